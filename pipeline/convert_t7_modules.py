"""The modules of a network of Lua Torch: their parts, and which of their parameters were used.

A converter walks the tree from the top `Module` and takes each parameter by its name, once; what it
has not taken at the end can be listed. Errors name a module as Lua does: trunk.modules[5].
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.trunk import TrunkConv2d
from pipeline.torch7_objects import Torch7Object, short

# Fields that a network computes with; other tensors are gradients and buffers of training.
PARAMETERS = ("weight", "bias", "a", "b", "running_mean", "running_var", "mean", "std")
MAX_DEPTH = 30  # modules in modules
# In inference these give their input, in another shape or on another device at most.
NO_OPERATION = ("Identity", "Dropout", "Copy", "View", "Reshape")
FIXED_NORMS = ("SpatialConstDiagonal", "ConstAffine")
NORMS = (*FIXED_NORMS, "SpatialBatchNormalization")
CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")
RECTIFIERS = ("ReLU", "Threshold")
EPSILON = 1e-5  # of torchvision's batch norm
CONTAINERS = ("Sequential", "NoBackprop")  # NoBackprop: what is around layers kept as they are


class Taken:
    """Which parameters of a file were used: those of shared modules count once."""

    def __init__(self, root: Any):
        self._fields: set[tuple[int, str]] = set()
        self._root = root

    def add(self, module: Torch7Object, name: str) -> bool:
        """Marks a parameter; False if it was used before."""
        key = (id(module), name)
        new = key not in self._fields
        self._fields.add(key)
        return new

    def count(self) -> int:
        """How many parameters were used."""
        return len(self._fields)

    def unused(self) -> list[str]:
        """The parameters that were not, by place and shape."""
        return [
            f"{place}.{name} {'x'.join(map(str, value.shape))}"
            for place, module, name, value in _module_tensors(self._root)
            if name in PARAMETERS and (id(module), name) not in self._fields
        ]

    def left_out(self) -> Counter:
        """How many of the other tensors (gradients, buffers) the file has, by their field."""
        tensors = _module_tensors(self._root)
        return Counter(name for _, _, name, _ in tensors if name not in PARAMETERS)


def _module_tensors(root: Any) -> Iterator[tuple[str, Torch7Object, str, Tensor]]:
    """Place, module, field and value of all tensors that are fields and not empty, each once."""
    seen, pending = set(), [("", root)]
    while pending:
        place, item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Torch7Object):
            for name, value in item.fields.items():
                if isinstance(value, Tensor) and value.numel():
                    yield place, item, str(name), value
            below = [(f"{place}.{name}", value) for name, value in item.fields.items()]
        elif isinstance(item, dict):
            below = [(f"{place}{_index(name)}", value) for name, value in item.items()]
        elif isinstance(item, list):
            below = [(f"{place}[{number}]", value) for number, value in enumerate(item, 1)]
        else:
            continue
        pending.extend((name.lstrip("."), value) for name, value in reversed(below))


def _index(key: str | float) -> str:
    return f".{key}" if isinstance(key, str) else f"[{key}]"


def kind(value: Any) -> str:
    """A module's class without its package (nn, cudnn, inn, ...); "" for what is no module."""
    return value.typename.rpartition(".")[2] if isinstance(value, Torch7Object) else ""


def submodules(value: Any) -> list:
    """The modules in a container; none in anything else."""
    modules = value.fields.get("modules") if isinstance(value, Torch7Object) else None
    return modules if isinstance(modules, list) else []


class Module:
    """A module at its place in a file."""

    def __init__(self, value: Any, place: str, taken: Taken):
        """
        Raises:
            ValueError: the value is no module.
        """
        if not isinstance(value, Torch7Object):
            raise ValueError(f"{place}: a module is due, and there is a {type(value).__name__}")
        if place.count("[") > MAX_DEPTH:
            raise ValueError(f"{place[:60]}...: modules nested deeper than {MAX_DEPTH}")
        self.value, self.place, self._taken = value, place, taken
        self.kind = kind(value)

    def field(self, name: str, default: Any = None) -> Any:
        """A plain value, such as a stride."""
        return self.value.fields.get(name, default)

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number that is not negative.

        Raises:
            ValueError: it is none, or missing without a default.
        """
        value = self.field(name, default)
        if type(value) is not int or value < 0:
            raise ValueError(f"{self.place}: {name} is {short(value)}, and a number is due")
        return value

    def child(self, name: str) -> "Module":
        """The module that a field holds."""
        return Module(self.field(name), f"{self.place}.{name}".lstrip("."), self._taken)

    def item(self, name: str, number: int) -> "Module":
        """The module at a number, from 1 or 0 on, in a field that is a table."""
        table = self.field(name)
        if isinstance(table, list):
            table = dict(enumerate(table, 1))
        value = table.get(number) if isinstance(table, dict) else None
        return Module(value, f"{self.place}.{name}[{number}]".lstrip("."), self._taken)

    @property
    def modules(self) -> list["Module"]:
        """The parts of a container."""
        return [
            Module(value, f"{self.place}.modules[{number}]".lstrip("."), self._taken)
            for number, value in enumerate(submodules(self.value), 1)
        ]

    def has(self, name: str) -> bool:
        """Whether there is a parameter of this name."""
        value = self.field(name)
        return isinstance(value, Tensor) and value.numel() > 0

    def take(self, name: str, *, dimensions: int | None = None) -> Tensor:
        """A parameter, as a view of the file.

        Args:
            dimensions: how many it has to have.

        Raises:
            ValueError: it is missing, of no float type, not finite, or was used before.
        """
        place, value = f"{self.place}.{name}".lstrip("."), self.field(name)
        if not isinstance(value, Tensor) or value.numel() == 0:
            raise ValueError(f"{place}: the parameter is missing from this {self.value.typename}")
        if not value.is_floating_point():
            raise ValueError(f"{place}: {value.dtype} is no type of a parameter")
        if dimensions not in (None, value.dim()):
            raise ValueError(f"{place}: {value.dim()} dimensions, and due are {dimensions}")
        if not torch.isfinite(value).all():
            raise ValueError(f"{place}: not all numbers are finite")
        if not self._taken.add(self.value, name):
            raise ValueError(f"{place}: the parameter is in the network twice")
        return value.float()


def steps(module: Module) -> list[Module]:
    """What a network of Sequentials does in inference, one after the other."""
    if module.kind in CONTAINERS:
        return [step for part in module.modules for step in steps(part)]
    if module.kind == "Dropout" and module.field("v2") is False:
        raise ValueError(f"{module.place}: a Dropout of the old kind, which scales in inference")
    if module.kind == "Threshold" and not _is_relu(module):
        raise ValueError(f"{module.place}: a Threshold that is no ReLU")
    return [] if module.kind in NO_OPERATION else [module]


def _is_relu(threshold: Module) -> bool:
    """A ReLU, but for the 1e-6 that the released score head gives instead of 0."""
    value = threshold.field("val", 0)
    return threshold.field("threshold") == 0 and type(value) in (int, float) and 0 <= value <= 1e-6


def expect(parts: list[Module], *kinds: str | tuple[str, ...], where: str) -> list[Module]:
    """The parts, which must be of these classes in this order.

    Raises:
        ValueError: they are not; the first that differs is named.
    """
    for part, wanted in zip(parts, kinds, strict=False):
        if part.kind not in ((wanted,) if isinstance(wanted, str) else wanted):
            raise ValueError(f"{part.place}: {_words(wanted)} is due, and there is a {part.kind}")
    if len(parts) != len(kinds):
        due = ", ".join(map(_words, kinds))
        raise ValueError(f"{where}: {len(parts)} modules, and due are {len(kinds)}: {due}")
    return parts


def _words(wanted: str | tuple[str, ...]) -> str:
    return wanted if isinstance(wanted, str) else " or ".join(wanted)


@dataclass
class Convolution:
    """A convolution, its padding, and the batch norm behind it.

    Attributes:
        padding: pixels on each side. mirrored: symmetric padding, of a module before the
            convolution, instead of zeros of its own.
    """

    module: Module
    padding: int
    mirrored: bool
    norm: Module | None = None

    def weight(self) -> Tensor:
        """(out, in, k, k); the MM kind has it as a matrix."""
        size = [self.module.number(name) for name in ("nInputPlane", "kH", "kW")]
        if self.module.kind != "SpatialConvolutionMM":
            return self.module.take("weight", dimensions=4)
        weight = self.module.take("weight", dimensions=2)
        if weight.shape[1] != math.prod(size):
            raise ValueError(
                f"{self.module.place}: {weight.shape[1]} inputs, not {math.prod(size)}"
            )
        return weight.view(-1, *size)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as y = scale * conv + shift, without the convolution's bias.

        A norm that was folded into the convolution has left its shift there as the bias.
        """
        if self.norm is None:
            shift = self.module.take("bias", dimensions=1)
            return torch.ones_like(shift), shift
        scale, shift = norm_constants(self.norm)
        if self.module.has("bias"):
            bias = self.module.take("bias", dimensions=1)
            if not len(bias) == len(scale) == len(shift):
                raise ValueError(
                    f"{self.module.place}: a bias of {len(bias)} and a norm of another"
                )
            shift = shift + scale * bias
        return scale, shift

    def check(self, own: nn.Conv2d, *, mirrored: bool) -> list[str]:
        """In what its arithmetic differs from that of our convolution."""
        m = self.module
        found = {
            "kernel": (m.field("kH"), m.field("kW")),
            "stride": (m.field("dH"), m.field("dW")),
            "groups": m.field("groups", 1),
            "padding": (self.padding, "mirrored" if self.mirrored and self.padding else "zeros"),
        }
        padding = own.border if isinstance(own, TrunkConv2d) else own.padding[0]
        wanted = {
            "kernel": own.kernel_size,
            "stride": own.stride,
            "groups": own.groups,
            "padding": (padding, "mirrored" if mirrored and padding else "zeros"),
        }
        return [
            f"{m.place}: {name} {_plain(found[name])} instead of {_plain(wanted[name])}"
            for name in wanted
            if found[name] != wanted[name]
        ]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def norm_constants(norm: Module) -> tuple[Tensor, Tensor]:
    """A batch norm in inference, y = a x + b, from either of its serialised forms or a live one.

    Frozen ones have been written as nn.SpatialConstDiagonal (1, C, 1, 1) and inn.ConstAffine (C,).
    """
    if norm.kind in FIXED_NORMS:
        return norm.take("a").flatten(), norm.take("b").flatten()
    weight, bias, mean, variance = live_norm(norm)
    scale = weight * (variance + EPSILON).rsqrt()
    return scale, bias - mean * scale


def live_norm(norm: Module) -> tuple[Tensor, ...]:
    """Weight, bias, running mean and variance of a batch norm, (C,) each.

    With torchvision's epsilon: what the file's own has more is in the variance.
    """
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (norm.take(name, dimensions=1) for name in names)
    if not len(weight) == len(bias) == len(mean) == len(variance):
        raise ValueError(f"{norm.place}: parameters of different lengths")
    epsilon = norm.field("eps", EPSILON)
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise ValueError(f"{norm.place}: eps is {short(epsilon)}")
    return weight, bias, mean, variance + (epsilon - EPSILON)


def convolutions(parts: list[Module], *, norms: bool) -> list[Convolution]:
    """The convolutions of a sequence in which nothing else computes but norms and ReLUs.

    Args:
        norms: whether each has a norm behind it, or a bias that one was folded into.

    Raises:
        ValueError: another module.
    """
    found, before = [], None
    for part in parts:
        if part.kind == "SpatialSymmetricPadding" and before is None:
            before = part
        elif part.kind in CONVOLUTIONS:
            found.append(_padded(part, before))
            before = None
        elif norms and part.kind in NORMS and found and found[-1].norm is None:
            found[-1].norm = part
        elif part.kind not in RECTIFIERS or before is not None:
            raise ValueError(f"{part.place}: a {part.kind} is not expected here")
    for convolution in found if norms else ():
        if convolution.norm is None and not convolution.module.has("bias"):
            raise ValueError(f"{convolution.module.place}: a batch norm is due behind it")
    return found


def _padded(convolution: Module, before: Module | None) -> Convolution:
    own = {convolution.number(name, 0) for name in ("padH", "padW")}
    mirror = {before.number(f"pad_{side}", 0) if before else 0 for side in "lrtb"}
    if len(own) > 1 or len(mirror) > 1 or (max(own) and max(mirror)):
        raise ValueError(f"{convolution.place}: padding that is not the same on all sides")
    return Convolution(convolution, max(own | mirror), mirrored=bool(max(mirror)))
