"""Image files: which there are, and what is in them, as 8-bit RGB."""

from __future__ import annotations

import glob
import io
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL.PpmImagePlugin import PpmImageFile

from datasets.image_headers import Header, ImageError, read_header
from datasets.large_images import WindowedImage, open_by_windows, used_bits, windows_hint
from datasets.remote import read_bytes

SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
APPLY, IGNORE = "apply", "ignore"  # the orientation of EXIF
MAX_PIXELS = 2**28  # by default: 800 MB when decoded
MAX_READABLE_PIXELS = 2**30  # of OpenCV
# What turns an image upright once its sides are exchanged for orientations above 4: the axes that
# OpenCV flips, 0 for upside down, 1 for left to right, -1 for both.
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}

Image = np.ndarray | WindowedImage  # both have `shape`; the second gives its rows at any size


@dataclass(frozen=True)
class ImageFolder:
    """A folder of images, and how they are read; see `read_image`."""

    path: Path
    exif: str = APPLY
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, images: str | Path | ImageFolder) -> ImageFolder:
        """The folder, given as such or by its path."""
        return images if isinstance(images, ImageFolder) else cls(Path(images))

    def read(self, name: str) -> np.ndarray:
        """`read_image` of a file in the folder."""
        return read_image(self.path / name, exif=self.exif, max_pixels=self.max_pixels)

    def open(self, name: str) -> Image:
        """`open_image` of a file in the folder."""
        return open_image(self.path / name, exif=self.exif, max_pixels=self.max_pixels)


def read_image(path: str | Path, *, exif: str = APPLY, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB.

    Gray values are repeated, 16 bits become 8, CMYK and palettes become RGB, alpha is dropped. Of
    16 bits, as many count as the image uses: cameras and satellites give 10, 12 or 14.

    Args:
        exif: "apply" turns the image as its EXIF orientation says, "ignore" leaves it as stored.
        max_pixels: an image that has more by its header is not decoded.

    Raises:
        ImageError: missing, unreadable, empty, truncated, too large, or not an image.
    """
    return _decode_file(path, exif, max_pixels, hint="")


def open_image(path: str | Path, *, exif: str = APPLY, max_pixels: int = MAX_PIXELS) -> Image:
    """As `read_image`, but a file that is large and in tiles or strips is only opened.

    `max_pixels` is for those that are decoded.
    """
    turned = exif == APPLY
    if (image := open_by_windows(path, turned=turned)) is not None:
        return image
    return _decode_file(path, exif, max_pixels, hint=windows_hint(path, turned=turned))


def _decode_file(path: str | Path, exif: str, max_pixels: int, hint: str) -> np.ndarray:
    data, header = _read_file(path, max_pixels, hint)
    image = _decode(path, data, header)
    if image.dtype == np.uint16:
        image = (image >> (_used_bits(image, header) - 8)).astype(np.uint8)
        image = 255 - image if header.is_inverted else image
    if exif == APPLY:
        image = _turn(image, header.orientation)
    return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)


def sample_bits(path: str | Path, max_pixels: int = MAX_PIXELS) -> int:
    """How many bits of an image's samples count, see `read_image`; ImageError as there."""
    data, header = _read_file(path, max_pixels)
    if header.max_value not in (None, 65535):
        return header.bits
    return _used_bits(_decode(path, data, header), header)


def orientation_hint(path: str | Path, exif: str) -> str:
    """For a message on an image of an unexpected size: what its EXIF has to do with that."""
    try:
        with Path(path).open("rb") as file:
            header = read_header(file)
    except (OSError, ValueError):
        return ""
    if header.orientation == 1:
        return ""
    stored = f"its EXIF orientation {header.orientation}"
    size = f"{header.width}x{header.height}"
    if exif == APPLY:
        return f" ({stored} turns it, stored it is {size}; see data.exif and --exif)"
    return f" ({stored} is ignored; see data.exif and --exif)"


def _read_file(path: str | Path, max_pixels: int, hint: str = "") -> tuple[bytes, Header]:
    try:
        # By Python and not by cv2, for any file name, and errors with a reason.
        data = read_bytes(path)
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise ImageError(f"{path}: the file is empty")
    if _is_truncated(data):
        raise ImageError(f"{path}: the image is truncated")
    try:
        header = read_header(io.BytesIO(data))
    except (ImageError, OSError) as error:
        raise ImageError(f"{path}: {error}") from None
    if header.pixels > min(max_pixels, MAX_READABLE_PIXELS):
        raise ImageError(f"{path}: {_describe_excess(header, max_pixels, hint)}")
    return data, header


def _describe_excess(header: Header, max_pixels: int, hint: str) -> str:
    size = f"{header.width} x {header.height} pixels"
    advice = f"cut it into tiles, or {hint}" if hint else "cut it into tiles"
    if header.pixels > MAX_READABLE_PIXELS:
        return f"{size} are more than can be read, {MAX_READABLE_PIXELS:,}; {advice}"
    return (
        f"{size} are more than {max_pixels:,}; {advice}, or raise data.max_pixels "
        "or --max-pixels if there is the memory"
    )


def _decode(path: str | Path, data: bytes, header: Header) -> np.ndarray:
    """(H, W) gray or (H, W, 3) RGB as stored, uint8 or uint16."""
    try:
        if header.kind == "PPM" and header.max_value != 65535:
            # OpenCV does not scale by the largest value.
            with PpmImageFile(io.BytesIO(data)) as picture:
                pixels = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
            return (pixels >> 8).astype(np.uint8) if picture.mode == "I" else pixels
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        if header.kind == "TIFF":
            flags = cv2.IMREAD_UNCHANGED  # in color, 16 bits come with red and blue exchanged
            data = _patch(data, header)
        elif header.bits == 16:
            flags |= cv2.IMREAD_ANYDEPTH
        with _silent_opencv():
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{path}: cannot be decoded: {error.err}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"{path}: cannot be decoded: {error}") from None
    if image is None or image.dtype not in (np.uint8, np.uint16):
        raise ImageError(f"{path}: not an image, or a broken one")
    if header.kind == "TIFF" and image.ndim == 3:
        image = np.ascontiguousarray(image[..., 2::-1])
    return image


def _used_bits(image: np.ndarray, header: Header) -> int:
    """How many bits of a decoded image's samples count."""
    if image.dtype == np.uint8:
        return 8
    if header.bits < 16:  # OpenCV has scaled them
        return 16
    return used_bits(int(image.max()))


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image as its EXIF orientation shows it."""
    image = cv2.transpose(image) if orientation > 4 else image
    return cv2.flip(image, FLIPS[orientation]) if orientation in FLIPS else image


def _patch(data: bytes, header: Header) -> bytes:
    patched = bytearray(data)
    for offset, entry in header.patches:
        patched[offset : offset + len(entry)] = entry
    return bytes(patched)


_silence = threading.Lock()
_num_silent, _log_level = 0, 0
# OpenCV 5 has it below `utils`, OpenCV 4 at the top.
_set_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """The caller reports a broken file in one line; OpenCV would print several beside it.

    Its log level is the process's: the first of several threads sets it, the last restores it.
    """
    global _num_silent, _log_level
    with _silence:
        if _num_silent == 0:
            _log_level = _set_log_level(0)  # silent
        _num_silent += 1
    try:
        yield
    finally:
        with _silence:
            _num_silent -= 1
            if _num_silent == 0:
                _set_log_level(_log_level)


# A marker, but not the bytes that entropy-coded data has: stuffed, restart or fill bytes.
_find_jpeg_marker = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])", re.DOTALL).search
_PNG_END = b"\x00\x00\x00\x00IEND\xae\x42\x60\x82"


def _is_truncated(data: bytes) -> bool:
    """Whether the end is missing of a format of which cv2 may return a part without an error."""
    if not data.startswith(b"\xff\xd8"):
        return data.startswith(b"\x89PNG") and _PNG_END not in data
    # A JPEG's segments lead to its end-of-image marker: those of thumbnails do not count.
    marker = _find_jpeg_marker(data, 2)
    while marker and marker[1] != b"\xd9":
        at = marker.end()
        marker = _find_jpeg_marker(data, at + int.from_bytes(data[at : at + 2], "big"))
    return marker is None


Sources = str | Path | Sequence[str | Path]


def list_images(
    sources: Sources, *, output: Path | None = None, passed_over: Counter[str] | None = None
) -> list[Path]:
    """The image files of folders with their subfolders, of globs (`**` allowed), or single files.

    Sorted. Files count by their suffix, whatever is in them; hidden ones do not. A folder that
    links lead to, too, is visited once, by its own name where it has one below the sources.

    Args:
        output: what lies below is no input, nor what is drawn there if it holds the sources.
        passed_over: gets the number of other files, by what they are.

    Raises:
        ValueError: nothing there; one line.
    """
    passed_over = Counter() if passed_over is None else passed_over
    several = [sources] if isinstance(sources, str | Path) else sources
    found: dict[tuple[str, str], Path] = {}  # by its real folder and its name
    for source in several:
        images = 0
        for file, folder in _files(source, output):
            explicit = os.fspath(file) == os.fspath(Path(source))
            if not explicit and not _is_image(file, passed_over):
                continue
            images += 1
            known = found.setdefault((folder, file.name), file)
            if _rank(file, folder) < _rank(known, folder):
                found[folder, file.name] = file
        if not images:
            raise ValueError(f"{source}: no image files there ({' '.join(sorted(SUFFIXES))})")
    return sorted(found.values())


def _rank(file: Path, folder: str) -> tuple:
    """Of several paths of one file, the first is taken: by its own name, short."""
    return os.path.abspath(file.parent) != folder, len(file.parts), file


def _is_image(file: Path, passed_over: Counter[str]) -> bool:
    if file.is_dir():
        return False
    suffix = file.suffix.lower()
    if suffix in SUFFIXES and file.is_file():
        return True
    dangling = file.is_symlink() and not file.exists()
    passed_over["dangling link" if dangling else suffix or "without a suffix"] += 1
    return False


def _files(source: str | Path, output: Path | None) -> Iterator[tuple[Path, str]]:
    """Files and folders that a source may mean, and the real folder of each."""
    path, pattern = Path(source), Path(source)
    if path.is_dir():
        pattern = Path(glob.escape(str(source)), "**", "*")
    elif path.is_file():
        pattern = Path(glob.escape(str(source)))
    elif not glob.has_magic(str(source)):
        raise ValueError(f"{source}: no such file or folder")
    outputs = "" if output is None else os.path.realpath(output)
    if outputs and Path(os.path.realpath(path)).is_relative_to(outputs):
        outputs = os.path.join(outputs, "drawn")
    real: dict[Path, str] = {}
    for file in _matches(pattern):
        folder = real.get(file.parent) or os.path.realpath(file.parent)
        real[file.parent] = folder
        if not outputs or not f"{folder}{os.sep}".startswith(f"{outputs}{os.sep}"):
            yield file, folder


def _matches(pattern: Path) -> Iterator[Path]:
    """As glob, but a folder is visited once: those that link to themselves have endless paths."""
    parts = pattern.parts
    if "**" not in parts:
        yield from map(Path, glob.iglob(str(pattern)))
        return
    i = parts.index("**")
    for top in map(Path, glob.iglob(str(Path(*parts[:i])))) if i else [Path()]:
        for folder in _folders(top):
            yield from _matches(Path(glob.escape(str(folder)), *(parts[i + 1 :] or ("*",))))


def _folders(top: Path) -> Iterator[Path]:
    """A folder and those below it that are not hidden, each real one once."""
    folders, links, visited = deque([top]), deque[Path](), set()
    while folders or links:  # a folder's own name comes before links to it
        folder = (folders or links).popleft()
        real = os.path.realpath(folder)
        if real in visited or not folder.is_dir():
            continue
        visited.add(real)
        yield folder
        with suppress(OSError), os.scandir(folder) as entries:  # some are not ours to read
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.name.startswith(".") and entry.is_dir():
                    (links if entry.is_symlink() else folders).append(folder / entry.name)
