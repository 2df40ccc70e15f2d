"""The modules of a Lua network: their parts, their parameters and their convolutions.

A converter walks the tree from the top `Module` and takes each parameter by its name, once; those
left over at the end can be listed. Errors name a module as Lua does: trunk.modules[5].
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import describe_mismatch
from models.trunk import SymmetricConv2d, frozen_norm_state, norm_name
from pipeline.torch7.reader import Torch7Object, short

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
    """A module at its path in a file."""

    def __init__(self, value: Any, path: str, used: Used):
        """
        Raises:
            ValueError: the value is no module.
        """
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
        """A whole number that is not negative.

        Raises:
            ValueError: it is none, or missing without a default.
        """
        value = self.plain(name, default)
        if type(value) is not int or value < 0:
            raise ValueError(f"{self.path}: {name} must be a number >= 0, got {short(value)}")
        return value

    def child(self, name: str) -> "Module":
        """The module that a field holds."""
        return Module(self.field(name), self._below(name), self.used)

    def entry(self, name: str, index: int) -> "Module":
        """The module at an index, from 1 or 0, in a field that is a table."""
        table = self.field(name)
        if isinstance(table, list):
            table = dict(enumerate(table, 1))
        value = table.get(index) if isinstance(table, dict) else None
        return Module(value, self._below(f"{name}[{index}]"), self.used)

    @property
    def modules(self) -> list["Module"]:
        """The parts of a container."""
        return [self.entry("modules", i) for i in range(1, len(submodules(self.value)) + 1)]

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
        path, value = self._below(name), self.field(name)
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

    def differences(self, found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
        """The settings of this module, of plain values, that are not as expected, in words."""
        return [
            f"{self.path}: {name} {_words(found[name])} instead of {_words(value)}"
            for name, value in expected.items()
            if found[name] != value
        ]

    def _below(self, name: str) -> str:
        return f"{self.path}.{name}".lstrip(".")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def unused_parameters(root: Any, used: Used) -> list[str]:
    """The parameters below `root` that were not taken, by path and shape."""
    unused, seen, pending = [], set(), [("", root)]
    while pending:
        path, item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Torch7Object):
            for name in PARAMETERS:
                value = item.fields.get(name)
                if isinstance(value, Tensor) and value.numel() and (id(item), name) not in used:
                    unused.append(
                        f"{path}.{name}".lstrip(".") + f" {'x'.join(map(str, value.shape))}"
                    )
            item = item.fields
        if isinstance(item, list):
            item = dict(enumerate(item, 1))
        if isinstance(item, dict):
            for key, value in reversed(item.items()):
                pending.append((path + (f".{key}" if isinstance(key, str) else f"[{key}]"), value))
    return unused


def steps(module: Module) -> list[Module]:
    """What a network does in inference, in order; a ResNet's stages stay whole."""
    if module.typename == "DataParallelTable":  # the same network on each device
        return steps(module.entry("modules", 1))
    if module.typename in CONTAINERS and not is_stage(module.value):
        return [step for part in module.modules for step in steps(part)]
    if module.typename == "Dropout" and module.plain("v2") is False:
        raise ValueError(f"{module.path}: a Dropout of the old kind, which scales in inference")
    if module.typename == "Threshold":
        # A ReLU, but for the 1e-6 that the released score head gives instead of 0.
        value = module.plain("val", 0)
        is_small = type(value) in (int, float) and 0 <= value <= 1e-6
        if module.plain("threshold") != 0 or not is_small:
            raise ValueError(f"{module.path}: a Threshold that is no ReLU")
    return [] if module.typename in NO_OPERATION else [module]


def expect(parts: list[Module], *names: str | tuple[str, ...], where: str) -> list[Module]:
    """The parts, which must be of these classes in this order.

    Raises:
        ValueError: they are not; the first that differs is named.
    """
    words = [name if isinstance(name, str) else " or ".join(name) for name in names]
    for part, name, word in zip(parts, names, words, strict=False):
        if part.typename not in ((name,) if isinstance(name, str) else name):
            raise ValueError(f"{part.path}: expected {word}, got {part.typename}")
    if len(parts) != len(names):
        raise ValueError(
            f"{where}: expected {len(names)} modules ({', '.join(words)}), got {len(parts)}"
        )
    return parts


@dataclass
class Convolution:
    """A convolution, its padding, and the batch norm after it.

    Attributes:
        padding: pixels on each side.
        mirrored: they are a mirror of the input, made by a module before the convolution; otherwise
            zeros.
    """

    module: Module
    padding: int
    mirrored: bool
    norm: Module | None = None

    def weight(self) -> Tensor:
        """(out, in, k, k); SpatialConvolutionMM has it as a matrix."""
        if self.module.typename != "SpatialConvolutionMM":
            return self.module.take("weight", dimensions=4)
        size = [self.module.integer(name) for name in ("nInputPlane", "kH", "kW")]
        weight = self.module.take("weight", dimensions=2)
        if weight.shape[1] != math.prod(size):
            raise ValueError(
                f"{self.module.path}: expected {math.prod(size)} inputs, got {weight.shape[1]}"
            )
        return weight.reshape(-1, *size)

    def norm_state(self) -> State:
        """The state dict of the batch norm after it, the convolution's bias in it."""
        if self.norm is None:  # folded into the convolution, it has left its shift as the bias
            shift = self.module.take("bias", dimensions=1)
            return frozen_norm_state(torch.ones_like(shift), shift)
        state = _norm_state(self.norm)
        if self.module.has("bias"):
            bias = self.module.take("bias", dimensions=1)
            if bias.shape != state["running_mean"].shape:
                raise ValueError(f"{self.module.path}: a bias of another length than its norm")
            state["running_mean"] = state["running_mean"] - bias
        return state

    def differences_from(self, ours: nn.Conv2d) -> list[str]:
        """Differences between its arithmetic and that of our convolution, in words."""
        m = self.module
        found = {
            "kernel": (m.plain("kH"), m.plain("kW")),
            "stride": (m.plain("dH"), m.plain("dW")),
            "groups": m.plain("groups", 1),
            "padding": (self.padding, "mirrored" if self.mirrored else "zeros"),
        }
        expected = {
            "kernel": ours.kernel_size,
            "stride": ours.stride,
            "groups": ours.groups,
            "padding": _padding(ours),
        }
        return m.differences(found, expected)


def _padding(conv: nn.Conv2d) -> tuple[int, str]:
    mirrored = isinstance(conv, SymmetricConv2d) or conv.padding_mode == "replicate"
    return int(conv.padding[0]), "mirrored" if mirrored and conv.padding[0] else "zeros"


def _norm_state(norm: Module) -> State:
    """A batch norm as a state dict of torchvision's, from one of its frozen forms or a live one.

    Frozen ones, y = a x + b, were written as nn.SpatialConstDiagonal (1, C, 1, 1) and
    inn.ConstAffine (C,). What a live one's epsilon has more than torchvision's is in the variance.
    """
    if norm.typename in FROZEN_NORMS:
        state = frozen_norm_state(norm.take("a").flatten(), norm.take("b").flatten())
    else:
        names = ("weight", "bias", "running_mean", "running_var")
        state = {name: norm.take(name, dimensions=1) for name in names}
        epsilon = norm.plain("eps", EPSILON)
        if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
            raise ValueError(f"{norm.path}: eps must be from 0 to below 1, got {short(epsilon)}")
        if epsilon != EPSILON:
            state["running_var"] = state["running_var"] + (epsilon - EPSILON)
    if len({value.shape for value in state.values()}) > 1:
        raise ValueError(f"{norm.path}: parameters of different lengths")
    return state


def convolutions(parts: list[Module], *, norms: bool) -> list[Convolution]:
    """The convolutions of a sequence in which nothing else computes but norms and ReLUs.

    Args:
        norms: whether each has a norm after it, or a bias that one was folded into.

    Raises:
        ValueError: another module.
    """
    found: list[Convolution] = []
    padding = None
    for part in parts:
        if part.typename == "SpatialSymmetricPadding" and padding is None:
            padding = part
        elif part.typename in CONVOLUTIONS:
            found.append(_padded(part, padding))
            padding = None
        elif norms and part.typename in NORMS and found and found[-1].norm is None:
            found[-1].norm = part
        elif part.typename not in RELUS or padding is not None:
            raise ValueError(f"{part.path}: unexpected {part.typename}")
    for conv in found if norms else ():
        if conv.norm is None and not conv.module.has("bias"):
            raise ValueError(f"{conv.module.path}: expected a batch norm after it")
    return found


def _padded(conv: Module, padding: Module | None) -> Convolution:
    zeros = {conv.integer(name, 0) for name in ("padH", "padW")}
    mirror = {padding.integer(f"pad_{side}", 0) if padding else 0 for side in "lrtb"}
    if len(zeros) > 1 or len(mirror) > 1 or (max(zeros) and max(mirror)):
        raise ValueError(f"{conv.path}: padding that is not the same on all sides")
    return Convolution(conv, max(zeros | mirror), mirrored=max(mirror) > 0)


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
        self.convs[name] = conv
        self.state[f"{name}.weight"] = conv.weight()
        if norm:
            norm_state = conv.norm_state()
            self.state |= {f"{norm_name(name)}.{key}": value for key, value in norm_state.items()}
        else:
            self.state[f"{name}.bias"] = conv.module.take("bias", dimensions=1)

    def add_linear(self, name: str, linear: Module, *, window: int | None = None) -> None:
        """Takes a linear layer; with `window`, as the convolution that sees so many cells a side.

        Raises:
            ValueError: it does not see so many cells.
        """
        weight = linear.take("weight", dimensions=2)
        if window is not None:
            inputs = weight.shape[1]
            if window < 1 or inputs % window**2:
                raise ValueError(f"{linear.path}: {inputs} inputs are no {window} x {window} cells")
            weight = weight.reshape(len(weight), -1, window, window)
        self.state[f"{name}.weight"] = weight
        self.state[f"{name}.bias"] = linear.take("bias", dimensions=1)

    def outputs(self, name: str) -> int:
        """How many outputs a layer has.

        Raises:
            ValueError: there is no such layer.
        """
        if f"{name}.weight" not in self.state:
            raise ValueError(f"{name}: there is no such layer in the file")
        return len(self.state[f"{name}.weight"])

    def check(self, network: nn.Module, *, expected: State | None = None) -> None:
        """Compares everything with our network.

        Args:
            expected: the network's state dict, where not all of it is wanted.

        Raises:
            ValueError: parameters or arithmetic differ; one line lists all that does.
        """
        expected = network.state_dict() if expected is None else expected
        problems = [describe_mismatch(expected, self.state), *self.problems]
        layers = dict(network.named_modules())
        for name, conv in self.convs.items():
            if isinstance(ours := layers.get(name), nn.Conv2d):
                problems += conv.differences_from(ours)
        if any(problems):
            raise ValueError("; ".join(filter(None, problems)))
