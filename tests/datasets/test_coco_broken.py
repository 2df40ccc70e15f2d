"""COCO jsons of every kind: what is left out with which reason, what is an error."""

import json
from functools import partial

import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.coco import CHUNK, CocoInstances
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
from tests.fuzzing import fuzzed


@pytest.fixture
def load(tmp_path):
    return partial(load_json, tmp_path / "instances.json")


# What is left out

NAN, INF = float("nan"), float("inf")
UNUSABLE = {
    ("image_id", "unknown image"): [99],
    ("category_id", "unknown category"): [99],
    ("segmentation", "no segmentation"): [None, [], {}],
    ("segmentation", "malformed segmentation"): [
        *("x", 7, True, [SQUARE, "123456"], [SQUARE, [1, 2, {}, 3, 4, 5]]),
        *([[[1, 2, 3], [3, 4, 3], [5, 6, 3]]], [[10**400, 1, 2, 3, 4, 5]]),
    ],
    ("segmentation", "fewer than three points"): [
        *([[]], [[1, 2, 30, 20]], [1, 2, 30, 20], [[[1, 2], [30, 20]]], [[1, 2], [30, 20]]),
    ],
    ("segmentation", "odd number of coordinates"): [[SQUARE, [*SQUARE, 3]], [[1, 2, 3]], [1, 2, 3]],
    ("segmentation", "NaN or infinite number"): [
        [SQUARE, [1, 2, 3, value, 4, 9]] for value in (NAN, INF, None)
    ],
    ("segmentation", "zero area"): [
        *([[1, 1, 2.1, 2.1, 3.3, 3.3]], [[5, 5] * 4], rle([HEIGHT * WIDTH])),
        *([[[1, 1], [2, 2], [3, 3]]], [[1, 1], [2, 2], [3, 3]]),
    ],
    ("segmentation", "relative coordinates (0 to 1, not pixels)"): [
        *([[0.1, 0.2, 0.5, 0.2, 0.5, 0.9]], [[0, 0, 1.01, 0, 1, 1]], [[[0, 0], [0.4, 0], [0, 1]]]),
    ],
    **{
        (flag, "iscrowd or ignore is neither 0 nor 1"): [2, -1, 0.5, "no", "", "2", [], {}, NAN]
        for flag in ("iscrowd", "ignore")
    },
    ("segmentation", "outside the image"): [
        *([[-9, -9, -1, -9, -5, -1]], [[60, 10, 70, 10, 65, 20]]),
        *([[10, 10, 1e9, 10, 10, 20]], [[10, 10, 1e300, 10, 1e300, -1e300]]),
    ],
    ("segmentation", "RLE size differs from the image"): [
        *(rle([5, 10, 5], (4, 5)), rle(RUNS, (WIDTH, HEIGHT)), rle([20], (4, 5))),
    ],
    ("segmentation", "broken RLE"): [
        *(rle([5, 10]), rle([5, -10, HEIGHT * WIDTH + 5]), rle([5, 10.5, HEIGHT * WIDTH - 15.5])),
        *(rle([]), rle(""), rle("ooooooooooooooo"), rle("é\ud800"), rle(compress(RUNS)[:-1])),
        *(rle(RUNS, [HEIGHT]), rle(RUNS, [HEIGHT, str(WIDTH)]), rle([2**70], [2**35, 2**35])),
        {"counts": RUNS},
    ],
}
BAD_BOXES = {
    "zero area": [[0, 0, 0, 0], [10, 10, 0, 15], [10, 10, -5, 5], [5, 5, 1e-9, 5]],
    "outside the image": [[10, 40, 5, 5], [-1e300, 0, 2e300, 5], [10, 10, 1e9, 5]],
    "relative coordinates (0 to 1, not pixels)": [[0.2, 0.3, 0.5, 0.4], [0, 0, 1, 1]],
    "box is not four finite numbers": [
        *([10, 10, 5], [1.7e308, 10, 1.7e308, 5], [10, 10, 5, NAN], [1, 2, None, 4]),
        *("10 10 5 5", ["1", "2", "3", "4"], [[1, 2, 3, 4]], {"x": 1}, 7),
    ],
}
LEFT_OUT = [({key: x}, reason) for (key, reason), values in UNUSABLE.items() for x in values]
LEFT_OUT += [
    ({"bbox": box, "segmentation": []}, reason) for reason, v in BAD_BOXES.items() for box in v
]


@pytest.mark.parametrize(("change", "reason"), LEFT_OUT, ids=lambda value: str(value)[:60])
def test_left_out(load, change, reason):
    coco = load(minimal(**change))
    assert coco.left_out == {reason: 1}
    assert len(coco.annotation_ids) == 0
    assert coco.has_left_out.tolist() == [reason != "unknown image"]


def test_left_out_ones_do_not_shift_the_others(load):
    mixed, expected = various(), load(various())
    good = mixed["annotations"]
    bad = [
        minimal(**change, id=1000 + i)["annotations"][0] for i, (change, _) in enumerate(LEFT_OUT)
    ]
    mixed["annotations"] = [*bad[:9], *good[:2], *bad[9:30], *good[2:], *bad[30:]]
    coco = load(mixed)
    assert sum(coco.left_out.values()) == len(bad)
    assert coco.has_left_out.tolist() == [False, False, True]
    flags = ("is_crowd", "is_difficult")
    for name in ("annotation_ids", "image_index", "category_index", "areas", "boxes", *flags):
        np.testing.assert_array_equal(getattr(coco, name), getattr(expected, name))
    assert [coco.rle(a) for a in range(len(good))] == [expected.rle(a) for a in range(len(good))]


def test_summary_is_one_line_with_the_reasons(load):
    content = various()
    content["annotations"] += [content["annotations"][0] | {"image_id": 99}] * 2
    content["annotations"] += [content["annotations"][0] | {"segmentation": []}]
    content["annotations"] += [content["annotations"][2] | {"segmentation": []}]
    content["annotations"] += [content["annotations"][0] | {"bbox": [0, 0, 0, 0]}]
    expected = (
        "instances.json: 3 images, 6 annotations (1 crowd) of 2 categories; "
        "without a mask 1: no segmentation 1; left out 3: unknown image 2, no segmentation 1; "
        "boxes that contradict the segmentation, measured on it: 1"
    )
    assert load(content).summary().endswith(expected)


# What is an error


def without(array: str, key: str) -> dict:
    content = minimal()
    del content[array][0][key]
    return content


def with_element(array: str, element) -> dict:
    content = minimal()
    content[array].append(element)
    return content


def with_value(array: str, key: str, value) -> dict:
    return with_element(array, minimal()[array][0] | {"id": 50, key: value})


LARGE = {"id": 50, "file_name": "a.jpg", "height": 30_000, "width": 20_000}
ERRORS = [
    ("", "line 1 column 1"),
    ('{"images": [],\n "annotations": [1 2]}', "line 2 column 20"),
    ('{"images": [{"id": 1', "line 1 column"),
    ('{"info" 3}', "line 1 column 9"),
    (json.dumps(minimal()) + " }", "Extra data"),
    ('{"images": [' + "[" * 200_000, "not valid JSON: .* recursion depth"),
    ("[]", 'has no "images" array'),
    ("{}", 'has no "images" array'),
    ({"images": [], "annotations": []}, 'has no "categories" array'),
    ({"images": {}, "annotations": [], "categories": []}, 'has no "images" array'),
    (minimal() | {"images": []}, '"images" is empty'),
    (with_element("images", 3), r'images\[1\]: Expected "object"'),
    (with_element("annotations", None), r'annotations\[1\]: Expected "object"'),
    *[
        (without(array, key), rf'{array}\[0\]: .* missing required field "{key}"')
        for array, keys in {
            "images": ("id", "file_name", "height", "width"),
            "categories": ("id", "name"),
            "annotations": ("id", "image_id", "category_id"),
        }.items()
        for key in keys
    ],
    (with_value("images", "width", -5), r'images\[1\].width: Expected "int" >= 1'),
    (with_value("images", "width", 10**30), r'images\[1\].width: Expected "int" <= 1048576'),
    (with_value("images", "height", "480"), r'images\[1\].height: Expected "int", got "str"'),
    (with_value("images", "height", 4.5), r'images\[1\].height: Expected "int", got "float"'),
    (with_value("images", "height", NAN), r'images\[1\].height: Expected "int", got "float"'),
    (with_element("images", LARGE), r"images\[1\]: 20000 x 30000 pixels is too large"),
    (with_value("images", "id", True), r'images\[1\].id: Expected "int", got "bool"'),
    (with_value("images", "id", 3), r"images\[1\] has the id 3 of images\[0\]"),
    (with_value("images", "file_name", ""), r'images\[1\].file_name: Expected "str" of length'),
    (with_value("images", "file_name", None), r'images\[1\].file_name: Expected "str", got "null"'),
    (with_value("categories", "id", 5), r"categories\[1\] has the id 5 of categories\[0\]"),
    (with_value("annotations", "image_id", "3"), r'annotations\[1\].image_id: Expected "int", got'),
    (with_value("annotations", "id", 2**63), r'annotations\[1\].id: Expected "int" <= 9223'),
]


@pytest.mark.parametrize(("content", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors_name_file_and_place(load, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load(content)
    assert "instances.json: " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_place_beyond_the_first_chunk(load):
    content = without("annotations", "category_id")
    content["annotations"] = minimal()["annotations"] * (CHUNK + 7) + content["annotations"]
    with pytest.raises(ValueError, match=rf"annotations\[{CHUNK + 7}\]: .*category_id"):
        load(content)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        CocoInstances.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="a folder"):
        CocoInstances.load(tmp_path)
    path = tmp_path / "instances.json"
    path.write_bytes(json.dumps(minimal()).encode().replace(b"a.jpg", b"\xff.jpg"))
    with pytest.raises(ValueError, match=r"instances\.json: images\[0\].*utf-8"):
        CocoInstances.load(path)


number = st.integers(-70, 70) | st.integers() | st.floats()
counts = st.lists(st.integers(-1, 3000), max_size=4) | st.text("01PQo`?4O", max_size=6) | number
anything = st.recursive(
    st.none() | st.booleans() | number | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
segmentations = (
    st.lists(st.lists(number, max_size=8), max_size=3)
    | st.fixed_dictionaries({"size": st.just([HEIGHT, WIDTH]) | anything, "counts": counts})
    | anything
)


@fuzzed(data=st.data())
def test_any_value_anywhere_is_used_or_left_out_or_an_error(tmp_path_factory, data):
    content = various()
    array = data.draw(st.sampled_from(["images", "annotations", "annotations", "categories"]))
    element = data.draw(st.sampled_from(content[array]))
    keys = [*element, "area", "bbox", "iscrowd"] if array == "annotations" else [*element]
    key = data.draw(st.sampled_from(keys))
    element[key] = data.draw(segmentations if key == "segmentation" else anything)
    path = tmp_path_factory.getbasetemp() / "anything.json"
    path.write_text(json.dumps(content))
    try:
        coco = CocoInstances.load(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert len(coco.annotation_ids) + sum(coco.left_out.values()) == 4
    assert np.isfinite(coco.boxes).all() and np.isfinite(coco.areas).all()
    for a in range(len(coco.annotation_ids)):
        size = coco.image_sizes[coco.image_index[a]].tolist()
        assert list(coco_mask.decode(coco.rle(a)).shape) == size
