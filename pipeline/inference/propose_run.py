"""Proposals for many images.

In which process, what is left to do, and what had to be left out.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from datasets.files import write_json
from datasets.images import ImageError, read_image
from pipeline import distributed
from pipeline.inference.image_files import ImageFile, common_folder, find_images, read_ahead
from pipeline.inference.memory import NETWORK_ERRORS, describe_failure, release_between_sizes
from pipeline.inference.openvino import QuantizedNetwork, quantize
from pipeline.inference.proposals import MAX_ROWS, Proposals, ProposalStore
from pipeline.inference.propose import Proposer
from pipeline.inference.visualize import draw_proposals, picture_path, save_jpeg

MAX_IMAGES_IN_SHARD = 16  # so little is lost by a kill
# For the network in 8 bits: more change AR by less than its noise; larger ones take memory.
CALIBRATION_IMAGES, CALIBRATION_PIXELS = 64, 1 << 21


@dataclass
class Summary:
    """What a run did.

    Images done now and before, proposals in the store, messages on files left out: unreadable, or
    the network failed on them.
    """

    done: int = 0
    done_before: int = 0
    proposals: int = 0
    broken: list[str] = field(default_factory=list)

    @property
    def none_readable(self) -> bool:
        """Whether there was something to do and nothing of it could be used."""
        return bool(self.broken) and not self.done and not self.done_before


def propose_images(
    proposer: Proposer,
    source: str | Path,
    output: str | Path,
    *,
    settings: dict,
    annotations: str | Path | None = None,
    draw: int = 0,
    max_images: int | None = None,
    backend: str = "torch",
) -> Summary:
    """Fills the proposal store `output` for a folder, file or glob, and writes proposals.json.

    Args:
        settings: what the proposals depend on; a store made with other settings is refused.
        annotations: COCO json that gives the images' ids and which images to take.
        max_images: only the first so many images.
        draw: number of proposals to draw for each image, into `output/drawn`.
        backend: one of `BACKENDS`.

    Raises:
        ValueError: a backend that cannot be had, no images, annotations that are not COCO, a store
            made with other settings or ids, or for another folder (files of the same names would
            pass for done).
    """
    if draw < 0:
        raise ValueError(f"--draw must be at least 0, got {draw}")
    store = ProposalStore(output)
    done = store.images()
    files = find_images(source, annotations, {name: image["id"] for name, image in done.items()})
    files = files[:max_images]
    left = [file for file in files if file.file_name not in done]
    own = {"backend": backend, "image_folder": str(common_folder(files))}
    if distributed.is_main():
        store.open_for(settings | own)
    distributed.barrier()  # everyone has seen the same store before anyone adds to it
    if left and backend == "openvino-int8":
        _quantize(proposer, files, Path(output) / "quantized" / "dense.xml")
    mine = left[distributed.rank() :: distributed.world_size()]
    parts = distributed.gather(_propose_rank(proposer, mine, store))
    summary = Summary(
        sum(p[0] for p in parts), len(files) - len(left), 0, [m for p in parts for m in p[1]]
    )
    if distributed.is_main():
        _finish(store, summary, Path(output))
    if draw:
        _draw_rank(store, files, Path(output) / "drawn", draw)
    distributed.barrier()
    return summary


def _quantize(proposer: Proposer, files: list[ImageFile], path: Path) -> None:
    """Has the proposer run in 8 bits; the network is made once and kept for later runs.

    It is calibrated on images spread evenly over the files, each at a scale of its own.
    """
    if proposer.device.type != "cpu":
        raise ValueError("the backend openvino-int8 is for CPUs; use --device cpu or another one")
    if distributed.is_main() and not path.exists():
        number = min(CALIBRATION_IMAGES, len(files))
        print(f"calibrating the network in 8 bits on {number} images", flush=True)
        quantize(proposer.dense, _calibration_samples(proposer, files), path)
    distributed.barrier()
    proposer.dense = QuantizedNetwork(path)


def _calibration_samples(proposer: Proposer, files: list[ImageFile]) -> Iterator[Tensor]:
    rng = np.random.default_rng(0)
    for number in np.linspace(0, len(files) - 1, CALIBRATION_IMAGES).astype(int):
        log2_scale = float(rng.choice(proposer.log2_scales))
        with suppress(ImageError):
            image = read_image(files[number].path)
            largest = math.log2(CALIBRATION_PIXELS / (image.shape[0] * image.shape[1])) / 2
            yield proposer.scale(image, min(log2_scale, largest))[0]


def _propose_rank(
    proposer: Proposer, files: list[ImageFile], store: ProposalStore
) -> tuple[int, list[str]]:
    pending: list[Proposals] = []
    made, broken = 0, []
    writer = distributed.rank()
    images = release_between_sizes(read_ahead(files))
    progress = tqdm(images, total=len(files), unit="img", disable=not distributed.is_main())
    try:
        for file, image in progress:
            try:
                pending.append(_propose_one(proposer, file, image))
            except ImageError as error:
                broken.append(str(error))
                progress.write(f"skipped: {error}")
                continue
            made += 1
            if len(pending) >= MAX_IMAGES_IN_SHARD or sum(map(len, pending)) >= MAX_ROWS:
                store.write_shard(pending, writer=writer)
                pending = []
    finally:  # Ctrl-C keeps what is done
        if pending:
            store.write_shard(pending, writer=writer)
    return made, broken


def _propose_one(proposer: Proposer, file: ImageFile, image: np.ndarray | ImageError) -> Proposals:
    """Raises: ImageError: the image was not read, or the network failed on it (out of memory)."""
    if isinstance(image, ImageError):
        raise image
    try:
        return proposer(image, image_id=file.image_id, file_name=file.file_name)
    except NETWORK_ERRORS as error:
        advice = "make the image smaller or lower the largest of --scales"
        problem = describe_failure(error, image, advice=advice)
        raise ImageError(f"{file.path}: {problem}") from error


def _draw_rank(store: ProposalStore, files: list[ImageFile], directory: Path, count: int) -> None:
    """Pictures of this process's share of what the store holds on the files.

    Also of what it holds from earlier runs.
    """
    paths = {file.file_name: file.path for file in files}
    for proposals in itertools.islice(store, distributed.rank(), None, distributed.world_size()):
        if proposals.file_name not in paths:
            continue
        with suppress(ImageError):  # the file has gone since its proposals were made
            picture = draw_proposals(read_image(paths[proposals.file_name]), proposals, count)
            save_jpeg(picture, picture_path(directory, proposals.file_name))


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
        f"{len(summary.broken)} files could not be used; results in {path}"
    )
    for message in summary.broken:
        print(f"  left out: {message}")
