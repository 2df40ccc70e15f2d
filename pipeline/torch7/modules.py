"""The modules of a Lua network: their parts, their parameters and their convolutions.

A converter walks the tree from the top `Module` and takes each parameter by its name, once; those
left over at the end can be listed. Errors name a module as Lua does: trunk.modules[5].
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.backbone import describe_mismatch
from models.trunk import SymmetricConv2d, frozen_norm_state, norm_name
from pipeline.torch7.reader import Torch7Object, short, walk

# Fields that a network computes with; other tensors are gradients and buffers of training.
PARAMETERS = ("weight", "bias", "a", "b", "running_mean", "running_var", "mean", "std")
MAX_DEPTH = 30  # modules in modules
# In inference these give their input, in another shape or on another device at most.
NO_OPERATION = ("Identity", "Dropout", "Copy", "View", "Reshape")
RELUS = ("ReLU", "Threshold")
CONTAINERS = ("Sequential", "NoBackprop")  # NoBackprop: around layers that are not trained
CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")
FROZEN_NORMS = ("SpatialConstDiagonal", "ConstAffine")
NORMS = (*FROZEN_NORMS, "SpatialBatchNormalization")
# Letters for the order of layers: p(adding), c(onvolution), n(orm), r(ectifier).
LETTERS = {"SpatialSymmetricPadding": "p"}
LETTERS |= dict.fromkeys(CONVOLUTIONS, "c") | dict.fromkeys(NORMS, "n") | dict.fromkeys(RELUS, "r")
EPSILON = 1e-5  # of torchvision's batch norm

State = dict[str, Tensor]
Used = set[tuple[int, str]]  # parameters that were taken: id of the module's object, field


def typename(value: Any) -> str:
    """A module's class without its package (nn, cudnn, inn, ...); "" for anything else."""
    return value.typename.rpartition(".")[2] if isinstance(value, Torch7Object) else ""


def submodules(value: Any) -> list:
    """The modules in a container; none in anything else."""
    modules = value.fields.get("modules") if isinstance(value, Torch7Object) else None
    return modules if isinstance(modules, list) else []


def is_stage(value: Any) -> bool:
    """Whether this is a Sequential of residual blocks."""
    blocks = [submodules(block) for block in submodules(value)]
    return bool(blocks) and all(b and typename(b[0]) == "ConcatTable" for b in blocks)


def unpacked(value: Any) -> Any:
    """The network of {unpack, model}, whose function `unpack` would add gradients to it."""
    return value.get("model") if isinstance(value, dict) else value


class Module:
    """A module at its path in a file; a ValueError if the value there is none."""

    def __init__(self, value: Any, path: str, used: Used):
        if not isinstance(value, Torch7Object):
            raise ValueError(f"{path}: expected a module, got {short(value)}")
        if path.count("[") > MAX_DEPTH:
            raise ValueError(f"{path[:60]}...: modules nested deeper than {MAX_DEPTH}")
        self.value, self.path, self.used = value, path, used
        self.typename = typename(value)

    def field(self, name: str) -> Any:
        """Any field, None if it is not there."""
        return self.value.fields.get(name)

    def plain(self, name: str, default: Any = None) -> Any:
        """A number, word or boolean; of another field, its type."""
        value = self.value.fields.get(name, default)
        is_plain = value is None or isinstance(value, bool | int | float | str)
        return value if is_plain else type(value).__name__

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number that is not negative; anything else is a ValueError."""
        value = self.plain(name, default)
        if type(value) is not int or value < 0:
            raise ValueError(f"{self.path}: {name} must be a number >= 0, got {short(value)}")
        return value

    def fraction(self, name: str, default: float | None = None) -> float:
        """A number from 0 to below 1; anything else is a ValueError."""
        value = self.plain(name, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ValueError(f"{self.path}: {name} must be from 0 to below 1, got {short(value)}")
        return float(value)

    def child(self, name: str, index: int | None = None) -> "Module":
        """The module that a field holds, or that its table holds at an index, from 1 or 0."""
        value, path = self.field(name), f"{self.path}.{name}".lstrip(".")
        if index is not None:
            table = dict(enumerate(value, 1)) if isinstance(value, list) else value
            value = table.get(index) if isinstance(table, dict) else None
            path = f"{path}[{index}]"
        return Module(value, path, self.used)

    @property
    def modules(self) -> list["Module"]:
        """The parts of a container."""
        return [self.child("modules", i) for i in range(1, len(submodules(self.value)) + 1)]

    def has(self, name: str) -> bool:
        """Whether there is a parameter of this name."""
        value = self.field(name)
        return isinstance(value, Tensor) and value.numel() > 0

    def take(self, name: str, *, dimensions: int | None = None) -> Tensor:
        """A parameter, as a view of the file.

        Raises:
            ValueError: it is missing, no float tensor of so many dimensions, not finite, or was
                taken before.
        """
        path, value = f"{self.path}.{name}".lstrip("."), self.field(name)
        if not self.has(name):
            raise ValueError(f"{path}: the parameter is missing from this {self.value.typename}")
        if not value.is_floating_point():
            raise ValueError(f"{path}: expected floats, got {value.dtype}")
        if dimensions not in (None, value.dim()):
            raise ValueError(f"{path}: expected {dimensions} dimensions, got {value.dim()}")
        # The extremes, not each number: that takes no memory, and they do not hide a NaN.
        if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(value)):
            raise ValueError(f"{path}: not all numbers are finite")
        if (id(self.value), name) in self.used:
            raise ValueError(f"{path}: the parameter is in the network twice")
        self.used.add((id(self.value), name))
        return value.float()

    def differences(self, settings: dict[str, tuple[Any, Any]]) -> list[str]:
        """The settings, (found, expected) by name, that differ, in words."""
        return [
            f"{self.path}: {name} {_words(found)} instead of {_words(expected)}"
            for name, (found, expected) in settings.items()
            if found != expected
        ]


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def unused_parameters(root: Any, used: Used) -> list[str]:
    """The parameters below `root` that were not taken, by path and shape."""
    return [
        f"{path}.{name} {'x'.join(map(str, value.shape))}".lstrip(".")
        for path, item in walk(root)
        for name in PARAMETERS
        if isinstance(item, Torch7Object) and (id(item), name) not in used
        if isinstance(value := item.fields.get(name), Tensor) and value.numel()
    ]


def steps(*modules: Module) -> list[Module]:
    """What modules do in inference, in order; a ResNet's stages stay whole."""
    found = []
    for module in modules:
        if module.typename == "DataParallelTable":  # the same network on each device
            found += steps(module.child("modules", 1))
        elif module.typename in CONTAINERS and not is_stage(module.value):
            found += steps(*module.modules)
        elif module.typename == "Dropout" and module.plain("v2") is False:
            raise ValueError(f"{module.path}: a Dropout of the old kind, which scales in inference")
        elif module.typename == "Threshold" and (
            # A ReLU, but for the 1e-6 that the released score head gives instead of 0.
            module.plain("threshold") != 0 or module.fraction("val", 0) > 1e-6
        ):
            raise ValueError(f"{module.path}: a Threshold that is no ReLU")
        elif module.typename not in NO_OPERATION:
            found.append(module)
    return found


def expect(parts: list[Module], *names: str | tuple[str, ...], where: str) -> list[Module]:
    """The parts, which must be of these classes in this order.

    Raises:
        ValueError: they are not; the first that differs is named.
    """
    choices = [(name,) if isinstance(name, str) else name for name in names]
    for part, choice in zip(parts, choices, strict=False):
        if part.typename not in choice:
            raise ValueError(f"{part.path}: expected {' or '.join(choice)}, got {part.typename}")
    if len(parts) != len(names):
        words = ", ".join(map(" or ".join, choices))
        raise ValueError(f"{where}: expected {len(names)} modules ({words}), got {len(parts)}")
    return parts


class Convolution(NamedTuple):
    """A convolution, its padding (pixels on each side, and of what) and the norm after it."""

    module: Module
    padding: tuple[int, str]
    norm: Module | None


def convolutions(parts: list[Module], pattern: str, *, where: str) -> list[Convolution]:
    """The convolutions of a sequence; `pattern` is the order of its layers by their `LETTERS`.

    Raises:
        ValueError: another order.
    """
    order = "".join(LETTERS.get(part.typename, "?") for part in parts)
    if not re.fullmatch(pattern, order):
        names = ", ".join(part.typename for part in parts)
        raise ValueError(f"{where}: a convolution, norm or ReLU is not where it should be: {names}")
    found = []
    for i, part in enumerate(parts):
        if order[i] == "c":
            mirror = parts[i - 1] if order[:i].endswith("p") else None
            norm = parts[i + 1] if order[i + 1 :].startswith("n") else None
            found.append(Convolution(part, _file_padding(part, mirror), norm))
    return found


def _file_padding(conv: Module, mirror: Module | None) -> tuple[int, str]:
    zeros = {conv.integer(name, 0) for name in ("padH", "padW")}
    pixels = {mirror.integer(f"pad_{side}", 0) if mirror else 0 for side in "lrtb"}
    if len(zeros) > 1 or len(pixels) > 1 or (max(zeros) and max(pixels)):
        raise ValueError(f"{conv.path}: padding that is not the same on all sides")
    return max(zeros | pixels), "mirrored" if max(pixels) else "zeros"


def _padding(conv: nn.Conv2d) -> tuple[int, str]:
    mirrored = isinstance(conv, SymmetricConv2d) or conv.padding_mode == "replicate"
    return int(conv.padding[0]), "mirrored" if mirrored and conv.padding[0] else "zeros"


def _norm_state(conv: Module, norm: Module | None) -> State:
    """The batch norm after a convolution, as torchvision's; the convolution's bias is in it.

    Frozen ones, y = a x + b, were written as nn.SpatialConstDiagonal (1, C, 1, 1) and
    inn.ConstAffine (C,). What a live one's epsilon has more than torchvision's is in the variance.
    """
    if norm is None:  # folded into the convolution, it has left its shift as the bias
        shift = conv.take("bias", dimensions=1)
        return frozen_norm_state(torch.ones_like(shift), shift)
    if norm.typename in FROZEN_NORMS:
        state = frozen_norm_state(norm.take("a").flatten(), norm.take("b").flatten())
    else:
        names = ("weight", "bias", "running_mean", "running_var")
        state = {name: norm.take(name, dimensions=1) for name in names}
        if (epsilon := norm.fraction("eps", EPSILON)) != EPSILON:
            state["running_var"] = state["running_var"] + (epsilon - EPSILON)
    bias = conv.take("bias", dimensions=1) if conv.has("bias") else state["bias"]
    if len({values.shape for values in [bias, *state.values()]}) > 1:
        raise ValueError(f"{norm.path}: parameters, or the convolution's bias, of other lengths")
    if conv.has("bias"):
        state["running_mean"] = state["running_mean"] - bias
    return state


@dataclass
class Weights:
    """What a converter has read, by our names.

    Attributes:
        state: the parameters. convs: convolutions, whose arithmetic must be ours.
        problems: other differences that were found.
    """

    state: State = field(default_factory=dict)
    convs: dict[str, Convolution] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add_conv(self, name: str, conv: Convolution, *, norm: bool = False) -> None:
        """Takes a convolution's weight and bias; with `norm`, the bias as part of its norm."""
        module, self.convs[name] = conv.module, conv
        if module.typename == "SpatialConvolutionMM":  # (out, in, k, k) as a matrix
            size = [module.integer(key) for key in ("nInputPlane", "kH", "kW")]
            weight = module.take("weight", dimensions=2)
            if weight.shape[1] != math.prod(size):
                raise ValueError(
                    f"{module.path}: expected {math.prod(size)} inputs, got {weight.shape[1]}"
                )
            weight = weight.reshape(-1, *size)
        else:
            weight = module.take("weight", dimensions=4)
        self.state[f"{name}.weight"] = weight
        if norm:
            norm_state = _norm_state(module, conv.norm)
            self.state |= {f"{norm_name(name)}.{key}": value for key, value in norm_state.items()}
        else:
            self.state[f"{name}.bias"] = module.take("bias", dimensions=1)

    def add_linear(self, name: str, linear: Module, *, window: int | None = None) -> None:
        """Takes a linear layer; with `window`, as a convolution that sees so many cells a side."""
        weight = linear.take("weight", dimensions=2)
        if window is not None:
            inputs = weight.shape[1]
            if window < 1 or inputs % window**2:
                raise ValueError(f"{linear.path}: {inputs} inputs are no {window} x {window} cells")
            weight = weight.reshape(len(weight), -1, window, window)
        self.state[f"{name}.weight"] = weight
        self.state[f"{name}.bias"] = linear.take("bias", dimensions=1)

    def outputs(self, name: str) -> int:
        """How many outputs a layer has; a ValueError if the file has no such layer."""
        if f"{name}.weight" not in self.state:
            raise ValueError(f"{name}: there is no such layer in the file")
        return len(self.state[f"{name}.weight"])

    def check(self, network: nn.Module, *, expected: State | None = None) -> None:
        """Compares everything with our network; `expected` is its state dict, or a part of it.

        Raises:
            ValueError: parameters or arithmetic differ; one line lists all that does.
        """
        expected = network.state_dict() if expected is None else expected
        problems = [describe_mismatch(expected, self.state), *self.problems]
        layers = dict(network.named_modules())
        for name, (module, padding, _) in self.convs.items():
            if isinstance(ours := layers.get(name), nn.Conv2d):
                problems += module.differences(
                    {
                        "kernel": ((module.plain("kH"), module.plain("kW")), ours.kernel_size),
                        "stride": ((module.plain("dH"), module.plain("dW")), ours.stride),
                        "groups": (module.plain("groups", 1), ours.groups),
                        "padding": (padding, _padding(ours)),
                    }
                )
        if any(problems):
            raise ValueError("; ".join(filter(None, problems)))
