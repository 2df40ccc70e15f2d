"""Writes Torch7 files, as torch7's File.lua and THDiskFile.c do in binary mode."""

import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


def written(value: object, *, long_bytes: int = 8, version: str | None = "V 1") -> bytes:
    """The content of a file with a value: one of what `read_torch7` gives, or of the above."""
    content, long = bytearray(), "q" if long_bytes == 8 else "i"
    known: dict[int, tuple[int, object]] = {}  # index and object by id

    def pack(code: str, *values: float) -> None:
        content.extend(struct.pack(f"<{len(values)}{code}", *values))

    def text(text: str | bytes) -> None:
        data = text.encode() if isinstance(text, str) else text
        pack("i", len(data))
        content.extend(data)

    def write(value: object) -> None:
        if value is None:
            pack("i", 0)
        elif isinstance(value, bool):
            pack("i", 5, value)
        elif isinstance(value, int | float):
            pack("i", 1)
            pack("d", value)
        elif isinstance(value, str | bytes):
            pack("i", 2)
            text(value)
        else:
            is_table, is_known = isinstance(value, dict | list), id(value) in known
            type_ = value.type if isinstance(value, Function) else 3 if is_table else 4
            pack("i", type_)
            if type_ != 6:  # which has no index
                pack("i", known.setdefault(id(value), (len(known) + 1, value))[0])
            if not is_known:
                write_content(value)

    def write_content(value: object) -> None:
        if isinstance(value, Function):
            text(value.code)
            write(value.variables)
        elif isinstance(value, dict | list):
            table = value if isinstance(value, dict) else dict(enumerate(value, 1))
            pack("i", len(table))
            for key, item in table.items():
                write(key)
                write(item)
        else:
            if version:
                text(version)
            write_instance(value)

    def write_instance(value: object) -> None:
        if isinstance(value, torch.Tensor):
            element = {torch.float32: "Float", torch.int64: "Long"}[value.dtype]
            storage = Storage(element, value.flatten().numpy()) if value.numel() else None
            strides = value.contiguous().stride()
            value = Tensor(storage, tuple(value.shape), strides, element=element)
        if isinstance(value, Torch7Object):
            text(value.typename)
            write(value.fields)
        elif isinstance(value, Tensor):
            text(f"torch.{value.storage.element if value.storage else value.element}Tensor")
            pack("i", len(value.sizes))
            pack(long, *value.sizes, *value.strides, value.offset)
            write(value.storage)
        else:
            text(f"torch.{value.element}Storage")
            pack(long, len(value.values))
            code = CODES[value.element.removeprefix("Cuda") or "Float"]
            content.extend(np.asarray(value.values, long if code == "q" else code).tobytes())

    write(value)
    return bytes(content)


MEASURE = """
import re, sys
sys.path.insert(0, sys.argv[1])
from pipeline.torch7.convert import convert_file
from pipeline.torch7.reader import read_torch7
def peak():  # not ru_maxrss, which begins with what the process had that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
for path in sys.argv[3:]:
    before = peak()
    value = eval(sys.argv[2])
    print(peak() - before)
"""


def memory(call: str, *paths: Path) -> list[int]:
    """Peak resident memory that a call takes for each `path`, all in one new process.

    The first also has what libraries take once.
    """
    command = [sys.executable, "-c", MEASURE, Path(__file__).parents[3], call, *paths]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(map(int, output.split()))
