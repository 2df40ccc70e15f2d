"""Detections for the images of a proposal store.

An interrupted run, started again, does the parts of shards that are left. Processes share them.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from datasets.file_names import leads_out
from datasets.files import write_atomically, write_json
from datasets.images import (
    MAX_PIXELS,
    Image,
    ImageError,
    open_image,
    orientation_hint,
)
from datasets.progress import progress_bar
from datasets.remote import AnyPath, is_uri, join, list_files, remove_folder, to_path
from pipeline import distributed
from pipeline.inference.coco_json import categories_file, images_file
from pipeline.inference.detect import Detector
from pipeline.inference.engines import Engine, in_this_process
from pipeline.inference.folder_report import DRAWN, Summary, check_draw, report
from pipeline.inference.image_files import ImageFile, process_images
from pipeline.inference.proposal_store import READERS, Part, ProposalStore, ResumableDirectory
from pipeline.inference.proposals import Proposals, results_of, write_results
from pipeline.inference.visualize import draw_detections, save_in_folder
from pipeline.run_lock import locks_output

DETECTIONS = "detections.json"
T = TypeVar("T")


def image_folder(store: ProposalStore, given: str | Path | None) -> str | Path:
    """The folder that a store's file names are relative to: as given, or as the store knows it."""
    store.require_shards()
    if given is not None and not is_uri(given) and not Path(given).is_dir():
        raise ValueError(
            f"--images {given} is no folder; with --proposals it is the one that the store's file "
            "names are relative to"
        )
    folder = given or store.settings().get("image_folder")
    if folder is None:
        raise ValueError(f"{store.directory} does not say where its images are; give --images")
    return folder if is_uri(folder) else Path(folder)


@locks_output
def detect_images(
    detector: Detector,
    store: ProposalStore,
    images: str | Path,
    output: str | AnyPath,
    *,
    settings: dict,
    draw: int = 0,
    engine: Engine = in_this_process,
) -> Summary:
    """Writes `output/detections.json` for the images of a proposal store; `output` may be a URI.

    Beside it go the detector's categories and a list of the images, since results have ids only.

    Args:
        images: the folder, or URI, that the store's file names are relative to.
        settings: what the detections depend on, beside the images and the store.
        draw: number of detections to draw on each image, into `output/drawn`.
        engine: who detects; others than this process load the detector themselves.

    Raises:
        ValueError: no store, or none of its images is in the folder or can be used.
    """
    output = to_path(output)
    check_draw(draw, output)
    store.require_shards()
    stored = store.catalog()
    names = (name.as_py() for name in stored["file_name"])
    if not any(not leads_out(name) and _may_be_there(join(images, name)) for name in names):
        raise ValueError(
            f"{images}: none of the {len(stored)} images of {store.directory} is there"
        )
    sizes = stored.select(["height", "width"]).group_by(["height", "width"]).aggregate([])
    detector.check_memory((row["height"], row["width"]) for row in sizes.to_pylist())
    # Keep the parts of an interrupted run that had the same settings: one for each part of a shard.
    parts = ResumableDirectory(output / "parts")
    if distributed.is_main():
        where = store.directory.resolve()
        stamps = [[str(where / name), *stamp] for name, stamp in store.stamps().items()]
        folder = images if is_uri(images) else Path(images).resolve()
        inputs = {"images": str(folder), "draw": draw, "proposals": stamps}
        parts.open_for(settings | inputs, discard=True)
    distributed.barrier()
    file_of = {part: parts.directory / _file_name(part) for part in store.parts()}
    there = list_files(parts.directory)
    todo = [part for part, file in file_of.items() if file.name not in there]
    distributed.barrier()  # every process has seen the same parts before one adds to them
    # Detect, each process in the images of its share of the parts.
    assigned = todo[distributed.rank() :: distributed.world_size()]
    work = partial(
        detect_each, store=store.directory, images=images, draw=draw, drawn=output / DRAWN
    )
    progress = progress_bar(total=len(assigned), unit="part", enabled=distributed.is_main())
    with progress:
        for rows in engine(work, detector, assigned, [], largest=1):
            for row in rows.to_pylist():
                write_atomically(parts.directory / row["part"], row["done"].encode())
                progress.update()
    distributed.barrier()
    # Join the parts to one file of results.
    files = list(file_of.values())
    broken = list(_joined(files, "broken")) if distributed.is_main() else []
    broken = distributed.gather(broken)[0]
    summary = Summary(len(stored) - len(broken), 0, broken)
    if distributed.is_main():
        if summary.done:
            results = _joined(files, "results")
            write_json(categories_file(output / DETECTIONS), detector.categories)
            store.write_images(images_file(output / DETECTIONS), detector.categories)
            summary.found = write_results(output / DETECTIONS, results)
            report(summary, "detections", output / DETECTIONS, output, draw=draw)
        remove_folder(parts.directory)
    if not summary.done:
        raise ValueError(
            f"none of the images of {store.directory} could be used; the first: {broken[0]}"
        )
    return summary


def _may_be_there(path: str | Path) -> bool:
    return is_uri(path) or Path(path).is_file()


def _file_name(part: Part) -> str:
    """Of a part's detections; shards of earlier versions have one part."""
    return f"{part.shard.stem}-{part.group}.json" if part.group else f"{part.shard.stem}.json"


def _joined(parts: Sequence[AnyPath], key: str) -> Iterator:
    """What all parts have by a name. Several are read at once: an object store takes its time."""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(parts), READERS):
            for content in pool.map(methodcaller("read_bytes"), parts[start : start + READERS]):
                yield from json.loads(content)[key]


def detect_each(
    detector: Detector,
    parts: Sequence[Part],
    _broken: list[str],
    *,
    store: AnyPath,
    images: str | Path,
    draw: int,
    drawn: AnyPath,
) -> Iterator[pa.Table]:
    """A row for each part of a store: its file's name, and as JSON results and messages."""
    proposals = ProposalStore(store)
    for part in parts:
        done: dict[str, list] = {"results": [], "broken": []}
        for image, found in detect_in_part(detector, proposals, part, images, done["broken"]):
            if draw:
                picture = draw_detections(image, found, detector.category_names, draw)
                assert isinstance(drawn, Path)  # else `draw` is 0
                save_in_folder(picture, drawn, found.file_name)
            done["results"] += results_of(found)
        yield pa.table({"part": [_file_name(part)], "done": [json.dumps(done)]})


def detect_in_part(
    detect: Callable[[Image, Proposals], T],
    store: ProposalStore,
    part: Part,
    images: str | Path,
    broken: list[str],
) -> Iterator[tuple[Image, T]]:
    """The images of a part of a shard that have proposals, and what `detect` finds in each.

    Args:
        detect: takes an image and its proposals.
        images: the folder, or URI, that the store's file names are relative to.
        broken: see `process_images`; also images of another size than their proposals'.
    """
    proposals_of = {proposals.image_id: proposals for proposals in store.read_shard(part)}

    def process(file: ImageFile, image: Image) -> T:
        proposals = proposals_of[file.image_id]
        if image.shape[:2] != (proposals.height, proposals.width):
            raise ImageError(
                f"{file.path}: is {image.shape[1]}x{image.shape[0]} pixels, its proposals are of "
                f"{proposals.width}x{proposals.height}{orientation_hint(file.path, store.exif())}"
            )
        return detect(image, proposals)

    files = []
    for image_id, p in proposals_of.items():
        if leads_out(p.file_name):  # another tool's store: no file of anybody's is opened for it
            broken.append(
                str(ImageError(f"{part.shard}: {p.file_name} is no name within a folder"))
            )
        else:
            files.append(ImageFile(image_id, p.file_name, join(images, p.file_name)))
    advice = "make the image smaller or lower --short-sides"
    # Images as large as their proposals' were allowed when these were made.
    largest = max((p.height * p.width for p in proposals_of.values()), default=0)
    read = partial(open_image, exif=store.exif(), max_pixels=max(largest, MAX_PIXELS))
    yield from process_images(files, process, broken=broken, advice=advice, read=read)
