"""Image files made for tests: TIFFs that no library writes, and headers of huge images."""

import struct
import zlib

import numpy as np

SHORT, LONG = 3, 4


def tiff(
    samples: np.ndarray,
    photometric: int,
    *,
    extra: list[int] | None = None,
    orientation: int | None = None,
    sample_format: int = 1,
    size: tuple[int, int] | None = None,
    order: str = "<",
    big: bool = False,
    planar: bool = False,
) -> bytes:
    """An uncompressed TIFF of (H, W, bands) samples; `size` is the height and width it states."""
    height, width, bands = samples.shape
    bits = 8 * samples.dtype.itemsize
    planes = np.moveaxis(samples, -1, 0) if planar else samples
    pixels = planes.astype(samples.dtype.newbyteorder(order)).tobytes()
    strips = bands if planar else 1
    values = {
        256: (LONG, [(size or (height, width))[1]]),
        257: (LONG, [(size or (height, width))[0]]),
        258: (SHORT, [bits] * bands),
        259: (SHORT, [1]),
        262: (SHORT, [photometric]),
        273: (LONG, [0] * strips),
        277: (SHORT, [bands]),
        278: (LONG, [height]),
        279: (LONG, [len(pixels) // strips] * strips),
        284: (SHORT, [2 if planar else 1]),
        339: (SHORT, [sample_format] * bands),
    }
    if orientation is not None:
        values[274] = (SHORT, [orientation])
    if extra is not None:
        values[338] = (SHORT, extra)
    word, inline, start = ("Q", 8, 16) if big else ("I", 4, 8)
    count = struct.pack(order + ("Q" if big else "H"), len(values))
    after = start + len(count) + len(values) * (4 + 2 * inline) + inline  # of the directory
    lengths = [len(v) * (2 if kind == SHORT else 4) for kind, v in values.values()]
    first = after + sum(length for length in lengths if length > inline)
    values[273] = (LONG, [first + n * (len(pixels) // strips) for n in range(strips)])
    entries, outside = b"", b""
    for tag, (kind, numbers) in sorted(values.items()):
        data = struct.pack(f"{order}{len(numbers)}{'H' if kind == SHORT else 'I'}", *numbers)
        if len(data) > inline:
            where = struct.pack(order + word, after + len(outside))
            outside, data = outside + data, where
        entries += struct.pack(f"{order}HH{word}", tag, kind, len(numbers)) + data.ljust(
            inline, b"\0"
        )
    mark = b"II" if order == "<" else b"MM"
    head = struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else struct.pack(order + "HI", 42, 8)
    return mark + head + count + entries + bytes(inline) + outside + pixels


def png(width: int, height: int, *, bits: int = 1, rows: int = 0) -> bytes:
    """A PNG of gray zeros; of an image of `rows` fewer rows, the file is torn."""
    line = bytes(1 + (width * bits + 7) // 8)
    pixels = zlib.compressobj(9)
    data = b"".join(pixels.compress(line) for _ in range(height - rows)) + pixels.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(name, content)
        for name, content in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG's chunk."""
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
