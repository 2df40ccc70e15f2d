"""The files that the page may open: images in the folders that were given, and nothing else."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from datasets.images import ImageError
from datasets.resize import resize_image
from pipeline.inference.image_files import find_images
from pipeline.serve.images import encode_jpeg, read_page_image

THUMBNAIL_SIDE = 192  # px of the longer side
NUM_THUMBNAILS = 1000  # kept in memory, of some 8 kB each


class ServedFiles:
    """The image files in folders, by names relative to these.

    Links are followed as long as they stay in the folders.
    """

    def __init__(self, sources: Sequence[str | Path], *, max_pixels: int):
        """
        Args:
            sources: folders or files; may be none.

        Raises:
            ValueError: one is not there, or holds no image.
        """
        self.sources, self.max_pixels = list(sources), max_pixels
        self.roots = [Path(os.path.realpath(source)) for source in sources]
        self._paths: dict[str, Path] = {}
        self._make_thumbnail = functools.lru_cache(NUM_THUMBNAILS)(self._read_thumbnail)
        self.names()

    def names(self) -> list[str]:
        """The names of the files that are there now, sorted."""
        if self.sources:
            files = find_images(self.sources, None, {})
            self._paths = {
                f.file_name: f.path
                for f in files
                if isinstance(f.path, Path) and self._is_inside(f.path)
            }
        return list(self._paths)

    def path(self, name: str) -> Path:
        """Where a file is.

        Raises:
            ImageError: there is none of this name.
        """
        path = self._paths.get(name)
        if path is None or not self._is_inside(path):  # now, whatever it was when it was listed
            raise ImageError(f"{name}: no such image in the folder")
        return path

    def _is_inside(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(root) for root in self.roots)

    def thumbnail(self, name: str) -> bytes:
        """A small JPEG of an image.

        Raises:
            ImageError: it is not there, or cannot be read.
        """
        path = self.path(name)
        return self._make_thumbnail(path, name, path.stat().st_mtime_ns)

    def _read_thumbnail(self, path: Path, name: str, _changed: int) -> bytes:
        image, _ = read_page_image(path, name, max_pixels=self.max_pixels)
        return encode_jpeg(resize_image(image, min(1.0, THUMBNAIL_SIDE / max(image.shape[:2]))))
