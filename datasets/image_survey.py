"""A look at the headers of images before a run: whether EXIF turns them, and their samples."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from datasets.coco import CocoInstances
from datasets.image_headers import Header, read_header
from datasets.images import APPLY, IGNORE, sample_bits
from datasets.large_images import LARGE_PIXELS
from datasets.remote import is_uri, open_file
from datasets.segmentations import Reason

AUTO = "auto"
EXIF_CHOICES = (AUTO, APPLY, IGNORE)
MAX_SURVEYED = 10_000  # images, spread evenly: a second on a local disk
MAX_REMOTE = 200  # of an object store, where each takes a tenth of a second
MAX_DECODED = 4  # images of more than 8 bits
NUM_THREADS = 8  # network drives answer several at once

Size = tuple[int, int]  # height and width


def survey_images(
    paths: Sequence[str | Path],
    *,
    exif: str,
    annotated_sizes: Callable[[], Sequence[Size | None]] | None = None,
    overfull: Callable[[], Collection[int]] = tuple,
) -> tuple[str, list[str]]:
    """Which frame images are read in, and lines for the user on orientation and samples.

    Args:
        exif: "auto" chooses "ignore" where the annotated sizes are those of the stored pixels, for
            every image that its EXIF turns by 90 degrees and that is not square; else "apply".
        annotated_sizes: gives the sizes that the annotations have for the paths; called only when
            EXIF turns an image.
        overfull: gives indices of paths whose annotations reach beyond the annotated size, so that
            this size proves nothing.

    Returns:
        "apply" or "ignore", and the lines. Files that cannot be read are left to the run.
    """
    limit = MAX_REMOTE if paths and is_uri(paths[0]) else MAX_SURVEYED
    chosen = np.unique(np.linspace(0, max(len(paths) - 1, 0), limit).astype(int)).tolist()
    chosen = chosen[: len(paths)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        headers = dict(zip(chosen, pool.map(_header, (paths[i] for i in chosen)), strict=True))
    readable = {i: header for i, header in headers.items() if header is not None}
    turned = {i: header for i, header in readable.items() if header.orientation != 1}
    deep = {paths[i]: header for i, header in readable.items() if header.bits > 8}
    looked_at = f"{len(readable):,} images"
    if len(chosen) < len(paths):
        looked_at += f" that were looked at (of {len(paths):,})"
    frame, lines = (APPLY if exif == AUTO else exif), []
    if turned:
        shown = _frame_of_sizes(turned, annotated_sizes() if annotated_sizes else None)
        contradicted = shown == IGNORE and not turned.keys().isdisjoint(overfull())
        if exif == AUTO and shown and not contradicted:
            frame = shown
        lines.append(
            f"{len(turned):,} of {looked_at} are turned by their EXIF orientation; "
            + _describe_frame(frame, shown, contradicted, annotated_sizes is not None)
        )
    if deep:
        lines.append(_describe_samples(deep, looked_at))
    return frame, lines


def overfull_images(coco: CocoInstances) -> set[int]:
    """Indices of the images whose annotations reach beyond them."""
    height, width = coco.image_sizes[coco.image_index].T
    is_beyond = (coco.boxes[:, 2] > width + 1) | (coco.boxes[:, 3] > height + 1)
    found = set(coco.image_index[is_beyond].tolist())
    if Reason.OUTSIDE in coco.left_out:
        found |= set(np.flatnonzero(coco.has_left_out).tolist())
    return found


def _header(path: str | Path) -> Header | None:
    with suppress(OSError, ValueError), open_file(path) as file:
        return read_header(file)
    return None


def _frame_of_sizes(turned: dict[int, Header], sizes: Sequence[Size | None] | None) -> str | None:
    """The frame that the annotated sizes show for certain, if any."""
    if sizes is None:
        return None
    telling = [
        (sizes[i], (header.height, header.width))
        for i, header in turned.items()
        if header.orientation > 4 and header.width != header.height
    ]
    if telling and all(size == stored for size, stored in telling):
        return IGNORE
    if telling and all(size == stored[::-1] for size, stored in telling):
        return APPLY
    return None


def _describe_frame(frame: str, shown: str | None, contradicted: bool, annotated: bool) -> str:
    reading = {APPLY: "read as turned", IGNORE: "read as stored"}
    text = f"they are {reading[frame]} (exif: {frame})"
    other = IGNORE if frame == APPLY else APPLY
    if contradicted:
        return (
            f"{text}: the annotated widths and heights are those of the stored pixels, but "
            "annotations reach beyond them; exchange width and height in the annotations"
        )
    if shown == frame:
        return f"{text}, as the annotated sizes show"
    if shown:
        return f"{text}, but the annotated sizes say {shown}"
    if not annotated:
        return text
    return f"{text}; if annotations lie beside their objects, set data.exif or --exif to {other}"


def _describe_samples(deep: dict[str | Path, Header], looked_at: str) -> str:
    used = []
    small = [path for path, header in deep.items() if header.pixels <= LARGE_PIXELS]
    for path in small[:MAX_DECODED]:
        with suppress(OSError, ValueError, MemoryError):
            used.append(sample_bits(path))
    text = f"{len(deep):,} of {looked_at} have samples of more than 8 bits"
    if not used:
        return text
    bits = f"{min(used)} to {max(used)}" if min(used) < max(used) else f"{used[0]}"
    return f"{text}, of which {bits} are used; an image is scaled by the bits that it uses"
