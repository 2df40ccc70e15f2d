"""JSON files in COCO's format, whatever tool wrote them: their elements, decoded and repaired."""

from __future__ import annotations

import codecs
import contextlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from datasets import segmentations as seg
from datasets.remote import AnyPath, to_path

T = TypeVar("T")
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Name = Annotated[str, msgspec.Meta(min_length=1)]
Box = tuple[float, float, float, float]
NO_BOX = (math.nan,) * 4
UNREADABLE = -1  # of a flag
FLAGS = {None: 0, 0: 0, 1: 1, "0": 0, "1": 1, "false": 0, "true": 1}  # 1.0 and true equal 1
Flag = Literal[-1, 0, 1]


class ListedImage(msgspec.Struct, gc=False, kw_only=True):
    """An image of any COCO json."""

    id: Int64
    file_name: Name = ""
    coco_url: Any = None  # LVIS names its files by it alone
    height: Int64 | None = None
    width: Int64 | None = None

    def __post_init__(self) -> None:
        if not self.file_name:
            if not isinstance(self.coco_url, str) or not self.coco_url:
                raise ValueError("Object missing required field `file_name`")
            self.file_name = "/".join(self.coco_url.split("/")[-2:])  # val2017/000000000139.jpg


class AnnotatedImage(ListedImage, gc=False, kw_only=True):
    """An image of a COCO instances json."""

    height: seg.Side
    width: seg.Side
    # Of federated annotations, see `find_federated`: LVIS has both, Open Images the first.
    neg_category_ids: Any = None
    not_exhaustive_category_ids: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.height * self.width > seg.MAX_PIXELS:
            raise ValueError(f"{self.width} x {self.height} pixels is too large")


class Category(msgspec.Struct, gc=False):
    """A category of a COCO instances json."""

    id: Int64
    name: Name
    frequency: Any = None  # LVIS: r, c or f, by the number of its images


class Annotation(msgspec.Struct, gc=False):
    """An annotation of a COCO instances json."""

    id: Int64
    image_id: Int64
    category_id: Int64
    segmentation: seg.Segmentation = None
    area: float | None = None
    bbox: Box | None = None  # xywh
    iscrowd: Flag = 0
    ignore: Flag = 0


def read_json(path: str | AnyPath) -> Any:
    """The content of a JSON file: UTF-8, 16 or 32, whatever the locale is; a BOM does not matter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder, or no JSON; one line that names it.
    """
    return _parse(path, _read_bytes(path))


def _read_bytes(path: str | AnyPath) -> bytes:
    path = to_path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder, expected a JSON file")
    return path.read_bytes()


def _parse(path: str | AnyPath, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None


def read_arrays(path: str | Path, *names: str) -> dict[str, list[msgspec.Raw]]:
    """Arrays of a JSON file's top-level object, their elements still to be decoded."""
    data = _read_bytes(path).removeprefix(codecs.BOM_UTF8)  # some editors put it
    layout = msgspec.defstruct("Layout", [(name, list[msgspec.Raw]) for name in names])
    with contextlib.suppress(msgspec.DecodeError, RecursionError):
        return msgspec.structs.asdict(msgspec.json.decode(data, type=layout))
    # Slower, but it says where the JSON is broken, and reads NaN and half a surrogate pair.
    content = _parse(path, data)
    for name in names:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f'{path}: has no "{name}" array')
    return {name: [msgspec.Raw(json.dumps(e).encode()) for e in content[name]] for name in names}


def decode(
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
    """An element that can be decoded if its shape, area, box or flags could not; 3.0 becomes 3."""
    if not isinstance(element, dict):
        return element
    repaired = {
        "segmentation": seg.repair_segmentation(element.get("segmentation")),
        "area": seg.convert_or(None, element.get("area"), float | None),
        "bbox": seg.convert_or(NO_BOX, element.get("bbox") or None, Box | None),
        "iscrowd": _read_flag(element.get("iscrowd")),
        "ignore": _read_flag(element.get("ignore")),
    }
    return {name: whole(value) for name, value in element.items()} | repaired


def whole(value: Any) -> Any:
    """3 for 3.0, as pandas and Lua write whole numbers; any other value as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _read_flag(value: Any) -> int:
    """What a flag says, as number, text or truth value; UNREADABLE if it is none of these."""
    if isinstance(value, str):
        value = value.strip().lower()
    return UNREADABLE if isinstance(value, list | dict) else FLAGS.get(value, UNREADABLE)


def refuse_duplicates(path: str | Path, array: str, elements: list) -> None:
    """Raises a ValueError if two elements have the same id."""
    rows: dict[int, int] = {}
    for row, element in enumerate(elements):
        first = rows.setdefault(element.id, row)
        if first != row:
            raise ValueError(f"{path}: {array}[{row}] has the id {element.id} of {array}[{first}]")


def read_image_list(path: str | Path) -> list[ListedImage]:
    """The images of a COCO json, annotated or not: test sets have no annotations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such list, or an id twice; one line with the file and the place.
    """
    images = decode(path, "images", read_arrays(path, "images")["images"], ListedImage)
    refuse_duplicates(path, "images", images)
    return images


def read_categories(path: str | Path) -> dict[int, str]:
    """The names of a COCO instances json's categories by id; the rest is not looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has no such list; one line with the file and the place.
    """
    elements = read_arrays(path, "categories")["categories"]
    categories = decode(path, "categories", elements, Category)
    return {category.id: category.name for category in categories}


def find_federated(images: list[AnnotatedImage], categories: list[Category]) -> str:
    """Where a json says that its annotations are federated; empty if it does not.

    Then an image was searched for some categories only, as in LVIS and Open Images: what is not
    annotated there may be an object.
    """
    for i, image in enumerate(images):
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if getattr(image, key) is not None:
                return f"images[{i}].{key}"
    for i, category in enumerate(categories):
        if category.frequency in ("r", "c", "f"):
            return f"categories[{i}].frequency"
    return ""


def read_federated(path: str | Path) -> str:
    """`find_federated` of a file, whose annotations are not looked at; errors as of `load`."""
    content = read_arrays(path, "images", "categories")
    return find_federated(
        decode(path, "images", content["images"], AnnotatedImage),
        decode(path, "categories", content["categories"], Category),
    )


def refuse_federated(path: str | Path, place: str, advice: str) -> None:
    """Raises a ValueError if `find_federated` found a place."""
    if place:
        raise ValueError(
            f"{path}: {place} says that not every object is annotated, as in LVIS and Open Images; "
            f"{advice}"
        )
