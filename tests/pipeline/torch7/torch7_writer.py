"""Writes Torch7 files, as torch7's own code does."""

import struct
from dataclasses import dataclass

import numpy as np

# Codes of struct and of numpy alike.
CODES = {"Byte": "B", "Char": "b", "Short": "h", "Int": "i", "Long": "q", "Half": "e"}
CODES |= {"Float": "f", "Double": "d"}


@dataclass(eq=False)
class Storage:
    kind: str  # "Float", "CudaLong", "Cuda", ...
    values: list | np.ndarray

    @property
    def element(self) -> str:
        return self.kind.removeprefix("Cuda") or "Float"


@dataclass(eq=False)
class Tensor:
    storage: Storage | None
    sizes: tuple
    strides: tuple
    offset: int = 1
    kind: str = "Float"


@dataclass(eq=False)
class Instance:
    name: str
    fields: object
    version: str | None = "V 1"


@dataclass(eq=False)
class Function:
    code: bytes
    variables: object
    type: int = 8


class Writer:
    """What torch7's File.lua and THDiskFile.c write."""

    def __init__(self, *, ascii: bool = False, long_bytes: int = 8):
        self.ascii, self.long_bytes = ascii, long_bytes
        self.content, self.numbers = bytearray(), {}

    def pack(self, code: str, *values: float) -> None:
        if self.ascii and values:
            words = ("%d" if code in "bhilq" else "%.17g" for _ in values)
            text = " ".join(w % v for w, v in zip(words, values, strict=True))
            self.content += text.encode() + b"\n"
        else:
            self.content += struct.pack(f"<{len(values)}{code}", *values)

    def longs(self, *values: int) -> None:
        self.pack("q" if self.long_bytes == 8 else "i", *values)

    def raw(self, data: bytes) -> None:
        self.content += data + (b"\n" if self.ascii and data else b"")

    def text(self, text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        self.pack("i", len(data))
        self.raw(data)

    def write(self, value: object) -> None:
        if value is None:
            self.pack("i", 0)
        elif isinstance(value, bool):
            self.pack("i", 5)
            self.pack("i", value)
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
            self.numbered(value)

    def numbered(self, value: object) -> None:
        kind = 3 if isinstance(value, dict | list) else 4
        self.pack("i", value.type if isinstance(value, Function) else kind)
        known = id(value) in self.numbers
        self.pack("i", self.numbers.setdefault(id(value), len(self.numbers) + 1))
        if known:
            return
        if isinstance(value, Function):
            self.function(value)
        elif isinstance(value, dict | list):
            table = value if isinstance(value, dict) else dict(enumerate(value, 1))
            self.pack("i", len(table))
            for item in (item for entry in table.items() for item in entry):
                self.write(item)
        else:
            self.instance(value)

    def function(self, value: Function) -> None:
        self.text(value.code)
        self.write(value.variables)

    def instance(self, value: object) -> None:
        if not isinstance(value, Instance) or value.version:
            self.text(value.version if isinstance(value, Instance) else "V 1")
        if isinstance(value, Instance):
            self.text(value.name)
            self.write(value.fields)
        elif isinstance(value, Tensor):
            self.text(f"torch.{value.storage.kind if value.storage else value.kind}Tensor")
            self.pack("i", len(value.sizes))
            self.longs(*value.sizes)
            self.longs(*value.strides)
            self.longs(value.offset)
            self.write(value.storage)
        else:
            self.text(f"torch.{value.kind}Storage")
            self.longs(len(value.values))
            self.elements(value)

    def elements(self, storage: Storage) -> None:
        code = CODES[storage.element]
        if code == "q":
            self.longs(*storage.values)
        elif code in "Bb" or not self.ascii:
            self.raw(np.asarray(storage.values, code).tobytes())
        else:
            self.pack(code, *storage.values)


def written(value: object, **form: object) -> bytes:
    writer = Writer(**form)
    writer.write(value)
    return bytes(writer.content)
