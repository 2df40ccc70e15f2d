"""Proposals for many images.

An interrupted run, started again, does what is left. Processes share the images.
"""

import itertools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datasets.coco import CocoInstances
from datasets.coco_file import read_image_list
from datasets.files import write_json as write_json_file
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
from datasets.remote import AnyPath, RemotePath, is_uri, list_files
from pipeline import distributed
from pipeline.inference.engines import Engine, in_this_process
from pipeline.inference.folder_report import DRAWN, Summary, check_draw, report
from pipeline.inference.image_files import (
    ImageFile,
    Paths,
    choose,
    common_folder,
    find_images,
    ids_of,
    process_images,
)
from pipeline.inference.openvino import QuantizedNetwork, run_in_8_bits
from pipeline.inference.proposal_store import ProposalStore, ShardWriter
from pipeline.inference.propose import Proposer
from pipeline.inference.shards import to_rows
from pipeline.inference.visualize import draw_proposals, save_in_folder
from pipeline.run_lock import locks_output, other_shards

LIST = "list"  # of the settings: which images shards are of
PROPOSALS = "proposals.json"
MAX_LOOKED_AT = 1000  # of the images that are done: looking at millions takes minutes
MAX_CHUNK = 8  # images of one task: what is lost when its worker is killed


@locks_output
def propose_images(
    proposer: Proposer,
    source: Sources,
    output: str | AnyPath,
    *,
    settings: dict,
    annotations: str | Path | None = None,
    exif: str = AUTO,
    max_pixels: int = MAX_PIXELS,
    draw: int = 0,
    above_output: AnyPath | None = None,
    max_images: int | None = None,
    backend: str = "torch",
    shard: tuple[int, int] | None = None,
    write_json: bool = True,
    engine: Engine = in_this_process,
) -> Summary:
    """Fills the proposal store `output` for images: a folder, file or glob, or several, or a list.

    The store is a folder, or the URI of one.

    Args:
        settings: what the proposals depend on.
        annotations: COCO json that gives the images' ids and which images to take.
        exif: see `survey_images`; what a store was begun with stays.
        max_pixels: see `open_image`.
        draw: number of proposals to draw for each image, into `output/drawn`.
        above_output: the folder of all results, if it is another one: what lies below is no input.
        backend: one of `BACKENDS`.
        shard: (i, n): do every nth image from the ith on, counted from 1. Such processes fill one
            store, each knowing nothing of the others; they write no proposals.json.
        write_json: write proposals.json (COCO results) as well, which is larger than the store.
        engine: who proposes; others than this process load the proposer themselves.

    Raises:
        ValueError: a backend that cannot be had, no images, annotations that are not COCO, a store
            made with other settings or ids, or for another folder (files of the same names would
            pass for done), or a shard that cannot be.
    """
    store = ProposalStore(output)
    check_draw(draw, store.directory)
    if backend == "openvino-int8" and isinstance(store.directory, RemotePath):
        raise ValueError(f"--backend openvino-int8 needs a folder as --output, got {output}")
    if shard and distributed.world_size() > 1:
        raise ValueError("--shard is for processes without torchrun, whose own share the images")
    # Leave out the images that earlier runs have done.
    known = store.catalog().select(["image_id", "file_name"])
    passed_over: Counter[str] = Counter()
    unnamable: list[str] = []
    # A detector's proposals lie below its output, which is then no input either.
    files = find_images(
        source,
        annotations,
        known,
        shard=shard or (1, 1),
        output=above_output or store.directory,
        passed_over=passed_over,
        unnamable=unnamable,
    )[:max_images]
    frame = _choose_frame(store, files, annotations, exif)
    read = partial(open_image, exif=frame, max_pixels=max_pixels)
    if distributed.is_main():
        # Stores that are older than the setting have none.
        inputs = {
            "image_folder": str(common_folder(files)),
            "exif": None if frame == APPLY else frame,
        }
        store.open_for(settings | {"backend": backend} | inputs)
        store.write_index()
    distributed.barrier()  # every process has seen the same store before one adds to it
    listed = files
    if shard:
        _agree_on_list(store, listed)
        files = listed[shard[0] - 1 :: shard[1]]
    is_done = np.isin(ids_of(files), known["image_id"].to_numpy())
    todo = choose(files, np.flatnonzero(~is_done))
    if distributed.is_main():
        _say_what_changed(store, choose(files, np.flatnonzero(is_done)[:MAX_LOOKED_AT]))
    quantized = None
    if todo and backend == "openvino-int8":
        assert isinstance(store.directory, Path)
        quantized = store.directory / "quantized" / "dense.xml"
        if shard and not quantized.exists():
            raise ValueError(
                "--shard with --backend openvino-int8 needs the calibrated network: make it by a "
                "run without --shard, of an image"
            )
        run_in_8_bits(proposer, Paths(listed), quantized, read)
    # Propose, each process for its part of the images.
    part = todo[distributed.rank() :: distributed.world_size()]
    writer = shard[0] - 1 if shard else distributed.rank()
    work = partial(propose_each, read=read, turned=store.exif() == APPLY, quantized=quantized)
    messages = distributed.gather(_propose(partial(engine, work, proposer), part, store, writer))
    broken = list(itertools.chain(*messages))
    summary = Summary(len(todo) - len(broken), len(files) - len(todo), broken + unnamable)
    summary.passed_over = passed_over
    if distributed.is_main():
        store.write_index()
        found = store.catalog()
        if shard:
            found = found.filter(np.isin(found["image_id"].to_numpy(), ids_of(files)))
        summary.found = pc.sum(found["num_proposals"].cast(pa.int64())).as_py() or 0
        path, name = store.directory, f"-{shard[0]}-of-{shard[1]}" if shard else ""
        if write_json and not shard:
            path /= PROPOSALS
            if summary.done or not _is_newer(PROPOSALS, store):
                store.write_json()
        report(summary, "proposals", path, store.directory, draw=draw, part=name)
        _report_cut_off(store, settings)
    if draw:
        _draw(store, files, draw, read)
    distributed.barrier()
    return summary


def _agree_on_list(store: ProposalStore, files: Sequence[ImageFile]) -> None:
    """Makes sure that shards written now are of one list: ids and parts follow from it.

    Raises:
        ValueError: others have another one.
    """
    checksum = 0
    for start in range(0, len(files), 10_000):
        names = "\n".join(file.file_name for file in files[start : start + 10_000])
        checksum = zlib.crc32(names.encode(), checksum)
    images, settings = f"{len(files)}, checksum {checksum:08x}", store.settings()
    if settings.get(LIST, images) != images and (others := other_shards(store.directory)):
        part, count = others[0]
        raise ValueError(
            f"{store.directory}: shard {part}/{count} is at work on other images "
            f"({settings[LIST]} -> {images}); give all shards the same"
        )
    if settings.get(LIST) != images:
        write_json_file(store.path, settings | {LIST: images})


def _choose_frame(
    store: ProposalStore, files: Sequence[ImageFile], annotations: str | Path | None, exif: str
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
        ids = coco.image_ids[list(overfull_images(coco))]
        return np.flatnonzero(np.isin(ids_of(files), ids)).tolist()

    lines: list[str] = []
    if distributed.is_main():
        exif, lines = survey_images(
            Paths(files),
            exif=exif,
            annotated_sizes=annotated_sizes if annotations else None,
            overfull=overfull,
        )
    for line in lines:
        distributed.say(line)
    return distributed.gather(exif)[0]


def _say_what_changed(store: ProposalStore, files: Sequence[ImageFile]) -> None:
    """Says if images were changed after their proposals were made, which stay as they are."""
    times, changed = store.times(ids_of(files)), []
    for file in files:
        with suppress(OSError):
            if not is_uri(file.path) and os.stat(file.path).st_mtime_ns > times[file.image_id]:
                changed.append(file.file_name)
    if changed:
        distributed.say(
            f"{len(changed)} images are newer than their proposals, such as {changed[0]}: delete "
            f"{store.directory} or choose another --output to make new ones"
        )


def _is_newer(name: str, store: ProposalStore) -> bool:
    """Whether a file of the store's folder is there and no shard is newer."""
    _, written = list_files(store.directory).get(name, (0, -1))
    return all(time <= written for _, time in store.stamps().values())


def _propose(
    run: Callable[..., Iterator[pa.Table]],
    files: Sequence[ImageFile],
    store: ProposalStore,
    writer: int,
) -> list[str]:
    """Adds shards to the store, as its `writer`; returns messages on images that were left out."""
    broken: list[str] = []
    progress = progress_bar(total=len(files), unit="img", enabled=distributed.is_main())
    with progress, ShardWriter(store, writer) as shards:
        for rows in run(files, broken, largest=MAX_CHUNK):
            shards.add_rows(rows)
            progress.update(len(rows))
    return broken


def propose_each(
    proposer: Proposer,
    files: Sequence[ImageFile],
    broken: list[str],
    *,
    read: Callable[[str | Path], Image],
    turned: bool,
    quantized: Path | None,
) -> Iterator[pa.Table]:
    """A row of `shards.SCHEMA` for each image; see `process_images`.

    Args:
        turned: images are read as their EXIF orientation says.
        quantized: the network in 8 bits that the proposer is to have.
    """
    if quantized and not isinstance(proposer.dense, QuantizedNetwork):
        proposer.dense = QuantizedNetwork(quantized)

    def process(file: ImageFile, image: Image) -> pa.Table:
        proposals = proposer(image, image_id=file.image_id, file_name=file.file_name)
        return to_rows(
            [replace(proposals, georeference=read_georeference(file.path, turned=turned))]
        )

    advice = "make the image smaller or lower the largest of --scales"
    images = process_images(files, process, broken=broken, advice=advice, read=read)
    return (rows for _, rows in images)


def _report_cut_off(store: ProposalStore, settings: dict) -> None:
    """Says in how many of a store's images the limit left out what looks like an object."""
    if not (cut_off := store.cut_off()):
        return
    limit = f"{settings.get('num_proposals')}"
    if per_megapixel := settings.get("per_megapixel"):
        limit += f", or {per_megapixel:g} per megapixel,"
    print(
        f"  the limit of {limit} cut off proposals above .5 in {len(cut_off):,} of "
        f"{len(store.catalog()):,} images ({max(cut_off.values()):,} in the worst): "
        "--num-proposals or --per-megapixel"
    )


def _draw(
    store: ProposalStore,
    files: Sequence[ImageFile],
    count: int,
    read: Callable[[str | Path], Image],
) -> None:
    """Pictures of this process's part of the store's images, also of those of earlier runs."""
    assert isinstance(store.directory, Path)
    paths = {file.file_name: file.path for file in files}
    for proposals in itertools.islice(store, distributed.rank(), None, distributed.world_size()):
        if proposals.file_name in paths:
            with suppress(ImageError):  # the file has gone since its proposals were made
                image = read(paths[proposals.file_name])
                if image.shape[:2] != (proposals.height, proposals.width):
                    print(f"not drawn: {proposals.file_name} has another size than its proposals")
                    continue
                picture = draw_proposals(image, proposals, count)
                save_in_folder(picture, store.directory / DRAWN, proposals.file_name)
