"""COCO jsons that say in their own way what is meant: what is read, measured, kept, and counted."""

import json
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.coco_file import read_json
from tests.datasets.coco_jsons import (
    HEIGHT,
    RUNS,
    SQUARE,
    WIDTH,
    compress,
    load_json,
    minimal,
    rle,
    various,
)
from tests.datasets.test_coco_broken import BAD_BOXES, NAN, UNUSABLE


@pytest.fixture
def load(tmp_path):
    return partial(load_json, tmp_path / "instances.json")


SHAPES = [  # the square in other words
    [[[10, 10], [30, 10], [30, 25], [10, 25]]],
    [[10, 10], [30, 10], [30, 25], [10, 25]],
    SQUARE,
    [[[10.0, 10], [30, 10], [30, 25], [10, 25]], [], [[1, 2]]],
]
RLES = [
    rle(compress(RUNS)),
    rle([float(run) for run in RUNS], [float(HEIGHT), WIDTH]),
    rle(f"b'{compress(RUNS)}'"),
    rle(f'b"{compress(RUNS)}"'),
]


@pytest.mark.parametrize("segmentation", SHAPES)
def test_polygons_of_other_forms(load, segmentation):
    expected, coco = load(minimal()), load(minimal(segmentation=segmentation))
    assert [ring.tolist() for ring in coco.polygons(0)] == [expected.polygons(0)[0].tolist()]
    assert coco.areas.tolist() == expected.areas.tolist() and not coco.left_out


@pytest.mark.parametrize("segmentation", RLES, ids=str)
def test_rles_of_other_forms(load, segmentation):
    assert load(minimal(segmentation=segmentation)).rle(0)["counts"] == compress(RUNS).encode()


def test_counts_as_python_prints_bytes_keep_their_backslashes(load):
    rng = np.random.default_rng(0)
    masks = rng.random((60, HEIGHT, WIDTH)) < rng.random((60, 1, 1))
    strings = [coco_mask.encode(np.asfortranarray(m, np.uint8))["counts"] for m in masks]
    assert any(b"\\" in string for string in strings)
    content = minimal()
    content["annotations"] = [
        minimal(id=i, segmentation=rle(str(string)))["annotations"][0]
        for i, string in enumerate(strings)
    ]
    coco = load(content)
    assert [coco.rle(a)["counts"] for a in range(len(strings))] == strings


FLAGS = {
    False: [0, "0", "false", "False", " FALSE ", False, 0.0, -0.0, None],
    True: [1, "1", "true", "True", " 1", True, 1.0],
}


@pytest.mark.parametrize(("expected", "value"), [(f, v) for f, vs in FLAGS.items() for v in vs])
@pytest.mark.parametrize(("flag", "column"), [("iscrowd", "is_crowd"), ("ignore", "is_difficult")])
def test_flags_are_read_for_what_they_say(load, flag, column, expected, value):
    coco = load(minimal(**{flag: value}))
    assert getattr(coco, column).tolist() == [expected] and not coco.left_out


@pytest.mark.parametrize("area", [0, -300, -0.0, None, NAN, "300", [], True])
def test_an_area_that_is_none_is_measured(load, area):
    coco = load(minimal(area=area))
    assert coco.areas.tolist() == [300] and not coco.left_out
    coco = load(minimal(area=area, segmentation=None, bbox=[10, 10, 4, 5]))
    assert coco.areas.tolist() == [20] and coco.without_mask == {"no segmentation": 1}


BOUNDS = [10, 10, 30, 25]
CONTRADICTIONS = {
    "y from below": [10, HEIGHT - 25, 20, 15],
    "corners": [10, 10, 30, 25],
    "corners, inclusive": [10, 10, 29, 24],
    "center": [20, 17.5, 20, 15],
    "relative": [10 / WIDTH, 10 / HEIGHT, 20 / WIDTH, 15 / HEIGHT],
    "relative center": [20 / WIDTH, 17.5 / HEIGHT, 20 / WIDTH, 15 / HEIGHT],
    "of a larger image": [20, 20, 40, 30],
}


@pytest.mark.parametrize(
    "bbox", [*CONTRADICTIONS.values(), *(box for boxes in BAD_BOXES.values() for box in boxes)]
)
def test_a_box_that_contradicts_the_segmentation_is_measured_on_it(load, bbox):
    coco = load(minimal(bbox=bbox))
    assert coco.boxes.tolist() == [BOUNDS] and coco.num_measured == 1
    assert not coco.left_out and coco.has_mask.all()


@pytest.mark.parametrize(
    "bbox",
    [[10, 10, 20, 15], [9, 9, 22, 17], [10, 10, 19, 14], [5, 4, 40, 30], [12, 11, 15, 13]],
)
def test_boxes_of_other_hands_and_of_hidden_parts_are_kept(load, bbox):
    coco = load(minimal(bbox=bbox))
    assert coco.boxes.tolist() == [[*bbox[:2], bbox[0] + bbox[2], bbox[1] + bbox[3]]]
    assert coco.num_measured == 0


@settings(max_examples=100, deadline=None)
@given(x=st.integers(0, 560), y=st.integers(0, 400), w=st.integers(12, 300), h=st.integers(12, 300))
def test_boxes_of_other_conventions_are_never_far_from_the_object(tmp_path_factory, x, y, w, h):
    """Whatever the object: what is kept overlaps it well, unless it may be its hidden part's."""
    height, width = 480, 640
    w, h = min(w, width - x), min(h, height - y)
    forms = [[x, height - y - h, w, h], [x, y, x + w, y + h], [y, x, h, w], [0, 0, 0, 0]]
    forms += [[x / width, y / height, w / width, h / height], [x + w / 2, y + h / 2, w, h]]
    content = minimal()
    content["images"][0] |= {"height": height, "width": width}
    ring = [x, y, x + w, y, x + w, y + h, x, y + h]
    content["annotations"] = [
        minimal(id=i, segmentation=[ring], bbox=box)["annotations"][0]
        for i, box in enumerate(forms)
    ]
    coco = load_json(tmp_path_factory.getbasetemp() / "forms.json", content)
    np.testing.assert_allclose(coco.boxes, [[x, y, x + w, y + h]] * len(forms), atol=4)


NO_MASK = ["no segmentation", "malformed segmentation", "fewer than three points", "broken RLE"]
NO_MASK += ["odd number of coordinates", "NaN or infinite number", "zero area"]
NO_MASK += ["relative coordinates (0 to 1, not pixels)"]
WITHOUT_MASK = [
    (value, reason)
    for (key, reason), values in UNUSABLE.items()
    for value in values
    if key == "segmentation"
]


@pytest.mark.parametrize(("value", "reason"), WITHOUT_MASK, ids=lambda value: str(value)[:60])
def test_a_good_box_without_a_mask_is_kept(load, value, reason):
    """Unless the segmentation is of another image, or of another place."""
    content = minimal(segmentation=value, bbox=[10, 10, 20, 15], area=123)
    content["annotations"] += minimal(id=8)["annotations"]
    coco = load(content)
    if reason in NO_MASK:
        assert coco.without_mask == {reason: 1} and coco.left_out == {}
        assert coco.boxes.tolist() == [BOUNDS] * 2 and coco.areas.tolist() == [123, 300]
        assert coco.has_mask.tolist() == [False, True] and not coco.has_left_out.any()
        assert coco.polygons(0) is None and coco_mask.area(coco.rle(0)) == 300
        assert coco.polygons(1)[0].ravel().tolist() == SQUARE
    else:
        assert coco.left_out == {reason: 1} and coco.boxes.tolist() == [BOUNDS]


def test_integral_floats_pass_for_integers(load):
    content = minimal(id=7.0, image_id=3.0, category_id=5.0)
    content["images"][0] |= {"height": 40.0, "id": 3.0}
    content["categories"][0]["id"] = 5.0
    coco = load(content)
    assert coco.image_sizes.tolist() == [[HEIGHT, WIDTH]] and coco.annotation_ids.tolist() == [7]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_encodings(tmp_path, encoding):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(various(), ensure_ascii=False), encoding=encoding)
    assert CocoInstances.load(path).file_name(0) == "train/ü 1.jpg"
    assert read_json(path) == various()
