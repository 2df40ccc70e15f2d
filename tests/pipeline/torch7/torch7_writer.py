"""Writes Torch7 files, as torch7's File.lua and THDiskFile.c do in binary mode."""

import struct
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.torch7.reader import Torch7Object

# Codes of struct and of numpy alike.
CODES = {"Byte": "B", "Char": "b", "Short": "h", "Int": "i", "Long": "q", "Half": "e"}
CODES |= {"Float": "f", "Double": "d"}


@dataclass(eq=False)
class Storage:
    element: str  # "Float", "CudaLong", "Cuda", ...
    values: list | np.ndarray


@dataclass(eq=False)
class Tensor:
    """One that may be impossible; torch.Tensor is for the others."""

    storage: Storage | None
    sizes: tuple
    strides: tuple
    offset: int = 1
    element: str = "Float"


@dataclass(eq=False)
class Function:
    code: bytes
    variables: object
    type: int = 8


class Writer:
    def __init__(self, *, long_bytes: int = 8, version: str | None = "V 1"):
        self.long_bytes, self.version = long_bytes, version
        self.content = bytearray()
        self.known: dict[int, tuple[int, object]] = {}  # index and object by id

    def pack(self, code: str, *values: float) -> None:
        self.content += struct.pack(f"<{len(values)}{code}", *values)

    def longs(self, *values: int) -> None:
        self.pack("q" if self.long_bytes == 8 else "i", *values)

    def text(self, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.pack("i", len(data))
        self.content += data

    def write(self, value: object) -> None:
        if value is None:
            self.pack("i", 0)
        elif isinstance(value, bool):
            self.pack("i", 5, value)
        elif isinstance(value, int | float):
            self.pack("i", 1)
            self.pack("d", value)
        elif isinstance(value, str | bytes):
            self.pack("i", 2)
            self.text(value)
        elif isinstance(value, Function) and value.type == 6:
            self.pack("i", 6)
            self.function(value)
        else:
            self.indexed(value)

    def indexed(self, value: object) -> None:
        is_known = id(value) in self.known
        index, _ = self.known.setdefault(id(value), (len(self.known) + 1, value))
        if isinstance(value, Function):
            type_, write = value.type, self.function
        elif isinstance(value, dict | list):
            type_, write = 3, self.table
        else:
            type_, write = 4, self.instance
        self.pack("i", type_, index)
        if not is_known:
            write(value)

    def function(self, value: Function) -> None:
        self.text(value.code)
        self.write(value.variables)

    def table(self, value: dict | list) -> None:
        table = value if isinstance(value, dict) else dict(enumerate(value, 1))
        self.pack("i", len(table))
        for key, item in table.items():
            self.write(key)
            self.write(item)

    def instance(self, value: Torch7Object | torch.Tensor | Tensor | Storage) -> None:
        if isinstance(value, torch.Tensor):
            element = {torch.float32: "Float", torch.int64: "Long"}[value.dtype]
            storage = Storage(element, value.flatten().numpy()) if value.numel() else None
            strides = value.contiguous().stride()
            value = Tensor(storage, tuple(value.shape), strides, element=element)
        if self.version:
            self.text(self.version)
        if isinstance(value, Torch7Object):
            self.text(value.typename)
            self.write(value.fields)
        elif isinstance(value, Tensor):
            self.text(f"torch.{value.storage.element if value.storage else value.element}Tensor")
            self.pack("i", len(value.sizes))
            self.longs(*value.sizes, *value.strides, value.offset)
            self.write(value.storage)
        else:
            self.text(f"torch.{value.element}Storage")
            self.longs(len(value.values))
            code = CODES[value.element.removeprefix("Cuda") or "Float"]
            if code == "q":
                self.longs(*value.values)
            else:
                self.content += np.asarray(value.values, code).tobytes()


def written(value: object, **options: object) -> bytes:
    """The content of a file with a value: one of what `read_torch7` gives, or of the above."""
    writer = Writer(**options)
    writer.write(value)
    return bytes(writer.content)
