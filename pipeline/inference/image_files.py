"""Image files for inference: which there are, their ids, and reading them one ahead."""

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datasets.coco import read_image_list
from datasets.images import ImageError, list_images, read_image

MAX_DIGITS = 18  # of a file name that is an image id: as many as 64 bits hold


@dataclass(frozen=True)
class ImageFile:
    """An image: its id, its name in results, and where it is."""

    image_id: int
    file_name: str
    path: Path


def find_images(
    source: str | Path, annotations: str | Path | None, known: dict[str, int]
) -> list[ImageFile]:
    """The images of a folder, file or glob, with ids.

    Ids come from the annotations, else from the file names if all of them are distinct numbers (as
    COCO's are), else they count from 1. Names are relative to the folder that was given.
    Images that the annotations (a COCO json) do not list are left out.

    Args:
        known: ids by file name that an earlier run has given; they stay, whatever has come since.

    Raises:
        FileNotFoundError, ValueError: no images, annotations that are not COCO, or ids other than
            the known ones.
    """
    if annotations is not None:
        files = _annotated_images(source, Path(annotations))
        for file in files:
            if known.get(file.file_name, file.image_id) != file.image_id:
                raise ValueError(
                    f"{file.file_name} has the id {file.image_id} in {annotations}, "
                    f"but the output holds its proposals under {known[file.file_name]}; "
                    "choose another --output or delete it"
                )
        return files
    paths = list_images(source)
    root = source if Path(source).is_dir() else os.path.commonpath([p.parent for p in paths])
    names = [path.relative_to(root).as_posix() for path in paths]
    numbers = list(range(1, len(paths) + 1))
    if all(path.stem.isdecimal() and len(path.stem) <= MAX_DIGITS for path in paths):
        stems = [int(path.stem) for path in paths]
        numbers = stems if len(set(stems)) == len(stems) else numbers
    taken = set(known.values())
    unused = itertools.count(max([*numbers, *taken]) + 1)
    ids = [
        known[name] if name in known else next(unused) if number in taken else number
        for name, number in zip(names, numbers, strict=True)
    ]
    return [ImageFile(*file) for file in zip(ids, names, paths, strict=True)]


def _annotated_images(source: str | Path, annotations: Path) -> list[ImageFile]:
    """Of a folder, all images that the annotations list; else those that match file or glob."""
    ids = {image.file_name: image.id for image in read_image_list(annotations)}
    if Path(source).is_dir():
        files = [ImageFile(i, name, Path(source) / name) for name, i in ids.items()]
        if not any(file.path.is_file() for file in files):
            raise ValueError(f"{source}: none of the {len(ids)} images of {annotations} is there")
        return files
    found: dict[str, Path] = {}
    for path in list_images(source):
        # The longest listed name that the path ends in: several folders may have files of one name.
        parts = path.absolute().parts
        endings = ("/".join(parts[i:]) for i in range(len(parts)))
        name = next((ending for ending in endings if ending in ids), None)
        if name in found:
            raise ValueError(
                f"{source}: {found[name]} and {path} are both {name} of {annotations}; "
                "give one folder at a time"
            )
        if name is not None:
            found[name] = path
    if not found:
        raise ValueError(f"{source}: none of these images is listed in {annotations}")
    return [ImageFile(ids[name], name, path) for name, path in found.items()]


def common_folder(files: list[ImageFile]) -> Path:
    """The folder that all names are relative to, the same however the files were given."""
    folders = {
        Path(*file.path.absolute().parts[: -len(Path(file.file_name).parts)]) for file in files
    }
    return Path(os.path.commonpath(folders)).resolve()


def read_ahead(files: list[ImageFile]) -> Iterator[tuple[ImageFile, np.ndarray | ImageError]]:
    """Images, or their errors, in order; the next is read while the present is worked on."""

    def read(file: ImageFile) -> np.ndarray | ImageError:
        try:
            return read_image(file.path)
        except ImageError as error:
            return error
        except MemoryError:
            return ImageError(f"{file.path}: out of memory")

    reader, upcoming = ThreadPoolExecutor(1), None
    try:
        for file, following in itertools.zip_longest(files, files[1:]):
            image = upcoming.result() if upcoming else read(file)
            upcoming = reader.submit(read, following) if following else None
            yield file, image
    finally:
        # Without waiting: a generator that is given up is closed by whatever thread collects
        # garbage, even one that is just starting, and would wait there forever.
        reader.shutdown(wait=False, cancel_futures=True)
