"""Image files for inference: which there are, their ids, and one after the other through a network.

The next image is read ahead, host memory stays flat over many images, and an image that cannot be
read or does not fit in memory stops no other.
"""

import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import compress, pairwise
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from datasets.coco_file import ListedImage, read_image_list
from datasets.file_names import find_named_files, match_paths
from datasets.image_lists import is_list, list_named_images
from datasets.images import Image, ImageError, Sources, list_images, open_image
from datasets.remote import AnyPath, is_uri, join
from pipeline import distributed
from pipeline.inference.memory import return_freed_blocks

MAX_DIGITS = 18  # of a file name that is an image id: as many as 64 bits hold
MAX_KEPT = 8  # images of one size between which freed memory is kept
# What a network raises on an image that is too large: PyTorch on a CPU and OpenCV have no special
# exception for it.
NETWORK_ERRORS = (RuntimeError, MemoryError, cv2.error)
NO_MEMORY = re.compile("(can't allocate|not enough|insufficient|out of) memory", re.IGNORECASE)
NONE_KNOWN = pa.table(
    {"image_id": pa.array([], pa.int64()), "file_name": pa.array([], pa.string())}
)
T = TypeVar("T")


@dataclass(frozen=True)
class ImageFile:
    """An image: its id, its name in results, and where it is."""

    image_id: int
    file_name: str
    path: str | Path


class ImageFiles(Sequence[ImageFile]):
    """Images in columns: of a million, each an object, a gigabyte would be full."""

    def __init__(self, ids: np.ndarray, names: pa.Array, folder: str | Path):
        self.ids, self.names, self.folder = ids, names, folder

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int | np.integer):
            name = self.names[int(index)].as_py()
            return ImageFile(int(self.ids[index]), name, join(self.folder, name))
        if isinstance(index, slice):
            return ImageFiles(self.ids[index], self.names[index], self.folder)
        return ImageFiles(self.ids[index], self.names.take(pa.array(index)), self.folder)

    def __reduce__(self) -> tuple:
        """A slice is pickled without the names that it shares with others."""
        names = self.names.take(pa.array(np.arange(len(self))))
        return ImageFiles, (self.ids, names, self.folder)


class Paths(Sequence[str | Path]):
    """The paths of images."""

    def __init__(self, files: Sequence[ImageFile]):
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        return self._files[index].path


def ids_of(files: Sequence[ImageFile]) -> np.ndarray:
    """(N,) int64."""
    if isinstance(files, ImageFiles):
        return files.ids
    return np.array([file.image_id for file in files], np.int64)


def choose(files: Sequence[ImageFile], indices: np.ndarray) -> Sequence[ImageFile]:
    """The images at some indices."""
    if isinstance(files, ImageFiles):
        return files[indices]
    return [files[index] for index in indices]


def find_images(
    source: Sources,
    annotations: str | Path | None,
    known: pa.Table | None = None,
    *,
    shard: tuple[int, int] = (1, 1),
    output: AnyPath | None = None,
    passed_over: Counter[str] | None = None,
    unnamable: list[str] | None = None,
) -> Sequence[ImageFile]:
    """The images of a folder, file or glob, of several of these, of a list or URI, with ids.

    Ids come from the annotations, else from the file names if all of them are distinct numbers (as
    COCO's are), else they count from 1. Names are relative to the folder that was given.
    Images that the annotations (a COCO json) do not list are left out.

    Args:
        known: the columns "image_id" and "file_name" of what an earlier run has done; ids stay,
            whatever has come since.
        shard: the part of several that this process does, see `propose_images`.
        output, passed_over: see `list_images`.
        unnamable: gets a line for each file whose name is not UTF-8, as results have to be.

    Raises:
        FileNotFoundError, ValueError: no images, annotations that are not COCO, or ids other than
            the known ones.
    """
    if not isinstance(source, str | Path) and len(source) == 1:
        [source] = source
    known = NONE_KNOWN if known is None else known
    if annotations is not None:
        files = _annotated_images(source, Path(annotations))
        name_of = {file.image_id: file.file_name for file in files}
        id_of = {name: image_id for image_id, name in name_of.items()}
        pairs = zip(known["image_id"].to_pylist(), known["file_name"].to_pylist(), strict=True)
        for image_id, name in pairs:
            if name_of.get(image_id) != name and name in id_of:
                raise ValueError(
                    f"{name} has the id {id_of[name]} in {annotations}, but the output holds its "
                    f"proposals under {image_id}; choose another --output or delete it"
                )
        return files
    if isinstance(source, str | Path) and is_list(source):
        listed = list_named_images(source, passed_over)
        folder, names = listed.folder, pa.array(listed.names, pa.string())
        del listed  # 100 MB of a million
        return _number(folder, names, known, shard)
    if not isinstance(source, str | Path) and any(map(is_list, source)):
        raise ValueError(f"--images {next(filter(is_list, source))}: give a list or a URI alone")
    local = output if isinstance(output, Path) else None
    paths = list_images(source, output=local, passed_over=passed_over)
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
        names = list(compress(names, is_text))
    return _number(Path(root), pa.array(names, pa.string()), known, shard)


def _number(
    folder: str | Path, names: pa.Array, known: pa.Table, shard: tuple[int, int]
) -> ImageFiles:
    """Images with ids: known ones, else numbers of their names or places, else unused ones.

    Processes that share the images by shards start at different times, when different images are
    known. So an unused id of one is never an unused id of another.
    """
    ids = np.arange(1, len(names) + 1)
    stems = _stems(names[:1])
    if _are_numbers(stems) and _are_numbers(stems := _stems(names)):
        numbers = np.array(stems, np.int64)
        ids = numbers if len(np.unique(numbers)) == len(numbers) else ids
    if not len(known):
        return ImageFiles(ids, names, folder)
    taken = known["image_id"].to_numpy()
    place = pc.index_in(names, value_set=known["file_name"])
    is_known = place.is_valid().to_numpy(zero_copy_only=False)
    is_new = ~is_known & np.isin(ids, taken)
    part, count = shard
    start = int(max(ids.max(), taken.max())) + 1
    start += (part - start) % count
    ids[is_new] = start + count * np.arange(is_new.sum())
    ids[is_known] = taken[place.drop_null().to_numpy()]
    return ImageFiles(ids, names, folder)


def _are_numbers(stems: list[str]) -> bool:
    return all(stem.isdecimal() and len(stem) <= MAX_DIGITS for stem in stems)


def _stems(names: pa.Array) -> list[str]:
    """The names without folder and suffix."""
    return [PurePosixPath(name).stem for name in names.to_pylist()]


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
    if isinstance(source, str | Path) and is_list(source):
        return _annotated_in_list(source, images, annotations)
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


def _annotated_in_list(
    source: str | Path, images: list[ListedImage], annotations: Path
) -> list[ImageFile]:
    listed = list_named_images(source)
    names = set(listed.names)
    found = [image for image in images if image.file_name in names]
    if not found:
        raise ValueError(f"{source}: none of these images is listed in {annotations}")
    return [
        ImageFile(image.id, image.file_name, join(listed.folder, image.file_name))
        for image in found
    ]


def common_folder(files: Sequence[ImageFile]) -> str | Path:
    """The folder, or URI, that all names are relative to, the same however the files were given."""
    if isinstance(files, ImageFiles):
        return files.folder if is_uri(files.folder) else Path(files.folder).resolve()
    if files and is_uri(uri := files[0].path):
        return str(uri).removesuffix(f"/{files[0].file_name}")
    folders = {
        Path(*Path(file.path).absolute().parts[: -len(Path(file.file_name).parts)])
        for file in files
    }
    return Path(os.path.commonpath(folders)).resolve()


def process_images(
    files: Sequence[ImageFile],
    process: Callable[[ImageFile, Image], T],
    *,
    broken: list[str],
    advice: str,
    read: Callable[[str | Path], Image] | None = None,
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
    files: Sequence[ImageFile], read: Callable[[str | Path], Image]
) -> Iterator[tuple[ImageFile, Future[Image]]]:
    """Images in order; the next is read while the present is worked on."""
    reader, upcoming = ThreadPoolExecutor(1), None
    try:
        for file, following in pairwise(itertools.chain(files, [None])):
            assert file is not None
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
