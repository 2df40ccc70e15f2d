"""COCO ground truth for evaluation, and COCO's IoU thresholds and area ranges."""

import contextlib
import functools
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params

from datasets.categories import match_categories, use_categories
from datasets.coco import CocoInstances
from datasets.coco_file import refuse_federated
from pipeline import distributed

IOU_TYPES = {"box": "bbox", "mask": "segm"}  # our names -> COCOeval's
IOU_THRESHOLDS = Params(iouType="bbox").iouThrs  # (T,) .50, .55, ... .95
AREA_RANGES = np.array(Params(iouType="bbox").areaRng)  # (A, 2) px², both ends included
AREAS = tuple(Params(iouType="bbox").areaRngLbl)  # all, small, medium, large


def load_ground_truth(
    annotations: str | Path,
    image_ids: set[int] | None = None,
    *,
    chosen: Iterable[str] | None = None,
    categories: Mapping[int, str] | None = None,
    needs_object: bool = False,
    needs_all_objects: bool = False,
) -> COCO:
    """Read a COCO instances json for evaluation, or of it the images with these ids.

    With the chosen categories only, see `CocoInstances.load`. With the ids of a detector's
    categories (names by id), if given, so that its results fit.

    It is read and checked as for training: annotations that `CocoInstances` cannot use are left out
    and counted in one logged warning; missing `area`, `bbox` and `iscrowd` are filled in.
    Segmentations become compressed RLE; objects with a box only have none. Annotation ids are
    renumbered from 1, because COCOeval takes a match with id 0 for none.

    Raises:
        ValueError: the file is missing or is not COCO instances json; its categories and those
            given do not fit; it has no object, crowds apart, when it `needs_object`; or its
            annotations are federated when it `needs_all_objects`.
    """
    try:
        instances = CocoInstances.load(annotations, chosen)
    except OSError as error:
        raise ValueError(f"{annotations}: cannot be read: {error.strerror}") from None
    if needs_all_objects:
        refuse_federated(
            annotations,
            instances.federated,
            "COCO's AP would count right detections as false: use LVIS's rules (pip install lvis), "
            "or score the proposals, whose recall needs only the annotated objects",
        )
    if (
        instances.left_out
        or instances.without_mask
        or instances.num_measured
        or instances.federated
    ):
        _say_once(instances.summary())
    if categories is not None:
        taken = categories.keys()
        if chosen is not None:  # the detector's others are not scored
            own = dict(zip(instances.category_ids.tolist(), instances.category_names, strict=True))
            matched = match_categories(own, categories).values()
            categories = {id_: name for id_, name in categories.items() if id_ in matched}
        line = use_categories(
            instances, categories, source="the detector", keep_others=True, taken=taken
        )
        _say_once(line)
    if needs_object and instances.is_crowd.all():
        raise ValueError(f"{annotations}: no object to score against: {instances.why_none()}")
    heights, widths = instances.image_sizes.T
    objects = _rows(
        id=np.arange(1, len(instances.areas) + 1),
        image_id=instances.image_ids[instances.image_index],
        category_id=instances.category_ids[instances.category_index],
        iscrowd=instances.is_crowd.astype(int),
        ignore=instances.is_difficult.astype(int),  # read by VOC's AP; COCOeval ignores it
        area=instances.areas,
        bbox=_as_xywh(instances.boxes),
    )
    images = _rows(id=instances.image_ids, height=heights, width=widths)
    coco = COCO()
    coco.dataset = {
        "images": [i for i in images if image_ids is None or i["id"] in image_ids],
        "annotations": [
            o | ({"segmentation": instances.rle(a)} if instances.has_mask[a] else {})
            for a, o in enumerate(objects)
            if image_ids is None or o["image_id"] in image_ids
        ],
        "categories": _rows(
            id=instances.category_ids, name=np.array(instances.category_names, object)
        ),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco.createIndex()
    return coco


def objects_for(iou_type: str, annotations: list[dict]) -> list[dict]:
    """The annotations that can be scored by "box", or those that can by "mask"."""
    if iou_type == "box":
        return annotations
    return [annotation for annotation in annotations if annotation.get("segmentation")]


def scorable(ground_truth: COCO, iou_types: tuple[str, ...]) -> tuple[str, ...]:
    """These IoU types, but not "mask" if all objects have a box only."""
    annotations = ground_truth.dataset["annotations"]
    return tuple(t for t in iou_types if objects_for(t, annotations) or not annotations)


@functools.cache
def _say_once(line: str) -> None:
    """Training comes here at each validation, in each of its processes."""
    if line:
        distributed.say(line)


def _rows(**columns: np.ndarray) -> list[dict]:
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in values]


def _as_xywh(boxes: np.ndarray) -> np.ndarray:
    """float32 xyxy -> float64 xywh, the json's decimals (up to three) restored to the last bit.

    The last bit decides whether an IoU that lies exactly on a threshold passes it.
    """
    corners = boxes.astype(np.float64)
    xywh = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    is_decimal = (corners.round(3).astype(np.float32) == boxes).all(axis=1, keepdims=True)
    return np.where(is_decimal, xywh.round(3), xywh)
