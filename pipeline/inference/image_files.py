"""Image files for inference: which there are, their ids, and one after the other through a network.

The next image is read ahead, host memory stays flat over many images, and an image that cannot be
read or does not fit in memory stops no other.
"""

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TypeVar

import cv2
import torch
from tqdm import tqdm

from datasets.coco_file import read_image_list
from datasets.file_names import find_named_files, match_paths
from datasets.images import Image, ImageError, Sources, list_images, open_image
from pipeline import distributed
from pipeline.inference.memory import return_freed_blocks

MAX_DIGITS = 18  # of a file name that is an image id: as many as 64 bits hold
MAX_KEPT = 8  # images of one size between which freed memory is kept
# What a network raises on an image that is too large: PyTorch on a CPU and OpenCV have no special
# exception for it.
NETWORK_ERRORS = (RuntimeError, MemoryError, cv2.error)
NO_MEMORY = re.compile("(can't allocate|not enough|insufficient|out of) memory", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True)
class ImageFile:
    """An image: its id, its name in results, and where it is."""

    image_id: int
    file_name: str
    path: Path


def find_images(
    source: Sources,
    annotations: str | Path | None,
    known: dict[int, str],
    *,
    output: Path | None = None,
    passed_over: Counter[str] | None = None,
    unnamable: list[str] | None = None,
) -> list[ImageFile]:
    """The images of a folder, file or glob, or of several of these, with ids.

    Ids come from the annotations, else from the file names if all of them are distinct numbers (as
    COCO's are), else they count from 1. Names are relative to the folder that was given.
    Images that the annotations (a COCO json) do not list are left out.

    Args:
        known: file names by the ids that an earlier run has given; they stay, whatever has come
            since.
        output, passed_over: see `list_images`.
        unnamable: gets a line for each file whose name is not UTF-8, as results have to be.

    Raises:
        FileNotFoundError, ValueError: no images, annotations that are not COCO, or ids other than
            the known ones.
    """
    if not isinstance(source, str | Path) and len(source) == 1:
        [source] = source
    if annotations is not None:
        files = _annotated_images(source, Path(annotations))
        listed = {file.image_id: file.file_name for file in files}
        id_of = {name: image_id for image_id, name in listed.items()}
        for image_id, name in known.items():
            if listed.get(image_id) != name and name in id_of:
                raise ValueError(
                    f"{name} has the id {id_of[name]} in {annotations}, but the output holds its "
                    f"proposals under {image_id}; choose another --output or delete it"
                )
        return files
    paths = list_images(source, output=output, passed_over=passed_over)
    if isinstance(source, str | Path):
        tops = [Path(source)] if Path(source).is_dir() else [path.parent for path in paths]
    else:
        folders = [Path(one).absolute() for one in source if Path(one).is_dir()]
        paths = [path.absolute() for path in paths]
        tops = folders + [path.parent for path in paths]
    root = os.path.commonpath(tops)
    names = [path.relative_to(root).as_posix() for path in paths]
    is_text = [_is_text(name) for name in names]
    if not all(is_text):
        lines = [
            str(ImageError(f"{path}: its name is not UTF-8; rename it"))
            for path, good in zip(paths, is_text, strict=True)
            if not good
        ]
        if not any(is_text):
            raise ImageError(lines[0])
        if unnamable is not None:
            unnamable += lines
        paths, names = list(compress(paths, is_text)), list(compress(names, is_text))
    numbers = list(range(1, len(paths) + 1))
    if all(path.stem.isdecimal() and len(path.stem) <= MAX_DIGITS for path in paths):
        stems = [int(path.stem) for path in paths]
        numbers = stems if len(set(stems)) == len(stems) else numbers
    taken, known_ids = set(known), {name: image_id for image_id, name in known.items()}
    unused = itertools.count(max([*numbers, *taken]) + 1)
    ids = [
        known_ids[name] if name in known_ids else next(unused) if number in taken else number
        for name, number in zip(names, numbers, strict=True)
    ]
    return [ImageFile(*file) for file in zip(ids, names, paths, strict=True)]


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _annotated_images(source: Sources, annotations: Path) -> list[ImageFile]:
    """Of a folder, all images that the annotations list; else those that match file or glob."""
    images = read_image_list(annotations)
    if isinstance(source, str | Path) and Path(source).is_dir():
        found = find_named_files([image.file_name for image in images], source, annotations)
        if found.message:
            distributed.say(found.message)
        return [
            ImageFile(image.id, name, Path(source) / name)
            for image, name in zip(images, found.names, strict=True)
        ]
    files: dict[str, ImageFile] = {}
    named = match_paths(list_images(source), [image.file_name for image in images])
    for path, (name, end) in named.items():
        if name in files:
            raise ValueError(
                f"{source}: {files[name].path} and {path} are both {name} of {annotations}; "
                "give one folder at a time"
            )
        files[name] = ImageFile(0, end, path)
    if not files:
        raise ValueError(f"{source}: none of these images is listed in {annotations}")
    ids = defaultdict(list)
    for image in images:  # several may have one name
        ids[image.file_name].append(image.id)
    return [replace(file, image_id=i) for name, file in files.items() for i in ids[name]]


def common_folder(files: list[ImageFile]) -> Path:
    """The folder that all names are relative to, the same however the files were given."""
    folders = {
        Path(*file.path.absolute().parts[: -len(Path(file.file_name).parts)]) for file in files
    }
    return Path(os.path.commonpath(folders)).resolve()


def process_images(
    files: list[ImageFile],
    process: Callable[[ImageFile, Image], T],
    *,
    broken: list[str],
    advice: str,
    read: Callable[[Path], Image] | None = None,
) -> Iterator[tuple[Image, T]]:
    """Images (H, W, 3) and what `process` makes of them, the next one read meanwhile.

    Before an image of another size, freed memory goes back to the system. Blocks of ever other
    sizes leave gaps that no later one fits, so a process that keeps them grows from image to image.
    Images of one size reuse the same blocks, and are interrupted only now and then, for what is
    left between these.

    Args:
        broken: gets a line for each image that is left out: unreadable, or `process` failed on it.
        advice: for when memory runs out.
        read: `open_image` with other options.
    """
    size, kept = None, 0
    for file, reading in _read_ahead(files, read or open_image):
        image = None
        try:
            image = reading.result()
            if kept == MAX_KEPT or size not in (None, image.shape):
                return_freed_blocks()
                kept = 0
            size, kept = image.shape, kept + 1
            result = process(file, image)
        except ImageError as error:
            problem = str(error)
        except NETWORK_ERRORS as error:
            problem = f"{file.path}: {describe_failure(error, image, advice)}"
        else:
            yield image, result
            continue
        broken.append(problem)
        tqdm.write(f"skipped: {problem}")


def _read_ahead(
    files: list[ImageFile], read: Callable[[Path], Image]
) -> Iterator[tuple[ImageFile, Future[Image]]]:
    """Images in order; the next is read while the present is worked on."""
    reader, upcoming = ThreadPoolExecutor(1), None
    try:
        for file, following in itertools.zip_longest(files, files[1:]):
            reading = upcoming or reader.submit(read, file.path)
            upcoming = reader.submit(read, following.path) if following else None
            yield file, reading
    finally:
        # Without waiting: a generator that is given up is closed by whatever thread collects
        # garbage, even one that is just starting, and would wait there forever.
        reader.shutdown(wait=False, cancel_futures=True)


def describe_failure(error: Exception, image: Image | None, advice: str) -> str:
    """Why reading an image or a network on it failed, in one line."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not NO_MEMORY.search(text):
        return f"{type(error).__name__}: {text}"
    at = "" if image is None else f" at {image.shape[1]} x {image.shape[0]} px"
    return f"out of memory{at}; {advice}"
