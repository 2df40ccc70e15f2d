"""Detections for many images, from a proposal store or from the images alone."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from datasets.files import write_json
from datasets.images import ImageError
from pipeline import distributed
from pipeline.inference.detect import Detector
from pipeline.inference.detection_parts import DetectionParts
from pipeline.inference.detections import write_results
from pipeline.inference.image_files import ImageFile, read_ahead
from pipeline.inference.memory import NETWORK_ERRORS, describe_failure, release_between_sizes
from pipeline.inference.proposals import Proposals, ProposalStore
from pipeline.inference.visualize import draw_detections, picture_path, save_jpeg

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
    detector: Detector,
    store: ProposalStore,
    images: Path,
    output: Path,
    *,
    settings: dict,
    draw: int = 0,
) -> Summary:
    """Writes `output/detections.json` for the images of a proposal store.

    The processes share the shards. An interrupted run, started again, goes on where it was.

    Args:
        images: the folder that the store's file names are relative to.
        settings: what the detections depend on, beside the images and the store.
        draw: number of detections to draw on each image, into `output/drawn`.

    Raises:
        ValueError: no store, or none of its images is in the folder or can be used.
    """
    if draw < 0:
        raise ValueError(f"--draw must be at least 0, got {draw}")
    shards, names = store.require_shards(), list(store.images())
    if not any((images / name).is_file() for name in names):
        raise ValueError(f"{images}: none of the {len(names)} images of {store.directory} is there")
    parts = DetectionParts(output)
    if distributed.is_main():
        stamps = [[str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns] for s in shards]
        own = {"images": str(images.resolve()), "draw": draw, "proposals": stamps}
        parts.open_for(settings | own)
    distributed.barrier()
    mine = parts.missing(shards)[distributed.rank() :: distributed.world_size()]
    distributed.barrier()  # everyone has seen the same parts before anyone adds to them
    for shard in tqdm(mine, unit="shard", disable=None if distributed.is_main() else True):
        parts.write(shard, *_detect_shard(detector, store, shard, images, output / "drawn", draw))
    distributed.barrier()
    summary = Summary(broken=parts.broken(shards))
    summary.images = len(names) - len(summary.broken)
    distributed.barrier()  # everyone has read them
    if distributed.is_main():
        if summary.images:
            summary.detections = write_results(output / RESULTS, parts.results(shards))
            _finish(summary, output)
        parts.remove()
    if not summary.images:
        raise ValueError(
            f"none of the images of {store.directory} could be used; the first: {summary.broken[0]}"
        )
    return summary


def _detect_shard(
    detector: Detector, store: ProposalStore, shard: Path, images: Path, drawn: Path, draw: int
) -> tuple[list[dict], list[str]]:
    """COCO results of a shard's images, and messages on those left out."""
    names = {category["id"]: category["name"] for category in detector.categories}
    results: list[dict] = []
    broken: list[str] = []
    for image, proposals in with_images(store, [shard], images, broken):
        try:
            found = detector(image, proposals)
        except NETWORK_ERRORS as error:
            advice = "make the image smaller or lower --short-sides"
            problem = describe_failure(error, image, advice=advice)
            broken.append(f"{images / proposals.file_name}: {problem}")
            continue
        if draw:
            picture = draw_detections(image, found, names, draw)
            save_jpeg(picture, picture_path(drawn, proposals.file_name))
        results += found.results()
    return results, broken


def _finish(summary: Summary, output: Path) -> None:
    write_json(output / "broken.json", summary.broken)
    print(
        f"{summary.images} images, {summary.detections:,} detections, {len(summary.broken)} files "
        f"could not be used; results in {output / RESULTS}"
    )
    for message in summary.broken:
        print(f"  left out: {message}")


def with_images(
    store: ProposalStore, shards: list[Path], images: Path, broken: list[str]
) -> Iterator[tuple[np.ndarray, Proposals]]:
    """Each image of some shards that has proposals, and these.

    Args:
        images: the folder that the store's file names are relative to.
        broken: gets a message for every image that is left out: unreadable, or of another size.
    """
    for shard in shards:
        proposals = {p.file_name: p for p in store.read_shard(shard)}
        files = [ImageFile(p.image_id, name, images / name) for name, p in proposals.items()]
        for file, image in release_between_sizes(read_ahead(files)):
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
