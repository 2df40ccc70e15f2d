"""Torch7 (.t7) files: what `torch.save` of the Lua Torch wrote, as Python objects.

A file is one object. An object starts with its type; tables, instances of classes and functions
go on with a number that is new, or that of an earlier object, which is meant then. So objects are
shared and contain themselves. A class follows with its version and name; tensors and storages
have a layout of their own, and other classes are a table of their fields.

Nothing of the file is run, and every size is checked before it is used: see `read_torch7`.
"""

import mmap
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pipeline.torch7.encoding import AsciiInput, BinaryInput, FormatError
from pipeline.torch7.objects import (
    BOOLEAN,
    FUNCTION_6,
    KIND_NAMES,
    MAX_DIMENSIONS,
    NIL,
    NUMBER,
    STORAGES,
    STRING,
    TABLE,
    TENSORS,
    TORCH,
    LuaFunction,
    Torch7Object,
    short,
    tables_to_lists,
    view_storage,
)

MAX_DEPTH = 1000  # objects in objects; the networks of the release take about 35
EXACT_INTEGERS = 1 << 53  # of a double

_VERSION = re.compile(r"V -?[0-9]{1,9}(\.[0-9]{1,9})?")
_CLASS_NAME = re.compile(r"[A-Za-z_][\w.:-]{0,199}", re.ASCII)
_UNFINISHED = object()

# Yields to have the next object of the file read, which is sent to it; returns its own object.
Steps = Generator[None, Any, Any]


def read_torch7(path: str | Path, *, long_bytes: int | None = None) -> Any:
    """The object in a Torch7 file.

    Tables with the keys 1 to n are lists, others dicts (an empty one too); whole numbers are int.
    Tensors are views of their storage, which those of the file share as they did in Lua; storages
    by themselves are tensors of one dimension. All are on the CPU. They may be written to, which
    does not change the file; while one of them lives, the file has to keep its content.

    Storages are mapped, or in memory once: no more than the file's size (ascii: 4 times it).

    Args:
        long_bytes: 4 or 8 in a binary file; None to find out. 32-bit machines and Windows have 4.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a Torch7 file, or a damaged one: path, byte offset and what is there.
    """
    assert long_bytes in (None, 4, 8), long_bytes
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: not a file")
    failures = []
    with open(path, "rb") as file:
        if not path.stat().st_size:
            raise ValueError(f"{path}: byte 0: the file is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for source in _inputs(data, file, long_bytes):
            reader = _Reader(source)
            try:
                return reader.read()
            except FormatError as error:  # as text: its traceback keeps what was read so far
                failures.append((reader.num_elements, source.at, str(error)))
    # With the wrong size of longs the first storage is not found.
    *_, reason = max(failures, key=lambda failure: failure[:2])
    raise ValueError(f"{path}: not a Torch7 file, or a damaged one: {reason}")


def _inputs(
    data: mmap.mmap, file: BinaryIO, long_bytes: int | None
) -> Iterator[AsciiInput | BinaryInput]:
    """The ways to read the file: wrong longs make a tensor that is out of bounds."""
    if data[0] in b"012345678":  # the types as text; as a binary number they start with 0 to 8
        yield AsciiInput(data)
    else:
        for size in (8, 4) if long_bytes is None else (long_bytes,):
            yield BinaryInput(data, file, long_bytes=size)


class _Reader:
    """Reads the objects of one file."""

    def __init__(self, source: AsciiInput | BinaryInput):
        self.source = source
        self.objects: dict[int, tuple[int, Any]] = {}  # type and value by number
        self.tables: list[dict] = []
        self.field_tables: set[int] = set()  # ids of those that are an instance's fields
        self.storages: set[int] = set()  # ids of the tensors that are storages
        self.num_elements = 0  # of all storages

    def read(self) -> Any:
        """The file's one object."""
        value = self._run()
        self.source.expect_end()
        return tables_to_lists(value, self.tables, keep=self.field_tables)

    def _run(self) -> Any:
        # The objects being read are on a list, not on Python's stack: a file may nest them deeper.
        pending, value = [self._object()], None
        while pending:
            try:
                pending[-1].send(value)
            except StopIteration as done:
                pending.pop()
                value = done.value
            else:
                if len(pending) == MAX_DEPTH:
                    raise FormatError(self.source.at, f"nested deeper than {MAX_DEPTH} objects")
                pending.append(self._object())
                value = None
        return value

    def _object(self) -> Steps:
        at, kind = self.source.at, self.source.read_int()
        if kind == NIL:
            return None
        if kind == NUMBER:
            return _number(self.source.read_double())
        if kind == STRING:
            return self.source.read_text(self.source.read_int())
        if kind == BOOLEAN:
            return self._boolean()
        if kind == FUNCTION_6:
            return (yield from self._function(None))
        if kind not in KIND_NAMES:
            raise FormatError(at, f"{kind} is no type of object (0 to 8)")
        index = self.source.read_int()
        if index in self.objects:
            return self._earlier(kind, index, at)
        if index < 1:
            raise FormatError(at, f"{index} is no number of an object")
        self.objects[index] = kind, _UNFINISHED
        if kind == TABLE:
            return (yield from self._table(index))
        if kind == TORCH:
            return (yield from self._instance(index))
        return (yield from self._function(index))

    def _boolean(self) -> bool:
        at, value = self.source.at, self.source.read_int()
        if value not in (0, 1):
            raise FormatError(at, f"{value} is no boolean")
        return value == 1

    def _earlier(self, kind: int, index: int, at: int) -> Any:
        known, value = self.objects[index]
        if known != kind:
            names = KIND_NAMES[known], KIND_NAMES[kind]
            raise FormatError(at, f"object {index} is a {names[0]}, and meant as a {names[1]}")
        if value is _UNFINISHED:
            raise FormatError(at, f"object {index}, a tensor or storage, contains itself")
        return value

    def _table(self, index: int) -> Steps:
        at, size = self.source.at, self.source.read_int()
        left = len(self.source.data) - self.source.at
        if not 0 <= size <= left // self.source.smallest_entry + 1:
            raise FormatError(at, f"a table of {size} entries, with {left} bytes left in the file")
        table = {}
        self.objects[index] = TABLE, table
        self.tables.append(table)
        for _ in range(size):
            at = self.source.at
            key = yield
            value = yield
            if not isinstance(key, str | int | float) or key != key:
                raise FormatError(at, f"a key has to be text or a number, not {short(key)}")
            if key in table:
                raise FormatError(at, f"the key {short(key)} is twice in a table")
            if value is not None:
                table[key] = value
        return table

    def _instance(self, index: int) -> Steps:
        typename = self._class_name()
        if typename in STORAGES:
            at, count = self.source.at, self.source.read_long()
            if count < 0:
                raise FormatError(at, f"a storage of {count} elements")
            value = self.source.read_numbers(count, STORAGES[typename])
            self.storages.add(id(value))
            self.num_elements += count
        elif typename in TENSORS:
            value = yield from self._tensor(TENSORS[typename])
        else:
            return (yield from self._fields(index, typename))
        self.objects[index] = TORCH, value
        return value

    def _class_name(self) -> str:
        at = self.source.at
        name = self.source.read_text(self.source.read_int())
        if _VERSION.fullmatch(name):  # the first files have no version
            at = self.source.at
            name = self.source.read_text(self.source.read_int())
        if not _CLASS_NAME.fullmatch(name):
            raise FormatError(at, f"{short(name)} is no name of a class")
        return name

    def _fields(self, index: int, typename: str) -> Steps:
        instance = Torch7Object(typename, {})
        self.objects[index] = TORCH, instance
        at = self.source.at
        fields = yield
        if not isinstance(fields, dict):
            what = f"{typename} is not stored as a table of its fields, so this cannot read it"
            raise FormatError(at, what)
        self.field_tables.add(id(fields))
        instance.fields = fields
        return instance

    def _tensor(self, dtype: torch.dtype) -> Steps:
        at, dimensions = self.source.at, self.source.read_int()
        if not 0 <= dimensions <= MAX_DIMENSIONS:
            raise FormatError(at, f"a tensor of {dimensions} dimensions")
        sizes = [self.source.read_long() for _ in range(dimensions)]
        strides = [self.source.read_long() for _ in range(dimensions)]
        offset = self.source.read_long() - 1  # Lua counts from 1
        storage = yield
        if storage is None:
            storage = torch.empty(0, dtype=dtype)
        elif id(storage) not in self.storages or storage.dtype != dtype:
            raise FormatError(at, f"a {dtype} tensor whose storage is not one of its type")
        return view_storage(storage, sizes, strides, offset, at=at)

    def _function(self, index: int | None) -> Steps:
        size = self.source.read_int()
        self.source.skip(size)
        function = LuaFunction(size)
        if index is not None:  # before the variables: a function may call itself
            self.objects[index] = self.objects[index][0], function
        yield  # the variables of its surroundings: objects that others may refer to
        return function


def _number(value: float) -> int | float:
    whole = value.is_integer() and abs(value) <= EXACT_INTEGERS
    return int(value) if whole else value
