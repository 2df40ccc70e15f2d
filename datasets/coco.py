"""COCO annotation files, checked, in flat arrays that data-loader workers share.

I: images, A: usable annotations, C: categories.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import compress
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from datasets import segmentations as seg
from datasets.annotated_boxes import (
    are_good,
    are_near,
    are_outside,
    as_corners,
    contradict,
    find_problems,
)
from datasets.category_names import choose_categories, listed, short
from datasets.coco_file import (
    NO_BOX,
    UNREADABLE,
    AnnotatedImage,
    Annotation,
    Category,
    decode,
    find_federated,
    read_arrays,
    refuse_duplicates,
)
from datasets.file_names import find_named_files
from datasets.segmentations import Reason
from datasets.sharing import SharedArrays

MAX_AREA = float(np.finfo(np.float32).max)
CHUNK = 256  # annotations decoded at once: for numpy to work in bulk, in the cache
# With these there is something wrong about the image, not about the segmentation alone: then a box
# beside it is not to be trusted.
MISPLACED = (Reason.RLE_SIZE, Reason.OUTSIDE)


class CocoInstances(SharedArrays):
    """Images, categories and usable annotations of a COCO instances json; sorted by image."""

    path: str
    image_ids: np.ndarray  # (I,) int64
    image_sizes: np.ndarray  # (I, 2) int32, height and width in pixels
    # (I,) bool: an annotation of the image was left out, so that the image, or a part of it, cannot
    # be taken for background.
    has_left_out: np.ndarray
    image_starts: np.ndarray  # (I + 1,) int64; image i has annotations starts[i]:starts[i + 1]
    category_ids: np.ndarray  # (C,) int64, ascending
    category_names: list[str]
    num_listed: int  # categories of the json; more than C where some were chosen
    federated: str  # where it says that not every object is annotated, see `find_federated`
    annotation_ids: np.ndarray  # (A,) int64
    image_index: np.ndarray  # (A,) int32, row of image_ids
    category_index: np.ndarray  # (A,) int32, row of category_ids
    is_crowd: np.ndarray  # (A,) bool
    is_difficult: np.ndarray  # (A,) bool, PASCAL VOC's flag: "ignore" in its jsons in COCO's format
    has_mask: np.ndarray  # (A,) bool, else there is a box only
    areas: np.ndarray  # (A,) float32 in pixels
    boxes: np.ndarray  # (A, 4) float32 xyxy in absolute pixels
    left_out: dict[str, int]  # number of annotations that cannot be used, by reason
    without_mask: dict[
        str, int
    ]  # of those with a box only, by what is wrong about the segmentation
    num_measured: int  # of boxes that contradicted the segmentation and were measured on it

    # Flat, in the file's order; spans (..., 2) int64 say where each piece begins and ends.
    _name_bytes: np.ndarray  # UTF-8
    _name_spans: np.ndarray  # (I, 2)
    _points: np.ndarray  # (P, 2) float32
    _ring_spans: np.ndarray  # (R, 2) of rings in the points
    _polygon_spans: np.ndarray  # (A, 2) of annotations in the rings, empty without polygons
    _rle_bytes: np.ndarray  # compressed counts
    _rle_spans: np.ndarray  # (A, 2), empty without an RLE

    @classmethod
    def load(cls, path: str | Path, chosen: Iterable[str] | None = None) -> CocoInstances:
        """Read and check a COCO instances json.

        Args:
            chosen: names or ids of the categories to take, see `choose_categories`; by default all.
                Objects of others are as if they were not annotated.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: its structure is broken, or it has not the chosen categories; one line with
                the file and the place. A single annotation that cannot be used is no error: it is
                left out and counted.
        """
        content = read_arrays(path, "images", "annotations", "categories")
        images = decode(path, "images", content.pop("images"), AnnotatedImage)
        categories = decode(path, "categories", content.pop("categories"), Category)
        if not images:
            raise ValueError(f'{path}: "images" is empty')
        refuse_duplicates(path, "images", images)
        refuse_duplicates(path, "categories", categories)

        self = cls()
        self.path = str(path)
        self.image_ids = np.array([image.id for image in images], np.int64)
        self.image_sizes = np.array([(image.height, image.width) for image in images], np.int32)
        self._set_file_names([image.file_name for image in images])
        self.federated, self.num_listed = find_federated(images, categories), len(categories)
        others: set[int] = set()
        if chosen is not None:
            known = {category.id: category.name for category in categories}
            others = known.keys() - choose_categories(path, known, chosen).keys()
            categories = [category for category in categories if category.id not in others]
        categories.sort(key=attrgetter("id"))
        self.category_ids = np.array([category.id for category in categories], np.int64)
        self.category_names = [category.name for category in categories]
        self._set_annotations(content.pop("annotations"), others)
        return self

    def _set_file_names(self, names: list[str]) -> None:
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        self._name_bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._name_spans = _spans([len(name) for name in encoded])

    def find_files(self, folder: str | Path) -> str:
        """From now on, `file_name` gives the files in the folder that the json's names mean.

        Returns:
            One line on what had to be resolved and what is missing; empty if nothing.

        Raises:
            ValueError: the folder has none of the files.
        """
        names = [self.file_name(i) for i in range(len(self))]
        found = find_named_files(names, folder, self.path)
        self._set_file_names(found.names)
        return found.message

    def _set_annotations(self, elements: list[msgspec.Raw], others: set[int]) -> None:
        """`others` are the ids of the categories that were not chosen."""
        image_rows = {image_id: row for row, image_id in enumerate(self.image_ids.tolist())}
        category_rows = {id_: row for row, id_ in enumerate(self.category_ids.tolist())}
        self.has_left_out = np.zeros(len(self), bool)
        left_out: Counter[str] = Counter()
        without_mask: Counter[str] = Counter()
        self.num_measured = 0
        # Columns grow in place: pieces to be joined would need twice the memory, scattered.
        usable: defaultdict[str, bytearray] = defaultdict(bytearray)
        for start in range(0, max(len(elements), 1), CHUNK):
            part = elements[start : start + CHUNK]
            chunk = decode(self.path, "annotations", part, Annotation, first=start)
            if others:
                chunk = [a for a in chunk if a.category_id not in others]
            image = np.array([image_rows.get(a.image_id, -1) for a in chunk], np.int32)
            category = np.array([category_rows.get(a.category_id, -1) for a in chunk], np.int32)
            reason, mask_reason, is_measured, columns = self._flatten(chunk, image, category)
            is_usable = reason == seg.USABLE
            if not (is_usable.all() and columns["has_mask"].all()):
                left_out.update(map(str, reason[~is_usable]))
                self.has_left_out[image[~is_usable & (image >= 0)]] = True
                has_no_mask = is_usable & ~columns["has_mask"]
                without_mask.update(map(str, mask_reason[has_no_mask]))
                for i in np.flatnonzero(has_no_mask):
                    chunk[i].segmentation = None
                chunk = list(compress(chunk, is_usable))
                *_, is_measured, columns = self._flatten(
                    chunk, image[is_usable], category[is_usable]
                )
            self.num_measured += int(is_measured.sum())
            for name, column in columns.items():
                usable[name].extend(np.ascontiguousarray(column))
        elements.clear()  # the file's text
        self.left_out, self.without_mask = dict(left_out), dict(without_mask)
        columns = {
            name: np.frombuffer(usable[name], column.dtype).reshape(-1, *column.shape[1:])
            for name, column in columns.items()
        }
        # Polygons and RLEs stay in the file's order; only their spans are sorted.
        self._points, self._rle_bytes = columns.pop("points"), columns.pop("rle_bytes")
        self._ring_spans = _spans(columns.pop("ring_size"))
        columns["_polygon_spans"] = _spans(columns.pop("ring_count"))
        columns["_rle_spans"] = _spans(columns.pop("rle_length"))
        order = np.argsort(columns["image_index"], kind="stable")
        vars(self).update({name: column[order] for name, column in columns.items()})
        self.image_starts = np.searchsorted(self.image_index, np.arange(len(self) + 1))

    def _flatten(
        self, annotations: list[Annotation], image: np.ndarray, category: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """Checks annotations of images and categories (their rows, or -1).

        Returns:
            Why each cannot be used, and why its segmentation cannot (a `Reason` or USABLE); whether
            a box that was given was measured on the segmentation; and the columns of them all.
        """
        sizes = self.image_sizes[image]
        segmentations = [a.segmentation for a in annotations]
        mask_reason, bounds, areas, columns = seg.flatten_segmentations(segmentations, sizes)
        mask_reason[(mask_reason == seg.USABLE) & are_outside(bounds, sizes)] = Reason.OUTSIDE
        has_mask = mask_reason == seg.USABLE
        xywh = np.array([a.bbox or NO_BOX for a in annotations], np.float64).reshape(-1, 4)
        boxes = as_corners(xywh)
        reason, is_fit = mask_reason.copy(), has_mask & are_good(boxes, sizes)
        far = np.flatnonzero(is_fit & ~are_near(boxes, bounds))
        if len(far):
            is_fit[far] = ~contradict(xywh[far], bounds[far], sizes[far])
        is_measured = np.zeros(len(annotations), bool)
        rows = np.flatnonzero(~is_fit)
        if len(rows):  # few, of a good file
            has_box = np.array([annotations[i].bbox is not None for i in rows], bool)
            is_measured[rows] = has_mask[rows] & has_box
            boxes[rows[has_mask[rows]]] = bounds[rows[has_mask[rows]]]
            # A box may stand alone, but not beside a segmentation that is of another image.
            box_reason = find_problems(xywh[rows], sizes[rows])
            is_alone = has_box & ~has_mask[rows] & ~np.isin(mask_reason[rows], MISPLACED)
            is_bad = is_alone & (mask_reason[rows] == Reason.NO_SEGMENTATION)
            reason[rows[is_bad]] = box_reason[is_bad]
            alone = rows[is_alone & (box_reason == seg.USABLE)]
            reason[alone] = seg.USABLE
            areas[alone] = xywh[alone, 2:].prod(axis=1)

        given = np.array([a.area for a in annotations], np.float64)  # None becomes NaN
        areas = np.where((given > 0) & np.isfinite(given), given, areas).clip(max=MAX_AREA)
        with np.errstate(over="ignore"):  # of those that cannot be used
            boxes = boxes.astype(np.float32)
        is_crowd = np.array([a.iscrowd for a in annotations], np.int8)
        is_difficult = np.array([a.ignore for a in annotations], np.int8)
        reason[(is_crowd == UNREADABLE) | (is_difficult == UNREADABLE)] = Reason.FLAG
        reason[category < 0] = Reason.UNKNOWN_CATEGORY
        reason[image < 0] = Reason.UNKNOWN_IMAGE
        return (
            reason,
            mask_reason,
            is_measured,
            columns
            | {
                "annotation_ids": np.array([a.id for a in annotations], np.int64),
                "image_index": image,
                "category_index": category,
                "is_crowd": is_crowd > 0,
                "is_difficult": is_difficult > 0,
                "has_mask": has_mask,
                "areas": areas.astype(np.float32),
                "boxes": boxes,
            },
        )

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    def file_name(self, i: int) -> str:
        """The file name of image i as the json has it (see `find_files`); it may have folders."""
        start, end = self._name_spans[i]
        return self._name_bytes[start:end].tobytes().decode("utf-8", "surrogatepass")

    def polygons(self, a: int) -> list[np.ndarray] | None:
        """The rings of annotation a, each (n, 2) float32 in absolute pixels; None if it has none.

        Rings of one or two points, which enclose nothing, are not among them.
        """
        first, end = self._polygon_spans[a]
        rings = self._ring_spans[first:end].tolist()
        return [self._points[start:stop].copy() for start, stop in rings] or None

    def rle(self, a: int) -> dict[str, Any]:
        """The mask of annotation a, {"size": [height, width], "counts": bytes}.

        Of one without a mask it is the whole box.
        """
        height, width = self.image_sizes[self.image_index[a]].tolist()
        if not self.has_mask[a]:
            x1, y1, x2, y2 = self.boxes[a].astype(np.float64)
            return coco_mask.frPyObjects(np.array([[x1, y1, x2 - x1, y2 - y1]]), height, width)[0]
        rings = self.polygons(a)
        if rings is None:
            start, end = self._rle_spans[a]
            return {"size": [height, width], "counts": self._rle_bytes[start:end].tobytes()}
        flat = [_as_written(ring).ravel().tolist() for ring in rings]
        return coco_mask.merge(coco_mask.frPyObjects(flat, height, width))

    def summary(self) -> str:
        """One line: what the file holds and what was left out."""
        line = (
            f"{self.path}: {len(self):,} images, {len(self.annotation_ids):,} annotations "
            f"({int(self.is_crowd.sum()):,} crowd) of {self._name_categories()}"
        )
        for text, counts in (("without a mask", self.without_mask), ("left out", self.left_out)):
            if counts:
                line += f"; {text} {sum(counts.values()):,}: {name_counts(counts)}"
        if self.num_measured:
            line += (
                f"; boxes that contradict the segmentation, measured on it: {self.num_measured:,}"
            )
        if self.federated:
            line += f"; {self.federated}: there may be objects that are not annotated"
        return line

    def _name_categories(self) -> str:
        if len(self.category_ids) == self.num_listed:
            return f"{self.num_listed:,} categories"
        return (
            f"{len(self.category_ids):,} of {self.num_listed:,} categories "
            f"({listed(map(short, self.category_names))}) in {len(np.unique(self.image_index)):,} "
            "of the images"
        )

    def why_none(self, unfit: dict[str, int] | None = None) -> str:
        """Why no annotation is fit for a purpose: how many for which reason.

        `unfit` counts, by reason, usable ones that are not fit for it; crowds never are.
        """
        crowds = {"crowd": int(self.is_crowd.sum())}
        counts = Counter(self.left_out) + Counter(crowds) + Counter(unfit or {})
        return name_counts(counts) or "there is no annotation"


def name_counts(counts: dict[str, int]) -> str:
    """Counts by name, in one line."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _spans(lengths: np.ndarray | list[int]) -> np.ndarray:
    """Where pieces of (n,) lengths begin and end, one after the other: (n, 2) int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.stack([ends - lengths, ends], axis=1)


def _as_written(points: np.ndarray) -> np.ndarray:
    """The decimals that were rounded to float32: masks come out as pycocotools draws the json."""
    decimal = points.astype(np.float64).round(3)
    return np.where(decimal.astype(np.float32) == points, decimal, points)
