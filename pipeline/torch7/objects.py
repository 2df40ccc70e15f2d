"""What a Torch7 file can hold: instances of classes, functions, tensors on a storage, tables.

`pipeline/torch7/reader.py` reads them.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.torch7.encoding import FormatError

# The types of objects in torch7's File.lua. Functions were type 6, without a number, and then 7.
NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN, FUNCTION_6, FUNCTION_7, FUNCTION = range(9)
KIND_NAMES = {TABLE: "table", TORCH: "class", FUNCTION_7: "function", FUNCTION: "function"}

MAX_DIMENSIONS = 64  # torch's own limit
# A tensor of stride 0 has more elements than its storage; whoever copies it allocates them all.
MAX_REPEATED = 1 << 26

_ELEMENTS = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
}
# "torch.CudaTensor" is the one of floats; the layout is the same as on the CPU.
_ELEMENTS |= {f"Cuda{name}": dtype for name, dtype in _ELEMENTS.items()} | {"Cuda": torch.float32}
TENSORS = {f"torch.{name}Tensor": dtype for name, dtype in _ELEMENTS.items()}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _ELEMENTS.items()}


@dataclass(eq=False)
class Torch7Object:
    """An instance of a Lua class, such as "nn.Linear"; its fields by name."""

    typename: str
    fields: dict

    def __repr__(self) -> str:
        return f"<Torch7Object {self.typename} of {len(self.fields)} fields>"


@dataclass(frozen=True, eq=False)
class LuaFunction:
    """Stands for a function; its code is not kept."""

    num_bytes: int


def view_storage(
    storage: torch.Tensor, sizes: list[int], strides: list[int], offset: int, *, at: int
) -> torch.Tensor:
    """A tensor on a storage, if it lies inside.

    Args:
        storage: one dimension. sizes, strides, offset: in elements; no sizes for an empty tensor.
        at: the offset in the file, for errors.
    """
    if not sizes:
        return storage.new_empty(0)
    shape = f"a tensor of sizes {short(sizes)}, strides {short(strides)}, offset {offset + 1}"
    repeated = math.prod(max(size, 1) for size in sizes)
    if min(sizes + strides) < 0 or repeated > max(len(storage), MAX_REPEATED):
        raise FormatError(at, f"{shape} cannot be")
    if 0 in sizes:
        return storage.new_empty(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if offset < 0 or last >= len(storage):
        raise FormatError(at, f"{shape} is outside its storage of {len(storage)}")
    # Where the size is 1 the stride may be anything; torch multiplies it all the same.
    strides = [min(stride, len(storage)) for stride in strides]
    return storage.as_strided(sizes, strides, offset)


def tables_to_lists(value: Any, tables: list[dict], *, keep: set[int]) -> Any:
    """`value` with each of the tables that has the keys 1 to n as a list, wherever it is.

    Args:
        tables: all there are below `value`. keep: ids of those that stay dicts.
    """
    lists = {}
    for table in tables:
        if table and id(table) not in keep and _is_list(table):
            lists[id(table)] = [table[n] for n in range(1, len(table) + 1)]
    # Only now: a table that contains itself, or one around it, is known as a list at its end.
    for items in lists.values():
        items[:] = [lists.get(id(item), item) for item in items]
    for table in tables:
        if id(table) not in lists:
            for key, item in table.items():
                table[key] = lists.get(id(item), item)
    return lists.get(id(value), value)


def _is_list(table: dict) -> bool:
    return all(type(key) is int and 1 <= key <= len(table) for key in table)


def short(value: Any) -> str:
    """For an error message: the value, cut, or its type."""
    text = repr(value) if isinstance(value, str | int | float | list) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
