"""Numbers and strings of a Torch7 file, binary or ascii, each checked against the file's end.

Torch7 writes ints (4 bytes), longs (4 or 8 bytes, as the machine had them), doubles, strings and
whole storages; `pipeline/torch7/reader.py` says what objects they make up. Binary numbers are
little-endian. In ascii mode numbers are decimal words, while strings and the storages of bytes are
still raw bytes; a line feed follows each value.
"""

import mmap
import re
import struct
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import torch

# Lengths are limited (C prints at most 25 characters): a file of digits is no number.
_INTEGER = re.compile(rb"\s*([+-]?[0-9]{1,20})\n?")
_REAL = re.compile(
    rb"\s*([+-]?(?:nan|inf|(?:[0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})(?:e[+-]?[0-9]{1,5})?))\n?",
    re.IGNORECASE,
)
_BYTES = (torch.uint8, torch.int8)


class FormatError(Exception):
    """What is wrong with a file, and the offset in bytes of the value that is."""

    def __init__(self, offset: int, reason: str):
        super().__init__(f"byte {offset}: {reason}")


class _Input:
    """A mapped file that is read from its start on; `at` is the offset of the next byte."""

    # The fewest bytes that a table's key (a boolean) and value (nil) take.
    smallest_entry: int

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def read_text(self, count: int) -> str:
        """A Lua string of `count` bytes; those that are not UTF-8 become surrogates."""
        start = self.skip(count)
        return self.data[start : start + count].decode("utf-8", "surrogateescape")

    def skip(self, count: int) -> int:
        """Step over `count` bytes, and return where they start."""
        left = len(self.data) - self.at
        if not 0 <= count <= left:
            raise FormatError(self.at, f"{count} bytes are due and {left} are left in the file")
        start, self.at = self.at, self.at + count
        return start


class BinaryInput(_Input):
    """Little-endian numbers; storages are mapped, where the file has them at a multiple of 4 or 8.

    The kernels of torch may count on numbers at multiples of their size, and Torch7 does not: what
    the file has elsewhere is read into memory of its own, past the mapping, so that it is in memory
    once.
    """

    smallest_entry = 12

    def __init__(self, data: mmap.mmap, file: BinaryIO, *, long_bytes: int):
        super().__init__(data)
        self.file, self.long_bytes = file, long_bytes

    def read_int(self) -> int:
        return self._unpack("<i", 4)

    def read_long(self) -> int:
        return self._unpack("<q" if self.long_bytes == 8 else "<i", self.long_bytes)

    def read_double(self) -> float:
        return self._unpack("<d", 8)

    def read_numbers(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A storage: (count,) of `dtype`."""
        if dtype == torch.int64 and self.long_bytes == 4:
            return self.read_numbers(count, torch.int32).long()
        start = self.skip(count * dtype.itemsize)
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if start % dtype.itemsize == 0:
            return torch.frombuffer(self.data, dtype=dtype, count=count, offset=start)
        values = torch.empty(count, dtype=dtype)
        self.file.seek(start)
        if self.file.readinto(values.numpy()) != count * dtype.itemsize:
            raise FormatError(start, "the file has become shorter while it was read")
        return values

    def expect_end(self) -> None:
        """Raises FormatError if anything is left."""
        if self.at != len(self.data):
            raise FormatError(self.at, f"{len(self.data) - self.at} bytes too many")

    def _unpack(self, code: str, size: int) -> int | float:
        return struct.unpack_from(code, self.data, self.skip(size))[0]


class AsciiInput(_Input):
    """Decimal words between white space."""

    smallest_entry = 5  # "5 1 0"

    def read_int(self) -> int:
        return self._number(_INTEGER, int)

    read_long = read_int

    def read_double(self) -> float:
        return self._number(_REAL, float)

    def skip(self, count: int) -> int:
        start = super().skip(count)
        if count and self.data[self.at : self.at + 1] == b"\n":
            self.at += 1
        return start

    def read_numbers(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A storage: (count,) of `dtype`."""
        if dtype in _BYTES:
            start = self.skip(count)
            # bytearray: torch wants memory that it may write to
            raw = bytearray(self.data[start : start + count])
            return torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        start, left = self.at, len(self.data) - self.at
        if 2 * count - 1 > left:
            raise FormatError(start, f"{count} numbers are due and {left} bytes are left")
        values = torch.empty(count, dtype=dtype)
        kind = values.numpy().dtype
        try:
            with np.errstate(over="ignore"):
                values.numpy()[:] = np.fromiter(self._each(count, dtype), kind, count)
        except OverflowError:
            raise FormatError(start, f"a number among the next {count} is no {kind}") from None
        return values

    def _each(self, count: int, dtype: torch.dtype) -> Iterator[int | float]:
        for _ in range(count):
            yield self.read_double() if dtype.is_floating_point else self.read_long()

    def expect_end(self) -> None:
        """Raises FormatError if anything but white space is left."""
        rest = re.compile(rb"\s*").match(self.data, self.at).end()
        if rest != len(self.data):
            raise FormatError(rest, f"{len(self.data) - rest} bytes too many")

    def _number(self, pattern: re.Pattern, kind: type) -> int | float:
        found = pattern.match(self.data, self.at)
        if not found:
            word = bytes(self.data[self.at : self.at + 12])
            raise FormatError(self.at, f"a number is due and there is {word!r}")
        self.at = found.end()
        return kind(found[1])
