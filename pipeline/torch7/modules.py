"""The modules of a Lua network, and how they become the layers of ours.

A converter lists a file's modules in their order, makes the network that they show, and pairs the
two: `convert_layers`. Each parameter is taken once, so that those left over can be listed. Errors
name a module as Lua does: trunk.modules[5].
"""

import math
import re
from typing import Any

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
CONTAINERS = ("Sequential", "NoBackprop")  # NoBackprop: around layers that are not trained
# Kinds of layers by their Lua classes; the kind of any other class is its name.
KINDS = {
    "SpatialSymmetricPadding": "padding",
    "SpatialConvolution": "conv",
    "SpatialConvolutionMM": "conv",
    "SpatialBatchNormalization": "norm",
    "SpatialConstDiagonal": "norm",
    "ConstAffine": "norm",
    "ReLU": "relu",
    "Threshold": "relu",
    "SpatialMaxPooling": "pool",
    "SpatialCrossMapLRN": "lrn",
    "SpatialCrossResponseNormalization": "lrn",
    "Linear": "linear",
}
# The kinds that our layers are made from, in the order of the layers.
SOURCES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("conv", "linear"),  # a Linear over a window
    nn.Linear: ("linear",),
    nn.MaxPool2d: ("pool",),
    nn.LocalResponseNorm: ("lrn",),
}
PADDINGS = ("zeros", "mirrored")  # by whether it is a mirror
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
        self.kind = KINDS.get(self.typename, self.typename)

    def plain(self, name: str, default: Any = None) -> Any:
        """A number, word or boolean; of another field, its type."""
        value = self.value.fields.get(name, default)
        is_plain = value is None or isinstance(value, bool | int | float | str)
        return value if is_plain else type(value).__name__

    def number(self, name: str, default: float | None = None, *, below: float = math.inf) -> Any:
        """A number from 0 to below a limit, without one a whole number; else a ValueError."""
        value, limit = self.plain(name, default), "" if below == math.inf else f" and < {below}"
        if type(value) not in (int, float if limit else int) or not 0 <= value < below:
            raise ValueError(
                f"{self.path}: {name} must be a number >= 0{limit}, got {short(value)}"
            )
        return value

    def child(self, name: str, index: int | None = None) -> "Module":
        """The module that a field holds, or that its table holds at an index, from 1 or 0."""
        value, path = self.value.fields.get(name), f"{self.path}.{name}".lstrip(".")
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
        value = self.value.fields.get(name)
        return isinstance(value, Tensor) and value.numel() > 0

    def parameter(self, name: str) -> Tensor:
        """A parameter, as a view of the file; a ValueError if it is missing or of no floats."""
        value = self.value.fields.get(name)
        if not isinstance(value, Tensor) or not value.numel():
            problem = f"the parameter is missing from this {self.value.typename}"
        elif not value.is_floating_point():
            problem = f"expected floats, got {value.dtype}"
        else:
            return value.float()
        raise ValueError(f"{self.path}.{name}: {problem}")

    def take(self, name: str) -> Tensor:
        """A parameter, of finite numbers, that was not taken before."""
        value = self.parameter(name)
        # The extremes, not each number: that takes no memory, and they do not hide a NaN.
        if not all(math.isfinite(float(extreme)) for extreme in torch.aminmax(value)):
            raise ValueError(f"{self.path}.{name}: not all numbers are finite")
        if (id(self.value), name) in self.used:
            raise ValueError(f"{self.path}.{name}: the parameter is in the network twice")
        self.used.add((id(self.value), name))
        return value

    @property
    def outputs(self) -> int:
        """How many outputs a layer has."""
        return len(self.parameter("weight"))

    @property
    def rounds_up(self) -> bool:
        """Whether a pool rounds sizes up, as all of imagine-nn do; old files have no such field."""
        is_caffes = self.value.typename.startswith("inn.") and self.kind == "pool"
        return is_caffes or bool(self.plain("ceil_mode"))


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
            module.plain("threshold") != 0 or module.number("val", 0, below=1) > 1e-6
        ):
            raise ValueError(f"{module.path}: a Threshold that is no ReLU")
        elif module.typename not in NO_OPERATION:
            found.append(module)
    return found


def expect(parts: list[Module], pattern: str, where: str) -> list[Module]:
    """The parts; a ValueError if their kinds are not in an order such as "padding? conv any*"."""
    regex = re.sub("[A-Za-z]+", r"(?:\g<0>,)", pattern).replace(" ", "").replace("any", "[^,]+")
    if not re.fullmatch(regex, "".join(f"{part.kind}," for part in parts)):
        names = ", ".join(part.typename for part in parts) or "nothing"
        raise ValueError(f"{where}: expected {pattern or 'no layers'}, got {names}")
    return parts


def convert_layers(parts: list[Module], network: nn.Module, **others: Tensor) -> State:
    """The state dict of our network from a file's layers, which are in the same order.

    A file's convolution may follow its padding, and precede its batch norm.

    Args:
        others: parameters that belong to no layer.

    Raises:
        ValueError: parameters or arithmetic differ; one line lists all that does.
    """
    state, problems = dict(others), []
    kinds = {kind for each in SOURCES.values() for kind in each}
    layers = [each for each in network.named_modules() if isinstance(each[1], tuple(SOURCES))]
    found = [i for i, part in enumerate(parts) if part.kind in kinds]
    for i, (name, layer) in zip(found, layers, strict=False):
        part = parts[i]
        allowed = next(kinds for ours, kinds in SOURCES.items() if isinstance(layer, ours))
        if part.kind not in allowed:
            raise ValueError(f"{part.path}: expected {allowed[0]}, got {part.typename}")
        if part.kind in ("conv", "linear"):
            state |= _parameters(part, parts[i + 1 : i + 2], layer, name)
        settings = _settings(part, parts[max(i - 1, 0) : i], layer)
        problems += [
            f"{part.path}: {setting} {_words(theirs)} instead of {_words(ours)}"
            for setting, (theirs, ours) in settings.items()
            if theirs != ours
        ]
    if len(found) != len(layers):
        problems.append(f"expected {len(layers)} layers, got {len(found)}")
    expected = {k: v for k, v in network.state_dict().items() if "num_batches" not in k}
    problems.insert(0, describe_mismatch(expected, state))
    if any(problems):
        raise ValueError("; ".join(filter(None, problems)))
    return state


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parameters(part: Module, after: list[Module], layer: Any, name: str) -> State:
    weight = part.take("weight")
    # A Linear's inputs, and those of a SpatialConvolutionMM, are a window's in one dimension.
    if isinstance(layer, nn.Conv2d) and weight.dim() == 2:
        area = math.prod(layer.kernel_size)
        if weight.shape[1] % area:
            raise ValueError(f"{part.path}: {weight.shape[1]} inputs, no multiple of {area}")
        weight = weight.reshape(len(weight), -1, *layer.kernel_size)
    state = {f"{name}.weight": weight}
    if layer.bias is not None:
        return state | {f"{name}.bias": part.take("bias")}
    norm = after[0] if after and after[0].kind == "norm" else None
    norm_state = _norm_state(part, norm)
    return state | {f"{norm_name(name)}.{key}": value for key, value in norm_state.items()}


def _norm_state(conv: Module, norm: Module | None) -> State:
    """The batch norm after a convolution, as torchvision's; the convolution's bias is in it.

    Frozen ones, y = a x + b, were written as nn.SpatialConstDiagonal (1, C, 1, 1) and
    inn.ConstAffine (C,). What a live one's epsilon has more than torchvision's is in the variance.
    """
    if norm is None:  # folded into the convolution, it has left its shift as the bias
        shift = conv.take("bias")
        return frozen_norm_state(torch.ones_like(shift), shift)
    if norm.typename == "SpatialBatchNormalization":
        names = ("weight", "bias", "running_mean", "running_var")
        state = {name: norm.take(name) for name in names}
        if (epsilon := norm.number("eps", EPSILON, below=1)) != EPSILON:
            state["running_var"] = state["running_var"] + (epsilon - EPSILON)
    else:
        state = frozen_norm_state(norm.take("a").flatten(), norm.take("b").flatten())
    if conv.has("bias"):
        bias, mean = conv.take("bias"), state["running_mean"]
        if bias.shape != mean.shape:
            raise ValueError(f"{norm.path}: {len(mean)} channels, and the bias has {len(bias)}")
        state["running_mean"] = mean - bias
    return state


def _settings(part: Module, before: list[Module], layer: Any) -> dict[str, tuple[Any, Any]]:
    """The settings of a file's layer and of ours."""
    kernel, stride = ((part.plain(f"{name}H"), part.plain(f"{name}W")) for name in "kd")
    if part.kind == "conv":
        mirrored = isinstance(layer, SymmetricConv2d) or layer.padding_mode == "replicate"
        padding = int(layer.padding[0])
        return {
            "kernel": (kernel, layer.kernel_size),
            "stride": (stride, layer.stride),
            "groups": (part.plain("groups", 1), layer.groups),
            "padding": (_padding(part, before), (padding, PADDINGS[mirrored and padding > 0])),
        }
    if part.kind == "pool":
        sides = layer.kernel_size, layer.stride, layer.padding
        sizes = (*kernel, *stride, part.plain("padH", 0), part.plain("padW", 0))
        return {
            "kernel, stride and padding": (sizes, tuple(side for side in sides for _ in "HW")),
            "ceil_mode": (part.rounds_up, layer.ceil_mode),
        }
    names = ("size", "alpha", "beta", "k") if part.kind == "lrn" else ()
    return {name: (part.plain(name), getattr(layer, name)) for name in names}


def _padding(conv: Module, before: list[Module]) -> tuple[int, str]:
    """Pixels on each side of a convolution's input, and of what they are."""
    mirror = before[0] if before and before[0].kind == "padding" else None
    zeros = {conv.number(name, 0) for name in ("padH", "padW")}
    pixels = {mirror.number(f"pad_{side}", 0) if mirror else 0 for side in "lrtb"}
    if len(zeros) > 1 or len(pixels) > 1 or (max(zeros) and max(pixels)):
        raise ValueError(f"{conv.path}: padding that is not the same on all sides")
    return max(zeros | pixels), PADDINGS[max(pixels) > 0]
