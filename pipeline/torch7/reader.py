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
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The types of objects in torch7's File.lua. Functions were type 6, without an index, and then 7.
NIL, NUMBER, STRING, TABLE, TORCH, BOOLEAN, FUNCTION_6, FUNCTION_7, FUNCTION = range(9)
TYPE_NAMES = {TABLE: "table", TORCH: "class", FUNCTION_7: "function", FUNCTION: "function"}

MAX_DEPTH = 150  # objects in objects; the released networks take about 35
MAX_DIMENSIONS = 64  # torch's own limit
# A tensor of stride 0 has more elements than its storage; whoever copies it allocates them all.
MAX_REPEATED = 1 << 26
SMALLEST_ENTRY = 12  # bytes of a table's key (a boolean) and value (nil)
EXACT_INTEGERS = 1 << 53  # of a double

_DTYPES = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "Float": torch.float32,
    "Double": torch.float64,
}
# On the GPU "torch.CudaTensor" is the one of floats; the layout is the same as on the CPU.
_DTYPES |= {f"Cuda{name}": dtype for name, dtype in _DTYPES.items()} | {"Cuda": torch.float32}
_TENSORS = {f"torch.{name}Tensor": dtype for name, dtype in _DTYPES.items()}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()}
_VERSION = re.compile(r"V -?[0-9]{1,9}(\.[0-9]{1,9})?")
_CLASS_NAME = re.compile(r"[A-Za-z_][\w.:-]{0,199}", re.ASCII)
_UNFINISHED = object()


class FormatError(Exception):
    """What is wrong with a file, and the offset in bytes of the wrong value."""

    def __init__(self, offset: int, reason: str):
        super().__init__(f"byte {offset}: {reason}")


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
        for long_bytes in (8, 4):
            reader = _Reader(_Input(data, file, long_bytes))
            try:
                return reader.read()
            except FormatError as error:  # as text: its traceback keeps what was read so far
                failures.append((reader.input.offset, str(error)))
    _, reason = max(failures)  # with the wrong size of longs the first tensor does not fit
    raise ValueError(f"{path}: not a Torch7 file, or a damaged one: {reason}")


class _Input:
    """A mapped file, read from its start; `offset` is that of the next byte.

    Torch's kernels may expect numbers at multiples of their size. Torch7 does not align them, so a
    storage that lies elsewhere is read into new memory, past the mapping: it is in memory once.
    """

    def __init__(self, data: mmap.mmap, file: BufferedReader, long_bytes: int):
        self.data, self.file, self.long_bytes, self.offset = data, file, long_bytes, 0

    @property
    def remaining(self) -> int:
        return len(self.data) - self.offset

    def skip(self, count: int) -> int:
        """Steps over `count` bytes and returns the offset of the first."""
        if not 0 <= count <= self.remaining:
            raise FormatError(
                self.offset, f"expected {count} bytes, and {self.remaining} are left in the file"
            )
        start, self.offset = self.offset, self.offset + count
        return start

    def read_int(self) -> int:
        return struct.unpack_from("<i", self.data, self.skip(4))[0]

    def read_long(self) -> int:
        code = "<q" if self.long_bytes == 8 else "<i"
        return struct.unpack_from(code, self.data, self.skip(self.long_bytes))[0]

    def read_double(self) -> float:
        return struct.unpack_from("<d", self.data, self.skip(8))[0]

    def read_text(self) -> str:
        """A Lua string; bytes that are not UTF-8 become surrogates."""
        count = self.read_int()
        start = self.skip(count)
        return self.data[start : start + count].decode("utf-8", "surrogateescape")

    def read_storage(self, dtype: torch.dtype) -> Tensor:
        """A length and as many numbers: (n,) of `dtype`."""
        if dtype == torch.int64 and self.long_bytes == 4:
            return self.read_storage(torch.int32).long()
        start, count = self.offset, self.read_long()
        if count < 0:
            raise FormatError(start, f"a storage of {count} elements")
        start = self.skip(count * dtype.itemsize)
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self.data, dtype=dtype, count=count, offset=start)
        memory = bytearray(count * dtype.itemsize)
        self.file.seek(start)
        if self.file.readinto(memory) != len(memory):
            raise FormatError(start, "the file has become shorter while it was read")
        return torch.frombuffer(memory, dtype=dtype)


class _Reader:
    """Reads the objects of one file."""

    def __init__(self, source: _Input):
        self.input = source
        self.objects: dict[int, tuple[int, Any]] = {}  # type and value by index
        self.tables: list[dict] = []
        self.field_tables: set[int] = set()  # ids of the tables that are an instance's fields
        self.storages: set[int] = set()  # ids of the tensors that are storages
        self.depth = 0

    def read(self) -> Any:
        """The file's one object."""
        value = self._object()
        if self.input.remaining:
            raise FormatError(self.input.offset, f"{self.input.remaining} bytes too many")
        return _tables_to_lists(value, self.tables, keep=self.field_tables)

    def _object(self) -> Any:
        offset, type_ = self.input.offset, self.input.read_int()
        if type_ == NIL:
            return None
        if type_ == NUMBER:
            number = self.input.read_double()
            is_exact = number.is_integer() and abs(number) <= EXACT_INTEGERS
            return int(number) if is_exact else number
        if type_ == STRING:
            return self.input.read_text()
        if type_ == BOOLEAN:
            return self._boolean()
        if self.depth == MAX_DEPTH:
            raise FormatError(offset, f"nested deeper than {MAX_DEPTH} objects")
        self.depth += 1
        value = self._function(None) if type_ == FUNCTION_6 else self._indexed(type_, offset)
        self.depth -= 1
        return value

    def _boolean(self) -> bool:
        offset, value = self.input.offset, self.input.read_int()
        if value not in (0, 1):
            raise FormatError(offset, f"a boolean is 0 or 1, got {value}")
        return value == 1

    def _indexed(self, type_: int, offset: int) -> Any:
        if type_ not in TYPE_NAMES:
            raise FormatError(offset, f"the type of an object is 0 to 8, got {type_}")
        index = self.input.read_int()
        if index in self.objects:
            return self._earlier(type_, index, offset)
        if index < 1:
            raise FormatError(offset, f"the index of an object is at least 1, got {index}")
        self.objects[index] = type_, _UNFINISHED
        if type_ == TABLE:
            return self._table(index)
        return self._instance(index) if type_ == TORCH else self._function(index)

    def _earlier(self, type_: int, index: int, offset: int) -> Any:
        known, value = self.objects[index]
        if known != type_:
            names = TYPE_NAMES[known], TYPE_NAMES[type_]
            raise FormatError(offset, f"object {index} is a {names[0]}, not a {names[1]}")
        if value is _UNFINISHED:
            raise FormatError(offset, f"object {index}, a tensor or storage, contains itself")
        return value

    def _table(self, index: int) -> dict:
        offset, size = self.input.offset, self.input.read_int()
        remaining = self.input.remaining
        if not 0 <= size <= remaining // SMALLEST_ENTRY + 1:
            raise FormatError(offset, f"a table of {size} entries, with {remaining} bytes left")
        table: dict = {}
        self.objects[index] = TABLE, table
        self.tables.append(table)
        for _ in range(size):
            offset = self.input.offset
            key, value = self._object(), self._object()
            if not isinstance(key, str | int | float) or key != key:
                raise FormatError(offset, f"a key must be text or a number, got {short(key)}")
            if key in table:
                raise FormatError(offset, f"the key {short(key)} is twice in a table")
            if value is not None:
                table[key] = value
        return table

    def _instance(self, index: int) -> Torch7Object | Tensor:
        typename = self._class_name()
        if typename in _STORAGES:
            value = self.input.read_storage(_STORAGES[typename])
            self.storages.add(id(value))
        elif typename in _TENSORS:
            value = self._tensor(_TENSORS[typename])
        else:
            return self._fields(index, typename)
        self.objects[index] = TORCH, value
        return value

    def _class_name(self) -> str:
        offset, name = self.input.offset, self.input.read_text()
        if _VERSION.fullmatch(name):  # the first files have no version
            offset, name = self.input.offset, self.input.read_text()
        if not _CLASS_NAME.fullmatch(name):
            raise FormatError(offset, f"expected the name of a class, got {short(name)}")
        return name

    def _fields(self, index: int, typename: str) -> Torch7Object:
        instance = Torch7Object(typename, {})
        self.objects[index] = TORCH, instance
        offset, fields = self.input.offset, self._object()
        if not isinstance(fields, dict):
            raise FormatError(offset, f"{typename} is not stored as a table of its fields")
        self.field_tables.add(id(fields))
        instance.fields = fields
        return instance

    def _tensor(self, dtype: torch.dtype) -> Tensor:
        start, dimensions = self.input.offset, self.input.read_int()
        if not 0 <= dimensions <= MAX_DIMENSIONS:
            raise FormatError(start, f"a tensor of {dimensions} dimensions")
        sizes = [self.input.read_long() for _ in range(dimensions)]
        strides = [self.input.read_long() for _ in range(dimensions)]
        offset = self.input.read_long() - 1  # Lua counts from 1
        storage = self._object()
        if storage is None:
            storage = torch.empty(0, dtype=dtype)
        elif id(storage) not in self.storages or storage.dtype != dtype:
            raise FormatError(start, f"the storage of a {dtype} tensor is not one of its type")
        try:
            return _view(storage, sizes, strides, offset)
        except ValueError as error:
            raise FormatError(start, str(error)) from None

    def _function(self, index: int | None) -> LuaFunction:
        size = self.input.read_int()
        self.input.skip(size)
        function = LuaFunction(size)
        if index is not None:  # before the variables: a function may call itself
            self.objects[index] = self.objects[index][0], function
        self._object()  # the variables it refers to: objects that others may share
        return function


def _view(storage: Tensor, sizes: list[int], strides: list[int], offset: int) -> Tensor:
    """A tensor on a storage; all in elements, no sizes for an empty tensor.

    Raises:
        ValueError: it does not lie inside.
    """
    if not sizes:
        return storage.new_empty(0)
    shape = f"a tensor of sizes {cut(str(sizes))}, strides {cut(str(strides))}, offset {offset + 1}"
    repeated = math.prod(max(size, 1) for size in sizes)
    if min(sizes + strides) < 0 or repeated > max(len(storage), MAX_REPEATED):
        raise ValueError(f"{shape} is impossible")
    if 0 in sizes:
        return storage.new_empty(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if offset < 0 or last >= len(storage):
        raise ValueError(f"{shape} is outside its storage of {len(storage)}")
    # Where the size is 1 the stride may be anything; torch multiplies it all the same.
    strides = [min(stride, len(storage)) for stride in strides]
    return storage.as_strided(sizes, strides, offset)


def _tables_to_lists(value: Any, tables: list[dict], *, keep: set[int]) -> Any:
    """`value` with every table of the keys 1 to n as a list.

    Args:
        tables: all of them below `value`. keep: ids of those that stay dicts.
    """
    lists = {}
    for table in tables:
        is_list = all(type(key) is int and 1 <= key <= len(table) for key in table)
        if table and is_list and id(table) not in keep:
            lists[id(table)] = [table[i] for i in range(1, len(table) + 1)]
    # Only now are all lists known: a table may contain itself, or one around it.
    for items in lists.values():
        items[:] = [lists.get(id(item), item) for item in items]
    for table in tables:
        if id(table) not in lists:
            for key, item in table.items():
                table[key] = lists.get(id(item), item)
    return lists.get(id(value), value)


def short(value: Any) -> str:
    """For messages: the value, cut, or its type."""
    is_plain = value is None or isinstance(value, str | int | float)
    return cut(repr(value)) if is_plain else type(value).__name__


def cut(text: str, limit: int = 60) -> str:
    """The text, or its start if it is long."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
