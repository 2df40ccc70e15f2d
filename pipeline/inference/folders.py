"""Proposals and detections for many images.

Both go through the images in one loop and keep what they find in a `ResumableDirectory`: an
interrupted run, started again, does what is left. Processes share the images.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from datasets.coco import CocoInstances
from datasets.coco_file import read_image_list
from datasets.file_names import leads_out
from datasets.files import write_atomically, write_json
from datasets.image_survey import AUTO, Size, overfull_images, survey_images
from datasets.images import (
    APPLY,
    MAX_PIXELS,
    Image,
    ImageError,
    Sources,
    open_image,
    orientation_hint,
)
from datasets.large_images import read_georeference
from datasets.progress import progress_bar
from pipeline import distributed
from pipeline.inference.coco_json import categories_file, images_file
from pipeline.inference.detect import Detector
from pipeline.inference.image_files import ImageFile, common_folder, find_images, process_images
from pipeline.inference.openvino import run_in_8_bits
from pipeline.inference.proposals import (
    MAX_ROWS,
    Proposals,
    ProposalStore,
    ResumableDirectory,
    results_of,
    write_results,
)
from pipeline.inference.propose import Proposer
from pipeline.inference.visualize import draw_detections, draw_proposals, save_in_folder
from pipeline.run_lock import locks_output

MAX_IMAGES_IN_SHARD = 16  # so a kill loses little
PROPOSALS, DETECTIONS = "proposals.json", "detections.json"
T = TypeVar("T")


@dataclass
class Summary:
    """What a run did.

    Attributes:
        done: images of this run. done_before: of earlier runs.
        found: proposals or detections in all of them.
        broken: messages on images left out: unreadable, or the network failed on them.
        passed_over: number of other files in the folders, by what they are.
    """

    done: int
    done_before: int
    broken: list[str]
    found: int = 0
    passed_over: Counter[str] = field(default_factory=Counter)

    @property
    def none_readable(self) -> bool:
        """Whether there were images and none of them could be used."""
        return bool(self.broken) and not self.done and not self.done_before


@locks_output
def propose_images(
    proposer: Proposer,
    source: Sources,
    output: str | Path,
    *,
    settings: dict,
    annotations: str | Path | None = None,
    exif: str = AUTO,
    max_pixels: int = MAX_PIXELS,
    draw: int = 0,
    above_output: Path | None = None,
    max_images: int | None = None,
    backend: str = "torch",
    write_json: bool = True,
) -> Summary:
    """Fills the proposal store `output` for a folder, file or glob, or several of these.

    Args:
        settings: what the proposals depend on.
        annotations: COCO json that gives the images' ids and which images to take.
        exif: see `survey_images`; what a store was begun with stays.
        max_pixels: see `open_image`.
        draw: number of proposals to draw for each image, into `output/drawn`.
        above_output: the folder of all results, if it is another one: what lies below is no input.
        backend: one of `BACKENDS`.
        write_json: write proposals.json (COCO results) as well, which is larger than the store.

    Raises:
        ValueError: a backend that cannot be had, no images, annotations that are not COCO, a store
            made with other settings or ids, or for another folder (files of the same names would
            pass for done).
    """
    _check_draw(draw)
    # Leave out the images that earlier runs have done.
    store = ProposalStore(output)
    done = store.images()
    known = {image_id: image["file_name"] for image_id, image in done.items()}
    passed_over: Counter[str] = Counter()
    unnamable: list[str] = []
    # A detector's proposals lie below its output, which is then no input either.
    files = find_images(
        source,
        annotations,
        known,
        output=above_output or store.directory,
        passed_over=passed_over,
        unnamable=unnamable,
    )[:max_images]
    todo = [file for file in files if file.image_id not in done]
    frame = _choose_frame(store, files, annotations, exif)
    read = partial(open_image, exif=frame, max_pixels=max_pixels)
    if distributed.is_main():
        # Stores that are older than the setting have none.
        inputs = {
            "image_folder": str(common_folder(files)),
            "exif": None if frame == APPLY else frame,
        }
        store.open_for(settings | {"backend": backend} | inputs)
    distributed.barrier()  # every process has seen the same store before one adds to it
    if todo and backend == "openvino-int8":
        network = store.directory / "quantized" / "dense.xml"
        run_in_8_bits(proposer, [file.path for file in files], network, read)
    # Propose, each process for its part of the images.
    part = todo[distributed.rank() :: distributed.world_size()]
    broken = list(itertools.chain(*distributed.gather(_propose(proposer, part, store, read))))
    summary = Summary(len(todo) - len(broken), len(files) - len(todo), broken + unnamable)
    summary.passed_over = passed_over
    if distributed.is_main():
        summary.found = store.count()
        path = store.directory
        if write_json:
            path /= PROPOSALS
            if summary.done or not _is_newer(path, store.shards()):
                store.write_json()
        _report(summary, "proposals", path, store.directory)
        _report_cut_off(store, settings)
    if draw:
        _draw(store, files, draw, read)
    distributed.barrier()
    return summary


def _choose_frame(
    store: ProposalStore, files: list[ImageFile], annotations: str | Path | None, exif: str
) -> str:
    """The frame that images are read in, the same in all processes; says why."""
    if exif == AUTO and store.path.exists():
        exif = store.exif()

    def annotated_sizes() -> list[Size | None]:
        images = read_image_list(annotations) if annotations else []
        sizes = {i.id: (i.height, i.width) for i in images if i.height and i.width}
        return [sizes.get(file.image_id) for file in files]

    def overfull() -> list[int]:
        try:
            coco = CocoInstances.load(str(annotations))
        except ValueError:  # it lists images only
            return []
        ids = set(coco.image_ids[list(overfull_images(coco))].tolist())
        return [i for i, file in enumerate(files) if file.image_id in ids]

    lines: list[str] = []
    if distributed.is_main():
        exif, lines = survey_images(
            [file.path for file in files],
            exif=exif,
            annotated_sizes=annotated_sizes if annotations else None,
            overfull=overfull,
        )
    for line in lines:
        distributed.say(line)
    return distributed.gather(exif)[0]


def _is_newer(path: Path, others: Iterable[Path]) -> bool:
    if not path.exists():
        return False
    written = path.stat().st_mtime_ns
    return all(other.stat().st_mtime_ns <= written for other in others)


def _check_draw(draw: int) -> None:
    if draw < 0:
        raise ValueError(f"--draw must be at least 0, got {draw}")


def _propose(
    proposer: Proposer,
    files: list[ImageFile],
    store: ProposalStore,
    read: Callable[[Path], Image],
) -> list[str]:
    """Adds shards to the store; returns messages on the images that were left out."""
    broken: list[str] = []
    turned = store.exif() == APPLY

    def process(file: ImageFile, image: Image) -> Proposals:
        proposals = proposer(image, image_id=file.image_id, file_name=file.file_name)
        return replace(proposals, georeference=read_georeference(file.path, turned=turned))

    images = process_images(
        files,
        process,
        broken=broken,
        advice="make the image smaller or lower the largest of --scales",
        read=read,
    )
    progress = progress_bar(images, total=len(files), unit="img", enabled=distributed.is_main())
    pending: list[Proposals] = []
    try:
        for _, proposals in progress:
            pending.append(proposals)
            if len(pending) >= MAX_IMAGES_IN_SHARD or sum(map(len, pending)) >= MAX_ROWS:
                store.write_shard(pending, writer=distributed.rank())
                pending = []
    finally:  # Ctrl-C keeps what is done
        if pending:
            store.write_shard(pending, writer=distributed.rank())
    return broken


def _report(summary: Summary, found: str, results: Path, output: Path) -> None:
    """Writes broken.json and metrics.json, and prints the same; `found` is their name."""
    write_json(output / "broken.json", summary.broken)
    counts = {"images": summary.done + summary.done_before, "broken": len(summary.broken)}
    if passed_over := summary.passed_over.total():
        counts["passed_over"] = passed_over
    write_json(output / "metrics.json", counts | {found: summary.found})
    before = f" ({summary.done_before} were there already)" if summary.done_before else ""
    print(
        f"{counts['images']} images{before}, {summary.found:,} {found}, "
        f"{counts['broken']} files could not be used; results in {results}"
    )
    if passed_over:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.passed_over.most_common())
        print(f"  passed over {passed_over:,} other files: {kinds}")
    for message in summary.broken:
        print(f"  left out: {message}")


def _report_cut_off(store: ProposalStore, settings: dict) -> None:
    """Says in how many of a store's images the limit left out what looks like an object."""
    if not (cut_off := store.cut_off()):
        return
    limit = f"{settings.get('num_proposals')}"
    if per_megapixel := settings.get("per_megapixel"):
        limit += f", or {per_megapixel:g} per megapixel,"
    print(
        f"  the limit of {limit} cut off proposals above .5 in {len(cut_off):,} of "
        f"{len(store.images()):,} images ({max(cut_off.values()):,} in the worst): "
        "--num-proposals or --per-megapixel"
    )


def _draw(
    store: ProposalStore, files: list[ImageFile], count: int, read: Callable[[Path], Image]
) -> None:
    """Pictures of this process's part of the store's images, also of those of earlier runs."""
    paths = {file.file_name: file.path for file in files}
    for proposals in itertools.islice(store, distributed.rank(), None, distributed.world_size()):
        if proposals.file_name in paths:
            with suppress(ImageError):  # the file has gone since its proposals were made
                picture = draw_proposals(read(paths[proposals.file_name]), proposals, count)
                save_in_folder(picture, store.directory / "drawn", proposals.file_name)


def image_folder(store: ProposalStore, given: Path | None) -> Path:
    """The folder that a store's file names are relative to: as given, or as the store knows it."""
    store.require_shards()
    if given is not None and not given.is_dir():
        raise ValueError(
            f"--images {given} is no folder; with --proposals it is the one that the store's file "
            "names are relative to"
        )
    folder = given or store.settings().get("image_folder")
    if folder is None:
        raise ValueError(f"{store.directory} does not say where its images are; give --images")
    return Path(folder)


@locks_output
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

    Beside it go the detector's categories and a list of the images, since results have ids only.

    Args:
        images: the folder that the store's file names are relative to.
        settings: what the detections depend on, beside the images and the store.
        draw: number of detections to draw on each image, into `output/drawn`.

    Raises:
        ValueError: no store, or none of its images is in the folder or can be used.
    """
    _check_draw(draw)
    shards = store.require_shards()
    stored = list(store.images().values())
    names = [image["file_name"] for image in stored]
    if not any(not leads_out(name) and (images / name).is_file() for name in names):
        raise ValueError(f"{images}: none of the {len(names)} images of {store.directory} is there")
    detector.check_memory((image["height"], image["width"]) for image in stored)
    # Keep the parts of an interrupted run that had the same settings: one for each shard.
    parts = ResumableDirectory(output / "parts")
    if distributed.is_main():
        stamps = [[str(s.resolve()), s.stat().st_size, s.stat().st_mtime_ns] for s in shards]
        inputs = {"images": str(images.resolve()), "draw": draw, "proposals": stamps}
        parts.open_for(settings | inputs, discard=True)
    distributed.barrier()
    part_of = {shard: parts.directory / f"{shard.stem}.json" for shard in shards}
    todo = [shard for shard in shards if not part_of[shard].exists()]
    distributed.barrier()  # every process has seen the same parts before one adds to them
    # Detect, each process in the images of its part of the shards.
    assigned = todo[distributed.rank() :: distributed.world_size()]
    for shard in progress_bar(assigned, unit="shard", enabled=distributed.is_main()):
        part: dict[str, list] = {"results": [], "broken": []}
        for image, found in detect_in_shard(detector, store, shard, images, part["broken"]):
            if draw:
                picture = draw_detections(image, found, detector.category_names, draw)
                save_in_folder(picture, output / "drawn", found.file_name)
            part["results"] += results_of(found)
        write_atomically(part_of[shard], json.dumps(part).encode())
    distributed.barrier()
    # Join the parts to one file of results.
    broken = list(_joined(part_of.values(), "broken"))
    summary = Summary(len(names) - len(broken), 0, broken)
    distributed.barrier()  # every process has read them
    if distributed.is_main():
        if summary.done:
            results = _joined(part_of.values(), "results")
            write_json(categories_file(output / DETECTIONS), detector.categories)
            store.write_images(images_file(output / DETECTIONS), detector.categories)
            summary.found = write_results(output / DETECTIONS, results)
            _report(summary, "detections", output / DETECTIONS, output)
        shutil.rmtree(parts.directory)
    if not summary.done:
        raise ValueError(
            f"none of the images of {store.directory} could be used; the first: {broken[0]}"
        )
    return summary


def _joined(parts: Iterable[Path], key: str) -> Iterator:
    return itertools.chain.from_iterable(json.loads(part.read_bytes())[key] for part in parts)


def detect_in_shard(
    detect: Callable[[Image, Proposals], T],
    store: ProposalStore,
    shard: Path,
    images: Path,
    broken: list[str],
) -> Iterator[tuple[Image, T]]:
    """The images of a shard that have proposals, and what `detect` finds in each.

    Args:
        detect: takes an image and its proposals.
        images: the folder that the store's file names are relative to.
        broken: see `process_images`; also images of another size than their proposals'.
    """
    proposals_of = {proposals.image_id: proposals for proposals in store.read_shard(shard)}

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
            broken.append(str(ImageError(f"{shard}: {p.file_name} is no name within a folder")))
        else:
            files.append(ImageFile(image_id, p.file_name, images / p.file_name))
    advice = "make the image smaller or lower --short-sides"
    # Images as large as their proposals' were allowed when these were made.
    largest = max((p.height * p.width for p in proposals_of.values()), default=0)
    read = partial(open_image, exif=store.exif(), max_pixels=max(largest, MAX_PIXELS))
    yield from process_images(files, process, broken=broken, advice=advice, read=read)
