"""Detections for many images, from a proposal store or from the images alone."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.files import write_json
from datasets.images import ImageError
from pipeline import distributed
from pipeline.detect import Detector
from pipeline.detections import Detections, write_detections
from pipeline.image_files import ImageFile, read_ahead
from pipeline.memory import NETWORK_ERRORS, describe_failure
from pipeline.proposals import Proposals, ProposalStore
from pipeline.visualize import draw_detections, picture_path, save_jpeg

RESULTS = "detections.json"


@dataclass
class Summary:
    """Images looked at, detections written, messages on images left out.

    An image without proposals has been looked at: nothing is in it.
    """

    images: int = 0
    detections: int = 0
    broken: list[str] = field(default_factory=list)


def image_folder(store: ProposalStore, given: Path | None) -> Path:
    """The folder that a store's file names are relative to: as given, or as the store knows it.

    Raises:
        ValueError: what is given is no folder, or nothing is known; no store.
    """
    store.require_shards()
    if given is not None and not given.is_dir():
        raise ValueError(
            f"--images {given} is no folder; with --proposals it is the one that the store's file "
            "names are relative to"
        )
    if given is not None:
        return given
    folder = store.settings().get("image_folder")
    if folder is None:
        raise ValueError(f"{store.directory} does not say where its images are; give --images")
    return Path(folder)


def detect_images(
    detector: Detector, store: ProposalStore, images: Path, output: Path, *, draw: int = 0
) -> Summary:
    """Writes `output/detections.json` for the images of a proposal store.

    The processes share the shards.

    Args:
        images: the folder that the store's file names are relative to.
        draw: number of detections to draw on each image, into `output/drawn`.

    Raises:
        ValueError: no store, or none of its images is in the folder or can be used.
    """
    if draw < 0:
        raise ValueError(f"--draw must be at least 0, got {draw}")
    store.require_shards()
    names = list(store.images())
    if not any((images / name).is_file() for name in names):
        raise ValueError(f"{images}: none of the {len(names)} images of {store.directory} is there")
    summary = Summary()
    detections = _detections(detector, store, images, summary, output / "drawn", draw)
    if distributed.share()[1] > 1:
        detections = itertools.chain.from_iterable(distributed.gather(list(detections)))
        summary.broken = list(itertools.chain.from_iterable(distributed.gather(summary.broken)))
    if distributed.is_main():
        some = _unless_all_broken(detections, summary, store)
        summary.detections = write_detections(output / RESULTS, some)
    summary.images = len(names) - len(summary.broken)
    if distributed.is_main():
        _finish(summary, output)
    return summary


def _unless_all_broken(
    detections: Iterable[Detections], summary: Summary, store: ProposalStore
) -> Iterator[Detections]:
    """Raises a ValueError at the end if no image could be used: an earlier file then stays."""
    yield from detections
    if len(summary.broken) == len(store.images()):
        raise ValueError(
            f"none of the images of {store.directory} could be used; the first: {summary.broken[0]}"
        )


def _finish(summary: Summary, output: Path) -> None:
    write_json(output / "broken.json", summary.broken)
    print(
        f"{summary.images} images, {summary.detections:,} detections, {len(summary.broken)} files "
        f"could not be used; results in {output / RESULTS}"
    )
    for message in summary.broken:
        print(f"  left out: {message}")


def _detections(
    detector: Detector,
    store: ProposalStore,
    images: Path,
    summary: Summary,
    drawn: Path,
    draw: int,
) -> Iterator[Detections]:
    """This process's images, in the order of the store."""
    index, count = distributed.share()
    names = {category["id"]: category["name"] for category in detector.categories}
    shards = store.shards()[index::count]
    for image, proposals in with_images(store, shards, images, summary.broken):
        try:
            found = detector(image, proposals)
        except NETWORK_ERRORS as error:
            advice = "make the image smaller or lower --short-sides"
            problem = describe_failure(error, image, advice=advice)
            summary.broken.append(f"{images / proposals.file_name}: {problem}")
            continue
        if draw:
            picture = draw_detections(image, found, names, draw)
            save_jpeg(picture, picture_path(drawn, proposals.file_name))
        yield found


def with_images(
    store: ProposalStore, shards: list[Path], images: Path, broken: list[str]
) -> Iterator[tuple[np.ndarray, Proposals]]:
    """Each image of some shards that has proposals, and these.

    Args:
        images: the folder that the store's file names are relative to.
        broken: gets a message for every image that is left out: unreadable, or of another size.
    """
    for shard in tqdm(shards, unit="shard", disable=None if distributed.is_main() else True):
        proposals = {p.file_name: p for p in store.read_shard(shard)}
        files = [ImageFile(p.image_id, name, images / name) for name, p in proposals.items()]
        for file, image in read_ahead(files):
            own = proposals[file.file_name]
            if isinstance(image, ImageError):
                broken.append(str(image))
            elif image.shape[:2] != (own.height, own.width):
                broken.append(
                    f"{file.path}: is {image.shape[1]}x{image.shape[0]} pixels, its proposals are "
                    f"of {own.width}x{own.height}"
                )
            else:
                yield image, own
