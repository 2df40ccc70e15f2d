"""COCO results of detections: pycocotools loads them, and the same detections are read back.

What is refused, and how, is tested with the scores (`tests/pipeline/evaluation`).
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from pipeline.inference.coco_json import read_detections
from pipeline.inference.proposals import Detections, logits_of, results_of, write_results
from tests.pipeline.inference.builders import proposals_of

HEIGHT, WIDTH = 48, 64


def detections(image_id, *, count, masks=True, seed=0):
    rng = np.random.default_rng([seed, image_id])
    corners = rng.uniform(0, 1, (count, 2, 2)) * [WIDTH, HEIGHT]
    proposals = proposals_of(rng.random((count, HEIGHT, WIDTH)) > 0.5)
    return Detections(
        image_id,
        f"folder/{image_id}.jpg",
        HEIGHT,
        WIDTH,
        logits=logits_of(np.sort(rng.random(count))[::-1]),
        boxes=np.sort(corners, axis=1).reshape(-1, 4).astype(np.float32),
        labels=rng.choice([1, 3, 90], count),
        rles=proposals.rles if masks else [],
    )


def write_detections(path, all_detections):
    return write_results(path, (result for d in all_detections for result in results_of(d)))


def images_of(all_detections):
    return [
        {"id": d.image_id, "file_name": d.file_name, "height": d.height, "width": d.width}
        for d in all_detections
    ]


counts = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@settings(max_examples=25, deadline=None)
@given(counts, st.booleans(), st.integers(0, 2**31 - 1))
def test_what_is_written_is_read_back(tmp_path_factory, counts, masks, seed):
    written = [
        detections(image_id, count=n, masks=masks, seed=seed)
        for image_id, n in enumerate(counts, start=5)
    ]
    path = tmp_path_factory.mktemp("detections") / "detections.json"
    assert write_detections(path, iter(written)) == sum(counts)
    for before, after in zip(written, read_detections(path, images_of(written)), strict=True):
        assert (after.image_id, after.file_name) == (before.image_id, before.file_name)
        np.testing.assert_allclose(after.scores, before.scores, atol=1e-8)
        np.testing.assert_allclose(after.boxes, before.boxes, atol=2e-3)
        assert after.labels.tolist() == before.labels.tolist()
        if sum(counts):
            assert after.rles == before.rles


@pytest.mark.parametrize("masks", [True, False])
def test_pycocotools_loads_it(tmp_path, masks):
    written = [detections(1, count=4, masks=masks), detections(2, count=3, masks=masks)]
    path = tmp_path / "detections.json"
    write_detections(path, written)
    truth = COCO()
    truth.dataset = {"images": images_of(written), "annotations": [], "categories": []}
    truth.createIndex()
    loaded = truth.loadRes(str(path))
    for image in written:
        found = loaded.loadAnns(loaded.getAnnIds(imgIds=[image.image_id]))
        assert [f["category_id"] for f in found] == image.labels.tolist()
        xywh = np.array([f["bbox"] for f in found])
        np.testing.assert_allclose(xywh[:, :2] + xywh[:, 2:], image.boxes[:, 2:], atol=2e-3)
        for n, one in enumerate(found if masks else []):
            assert np.array_equal(loaded.annToMask(one), mask_utils.decode(image.rle(n)))
    keys = ["image_id", "category_id", "score", "bbox", *(["segmentation"] if masks else [])]
    assert all(list(result) == keys for result in json.loads(path.read_text()))


def test_order_survives_from_the_network_to_the_results_and_back(tmp_path):
    """Sure detections: in float32 all of these scores would be 1, and ordered by image."""
    images = [detections(image_id, count=2) for image_id in (1, 2)]
    for image, logits in zip(images, ([30.1, 20.2], [30.0, 20.1]), strict=True):
        image.logits = np.array(logits)
    path = tmp_path / "detections.json"
    write_detections(path, images)
    (a, c), (b, d) = ([r["score"] for r in results_of(image)] for image in images)
    assert 1 > a > b > c > d and np.float32([a, b, c, d]).tolist() == [1] * 4
    for before, after in zip(images, read_detections(path, images_of(images)), strict=True):
        np.testing.assert_allclose(after.logits, before.logits, rtol=1e-3)


def test_reading_names_the_file_and_the_place(tmp_path):
    path = tmp_path / "detections.json"
    write_detections(path, [detections(7, count=1)])
    with pytest.raises(
        ValueError, match=r"detections\.json: results\[0\]: image_id 7 is not in the annotations"
    ):
        read_detections(path, images_of([detections(8, count=0)]))
