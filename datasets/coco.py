"""COCO annotation files, checked, in flat arrays that data-loader workers share.

I: images, A: usable annotations, C: categories.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
from collections import Counter, defaultdict
from itertools import compress
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from datasets import segmentations as seg
from datasets.segmentations import Reason
from datasets.sharing import SharedArrays

FAR = 20  # times the image's longer side: what reaches so far out is a mistake
MAX_AREA = float(np.finfo(np.float32).max)
CHUNK = 256  # annotations decoded at once: for numpy to work in bulk, in the cache

T = TypeVar("T")
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
Box = tuple[float, float, float, float]
NO_BOX = (math.nan,) * 4


class ListedImage(msgspec.Struct, gc=False, kw_only=True):
    """An image of any COCO json."""

    id: Int64
    file_name: Name
    height: Int64 | None = None
    width: Int64 | None = None


class AnnotatedImage(ListedImage, gc=False, kw_only=True):
    """An image of a COCO instances json."""

    height: seg.Side
    width: seg.Side

    def __post_init__(self) -> None:
        if self.height * self.width > seg.MAX_PIXELS:
            raise ValueError(f"{self.width} x {self.height} pixels is too large")


class Category(msgspec.Struct, gc=False):
    """A category of a COCO instances json."""

    id: Int64
    name: Name


class Annotation(msgspec.Struct, gc=False):
    """An annotation of a COCO instances json."""

    id: Int64
    image_id: Int64
    category_id: Int64
    segmentation: seg.Segmentation = None
    area: float | None = None
    bbox: Box | None = None  # xywh
    iscrowd: Any = None
    ignore: Any = None


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
    annotation_ids: np.ndarray  # (A,) int64
    image_index: np.ndarray  # (A,) int32, row of image_ids
    category_index: np.ndarray  # (A,) int32, row of category_ids
    is_crowd: np.ndarray  # (A,) bool
    is_difficult: np.ndarray  # (A,) bool, PASCAL VOC's flag: "ignore" in its jsons in COCO's format
    areas: np.ndarray  # (A,) float32 in pixels
    boxes: np.ndarray  # (A, 4) float32 xyxy in absolute pixels
    left_out: dict[str, int]  # number of annotations that cannot be used, by reason

    # Flat, in the file's order; spans (..., 2) int64 say where each piece begins and ends.
    _name_bytes: np.ndarray  # UTF-8
    _name_spans: np.ndarray  # (I, 2)
    _points: np.ndarray  # (P, 2) float32
    _ring_spans: np.ndarray  # (R, 2) of rings in the points
    _polygon_spans: np.ndarray  # (A, 2) of annotations in the rings, empty for an RLE
    _rle_bytes: np.ndarray  # compressed counts
    _rle_spans: np.ndarray  # (A, 2), empty for polygons

    @classmethod
    def load(cls, path: str | Path) -> CocoInstances:
        """Read and check a COCO instances json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: its structure is broken; one line with the file and the place. A single
                annotation that cannot be used is no error: it is left out and counted.
        """
        content = _read_arrays(path, "images", "annotations", "categories")
        images = _decode(path, "images", content.pop("images"), AnnotatedImage)
        categories = _decode(path, "categories", content.pop("categories"), Category)
        if not images:
            raise ValueError(f'{path}: "images" is empty')
        _refuse_duplicates(path, "images", images)
        _refuse_duplicates(path, "categories", categories)

        self = cls()
        self.path = str(path)
        self.image_ids = np.array([image.id for image in images], np.int64)
        self.image_sizes = np.array([(image.height, image.width) for image in images], np.int32)
        names = [image.file_name.encode("utf-8", "surrogatepass") for image in images]
        self._name_bytes = np.frombuffer(b"".join(names), np.uint8)
        self._name_spans = _spans([len(name) for name in names])
        categories.sort(key=attrgetter("id"))
        self.category_ids = np.array([category.id for category in categories], np.int64)
        self.category_names = [category.name for category in categories]
        self._set_annotations(content.pop("annotations"))
        return self

    def _set_annotations(self, elements: list[msgspec.Raw]) -> None:
        image_rows = {image_id: row for row, image_id in enumerate(self.image_ids.tolist())}
        category_rows = {id_: row for row, id_ in enumerate(self.category_ids.tolist())}
        self.has_left_out = np.zeros(len(self), bool)
        left_out: Counter[str] = Counter()
        # Columns grow in place: pieces to be joined would need twice the memory, scattered.
        usable: defaultdict[str, bytearray] = defaultdict(bytearray)
        for start in range(0, max(len(elements), 1), CHUNK):
            part = elements[start : start + CHUNK]
            chunk = _decode(self.path, "annotations", part, Annotation, first=start)
            image = np.array([image_rows.get(a.image_id, -1) for a in chunk], np.int32)
            category = np.array([category_rows.get(a.category_id, -1) for a in chunk], np.int32)
            reason, columns = self._flatten(chunk, image, category)
            is_usable = reason == seg.USABLE
            if not is_usable.all():
                left_out.update(map(str, reason[~is_usable]))
                self.has_left_out[image[~is_usable & (image >= 0)]] = True
                chunk = list(compress(chunk, is_usable))
                _, columns = self._flatten(chunk, image[is_usable], category[is_usable])
            for name, column in columns.items():
                usable[name].extend(np.ascontiguousarray(column))
        elements.clear()  # the file's text
        self.left_out = dict(left_out)
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
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Why each annotation cannot be used, if so, and the columns of them all."""
        sizes = self.image_sizes[image]
        segmentations = [a.segmentation for a in annotations]
        reason, bounds, measured, columns = seg.flatten_segmentations(segmentations, sizes)
        area = np.array([a.area for a in annotations], np.float64)  # None becomes NaN
        area = np.where(np.isfinite(area), area, measured).clip(max=MAX_AREA)
        box = np.array([a.bbox or NO_BOX for a in annotations]).reshape(-1, 4)
        has_no_box = [a.bbox is None for a in annotations]
        with np.errstate(over="ignore"):  # of 1e300
            box[:, 2:] += box[:, :2]  # xywh to xyxy
            box[has_no_box] = bounds[has_no_box]
            areas, boxes = area.astype(np.float32), box.astype(np.float32)

        extents = np.stack([box, bounds])  # (2, n, 4)
        is_outside = np.concatenate([extents[..., :2] >= sizes[:, ::-1], extents[..., 2:] <= 0], 2)
        # pycocotools draws a polygon's edges all the way, in memory too.
        is_far = np.abs(extents) > FAR * sizes.max(axis=1, keepdims=True)
        for problem, is_so in (
            (Reason.MALFORMED_BOX, ~np.isfinite(box).all(axis=1)),
            (Reason.ZERO_AREA, (box[:, 2:] <= box[:, :2]).any(axis=1) | (area <= 0)),
            (Reason.OUTSIDE, (is_outside | is_far).any(axis=(0, 2))),
        ):
            reason[is_so & (reason == seg.USABLE)] = problem
        reason[category < 0] = Reason.UNKNOWN_CATEGORY
        reason[image < 0] = Reason.UNKNOWN_IMAGE
        return reason, columns | {
            "annotation_ids": np.array([a.id for a in annotations], np.int64),
            "image_index": image,
            "category_index": category,
            "is_crowd": np.array([bool(a.iscrowd) for a in annotations], bool),
            "is_difficult": np.array([bool(a.ignore) for a in annotations], bool),
            "areas": areas,
            "boxes": boxes,
        }

    def __len__(self) -> int:
        """The number of images."""
        return len(self.image_ids)

    def file_name(self, i: int) -> str:
        """The file name of image i as the json has it; it may contain folders."""
        start, end = self._name_spans[i]
        return self._name_bytes[start:end].tobytes().decode("utf-8", "surrogatepass")

    def polygons(self, a: int) -> list[np.ndarray] | None:
        """The rings of annotation a, each (n, 2) float32 in absolute pixels; None for an RLE.

        Rings of one or two points, which enclose nothing, are not among them.
        """
        first, end = self._polygon_spans[a]
        rings = self._ring_spans[first:end].tolist()
        return [self._points[start:stop].copy() for start, stop in rings] or None

    def rle(self, a: int) -> dict[str, Any]:
        """The mask of annotation a, {"size": [height, width], "counts": bytes}."""
        height, width = self.image_sizes[self.image_index[a]].tolist()
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
            f"({int(self.is_crowd.sum()):,} crowd) of {len(self.category_ids):,} categories"
        )
        if self.left_out:
            reasons = ", ".join(f"{name} {count:,}" for name, count in self.left_out.items())
            line += f"; left out {sum(self.left_out.values()):,}: {reasons}"
        return line


def read_image_list(path: str | Path) -> list[ListedImage]:
    """The images of a COCO json, annotated or not: test sets have no annotations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such list; one line with the file and the place.
    """
    return _decode(path, "images", _read_arrays(path, "images")["images"], ListedImage)


def read_categories(path: str | Path) -> dict[int, str]:
    """The names of a COCO instances json's categories by id; the rest is not looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such list; one line with the file and the place.
    """
    elements = _read_arrays(path, "categories")["categories"]
    categories = _decode(path, "categories", elements, Category)
    return {category.id: category.name for category in categories}


def _read_arrays(path: str | Path, *names: str) -> dict[str, list[msgspec.Raw]]:
    """Arrays of a JSON file's top-level object, their elements still to be decoded."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: a folder, expected a JSON file")
    data = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)  # some editors put it
    layout = msgspec.defstruct("Layout", [(name, list[msgspec.Raw]) for name in names])
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        return msgspec.structs.asdict(msgspec.json.decode(data, type=layout))
    # Slower, but it says where the JSON is broken, and reads NaN and half a surrogate pair.
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f'{path}: has no "{name}" array')
    return {name: [msgspec.Raw(json.dumps(e).encode()) for e in content[name]] for name in names}


def _decode(
    path: str | Path, array: str, elements: list[msgspec.Raw], element_type: type[T], first: int = 0
) -> list[T]:
    """Decode elements of an array, from index `first` on; an error names the file and the place."""
    with contextlib.suppress(ValueError):
        return list(map(msgspec.json.Decoder(element_type).decode, elements))
    decoded = []
    for i, element in enumerate(elements, first):
        try:
            value = _repair(json.loads(bytes(element)))
            decoded.append(msgspec.convert(value, element_type))
        except ValueError as error:
            problem, _, member = str(error).replace("`", '"').partition(' - at "$')
            raise ValueError(f"{path}: {array}[{i}]{member[:-1]}: {problem}") from None
    return decoded


def _repair(element: Any) -> Any:
    """An element that can be decoded if its shape, area or box could not; 3.0 becomes 3."""
    if not isinstance(element, dict):
        return element
    integers = {n: int(x) for n, x in element.items() if isinstance(x, float) and x.is_integer()}
    shape = {
        "segmentation": seg.repair_segmentation(element.get("segmentation")),
        "area": seg.convert_or(None, element.get("area"), float | None),
        "bbox": seg.convert_or(NO_BOX, element.get("bbox") or None, Box | None),
    }
    return element | integers | shape


def _refuse_duplicates(path: str | Path, array: str, elements: list) -> None:
    rows: dict[int, int] = {}
    for row, element in enumerate(elements):
        first = rows.setdefault(element.id, row)
        if first != row:
            raise ValueError(f"{path}: {array}[{row}] has the id {element.id} of {array}[{first}]")


def _spans(lengths: np.ndarray | list[int]) -> np.ndarray:
    """Where pieces of (n,) lengths begin and end, one after the other: (n, 2) int64."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.stack([ends - lengths, ends], axis=1)


def _as_written(points: np.ndarray) -> np.ndarray:
    """The decimals that were rounded to float32: masks come out as pycocotools draws the json."""
    decimal = points.astype(np.float64).round(3)
    return np.where(decimal.astype(np.float32) == points, decimal, points)
