"""Image files: which there are, and what is in them, as 8-bit RGB."""

from __future__ import annotations

import glob
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

SUFFIXES = frozenset(
    {".avif", ".bmp", ".dib", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line with its path and the reason."""


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file to (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Gray values are repeated, 16 bits become 8, CMYK and palettes become RGB, alpha is dropped.

    Raises:
        ImageError: missing, unreadable, empty, truncated, or not an image.
    """
    try:
        # By Python and not by cv2, for any file name, and errors with a reason.
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise ImageError(f"{path}: the file is empty")
    if _is_truncated(data):
        raise ImageError(f"{path}: the image is truncated")
    try:
        with _silent_opencv():
            image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ImageError(f"{path}: cannot be decoded: {error.err}") from None
    if image is None:
        raise ImageError(f"{path}: not an image, or a broken one")
    return image


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


def list_images(source: str | Path) -> list[Path]:
    """The image files of a folder with its subfolders, of a glob (`**` allowed), or one file.

    Sorted. Files count by their suffix, whatever is in them; hidden ones do not.

    Raises:
        ValueError: nothing there; one line.
    """
    path, pattern = Path(source), str(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        pattern = str(Path(glob.escape(pattern)) / "**" / "*")  # unlike rglob, it follows links
    elif not glob.has_magic(pattern):
        raise ValueError(f"{source}: no such file or folder")
    found = {Path(file) for file in glob.iglob(pattern, recursive=True)}
    images = sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file())
    if not images:
        raise ValueError(f"{source}: no image files there ({' '.join(sorted(SUFFIXES))})")
    return images
