"""COCO jsons of every kind: what is read, what is left out with which reason, what is an error."""

import copy
import gc
import json
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets import json_arrays
from datasets.coco import CocoInstances
from tests.real_data import COCO_MINI_VAL

MINI = COCO_MINI_VAL
HEIGHT, WIDTH = 40, 60
SQUARE = [10, 10, 30, 10, 30, 25, 10, 25]
RUNS = [5, 10, HEIGHT * WIDTH - 15]


def minimal(**annotation) -> dict:
    """One image and one annotation, the square unless the arguments change it."""
    annotation = {"id": 7, "image_id": 3, "category_id": 5, "segmentation": [SQUARE]} | annotation
    return {
        "images": [{"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [annotation],
        "categories": [{"id": 5, "name": "cat"}],
    }


def rle(counts, size=(HEIGHT, WIDTH)) -> dict:
    return {"size": list(size), "counts": counts}


def compress(runs: list[int]) -> str:
    return coco_mask.frPyObjects(rle(runs), HEIGHT, WIDTH)["counts"].decode()


@pytest.fixture
def load(tmp_path):
    def write_and_load(content) -> CocoInstances:
        path = tmp_path / "instances.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return CocoInstances.load(path)

    return write_and_load


@pytest.fixture
def quiet_coco(capsys):
    def build(path) -> COCO:
        coco = COCO(str(path))
        capsys.readouterr()
        return coco

    return build


# What is read


def various() -> dict:
    """Two kinds of RLE, several rings, a crowd, gaps in the ids, an image without annotations."""
    content = minimal()
    content["images"] = [
        {"id": 30, "file_name": "train/ü 1.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 4, "file_name": "empty.jpg", "height": 1, "width": 2},
        {"id": 3, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH},
    ]
    content["categories"] = [{"id": 90, "name": "zebra"}, {"id": 5, "name": "cat"}]
    triangle = [40.5, 5.25, 50.13, 5, 45, 20.7]
    content["annotations"] = [
        {"id": 1, "image_id": 3, "category_id": 90, "segmentation": [SQUARE, triangle]},
        {"id": 2, "image_id": 30, "category_id": 5, "segmentation": rle(RUNS), "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 5, "segmentation": rle(compress(RUNS))},
        {"id": 4, "image_id": 30, "category_id": 5, "segmentation": [triangle], "iscrowd": 0},
    ]
    content["annotations"][2]["ignore"] = 1
    for annotation in content["annotations"][:2]:
        annotation |= {"area": 123.5, "bbox": [10.5, 11, 12, 13]}
    return content


def test_columns(load):
    coco = load(various())
    assert len(coco) == 3
    assert coco.image_ids.tolist() == [30, 4, 3]
    assert coco.image_sizes.tolist() == [[HEIGHT, WIDTH], [1, 2], [HEIGHT, WIDTH]]
    assert [coco.file_name(i) for i in range(3)] == ["train/ü 1.jpg", "empty.jpg", "a.jpg"]
    assert coco.category_ids.tolist() == [5, 90]
    assert coco.category_names == ["cat", "zebra"]
    assert coco.annotation_ids.tolist() == [2, 4, 1, 3]  # by image, in the file's order
    assert coco.image_starts.tolist() == [0, 2, 2, 4]
    assert coco.image_index.tolist() == [0, 0, 2, 2]
    assert coco.category_index.tolist() == [0, 0, 1, 0]
    assert coco.is_crowd.tolist() == [True, False, False, False]
    assert coco.is_difficult.tolist() == [False, False, False, True]
    assert not coco.left_out and not coco.has_left_out.any()


def test_box_and_area_from_the_json_or_measured(load):
    coco = load(various())
    assert coco.boxes[[0, 2]].tolist() == [[10.5, 11, 22.5, 24]] * 2
    assert coco.areas[[0, 2]].tolist() == [123.5] * 2
    np.testing.assert_allclose(coco.boxes[1], [40.5, 5, 50.13, 20.7], rtol=1e-6)
    np.testing.assert_allclose(coco.areas[1], 74.95425, rtol=1e-6)
    # Runs 5, 10: rows 5 to 14 of the first column.
    assert coco.boxes[3].tolist() == [0, 5, 1, 15] and coco.areas[3] == 10


def test_polygons_and_masks(load, quiet_coco, tmp_path):
    coco = load(various())
    reference = quiet_coco(tmp_path / "instances.json")
    assert coco.polygons(0) is None and coco.polygons(3) is None
    rings = coco.polygons(2)
    assert [ring.shape for ring in rings] == [(4, 2), (3, 2)]
    assert rings[0].ravel().tolist() == SQUARE and rings[0].dtype == np.float32
    for row, annotation_id in enumerate(coco.annotation_ids.tolist()):
        expected = reference.annToMask(reference.anns[annotation_id])
        np.testing.assert_array_equal(coco_mask.decode(coco.rle(row)), expected)


def test_what_polygons_gives_is_the_callers(load):
    coco = load(minimal())
    coco.polygons(0)[0] += 100
    assert coco.polygons(0)[0].ravel().tolist() == SQUARE


coordinates = st.integers(-200, 6200).map(lambda hundredth: hundredth / 100)


@settings(max_examples=60, deadline=None)
@given(rings=st.lists(st.lists(coordinates, min_size=6, max_size=16), min_size=1, max_size=3))
def test_masks_equal_those_of_pycocotools(tmp_path_factory, rings):
    rings = [ring[: len(ring) // 2 * 2] for ring in rings]
    path = tmp_path_factory.mktemp("coco") / "instances.json"
    path.write_text(json.dumps(minimal(segmentation=rings)))
    coco = CocoInstances.load(path)
    if coco.left_out:
        assert {"zero area", "outside the image"} >= coco.left_out.keys()
    else:
        expected = coco_mask.merge(coco_mask.frPyObjects(rings, HEIGHT, WIDTH))
        assert coco.rle(0) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-999, 999).map(lambda x: x / 10), min_size=6, max_size=12))
def test_area_is_that_of_the_polygon(tmp_path_factory, ring):
    ring = ring[: len(ring) // 2 * 2]
    path = tmp_path_factory.mktemp("coco") / "instances.json"
    path.write_text(json.dumps(minimal(segmentation=[ring])))
    coco = CocoInstances.load(path)
    x, y = np.array(ring).reshape(-1, 2).T
    shoelace = abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2
    if not coco.left_out:
        np.testing.assert_allclose(coco.areas[0], shoelace, rtol=1e-4)
        np.testing.assert_allclose(coco.boxes[0], [x.min(), y.min(), x.max(), y.max()], rtol=1e-6)


def test_empty_runs_are_joined(load):
    """Pycocotools' merge and toBbox go wrong on them."""
    runs = [0, 5, 0, 5, 0, 0, HEIGHT * WIDTH - 10]
    for counts in (runs, compress(runs)):
        coco = load(minimal(segmentation=rle(counts)))
        assert coco.rle(0)["counts"] == compress([0, 10, HEIGHT * WIDTH - 10]).encode()
        assert coco.boxes[0].tolist() == [0, 0, 1, 10]


def test_a_degenerate_ring_beside_a_good_one_is_dropped(load):
    coco = load(minimal(segmentation=[[1, 2], SQUARE, [], [1, 2, 3, 4]]))
    assert [ring.ravel().tolist() for ring in coco.polygons(0)] == [SQUARE]


def test_many_chunks_in_any_order_of_the_keys(load):
    rng = np.random.default_rng(0)
    content = minimal()
    count = 2 * json_arrays.CHUNK + 3
    content["images"] = [content["images"][0] | {"id": i} for i in range(json_arrays.CHUNK + 1)]
    content["annotations"] = [
        content["annotations"][0]
        | {
            "id": i,
            "image_id": int(rng.integers(len(content["images"]))),
            "bbox": [i % 30, 1, 2, 3],
        }
        for i in range(count)
    ]
    content["annotations"][-1]["segmentation"] = rle(RUNS)
    backwards = {"info": {"images": [[]]}} | dict(reversed(content.items())) | {"licenses": []}
    for coco in (load(content), load(backwards)):
        assert sorted(coco.annotation_ids.tolist()) == list(range(count))
        assert (np.diff(coco.image_index) >= 0).all()
        for row, annotation_id in enumerate(coco.annotation_ids.tolist()):
            annotation = content["annotations"][annotation_id]
            assert coco.image_ids[coco.image_index[row]] == annotation["image_id"]
            assert coco.boxes[row, 0] == annotation["bbox"][0]
        rows = np.flatnonzero(coco.annotation_ids == count - 1)
        assert [a for a in range(count) if coco.polygons(a) is None] == rows.tolist()
        for i in (0, 1, len(coco) - 1):
            rows = range(coco.image_starts[i], coco.image_starts[i + 1])
            ids = coco.annotation_ids[list(rows)].tolist()
            assert ids == [a["id"] for a in content["annotations"] if a["image_id"] == i]


def test_no_annotations_at_all(load):
    coco = load(minimal() | {"annotations": [], "categories": []})
    assert len(coco) == 1 and len(coco.annotation_ids) == 0
    assert coco.image_starts.tolist() == [0, 0]
    assert coco.boxes.shape == (0, 4)


def test_coco_mini_equals_pycocotools(quiet_coco):
    if not MINI.exists():
        pytest.skip(f"{MINI} is not there")
    coco, reference = CocoInstances.load(MINI), quiet_coco(MINI)
    assert not coco.left_out
    assert sorted(coco.annotation_ids.tolist()) == sorted(reference.anns)
    for row, annotation_id in enumerate(coco.annotation_ids.tolist()):
        annotation = reference.anns[annotation_id]
        assert coco.rle(row) == reference.annToRLE(annotation)
        assert coco.category_ids[coco.category_index[row]] == annotation["category_id"]
        x, y, width, height = annotation["bbox"]
        np.testing.assert_allclose(coco.boxes[row], [x, y, x + width, y + height], rtol=1e-5)
        np.testing.assert_allclose(coco.areas[row], annotation["area"], rtol=1e-5)
    for i, image_id in enumerate(coco.image_ids.tolist()):
        assert coco.file_name(i) == reference.imgs[image_id]["file_name"]


# What is left out

NAN = float("nan")
LEFT_OUT = [
    (dict(image_id=99), "unknown image"),
    (dict(category_id=99), "unknown category"),
    (dict(segmentation=None), "no segmentation"),
    (dict(segmentation=[]), "no segmentation"),
    (dict(segmentation={}), "no segmentation"),
    (dict(segmentation="x"), "malformed segmentation"),
    (dict(segmentation=SQUARE), "malformed segmentation"),
    (dict(segmentation=[SQUARE, [1, 2, {}, 3, 4, 5]]), "malformed segmentation"),
    (dict(segmentation=[SQUARE, "123456"]), "malformed segmentation"),
    (dict(segmentation=[[[1, 2], [3, 4], [5, 6]]]), "malformed segmentation"),
    (dict(segmentation=[[10**400, 1, 2, 3, 4, 5]]), "malformed segmentation"),
    (dict(segmentation=[[]]), "fewer than three points"),
    (dict(segmentation=[[1, 2, 30, 20]]), "fewer than three points"),
    (dict(segmentation=[SQUARE, [*SQUARE, 3]]), "odd number of coordinates"),
    (dict(segmentation=[[1, 2, 3]]), "odd number of coordinates"),
    (dict(segmentation=[SQUARE, [1, 2, 3, NAN, 4, 9]]), "NaN or infinite number"),
    (dict(segmentation=[[1, 2, 3, float("inf"), 4, 9]]), "NaN or infinite number"),
    (dict(segmentation=[[1, 2, None, 3, 4, 9]]), "NaN or infinite number"),
    (dict(segmentation=[[1, 1, 2.1, 2.1, 3.3, 3.3]]), "zero area"),
    (dict(segmentation=[[5, 5] * 4]), "zero area"),
    (dict(area=0), "zero area"),
    (dict(bbox=[10, 10, 0, 15]), "zero area"),
    (dict(segmentation=rle([HEIGHT * WIDTH])), "zero area"),
    (dict(segmentation=[[-9, -9, -1, -9, -5, -1]]), "outside the image"),
    (dict(segmentation=[[60, 10, 70, 10, 65, 20]]), "outside the image"),
    (dict(segmentation=[[10, 10, 1e9, 10, 10, 20]]), "outside the image"),
    (dict(segmentation=[[10, 10, 1e300, 10, 1e300, -1e300]]), "outside the image"),
    (dict(bbox=[10, 40, 5, 5]), "outside the image"),
    (dict(bbox=[-1e300, 0, 2e300, 5]), "outside the image"),
    (dict(bbox=[10, 10, 5]), "box is not four finite numbers"),
    (dict(bbox=[1.7e308, 10, 1.7e308, 5]), "box is not four finite numbers"),
    (dict(bbox=[10, 10, 5, NAN]), "box is not four finite numbers"),
    (dict(bbox="10 10 5 5"), "box is not four finite numbers"),
    (dict(segmentation=rle([5, 10, 5], (4, 5))), "RLE size differs from the image"),
    (dict(segmentation=rle(RUNS, (WIDTH, HEIGHT))), "RLE size differs from the image"),
    (dict(segmentation=rle([5, 10])), "broken RLE"),
    (dict(segmentation=rle([5, -10, HEIGHT * WIDTH + 5])), "broken RLE"),
    (dict(segmentation=rle([5, 10.5, HEIGHT * WIDTH - 15.5])), "broken RLE"),
    (dict(segmentation=rle([])), "broken RLE"),
    (dict(segmentation=rle("")), "broken RLE"),
    (dict(segmentation=rle(compress(RUNS)[:-1])), "broken RLE"),
    (dict(segmentation=rle("ooooooooooooooo")), "broken RLE"),
    (dict(segmentation=rle("é\ud800")), "broken RLE"),
    (dict(segmentation=rle(None)), "broken RLE"),
    (dict(segmentation=rle(RUNS, [HEIGHT])), "broken RLE"),
    (dict(segmentation=rle(RUNS, [HEIGHT, str(WIDTH)])), "broken RLE"),
    (dict(segmentation=rle([2**70], [2**35, 2**35])), "broken RLE"),
    (dict(segmentation={"counts": RUNS}), "broken RLE"),
]


@pytest.mark.parametrize(("change", "reason"), LEFT_OUT, ids=lambda value: str(value)[:60])
def test_left_out(load, change, reason):
    coco = load(minimal(**change))
    assert coco.left_out == {reason: 1}
    assert len(coco.annotation_ids) == 0
    assert coco.has_left_out.tolist() == [reason != "unknown image"]


def test_left_out_ones_do_not_shift_the_others(load):
    good = various()
    mixed = copy.deepcopy(good)
    bad = [
        minimal(**(change | {"id": 1000 + i}))["annotations"][0]
        for i, (change, _) in enumerate(LEFT_OUT)
    ]
    mixed["annotations"] = [
        *bad[:9],
        *good["annotations"][:2],
        *bad[9:30],
        *good["annotations"][2:],
        *bad[30:],
    ]
    expected, coco = load(good), load(mixed)
    assert sum(coco.left_out.values()) == len(bad)
    assert coco.has_left_out.tolist() == [False, False, True]
    flags = ("is_crowd", "is_difficult")
    for name in ("annotation_ids", "image_index", "category_index", "areas", "boxes", *flags):
        np.testing.assert_array_equal(getattr(coco, name), getattr(expected, name))
    for a in range(len(expected.annotation_ids)):
        assert coco.rle(a) == expected.rle(a)


def test_summary_is_one_line_with_the_reasons(load):
    content = various()
    content["annotations"] += [{**content["annotations"][0], "image_id": 99}] * 2
    content["annotations"] += [{**content["annotations"][0], "segmentation": []}]
    summary = load(content).summary()
    assert "\n" not in summary
    for part in (
        "instances.json",
        "3 images",
        "4 annotations",
        "1 crowd",
        "2 categories",
        "unknown image 2",
        "no segmentation 1",
    ):
        assert part in summary


def test_integral_floats_pass_for_integers(load):
    content = minimal(image_id=3.0, category_id=5.0)
    content["images"][0] |= {"height": 40.0, "id": 3.0}
    coco = load(content)
    assert coco.image_sizes.tolist() == [[HEIGHT, WIDTH]] and len(coco.annotation_ids) == 1


# What is an error


def without(content: dict, array: str, key: str) -> dict:
    del content[array][0][key]
    return content


def with_element(array: str, element) -> dict:
    content = minimal()
    content[array].append(element)
    return content


def with_value(array: str, key: str, value) -> dict:
    content = minimal()
    content[array].append(content[array][0] | {"id": 50} | {key: value})
    return content


ERRORS = [
    ("", "line 1 column 1"),
    ("x", "line 1 column 1"),
    ('{"images": [],\n "annotations": [1 2]}', "line 2 column 20"),
    ('{"images": [{"id": 1},\n]}', "line 2 column 1"),
    ('{"images": [{"id": 1', "line 1 column"),
    ('{"images": [', "line 1 column 13"),
    ("{'images': []}", "line 1 column 2"),
    ('{"info" 3}', "line 1 column 9"),
    (json.dumps(minimal()) + " }", "Extra data"),
    ('{"images": [' + "[" * 200_000, "nested too deeply"),
    ("[]", "top level"),
    ("3", "top level"),
    ("{}", 'has no "images" array'),
    ({"images": [], "annotations": []}, 'has no "categories" array'),
    ({"images": {}, "annotations": [], "categories": []}, '"images" is .*dict'),
    (minimal() | {"images": []}, '"images" is empty'),
    ('{"images": [], "images": []}', '"images" twice'),
    (with_element("images", 3), r"images\[1\] is not an object"),
    (with_element("categories", []), r"categories\[1\] is not an object"),
    (with_element("annotations", None), r"annotations\[1\] is not an object"),
    *[
        (without(minimal(), array, key), rf'{array}\[0\] has no "{key}"')
        for array, keys in (
            ("images", ("id", "file_name", "height", "width")),
            ("categories", ("id", "name")),
            ("annotations", ("id", "image_id", "category_id")),
        )
        for key in keys
    ],
    (with_value("images", "height", 0), r'images\[1\] has "height": 0'),
    (with_value("images", "width", -5), r'images\[1\] has "width": -5'),
    (with_value("images", "width", 10**30), r'images\[1\] has "width": 1000'),
    (with_value("images", "height", "480"), r"""images\[1\] has "height": '480'"""),
    (with_value("images", "height", 4.5), r'images\[1\] has "height": 4.5'),
    (with_value("images", "height", NAN), r'images\[1\] has "height": nan'),
    (with_value("images", "height", 2**21), r'images\[1\] has "height": 2097152'),
    (
        minimal()
        | {"images": [{"id": 3, "file_name": "a.jpg", "height": 30_000, "width": 20_000}]},
        r"images\[0\] has 20000 x 30000 pixels",
    ),
    (with_value("images", "id", True), r'images\[1\] has "id": True'),
    (with_value("images", "id", 3), r"images\[1\] has the id 3 of images\[0\]"),
    (with_value("images", "file_name", ""), r'images\[1\] has "file_name"'),
    (with_value("images", "file_name", None), r'images\[1\] has "file_name"'),
    (with_value("categories", "id", 5), r"categories\[1\] has the id 5 of categories\[0\]"),
    (with_value("annotations", "image_id", "3"), r"""annotations\[1\] has "image_id": '3'"""),
    (with_value("annotations", "id", 2**63), r'annotations\[1\] has "id": 9223'),
]


@pytest.mark.parametrize(("content", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors_name_file_and_place(load, content, message):
    with pytest.raises(ValueError, match=message) as error:
        load(content)
    assert "instances.json: " in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert gc.isenabled()


def test_place_beyond_the_first_chunk(load):
    row = json_arrays.CHUNK + 7
    content = minimal()
    content["annotations"] = [dict(content["annotations"][0]) for _ in range(row + 3)]
    del content["annotations"][row]["category_id"]
    with pytest.raises(ValueError, match=rf'annotations\[{row}\] has no "category_id"'):
        load(content)


def test_files_that_are_no_text(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        CocoInstances.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="a folder"):
        CocoInstances.load(tmp_path)
    path = tmp_path / "instances.json"
    path.write_bytes(b'{"images": "\xff\xfe"}')
    with pytest.raises(ValueError, match=r"instances\.json.* not UTF-8"):
        CocoInstances.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(minimal()).encode())
    assert len(CocoInstances.load(path)) == 1


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


@settings(max_examples=300, deadline=None)
@given(data=st.data())
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


# How workers get it


def assert_equal(one: CocoInstances, other: CocoInstances) -> None:
    assert one.summary() == other.summary() and one.category_names == other.category_names
    for name, value in vars(one).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, getattr(other, name))
    assert [one.rle(a) for a in range(4)] == [other.rle(a) for a in range(4)]


def test_spawned_workers_share_the_arrays(load):
    coco, untouched = load(various()), load(various())
    copies = [pickle.loads(ForkingPickler.dumps(coco)) for _ in range(2)]
    for one in copies:
        assert_equal(one, untouched)
    coco.boxes[0] = 77  # the same memory in all of them
    for one in copies:
        assert (one.boxes[0] == 77).all()
    assert_equal(pickle.loads(pickle.dumps(copies[0])), copies[0])


def test_annotations_are_flat_arrays(load):
    """Nothing that grows with the json is a Python object: those are copied page by page."""
    content = minimal()
    content["annotations"] *= 500
    grown = {
        name: value
        for name, value in vars(load(content)).items()
        if not isinstance(value, np.ndarray)
    }
    assert grown == {name: getattr(load(minimal()), name) for name in grown}
