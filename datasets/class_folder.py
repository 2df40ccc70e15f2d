"""Folders of classes, CLASS/*.jpg, as torchvision's ImageFolder has them."""

from pathlib import Path

import numpy as np
from torchvision.datasets import ImageFolder

from datasets.images import SUFFIXES


class _VisibleFolder(ImageFolder):
    """As torchvision's, without hidden files and folders."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Names, sorted, and their rows."""
        names = [name for name in super().find_classes(directory)[0] if not name.startswith(".")]
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: row for row, name in enumerate(names)}


def _is_image(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


class ClassFolder:
    """The images below a folder; the folder that an image is in, at the top, is its class.

    Hidden files and folders are none, such as those of Jupyter and macOS.

    Attributes:
        path: of the folder.
        classes: their names, sorted.
        labels: (I,) int64, the class of each image, a row of `classes`.
    """

    image_sizes = None  # unlike those of annotated images, they are not known before reading

    def __init__(self, path: str | Path, *, classes: list[str] | None = None):
        """Rows are of `classes` if given, which may have more than the folder.

        Raises:
            ValueError: no such folder, a class without images, or one that `classes` lacks.
        """
        try:
            found = _VisibleFolder(str(path), is_valid_file=_is_image)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is no folder of class folders: {error}") from error
        self.path, self.classes = str(path), classes or found.classes
        unknown = [name for name in found.classes if name not in self.classes]
        if unknown:
            raise ValueError(
                f"{path}: no such class in training: {', '.join(unknown[:4])}; "
                f"known are {', '.join(self.classes[:4])}, ..."
            )
        rows = np.array([self.classes.index(name) for name in found.classes], np.int64)
        self.labels = rows[np.array(found.targets)]
        self._names = [str(Path(name).relative_to(path)) for name, _ in found.samples]

    def __len__(self) -> int:
        """The number of images."""
        return len(self._names)

    def file_name(self, i: int) -> str:
        """The file of image i, with the folder of its class."""
        return self._names[i]
