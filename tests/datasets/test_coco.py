"""What is read from COCO jsons of every kind, and how workers share it."""

import json
import pickle
from functools import partial
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets.coco import CHUNK, CocoInstances
from datasets.coco_file import read_image_list
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
from tests.real_data import COCO_MINI_VAL, skip_without

MINI = COCO_MINI_VAL


@pytest.fixture
def load(tmp_path):
    return partial(load_json, tmp_path / "instances.json")


# What is read


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
    triangle, runs = [40.5, 5, 50.13, 20.7], [0, 5, 1, 15]  # rows 5 to 14 of the first column
    given = [0.5, 4, 2.5, 16], [8.5, 3, 51.5, 27]
    np.testing.assert_allclose(coco.boxes, [given[0], triangle, given[1], runs], rtol=1e-6)
    np.testing.assert_allclose(coco.areas, [99.5, 74.95425, 123.5, 10], rtol=1e-6)


def test_polygons_and_masks(load, tmp_path):
    coco = load(various())
    reference = COCO(tmp_path / "instances.json")
    assert coco.polygons(0) is None and coco.polygons(3) is None
    rings = coco.polygons(2)
    assert [ring.shape for ring in rings] == [(4, 2), (3, 2)]
    assert rings[0].ravel().tolist() == SQUARE and rings[0].dtype == np.float32
    rings[0] += 100  # it is the caller's
    assert coco.polygons(2)[0].ravel().tolist() == SQUARE
    for row, annotation_id in enumerate(coco.annotation_ids.tolist()):
        expected = reference.annToMask(reference.anns[annotation_id])
        np.testing.assert_array_equal(coco_mask.decode(coco.rle(row)), expected)


coordinates = st.integers(-200, 6200).map(lambda hundredth: hundredth / 100)


@settings(max_examples=60, deadline=None)
@given(rings=st.lists(st.lists(coordinates, min_size=6, max_size=16), min_size=1, max_size=3))
def test_mask_area_and_box_of_polygons(tmp_path_factory, rings):
    rings = [ring[: len(ring) // 2 * 2] for ring in rings]
    path = tmp_path_factory.getbasetemp() / "polygons.json"
    coco = load_json(path, minimal(segmentation=rings))
    if coco.left_out:
        assert {"zero area", "outside the image"} >= coco.left_out.keys()
        return
    assert coco.rle(0) == coco_mask.merge(coco_mask.frPyObjects(rings, HEIGHT, WIDTH))
    points = [np.reshape(ring, (-1, 2)) for ring in rings]
    areas = [abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2 for x, y in (p.T for p in points)]
    np.testing.assert_allclose(coco.areas[0], sum(areas), rtol=1e-4)
    box = [*np.concatenate(points).min(axis=0), *np.concatenate(points).max(axis=0)]
    np.testing.assert_allclose(coco.boxes[0], box, rtol=1e-6)


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
    content, count = minimal(), 2 * CHUNK + 3
    content["images"] = [content["images"][0] | {"id": i} for i in range(30)]
    content["annotations"] = [
        minimal(id=i, image_id=int(rng.integers(30)), bbox=[10 + i % 4 / 8, 9, 20, 16])[
            "annotations"
        ][0]
        for i in range(count)
    ]
    content["annotations"][-1] |= {"segmentation": rle(RUNS), "bbox": [0, 5, 1, 10]}
    expected = sorted(content["annotations"], key=lambda a: a["image_id"])
    backwards = {"info": {"images": [[]]}} | dict(reversed(content.items())) | {"licenses": []}
    for coco in (load(content), load(backwards)):
        assert coco.annotation_ids.tolist() == [a["id"] for a in expected]
        assert coco.image_index.tolist() == [a["image_id"] for a in expected]
        assert coco.boxes[:, 0].tolist() == [a["bbox"][0] for a in expected]
        without_polygons = [coco.polygons(a) is None for a in range(count)]
        assert without_polygons == [a["id"] == count - 1 for a in expected]
        assert coco.image_starts.tolist() == np.searchsorted(coco.image_index, range(31)).tolist()


@pytest.mark.parametrize("info", [float("nan"), float("inf"), "\ud800"])
def test_what_strict_json_has_not_is_read_elsewhere(load, info):
    assert_equal(load(various() | {"info": info}), load(various()))


def test_no_annotations_and_a_file_name_that_is_no_unicode(load):
    content = minimal() | {"annotations": [], "categories": []}
    content["images"][0]["file_name"] = "caf\udce9.jpg"  # as Python reads other encodings
    coco = load(content)
    assert len(coco) == 1 and len(coco.annotation_ids) == 0 and coco.boxes.shape == (0, 4)
    assert coco.image_starts.tolist() == [0, 0] and coco.file_name(0) == "caf\udce9.jpg"


def test_coco_mini_equals_pycocotools():
    skip_without(MINI)
    coco, reference = CocoInstances.load(MINI), COCO(MINI)
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
    few, many = (vars(load(c)).items() for c in (minimal(), content))
    objects = {name: value for name, value in many if not isinstance(value, np.ndarray)}
    assert objects == {name: value for name, value in few if not isinstance(value, np.ndarray)}


# Lists of images


def test_image_list_of_a_test_set(tmp_path):
    path = tmp_path / "test.json"
    listed = [{"id": 5.0, "file_name": "b"}, *minimal()["images"]]
    path.write_text(json.dumps({"images": listed}))
    images = [(i.id, i.file_name, i.height, i.width) for i in read_image_list(path)]
    assert images == [(5, "b", None, None), (3, "a.jpg", HEIGHT, WIDTH)]


def test_no_image_list(tmp_path):
    path = tmp_path / "test.json"
    path.write_text('{"images": [{"id": 1}]}')
    with pytest.raises(ValueError, match=r'test.json: images\[0\].*"file_name"'):
        read_image_list(path)
