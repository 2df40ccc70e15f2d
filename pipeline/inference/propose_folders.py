"""Proposals for many images.

An interrupted run, started again, does what is left. Processes share the images.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets.coco import CocoInstances
from datasets.coco_file import read_image_list
from datasets.image_survey import AUTO, Size, overfull_images, survey_images
from datasets.images import (
    APPLY,
    MAX_PIXELS,
    Image,
    ImageError,
    Sources,
    open_image,
)
from datasets.large_images import read_georeference
from datasets.progress import progress_bar
from pipeline import distributed
from pipeline.inference.folder_report import DRAWN, Summary, check_draw, report
from pipeline.inference.image_files import ImageFile, common_folder, find_images, process_images
from pipeline.inference.openvino import run_in_8_bits
from pipeline.inference.proposals import (
    MAX_ROWS,
    Proposals,
    ProposalStore,
)
from pipeline.inference.propose import Proposer
from pipeline.inference.visualize import draw_proposals, save_in_folder
from pipeline.run_lock import locks_output

MAX_IMAGES_IN_SHARD = 16  # so a kill loses little
PROPOSALS = "proposals.json"


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
    check_draw(draw)
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
        report(summary, "proposals", path, store.directory, draw=draw)
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
                save_in_folder(picture, store.directory / DRAWN, proposals.file_name)
