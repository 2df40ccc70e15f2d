"""Proposals for many images.

Which files, in which process, what is left to do, and what could not be read.
"""

import itertools
import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from tqdm import tqdm

from datasets.files import write_atomically, write_json
from datasets.images import ImageError, list_images, read_image
from pipeline import distributed
from pipeline.proposals import MAX_ROWS, Proposals, ProposalStore
from pipeline.propose import ImageFile, Proposer, read_ahead
from pipeline.visualize import draw_proposals

MAX_DIGITS = 18  # of a file name that is an image id: as many as 64 bits hold
MAX_IMAGES_IN_SHARD = 16  # so little is lost by a kill


@dataclass
class Summary:
    """What a run did.

    Images done now and before, proposals in the store, messages on unreadable files.
    """

    done: int = 0
    done_before: int = 0
    proposals: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def none_readable(self) -> bool:
        """Whether there was something to do and nothing of it could be read."""
        return bool(self.broken) and not self.done and not self.done_before


def propose_images(
    proposer: Proposer,
    source: str | Path,
    output: str | Path,
    *,
    settings: dict,
    annotations: str | Path | None = None,
    draw: int = 0,
) -> Summary:
    """Fills the proposal store `output` for a folder, file or glob, and writes proposals.json.

    Args:
        settings: what the proposals depend on; a store made with other settings is refused.
        annotations: COCO json that gives the images' ids and which images to take.
        draw: number of proposals to draw for each image, into `output/drawn`.

    Raises:
        ValueError: no images, a store made with other settings or ids, annotations that are not
            COCO.
    """
    if draw < 0:
        raise ValueError(f"--draw must be at least 0, got {draw}")
    store = ProposalStore(output)
    done = store.images()
    files = find_images(source, annotations, {name: image["id"] for name, image in done.items()})
    left = [file for file in files if file.file_name not in done]
    if distributed.is_main():
        store.open_for(settings)
    distributed.barrier()  # everyone has seen the same store before anyone adds to it
    index, count = distributed.share()
    shares = distributed.gather(_propose_share(proposer, left[index::count], store))
    summary = Summary(
        sum(s[0] for s in shares), len(files) - len(left), 0, [m for s in shares for m in s[1]]
    )
    if distributed.is_main():
        _finish(store, summary, Path(output))
    if draw:
        _draw_share(store, files, Path(output) / "drawn", draw)
    distributed.barrier()
    return summary


def find_images(
    source: str | Path, annotations: str | Path | None, known: dict[str, int]
) -> list[ImageFile]:
    """The images to propose for, with ids.

    Ids come from the annotations, else from the file names when all of them are distinct numbers
    (as COCO's are), else they count from 1. Names are relative to the folder that was given.

    Args:
        known: ids by file name that an earlier run has given; they stay, whatever has come into the
            folder since.

    Raises:
        ValueError: no images, annotations that are not COCO, or ids other than the known ones.
    """
    if annotations is not None:
        files = _annotated_images(source, Path(annotations))
        _refuse_other_ids(files, known, annotations)
        return files
    paths = list_images(source)
    root = Path(source) if Path(source).is_dir() else _common_parent(paths)
    names = [path.relative_to(root).as_posix() for path in paths]
    numbers = _own_numbers(paths) or range(1, len(paths) + 1)
    taken = set(known.values())
    unused = itertools.count(max([*numbers, *taken]) + 1)
    ids = [
        known[name] if name in known else next(unused) if number in taken else number
        for name, number in zip(names, numbers, strict=True)
    ]
    return [ImageFile(*file) for file in zip(ids, names, paths, strict=True)]


def _own_numbers(paths: list[Path]) -> list[int] | None:
    """The numbers that the files are named; None unless all have one of their own."""
    if not all(path.stem.isdecimal() and len(path.stem) <= MAX_DIGITS for path in paths):
        return None
    numbers = [int(path.stem) for path in paths]
    return numbers if len(set(numbers)) == len(numbers) else None


def _refuse_other_ids(
    files: list[ImageFile], known: dict[str, int], annotations: str | Path
) -> None:
    for file in files:
        if known.get(file.file_name, file.image_id) != file.image_id:
            raise ValueError(
                f"{file.file_name} has the id {file.image_id} in {annotations}, "
                f"but the output holds its proposals under {known[file.file_name]}; "
                "choose another --output or delete it"
            )


def _common_parent(paths: list[Path]) -> Path:
    parent = paths[0].parent
    while not all(path.is_relative_to(parent) for path in paths):
        parent = parent.parent
    return parent


def _annotated_images(source: str | Path, annotations: Path) -> list[ImageFile]:
    """With a folder, all images that the annotations list.

    With a file or glob, those of them that match it.
    """
    listed = {image["file_name"]: image["id"] for image in read_image_list(annotations)}
    if Path(source).is_dir():
        files = [
            ImageFile(image_id, name, Path(source) / name) for name, image_id in listed.items()
        ]
        if not any(file.path.is_file() for file in files):
            raise ValueError(
                f"{source}: none of the {len(files)} images that {annotations} lists is there"
            )
        return files
    found = [(_listed_name(path, listed), path) for path in list_images(source)]
    files = [ImageFile(listed[name], name, path) for name, path in found if name is not None]
    if not files:
        raise ValueError(f"{source}: none of these images is listed in {annotations}")
    return files


def _listed_name(path: Path, listed: Collection[str]) -> str | None:
    """The listed name that a path ends in.

    The longest, since several folders may have files of one name.
    """
    parts = path.absolute().parts
    return next((name for n in range(len(parts)) if (name := "/".join(parts[n:])) in listed), None)


def read_image_list(annotations: Path) -> list[dict]:
    """The "images" of a COCO json (test sets have no annotations).

    Raises:
        FileNotFoundError: no such file. ValueError: not COCO.
    """
    if not annotations.is_file():
        raise FileNotFoundError(f"annotations {annotations} do not exist")
    try:
        content = json.loads(annotations.read_text())
    except ValueError as error:
        raise ValueError(f"{annotations} is not JSON: {error}") from error
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(map(_names_image, images)):
        raise ValueError(
            f'{annotations} is not COCO: it has no list "images" with "id" and "file_name"'
        )
    return images


def _names_image(image: object) -> bool:
    return (
        isinstance(image, dict)
        and isinstance(image.get("id"), int)
        and isinstance(image.get("file_name"), str)
    )


def _propose_share(
    proposer: Proposer, files: list[ImageFile], store: ProposalStore
) -> tuple[int, list[str]]:
    pending: list[Proposals] = []
    made, broken = 0, []
    writer = distributed.share()[0]
    progress = tqdm(
        read_ahead(files), total=len(files), unit="img", disable=not distributed.is_main()
    )
    try:
        for file, image in progress:
            if isinstance(image, ImageError):
                broken.append(str(image))
                progress.write(f"skipped: {image}")
                continue
            pending.append(proposer(image, image_id=file.image_id, file_name=file.file_name))
            made += 1
            if len(pending) >= MAX_IMAGES_IN_SHARD or sum(map(len, pending)) >= MAX_ROWS:
                store.write_shard(pending, writer=writer)
                pending = []
    finally:  # Ctrl-C keeps what is done
        if pending:
            store.write_shard(pending, writer=writer)
    return made, broken


def _draw_share(store: ProposalStore, files: list[ImageFile], directory: Path, count: int) -> None:
    """Pictures of this process's share of what the store holds on the files.

    Also of what it holds from earlier runs.
    """
    paths = {file.file_name: file.path for file in files}
    index, processes = distributed.share()
    for proposals in itertools.islice(store, index, None, processes):
        if proposals.file_name not in paths:
            continue
        inner = [
            part for part in PurePosixPath(proposals.file_name).parts if part not in ("/", "..")
        ]
        with suppress(ImageError):  # the file has gone since its proposals were made
            picture = draw_proposals(read_image(paths[proposals.file_name]), proposals, count)
            _save_jpeg(picture, directory.joinpath(*inner[:-1], f"{inner[-1]}.jpg"))


def _save_jpeg(picture: np.ndarray, path: Path) -> None:
    ok, data = cv2.imencode(".jpg", picture[..., ::-1])
    assert ok
    write_atomically(path, data.tobytes())


def _finish(store: ProposalStore, summary: Summary, output: Path) -> None:
    path, summary.proposals = store.write_results()
    write_json(output / "broken.json", summary.broken)
    write_json(
        output / "metrics.json",
        {
            "images": summary.done + summary.done_before,
            "broken": len(summary.broken),
            "proposals": summary.proposals,
        },
    )
    again = f" ({summary.done_before} were there already)" if summary.done_before else ""
    print(
        f"{summary.done + summary.done_before} images{again}, {summary.proposals:,} proposals, "
        f"{len(summary.broken)} files could not be read; results in {path}"
    )
    for message in summary.broken:
        print(f"  not read: {message}")
