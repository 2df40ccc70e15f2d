"""A COCO instances json in flat arrays that data-loader workers share.

I: images, A: usable annotations, C: categories.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from datasets import segmentations as seg
from datasets.coco_columns import (
    Elements,
    GrowingColumns,
    annotation_columns,
    category_columns,
    image_columns,
)
from datasets.json_arrays import read_arrays
from datasets.rle import MAX_PIXELS

FAR = 20  # times the image's longer side: what reaches so far out is a mistake


class CocoInstances:
    """Images, categories and usable annotations of a COCO instances json; sorted by image.

    Attributes:
        image_ids (I,) int64, image_sizes (I, 2) int32: height and width in pixels.
        has_left_out (I,) bool: an annotation of the image was left out, so that the image, or a
            part of it, cannot be taken for background.
        image_starts (I + 1,) int64: image i has annotations image_starts[i]:image_starts[i + 1].
        category_ids (C,) int64, ascending; category_names: C strings.
        annotation_ids (A,) int64; image_index (A,) int32 and category_index (A,) int32: rows of
            the arrays above; is_crowd (A,) bool; is_difficult (A,) bool: PASCAL VOC's flag, which
            its jsons in COCO's format call "ignore"; areas (A,) float32 in pixels;
            boxes (A, 4) float32 xyxy in absolute pixels.
        left_out: number of annotations that cannot be used, by reason.
    """

    path: str
    image_ids: np.ndarray
    image_sizes: np.ndarray
    has_left_out: np.ndarray
    image_starts: np.ndarray
    category_ids: np.ndarray
    category_names: list[str]
    annotation_ids: np.ndarray
    image_index: np.ndarray
    category_index: np.ndarray
    is_crowd: np.ndarray
    is_difficult: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    left_out: dict[str, int]

    @classmethod
    def load(cls, path: str | Path) -> CocoInstances:
        """Read and check a COCO instances json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: its structure is broken; one line with the file and the place. A single
                annotation that cannot be used is no error: it is left out and counted.
        """
        columns_of = {
            "images": image_columns,
            "annotations": annotation_columns,
            "categories": category_columns,
        }
        columns = {name: GrowingColumns() for name in columns_of}
        with _no_garbage_collection():
            for name, first, elements in read_arrays(path, columns_of):
                columns[name].append(columns_of[name](Elements(path, name, first, elements)))
        self = cls()
        self.path = str(path)
        self._set_images(columns["images"].arrays())
        self._set_categories(columns["categories"].arrays())
        self._set_annotations(columns.pop("annotations").arrays())
        _return_freed_memory()
        return self

    def _set_images(self, images: dict[str, np.ndarray]) -> None:
        self.image_ids = images["id"]
        if not len(self.image_ids):
            raise ValueError(f'{self.path}: "images" is empty')
        _refuse_duplicates(self.path, "images", self.image_ids)
        sizes = np.stack([images["height"], images["width"]], axis=1)
        too_large = np.flatnonzero(sizes.prod(axis=1) > MAX_PIXELS)
        if too_large.size:
            height, width = sizes[too_large[0]]
            raise ValueError(
                f"{self.path}: images[{too_large[0]}] has {width} x {height} pixels, "
                f"more than {MAX_PIXELS}"
            )
        self.image_sizes = sizes.astype(np.int32)
        self._name_bytes, self._name_starts = images["name_bytes"], _starts(images["name_length"])

    def _set_categories(self, categories: dict[str, np.ndarray]) -> None:
        _refuse_duplicates(self.path, "categories", categories["id"])
        order = np.argsort(categories["id"])
        self.category_ids = categories["id"][order]
        starts = _starts(categories["name_length"])
        self.category_names = [_text(categories["name_bytes"], starts, row) for row in order]

    def _set_annotations(self, columns: dict[str, np.ndarray]) -> None:
        image = _find(columns["image_id"], self.image_ids)
        category = _find(columns["category_id"], self.category_ids)
        reason = self._reasons(columns, image, category)
        counts = np.bincount(reason, minlength=len(seg.REASONS))[1:].tolist()
        self.left_out = {name: n for name, n in zip(seg.REASONS[1:], counts, strict=True) if n}
        self.has_left_out = np.zeros(len(self), bool)
        self.has_left_out[image[(reason != seg.USABLE) & (image >= 0)]] = True

        usable = np.flatnonzero(reason == seg.USABLE)
        rows = usable[np.argsort(image[usable], kind="stable")]
        self.annotation_ids = columns["id"][rows]
        self.image_index = image[rows].astype(np.int32)
        self.category_index = category[rows].astype(np.int32)
        self.is_crowd = columns["is_crowd"][rows]
        self.is_difficult = columns["is_difficult"][rows]
        self.areas = columns["area"][rows].astype(np.float32)
        self.boxes = columns["box"][rows].astype(np.float32)
        self.image_starts = np.searchsorted(self.image_index, np.arange(len(self) + 1))
        self._set_shapes(columns, rows)

    def _reasons(self, columns: dict, image: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Add what shows only beside the image: each annotation's index into REASONS, (A',)."""
        reason, sizes = columns["reason"].copy(), self.image_sizes[image]
        box, bounds = columns["box"], columns["bounds"]
        outside = ~(_overlaps(box, sizes) & _overlaps(bounds, sizes))
        # pycocotools draws a polygon's edges all the way, in memory too.
        reach = np.abs(np.concatenate([box, bounds], axis=1)).max(axis=1)
        outside |= reach > FAR * sizes.max(axis=1)
        is_rle = columns["rle_length"] > 0
        for code, is_so in (
            (seg.ZERO_AREA, (box[:, 2:] <= box[:, :2]).any(axis=1) | (columns["area"] <= 0)),
            (seg.OUTSIDE, outside),
            (seg.RLE_SIZE, is_rle & (columns["rle_size"] != sizes).any(axis=1)),
        ):
            reason[is_so & (reason == seg.USABLE)] = code
        reason[category < 0] = seg.UNKNOWN_CATEGORY
        reason[image < 0] = seg.UNKNOWN_IMAGE
        return reason

    def _set_shapes(self, columns: dict, rows: np.ndarray) -> None:
        """Polygons and RLEs stay in the file's order; only where each begins is sorted."""
        first_ring, ring_start = _starts(columns["ring_count"]), _starts(columns["ring_size"])
        self._first_ring, self._end_ring = first_ring[rows], first_ring[rows + 1]
        self._ring_starts, self._points = ring_start, columns["points"]
        rle_starts = _starts(columns["rle_length"])
        self._rle_start, self._rle_end = rle_starts[rows], rle_starts[rows + 1]
        self._rle_bytes = columns["rle_bytes"]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    def file_name(self, i: int) -> str:
        """The file name of image i as the json has it; it may contain folders."""
        return _text(self._name_bytes, self._name_starts, i)

    def polygons(self, a: int) -> list[np.ndarray] | None:
        """The rings of annotation a, each (n, 2) float32 in absolute pixels; None for an RLE.

        Rings of one or two points, which enclose nothing, are not among them.
        """
        first, end = self._first_ring[a], self._end_ring[a]
        if first == end:
            return None
        starts = self._ring_starts[first : end + 1].tolist()
        return [self._points[s:e].copy() for s, e in zip(starts, starts[1:], strict=False)]

    def rle(self, a: int) -> dict[str, Any]:
        """The mask of annotation a, {"size": [height, width], "counts": bytes}."""
        height, width = self.image_sizes[self.image_index[a]].tolist()
        rings = self.polygons(a)
        if rings is None:
            counts = self._rle_bytes[self._rle_start[a] : self._rle_end[a]].tobytes()
            return {"size": [height, width], "counts": counts}
        flat = [_as_written(ring).ravel().tolist() for ring in rings]
        return coco_mask.merge(coco_mask.frPyObjects(flat, height, width))

    def summary(self) -> str:
        """One line: what the file holds and what was left out."""
        line = (
            f"{self.path}: {len(self):,} images, {len(self.annotation_ids):,} annotations "
            f"({int(self.is_crowd.sum()):,} crowd) of {len(self.category_ids):,} categories"
        )
        if self.left_out:
            reasons = ", ".join(f"{name} {count:,}" for name, count in self.left_out.items())
            line += f"; left out {sum(self.left_out.values()):,}: {reasons}"
        return line

    def __getstate__(self) -> dict[str, Any]:
        """Arrays as shared tensors: a spawned data-loader worker maps them and copies nothing."""
        if "_shared" not in self.__dict__:
            self._shared = {}
            for name, value in list(self.__dict__.items()):
                if isinstance(value, np.ndarray):
                    tensor = torch.tensor(value)
                    if tensor.numel():
                        tensor.share_memory_()
                    self._shared[name] = tensor
                    setattr(self, name, tensor.numpy())
            _return_freed_memory()
        return {
            name: self._shared.get(name, value)
            for name, value in self.__dict__.items()
            if name != "_shared"
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value.numpy() if isinstance(value, torch.Tensor) else value)


def _find(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The row of each id in `known`, -1 where it is not there."""
    if not len(known):
        return np.full(len(ids), -1)
    order = np.argsort(known)
    rows = order[np.searchsorted(known, ids, sorter=order).clip(max=len(known) - 1)]
    return np.where(known[rows] == ids, rows, -1)


def _overlaps(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether boxes (n, 4) xyxy have points inside of images (n, 2) of height and width."""
    height, width = sizes.T
    x1, y1, x2, y2 = boxes.T
    return (x1 < width) & (y1 < height) & (x2 > 0) & (y2 > 0)


def _refuse_duplicates(path: str, array: str, ids: np.ndarray) -> None:
    order = np.argsort(ids, kind="stable")
    again = np.flatnonzero(np.diff(ids[order]) == 0)
    if again.size:
        first, second = order[again[0] : again[0] + 2].tolist()
        raise ValueError(f"{path}: {array}[{second}] has the id {ids[first]} of {array}[{first}]")


def _starts(lengths: np.ndarray) -> np.ndarray:
    """(n,) lengths -> (n + 1,) int64 offsets."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _text(encoded: np.ndarray, starts: np.ndarray, i: int) -> str:
    return encoded[starts[i] : starts[i + 1]].tobytes().decode("utf-8", "surrogatepass")


def _as_written(points: np.ndarray) -> np.ndarray:
    """The decimals that were rounded to float32: masks come out as pycocotools draws the json."""
    decimal = points.astype(np.float64).round(3)
    return np.where(decimal.astype(np.float32) == points, decimal, points)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of short-lived lists and dicts, none in a cycle: the collector would only search."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _return_freed_memory() -> None:
    """To the system: glibc keeps 64 MB, and what lies below a block still in use."""
    with contextlib.suppress(OSError, AttributeError):  # other systems have no such call
        ctypes.CDLL("libc.so.6").malloc_trim(0)
