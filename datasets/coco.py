"""COCO annotation files, checked, in flat arrays that data-loader workers share.

I: images, A: usable annotations, C: categories.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import compress, islice
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
NO_BOX, BROKEN_BOX = (math.nan,) * 4, (math.inf,) * 4


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

    _name_bytes: np.ndarray  # UTF-8; that of image i is _name_starts[i]:_name_starts[i + 1]
    _name_starts: np.ndarray
    _points: np.ndarray  # (P, 2) float32; ring r is _ring_starts[r]:_ring_starts[r + 1]
    _ring_starts: np.ndarray
    _first_ring: np.ndarray  # (A,) int64; annotation a has the rings _first_ring[a]:_end_ring[a]
    _end_ring: np.ndarray
    _rle_bytes: np.ndarray  # that of annotation a is _rle_start[a]:_rle_end[a]
    _rle_start: np.ndarray
    _rle_end: np.ndarray

    @classmethod
    def load(cls, path: str | Path) -> CocoInstances:
        """Read and check a COCO instances json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: its structure is broken; one line with the file and the place. A single
                annotation that cannot be used is no error: it is left out and counted.
        """
        content = _read_arrays(path, "images", "annotations", "categories")
        images = list(_decode(path, "images", content.pop("images"), AnnotatedImage))
        categories = list(_decode(path, "categories", content.pop("categories"), Category))
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
        self._name_starts = _starts([len(name) for name in names])
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
        annotations = _decode(self.path, "annotations", elements, Annotation)
        for _ in range(0, max(len(elements), 1), CHUNK):
            chunk = list(islice(annotations, CHUNK))
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
        # Polygons and RLEs stay in the file's order; only where each begins is sorted.
        self._points, self._rle_bytes = columns.pop("points"), columns.pop("rle_bytes")
        self._ring_starts = _starts(columns.pop("ring_size"))
        rings, rles = _starts(columns.pop("ring_count")), _starts(columns.pop("rle_length"))
        columns |= {"_first_ring": rings[:-1], "_end_ring": rings[1:]}
        columns |= {"_rle_start": rles[:-1], "_rle_end": rles[1:]}
        order = np.argsort(columns["image_index"], kind="stable")
        vars(self).update({name: column[order] for name, column in columns.items()})
        self.image_starts = np.searchsorted(self.image_index, np.arange(len(self) + 1))

    def _flatten(
        self, annotations: list[Annotation], image: np.ndarray, category: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Why each annotation cannot be used, if so, and the columns of them all."""
        sizes = self.image_sizes[image]
        columns = seg.flatten_segmentations([a.segmentation for a in annotations], sizes)
        bounds = columns.pop("bounds")
        box = np.array([a.bbox or NO_BOX for a in annotations]).reshape(-1, 4)
        area = np.array([a.area for a in annotations], np.float64)  # None becomes NaN
        area = np.where(np.isfinite(area), area, columns.pop("area")).clip(max=MAX_AREA)
        with np.errstate(over="ignore"):  # of 1e300
            box[:, 2:] += box[:, :2]  # xywh to xyxy
            box = np.where(np.isnan(box), bounds, box)
            areas, boxes = area.astype(np.float32), box.astype(np.float32)

        extents = np.stack([box, bounds])  # (2, n, 4)
        is_outside = np.concatenate([extents[..., :2] >= sizes[:, ::-1], extents[..., 2:] <= 0], 2)
        # pycocotools draws a polygon's edges all the way, in memory too.
        is_far = np.abs(extents) > FAR * sizes.max(axis=1, keepdims=True)
        reason = columns.pop("reason")
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
        encoded = self._name_bytes[self._name_starts[i] : self._name_starts[i + 1]]
        return encoded.tobytes().decode("utf-8", "surrogatepass")

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


def read_image_list(path: str | Path) -> list[ListedImage]:
    """The images of a COCO json, annotated or not: test sets have no annotations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such list; one line with the file and the place.
    """
    return list(_decode(path, "images", _read_arrays(path, "images")["images"], ListedImage))


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
    path: str | Path, array: str, elements: list[msgspec.Raw], element_type: type[T]
) -> Iterator[T]:
    """Decode the elements of an array; an error names the file and the place."""
    decode = msgspec.json.Decoder(element_type).decode
    for i, element in enumerate(elements):
        try:
            try:
                decoded = decode(element)
            except ValueError:
                decoded = msgspec.convert(_repair(json.loads(bytes(element))), element_type)
        except ValueError as error:
            problem, _, member = str(error).replace("`", '"').partition(' - at "$')
            raise ValueError(f"{path}: {array}[{i}]{member[:-1]}: {problem}") from None
        yield decoded


def _repair(element: Any) -> Any:
    """An annotation whose shape, area and box, at least, can be decoded; 3.0 becomes 3."""
    if not isinstance(element, dict):
        return element
    area, box = seg.to_floats([element.get("area")]), element.get("bbox")
    if box:
        box = seg.to_floats(box)
        box = box if box and len(box) == 4 and np.isfinite(box).all() else BROKEN_BOX
    integers = {n: int(x) for n, x in element.items() if isinstance(x, float) and x.is_integer()}
    return (
        element
        | integers
        | {
            "segmentation": seg.repair_segmentation(element.get("segmentation")),
            "area": area[0] if area else None,
            "bbox": box or None,
        }
    )


def _refuse_duplicates(path: str | Path, array: str, elements: list) -> None:
    rows: dict[int, int] = {}
    for row, element in enumerate(elements):
        first = rows.setdefault(element.id, row)
        if first != row:
            raise ValueError(f"{path}: {array}[{row}] has the id {element.id} of {array}[{first}]")


def _starts(lengths: np.ndarray | list[int]) -> np.ndarray:
    """(n,) lengths -> (n + 1,) int64 offsets."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _as_written(points: np.ndarray) -> np.ndarray:
    """The decimals that were rounded to float32: masks come out as pycocotools draws the json."""
    decimal = points.astype(np.float64).round(3)
    return np.where(decimal.astype(np.float32) == points, decimal, points)
