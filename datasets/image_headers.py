"""What image files say of themselves, read without decoding a pixel: size, orientation, samples."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import BinaryIO

from PIL import Image
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.WebPImagePlugin import WebPImageFile

# Opened one by one: PIL.Image.open has a limit of pixels of its own, and it is the process's.
READERS: tuple[type[ImageFile], ...] = (
    JpegImageFile, WebPImageFile, AvifImageFile, GifImageFile,
    BmpImageFile, Jpeg2KImageFile, PpmImageFile,
)  # fmt: skip
ORIENTATION = 274  # of EXIF and of TIFF
MAX_BANDS = 4
HEIC_STARTS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftyphevx")
J2K_SIZES = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 code stream
# Tags of a TIFF, and the formats of their integers.
WIDTH, HEIGHT, BITS, PHOTOMETRIC, BANDS = 256, 257, 258, 262, 277
PLANAR, TILE_WIDTH, TILE_HEIGHT, EXTRA_SAMPLES, SAMPLE_FORMAT = 284, 322, 323, 338, 339
TIFF_TAGS = {
    WIDTH, HEIGHT, BITS, PHOTOMETRIC, BANDS, ORIENTATION,
    PLANAR, TILE_WIDTH, TILE_HEIGHT, EXTRA_SAMPLES, SAMPLE_FORMAT,
}  # fmt: skip
TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
TARGET_PRINTER = 337  # a tag that nobody reads
GRAY_INVERTED, GRAY, RGB, PALETTE = 0, 1, 2, 3  # photometric
UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # sample formats


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line with its path and the reason."""

    def __init__(self, message: str):
        """Escapes what no terminal or text file takes: bytes that are not UTF-8, line ends."""
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


@dataclass(frozen=True)
class Header:
    """What a file says of its image.

    Attributes:
        kind: of file, by PIL's names.
        width, height: as stored, in pixels.
        pixels: to be allocated at least, by what the file says.
        orientation: EXIF's, 1 to 8; above 4 the image is shown with its sides exchanged.
        bits: of a sample.
        max_value: of a sample, where a file says it (PNM).
        is_inverted: 0 is white, and the decoder does not turn it.
        photometric: of a TIFF, how its samples are meant.
        patches: TIFF tags to be rewritten before decoding, as (offset, bytes).
    """

    kind: str
    width: int
    height: int
    pixels: int = 0
    orientation: int = 1
    bits: int = 8
    max_value: int | None = None
    is_inverted: bool = False
    photometric: int | None = None
    patches: list[tuple[int, bytes]] = field(default_factory=list)


def read_header(file: BinaryIO) -> Header:
    """The header of an image file, which is read as far as needed.

    Raises:
        ImageError: not an image, a broken one, or one of a kind that cannot be used. The message
            has no path.
    """
    start = file.read(16)
    file.seek(0)
    if start[4:12] in HEIC_STARTS:
        raise ImageError("HEIC images cannot be read; convert it to JPEG")
    try:
        if start.startswith(b"\x89PNG"):
            return _read_png(file)
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _read_tiff(file)
        return _read_with_pil(file)
    except ImageError:
        raise
    except (OSError, MemoryError):
        raise
    except Exception:  # whatever parsers raise on bytes of any kind
        raise ImageError("not an image, or a broken one") from None


def _read_with_pil(file: BinaryIO) -> Header:
    image = None
    for reader in READERS:
        file.seek(0)
        try:
            image = reader(file)
        except SyntaxError:  # of another kind
            continue
        break
    if image is None:
        raise ImageError("not an image, or a broken one")
    kind, bits, max_value = str(image.format), 8, None
    if kind == "JPEG2000":
        file.seek(0)
        data = file.read()
        # After the marker: 38 bytes of sizes, the number of bands, and the bits of the first.
        bits = (data[data.index(J2K_SIZES) + 42] & 0x7F) + 1
    if kind == "PPM":
        arguments = image.tile[0].args
        max_value = arguments[1] if isinstance(arguments, tuple) and len(arguments) > 1 else 255
        max_value = 65535 if arguments == "I;16B" else max_value
        bits = 32 if image.mode == "F" else max(8, int(max_value).bit_length())
    if image.mode == "F" or bits > 16:
        raise ImageError(f"has samples of {max(bits, 32)} bits; convert it to 8 or 16 bits")
    width, height = image.size
    orientation = _orientation_of(image.info.get("exif"))
    return Header(kind, width, height, width * height, orientation, bits, max_value)


def _orientation_of(exif: bytes | None) -> int:
    """The orientation in a block of EXIF; 1 where it is missing or makes no sense."""
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        return _valid_orientation(tags.get(ORIENTATION))
    except Exception:  # broken EXIF does not make the image unreadable
        return 1


def _valid_orientation(value: object) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _read_png(file: BinaryIO) -> Header:
    """PIL would decode the pixels to look for EXIF beyond them."""
    file.seek(8)
    width = height = bits = 0
    orientation = 1
    while len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name == b"IHDR":
            width, height, bits = struct.unpack(">IIB", file.read(9))
            length -= 9
        elif name == b"eXIf":
            orientation = _orientation_of(b"Exif\0\0" + file.read(length))
            length = 0
        elif name == b"IEND":
            break
        file.seek(length + 4, io.SEEK_CUR)  # the chunk and its check sum
    if not width or not height:
        raise ImageError("not an image, or a broken one")
    return Header("PNG", width, height, width * height, orientation, max(bits, 8))


def _read_tiff(file: BinaryIO) -> Header:
    """PIL refuses many a TIFF of several bands, and OpenCV reads some of them as something else."""
    tags, offsets, order = _read_tiff_tags(file)
    width, height = tags[WIDTH][0], tags[HEIGHT][0]
    tile = tags.get(TILE_WIDTH, (0,))[0] * tags.get(TILE_HEIGHT, (0,))[0]
    bands, bits = tags.get(BANDS, (1,))[0], max(tags.get(BITS, (1,)))
    sample_format = tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0]
    if bands > MAX_BANDS:
        raise ImageError(f"has {bands} bands, more than {MAX_BANDS}; save three of them as RGB")
    if sample_format == FLOAT or bits > 16:
        kind = "floating-point samples" if sample_format == FLOAT else "samples"
        raise ImageError(f"has {kind} of {bits} bits; convert it to 8 or 16 bits")
    if sample_format == SIGNED:
        raise ImageError(f"has signed samples of {bits} bits; convert it to unsigned ones")
    if bands == 2 and (bits > 8 or tile):  # OpenCV loses every second column of such tiles
        where = "in tiles" if tile else f"of {bits} bits"
        raise ImageError(f"has two bands {where}; save the first one alone")
    if bands > 1 and bits > 8 and tags.get(PLANAR, (1,))[0] == 2:  # OpenCV mixes them up
        raise ImageError(f"has bands of {bits} bits one after the other; save them interleaved")
    photometric = tags.get(PHOTOMETRIC, (GRAY,))[0]
    changed = {}
    if ORIENTATION in tags:  # the caller turns the image, of whatever kind
        changed[ORIENTATION] = 1
    if bands > 2 and photometric in (GRAY_INVERTED, GRAY):
        changed[PHOTOMETRIC] = RGB
    patches = [
        (offsets[tag], struct.pack(order.short_entry, tag, 3, 1, value))
        for tag, value in changed.items()
    ]
    if EXTRA_SAMPLES in tags and photometric in (GRAY_INVERTED, GRAY, RGB) and bands > 2:
        # A fourth band is no alpha, which would be multiplied in; there is none beside three.
        tag = EXTRA_SAMPLES if bands == MAX_BANDS else TARGET_PRINTER
        patches.append((offsets[EXTRA_SAMPLES], struct.pack(order.short_entry, tag, 3, 1, 0)))
    return Header(
        "TIFF",
        width,
        height,
        max(width * height, tile),
        _valid_orientation(tags.get(ORIENTATION, (1,))[0]),
        max(bits, 8),
        is_inverted=photometric == GRAY_INVERTED and bands == 1 and bits > 8,
        photometric=photometric,
        patches=patches,
    )


@dataclass(frozen=True)
class TiffOrder:
    """Formats of `struct` for a TIFF's byte order, and for the 64 bits of a BigTIFF."""

    sign: str
    is_big: bool

    @property
    def word(self) -> str:
        """Of offsets and counts."""
        return "Q" if self.is_big else "I"

    @property
    def entry(self) -> str:
        """A tag, its type, how many values it has, and these or their offset."""
        return f"{self.sign}HH{self.word}{8 if self.is_big else 4}s"

    @property
    def short_entry(self) -> str:
        """The same with one value of 16 bits, the rest zeros."""
        return f"{self.sign}HH{self.word}H{6 if self.is_big else 2}x"


def _read_tiff_tags(
    file: BinaryIO,
) -> tuple[dict[int, tuple[int, ...]], dict[int, int], TiffOrder]:
    """Integers of the first image's tags (`TIFF_TAGS`), the offsets of these, and the order."""
    start = file.read(16)
    sign = "<" if start.startswith(b"II") else ">"
    is_big = struct.unpack(sign + "H", start[2:4])[0] == 43
    order = TiffOrder(sign, is_big)
    [directory] = struct.unpack_from(sign + order.word, start, 8 if is_big else 4)
    file.seek(directory)
    count_format = sign + ("Q" if is_big else "H")
    [count] = struct.unpack(count_format, file.read(struct.calcsize(count_format)))
    size = struct.calcsize(order.entry)
    at = directory + struct.calcsize(count_format)
    entries = file.read(size * min(count, 1000))
    tags: dict[int, tuple[int, ...]] = {}
    offsets: dict[int, int] = {}
    for position in range(0, len(entries) - size + 1, size):
        tag, kind, length, value = struct.unpack_from(order.entry, entries, position)
        if tag not in TIFF_TAGS or kind not in TIFF_INTEGERS or not length or tag in tags:
            continue
        length = min(length, 2 * MAX_BANDS)  # of more bands than can be read, no more are needed
        values_format = f"{sign}{length}{TIFF_INTEGERS[kind]}"
        if struct.calcsize(values_format) > len(value):
            file.seek(struct.unpack(sign + order.word, value)[0])
            value = file.read(struct.calcsize(values_format))
        tags[tag] = struct.unpack_from(values_format, value)
        offsets[tag] = at + position
    return tags, offsets, order
