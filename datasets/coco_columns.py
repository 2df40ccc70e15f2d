"""Chunks of a COCO json's arrays -> columns of numbers, checked; an error names file and place."""

from __future__ import annotations

from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np

from datasets import segmentations as seg

INT64 = (-(2**63), 2**63 - 1)
SIDE = (1, 2**20)  # of an image, in pixels: OpenCV reads none longer
_NAN = float("nan")

Columns = dict[str, np.ndarray]


class Elements:
    """A chunk of one of the file's arrays; its values are taken out key by key, and checked."""

    def __init__(self, path: str | Path, array: str, first: int, elements: list):
        self.path, self.array, self.first, self.elements = path, array, first, elements
        for row, element in enumerate(elements):
            if type(element) is not dict:
                raise self.error(row, "is not an object")

    def __len__(self) -> int:
        return len(self.elements)

    def error(self, row: int, problem: str) -> ValueError:
        """What is wrong with element `row` of the chunk, by its place in the file."""
        return ValueError(f"{self.path}: {self.array}[{self.first + row}] {problem}")

    def required(self, key: str) -> list:
        """The n values of a key that every element must have."""
        try:
            return list(map(itemgetter(key), self.elements))
        except KeyError:
            row = next(row for row, element in enumerate(self.elements) if key not in element)
            raise self.error(row, f'has no "{key}"') from None

    def optional(self, key: str, default: object = None) -> list:
        """The values, with the default also for null."""
        try:
            values = list(map(itemgetter(key), self.elements))
        except KeyError:
            values = [element.get(key) for element in self.elements]
        return [default if value is None else value for value in values]

    def integers(self, key: str, limits: tuple[int, int] = INT64) -> np.ndarray:
        """(n,) int64; 3.0 passes for 3."""
        low, high = limits
        values = self.required(key)
        if not {*map(type, values)} <= {int}:
            for row, value in enumerate(values):
                if type(value) is float and value.is_integer():
                    values[row] = int(value)
                elif type(value) is not int:
                    raise self.error(row, f'has "{key}": {value!r:.50}, expected an integer')
        if values and not low <= min(values) <= max(values) <= high:
            row = next(row for row, value in enumerate(values) if not low <= value <= high)
            raise self.error(row, f'has "{key}": {values[row]!r:.50}, expected {low} to {high}')
        return np.array(values, np.int64)

    def text(self, key: str) -> Columns:
        """The strings' UTF-8 in one array, and their lengths in it."""
        values = self.required(key)
        for row, value in enumerate(values):
            if type(value) is not str or not value:
                raise self.error(row, f'has "{key}": {value!r:.50}, expected a name')
        encoded = [value.encode("utf-8", "surrogatepass") for value in values]
        return {
            "name_bytes": np.frombuffer(b"".join(encoded), np.uint8),
            "name_length": np.array([len(name) for name in encoded], np.int64),
        }


def image_columns(elements: Elements) -> Columns:
    """`id`, `height` and `width` (n,) int64, `name_bytes`, `name_length`."""
    return {
        "id": elements.integers("id"),
        "height": elements.integers("height", SIDE),
        "width": elements.integers("width", SIDE),
        **elements.text("file_name"),
    }


def category_columns(elements: Elements) -> Columns:
    """`id` (n,) int64, `name_bytes`, `name_length`."""
    return {"id": elements.integers("id"), **elements.text("name")}


def annotation_columns(elements: Elements) -> Columns:
    """`id`, `image_id`, `category_id`, flags, `box` xyxy, and all of `flatten_segmentations`.

    Area and box are measured on the segmentation where the json has none.
    """
    columns = {name: elements.integers(name) for name in ("id", "image_id", "category_id")}
    for name, key in (("is_crowd", "iscrowd"), ("is_difficult", "ignore")):
        columns[name] = np.array(list(map(bool, elements.optional(key))), bool)
    columns |= seg.flatten_segmentations(elements.optional("segmentation"))

    area = _numbers([[value] for value in elements.optional("area", _NAN)], 1)[:, 0]
    columns["area"] = np.where(np.isfinite(area), area, columns["area"])

    boxes = elements.optional("bbox", [])
    given = np.array(list(map(bool, boxes)), bool)
    box = _numbers([box or [_NAN] * 4 for box in boxes], 4)
    with np.errstate(over="ignore"):
        box[:, 2:] += box[:, :2]  # xywh to xyxy
    malformed = given & ~np.isfinite(box).all(axis=1)
    columns["reason"][malformed & (columns["reason"] == seg.USABLE)] = seg.MALFORMED_BOX
    columns["box"] = np.where(given[:, None], box, columns["bounds"])
    return columns


def _numbers(rows: list, width: int) -> np.ndarray:
    """(n, width) float64; NaN where a row is not a list of so many numbers."""
    try:
        if {*map(type, rows)} <= {list} and {*map(len, rows)} <= {width}:
            flat = chain.from_iterable(rows)
            return np.fromiter(flat, np.float64, len(rows) * width).reshape(-1, width)
    except (TypeError, ValueError, OverflowError):
        pass
    if len(rows) == 1:
        return np.full((1, width), np.nan)
    return np.concatenate([_numbers([row], width) for row in rows])


class GrowingColumns:
    """Arrays that grow in place: pieces to be joined would need twice the memory, scattered."""

    def __init__(self):
        self._columns: dict[str, tuple[np.ndarray, bytearray]] = {}

    def append(self, chunk: Columns) -> None:
        for name, column in chunk.items():
            _, grown = self._columns.setdefault(name, (column[:0], bytearray()))
            grown.extend(np.ascontiguousarray(column))

    def arrays(self) -> Columns:
        return {
            name: np.frombuffer(grown, empty.dtype).reshape(-1, *empty.shape[1:])
            for name, (empty, grown) in self._columns.items()
        }
