"""Image files: which there are, and what is in them, as 8-bit RGB."""

from __future__ import annotations

import glob
from pathlib import Path

import cv2
import numpy as np

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .png .webp .bmp .dib .tif .tiff .jp2 .avif .gif .ppm .pgm .pbm .pnm".split()
)


class ImageError(ValueError):
    """An image file that cannot be used; the message is one line with its path and the reason."""


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file of any kind to (H, W, 3) uint8 RGB, turned as its EXIF orientation says.

    Raises:
        ImageError: missing, unreadable, empty, truncated, or not an image.
    """
    try:
        data = Path(path).read_bytes()  # by Python: any file name, and its own errors
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None
    if not data:
        raise ImageError(f"{path}: empty file")
    if _is_truncated(data):
        raise ImageError(f"{path}: truncated image")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ImageError(f"{path}: cannot be decoded ({error.err})") from None
    if image is None:
        raise ImageError(f"{path}: not an image, or a broken one")
    return image


def _is_truncated(data: bytes) -> bool:
    """Whether the end of the file is missing where cv2 would silently return a part of the image."""
    if data.startswith(b"\xff\xd8"):  # JPEG: end-of-image after the last start-of-scan
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    return False


def list_images(source: str | Path) -> list[Path]:
    """The image files of a folder with its subfolders, of one file, or of a glob (`**` allowed).

    Files count by their suffix, whatever is in them. Sorted.

    Raises:
        ValueError: nothing there.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = path.rglob("*")
    elif glob.has_magic(str(source)):
        found = map(Path, glob.glob(str(source), recursive=True))
    else:
        raise ValueError(f"{source}: no such file or folder")
    images = sorted(file for file in found if file.suffix.lower() in SUFFIXES and file.is_file())
    if not images:
        raise ValueError(
            f"{source}: no images there (known suffixes: {' '.join(sorted(SUFFIXES))})"
        )
    return images
