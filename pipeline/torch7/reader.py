"""Torch7 (.t7) files: what `torch.save` of Lua Torch wrote, as Python objects.

A file is one object. An object starts with its type. Tables, instances of classes and functions
carry an index; a repeated index refers to the earlier object, so objects can be shared or cyclic.
An instance names its class; tensors and storages have a layout of their own, and every other class
is a table of its fields. Numbers are little-endian; a "long" has 4 or 8 bytes, as the machine had
it.

Nothing in a file is executed, and every size is checked before it is used: see `read_torch7`.
"""

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The types of objects in torch7's File.lua. Functions were type 6, without an index, and then 7.
NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN, FUNCTION_6, FUNCTION_7, FUNCTION = range(9)
TYPE_NAMES = {TABLE: "table", TORCH: "class"}
TYPE_NAMES |= dict.fromkeys((FUNCTION_6, FUNCTION_7, FUNCTION), "function")

MAX_DEPTH = 150  # objects in objects; the released networks take about 35
MAX_DIMENSIONS = 64  # torch's own limit
# A tensor of stride 0 has more elements than its storage; whoever copies it allocates them all.
MAX_REPEATED = 1 << 26
SMALLEST_ENTRY = 12  # bytes of a table's key (a boolean) and value (nil)
EXACT_INTEGERS = 1 << 53  # of a double

# numpy's types by Torch7's names.
_DTYPES = {"Byte": "u1", "Char": "i1", "Short": "i2", "Int": "i4", "Long": "i8"}
_DTYPES |= {"Half": "f2", "Float": "f4", "Double": "f8"}
# On the GPU "torch.CudaTensor" is the one of floats; the layout is the same as on the CPU.
_DTYPES |= {f"Cuda{name}": dtype for name, dtype in _DTYPES.items()} | {"Cuda": "f4"}
_STORAGE = re.compile(rf"torch\.({'|'.join(_DTYPES)})(Tensor|Storage)")
_VERSION = re.compile(r"V -?[0-9]{1,9}(\.[0-9]{1,9})?")
_CLASS_NAME = re.compile(r"[A-Za-z_][\w.:-]{0,199}", re.ASCII)
_UNFINISHED = object()


class FormatError(Exception):
    """What is wrong with a file, after the offset in bytes of the wrong value."""


def _require(condition: bool, offset: int, reason: str) -> None:
    if not condition:
        raise FormatError(f"byte {offset}: {reason}")


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


def read_torch7(path: str | Path) -> Any:
    """The object in a Torch7 file.

    Tables with the keys 1 to n are lists, others dicts (an empty one too); whole numbers are int.
    Tensors are views of their storage and share it as they did in Lua; a storage by itself is a
    tensor of one dimension. All are on the CPU. Writing to them does not change the file; while one
    of them lives, the file must keep its content.

    Storages are mapped, or in memory once: no more than the file's size.

    Raises:
        OSError: the file cannot be opened.
        ValueError: not a Torch7 file, a damaged one, or one in ascii mode; a line with the path,
            the byte offset and the reason.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: not a file")
    failures = []
    with open(path, "rb") as file:
        if not path.stat().st_size:
            raise ValueError(f"{path}: byte 0: the file is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if data[0] in b"012345678":  # the types as text; as a binary number they start with 0 to 8
            raise ValueError(
                f"{path}: byte 0: Torch7's ascii mode is not supported; in Lua, load the file and "
                "save it again in binary: torch.save(path, object)"
            )
        for long in "qi":
            reader = _Reader(data, path, long)
            try:
                return reader.read()
            except FormatError as error:  # as text: its traceback keeps what was read so far
                failures.append((reader.offset, str(error)))
    _, reason = max(failures)  # with the wrong size of longs the first tensor does not fit
    raise ValueError(f"{path}: not a Torch7 file, or a damaged one: {reason}")


class _Reader:
    """Reads a mapped file; `offset` is that of the next byte, `long` the struct code of longs."""

    def __init__(self, data: mmap.mmap, path: Path, long: str):
        self.data, self.path, self.long, self.offset, self.depth = data, path, long, 0, 0
        self.objects: dict[
            int, tuple[int, Any]
        ] = {}  # type and value by index; a function 6's is 0
        self.storages: dict[int, str] = {}  # types of the tensors that are storages, by id

    def read(self) -> Any:
        """The file's one object."""
        value = self._object()
        left = len(self.data) - self.offset
        _require(left == 0, self.offset, f"{left} bytes too many")
        objects = [each for _, each in self.objects.values()]
        fields = {id(each.fields) for each in objects if isinstance(each, Torch7Object)}
        tables = [each for each in objects if isinstance(each, dict)]
        lists = {
            id(table): [table[i] for i in range(1, len(table) + 1)]
            for table in tables
            if table and id(table) not in fields
            if all(type(key) is int and 1 <= key <= len(table) for key in table)
        }
        # Only now are all lists known: a table may contain itself, or one around it.
        for items in lists.values():
            items[:] = [lists.get(id(item), item) for item in items]
        for table in tables:
            table.update((key, lists.get(id(item), item)) for key, item in table.items())
        return lists.get(id(value), value)

    def _skip(self, count: int) -> int:
        """Steps over `count` bytes and returns the offset of the first."""
        start, left = self.offset, len(self.data) - self.offset
        if not 0 <= count <= left:  # no call of _require: each number in a file comes here
            _require(False, start, f"expected {count} bytes, and {left} are left in the file")
        self.offset += count
        return start

    def _number(self, code: str = "i") -> Any:
        return struct.unpack_from(f"<{code}", self.data, self._skip(struct.calcsize(code)))[0]

    def _text(self) -> str:
        """A Lua string; bytes that are not UTF-8 become surrogates."""
        count = self._number()
        start = self._skip(count)
        return self.data[start : start + count].decode("utf-8", "surrogateescape")

    def _object(self) -> Any:
        start, type_ = self.offset, self._number()
        if type_ == NIL:
            return None
        if type_ == NUMBER:
            number = self._number("d")
            is_exact = number.is_integer() and abs(number) <= EXACT_INTEGERS
            return int(number) if is_exact else number
        if type_ == STRING:
            return self._text()
        if type_ == BOOLEAN:
            value = self._number()
            _require(value in (0, 1), start, f"a boolean is 0 or 1, got {value}")
            return value == 1
        _require(type_ in TYPE_NAMES, start, f"the type of an object is 0 to 8, got {type_}")
        _require(self.depth < MAX_DEPTH, start, f"nested deeper than {MAX_DEPTH} objects")
        index = 0 if type_ == FUNCTION_6 else self._number()
        is_index = index > 0 or type_ == FUNCTION_6
        _require(is_index, start, f"the index of an object is at least 1, got {index}")
        if index == 0 or index not in self.objects:
            self.objects[index] = type_, _UNFINISHED
            self.depth += 1
            read = {TABLE: self._table, TORCH: self._instance}.get(type_, self._function)
            value = read(index)
            self.depth -= 1
            return value
        known, value = self.objects[index]
        names = TYPE_NAMES[known], TYPE_NAMES[type_]
        _require(known == type_, start, f"object {index} is a {names[0]}, not a {names[1]}")
        is_finished = value is not _UNFINISHED
        _require(is_finished, start, f"object {index}, a tensor or storage, contains itself")
        return value

    def _keep(self, index: int, value: Any) -> None:
        self.objects[index] = self.objects[index][0], value

    def _table(self, index: int) -> dict:
        start, size = self.offset, self._number()
        left = len(self.data) - self.offset
        fits = 0 <= size <= left // SMALLEST_ENTRY + 1
        _require(fits, start, f"a table of {size} entries, with {left} bytes left")
        table: dict = {}
        self._keep(index, table)
        for _ in range(size):
            start = self.offset
            key, value = self._object(), self._object()
            is_key = isinstance(key, str | int | float) and key == key
            _require(is_key, start, f"a key must be text or a number, got {short(key)}")
            _require(key not in table, start, f"the key {short(key)} is twice in a table")
            if value is not None:
                table[key] = value
        return table

    def _function(self, index: int) -> LuaFunction:
        size = self._number()
        self._skip(size)
        function = LuaFunction(size)
        self._keep(index, function)  # before the variables: it may call itself
        self._object()  # the variables it refers to: objects that others may share
        return function

    def _instance(self, index: int) -> Torch7Object | Tensor:
        start, typename = self.offset, self._text()
        if _VERSION.fullmatch(typename):  # the first files have no version
            start, typename = self.offset, self._text()
        is_name = _CLASS_NAME.fullmatch(typename) is not None
        _require(is_name, start, f"expected the name of a class, got {short(typename)}")
        value: Torch7Object | Tensor
        if found := _STORAGE.fullmatch(typename):
            read = self._tensor if found[2] == "Tensor" else self._storage
            value = read(_DTYPES[found[1]])
        else:
            value = Torch7Object(typename, {})
            self._keep(index, value)  # before its fields, which may refer to it
            start, value.fields = self.offset, self._object()
            is_table = isinstance(value.fields, dict)
            _require(is_table, start, f"{typename} is not stored as a table of its fields")
        self._keep(index, value)
        return value

    def _storage(self, dtype: str) -> Tensor:
        """A length and as many numbers: (n,) of a numpy type.

        Torch's kernels may expect numbers at multiples of their size. Torch7 does not align them,
        so a storage that lies elsewhere is read into new memory, past the mapping.
        """
        start, count = self.offset, self._number(self.long)
        _require(count >= 0, start, f"a storage of {count} elements")
        stored = np.dtype("i4" if dtype == "i8" and self.long == "i" else dtype)
        start = self._skip(count * stored.itemsize)
        if count == 0:
            values = np.empty(0, dtype)
        elif start % stored.itemsize:
            values = np.fromfile(self.path, stored, count, offset=start)
        else:
            values = np.frombuffer(self.data, stored, count, start)
        tensor = torch.from_numpy(values.astype(dtype, copy=False))
        self.storages[id(tensor)] = dtype
        return tensor

    def _tensor(self, dtype: str) -> Tensor:
        start, dimensions = self.offset, self._number()
        is_possible = 0 <= dimensions <= MAX_DIMENSIONS
        _require(is_possible, start, f"a tensor of {dimensions} dimensions")
        sizes, strides = ([self._number(self.long) for _ in range(dimensions)] for _ in "ns")
        offset = self._number(self.long) - 1  # Lua counts from 1; all are in elements
        storage = self._object()
        if storage is None:
            storage = torch.from_numpy(np.empty(0, dtype))
        else:
            is_storage = self.storages.get(id(storage)) == dtype
            name = np.dtype(dtype).name
            _require(is_storage, start, f"the storage of a {name} tensor is not one of its type")
        if not sizes:
            return storage.new_empty(0)
        shape = f"sizes {cut(str(sizes))}, strides {cut(str(strides))}, offset {offset + 1}"
        repeated = math.prod(max(size, 1) for size in sizes)
        is_possible = min(sizes + strides) >= 0 and repeated <= max(len(storage), MAX_REPEATED)
        _require(is_possible, start, f"a tensor of {shape} is impossible")
        if 0 in sizes:
            return storage.new_empty(sizes)
        last = offset + sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        fits = offset >= 0 and last < len(storage)
        _require(fits, start, f"a tensor of {shape} is outside its storage of {len(storage)}")
        # Where the size is 1 the stride may be anything; torch multiplies it all the same.
        strides = [min(stride, len(storage)) for stride in strides]
        return storage.as_strided(sizes, strides, offset)


def walk(value: Any) -> Iterator[tuple[str, Any]]:
    """All that is in a value of `read_torch7`, with its path as in Lua; each object once."""
    seen, pending = set(), [("", value)]
    while pending:
        path, item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        yield path, item
        entries = item.fields if isinstance(item, Torch7Object) else item
        if isinstance(entries, list):
            entries = dict(enumerate(entries, 1))
        for key, below in reversed(entries.items()) if isinstance(entries, dict) else ():
            step = f".{key}" if isinstance(key, str) else f"[{key}]"
            pending.append(((path + step).lstrip("."), below))


def short(value: Any) -> str:
    """For messages: the value, cut, or its type."""
    is_plain = value is None or isinstance(value, str | int | float)
    return cut(repr(value)) if is_plain else type(value).__name__


def cut(text: str, limit: int = 60) -> str:
    """The text, or its start if it is long."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
