"""The modules of a network of Lua Torch: their parts, and which of their parameters were used.

A converter walks the tree from the top `Module` and takes each parameter by its name, once; what it
has not taken at the end can be listed. Errors name a module as Lua does: trunk.modules[5].
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.torch7.objects import Torch7Object, short

# Fields that a network computes with; other tensors are gradients and buffers of training.
PARAMETERS = ("weight", "bias", "a", "b", "running_mean", "running_var", "mean", "std")
MAX_DEPTH = 30  # modules in modules
# In inference these give their input, in another shape or on another device at most.
NO_OPERATION = ("Identity", "Dropout", "Copy", "View", "Reshape")
RECTIFIERS = ("ReLU", "Threshold")
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
        # The ends and not each number: that takes no memory, and neither hides a NaN.
        if not all(map(math.isfinite, map(float, torch.aminmax(value)))):
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
