"""Proposal files: boxes in Lua's order and counting, sizes from elsewhere, boxes as masks."""

import json

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from pipeline.inference.proposal_store import ProposalStore
from pipeline.torch7.convert import convert_file
from tests.pipeline.torch7.torch7_writer import written

HEIGHT, WIDTH = 30, 40
# y1, x1, y2, x2 from 1 on, the last pixel in the box
BOXES = {
    "b.jpg": [[1, 1, 1, 1], [3, 5, 12, 8], [1, 1, 30, 40]],
    "a.jpg": [[29, 39, 50, 60], [100, 100, 120, 120], [2.4, 2.4, 4.6, 4.6]],
    "empty.jpg": [],
}
SCORES = {"b.jpg": [0.25, 0.75, 0.5], "a.jpg": [0.9, 0.8, 0.7], "empty.jpg": []}


def tensor(rows: list) -> torch.Tensor | dict:
    return torch.tensor(rows, dtype=torch.float32) if rows else {}


def table(**changes: list) -> dict:
    columns = {
        "images": list(BOXES),
        "boxes": [tensor(rows) for rows in BOXES.values()],
        "scores": [tensor(scores) for scores in SCORES.values()],
    }
    return columns | changes


@pytest.fixture
def write(tmp_path):
    """Writes a file of proposals and a COCO json with the sizes of its images."""

    def make(**changes: list):
        (tmp_path / "val.t7").write_bytes(written(table(**changes)))
        images = [
            {"id": 7 + n, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for n, name in enumerate(sorted(BOXES))
        ]
        content = {"images": images, "annotations": [], "categories": []}
        (tmp_path / "val.json").write_text(json.dumps(content))
        return tmp_path / "val.t7", tmp_path / "store", tmp_path / "val.json"

    return make


def test_boxes_scores_ids_and_masks(write):
    file, output, annotations = write()
    lines = convert_file(file, output, annotations=annotations)
    assert any("6 boxes of 3 images" in line for line in lines)
    assert any("left out: 1 boxes" in line for line in lines)
    assert any("the masks in the store are the filled boxes" in line for line in lines)
    store = ProposalStore(output)
    assert store.settings()["masks"] == "filled boxes"
    found = {proposals.file_name: proposals for proposals in store}
    assert {i["file_name"] for i in store.images().values()} == set(BOXES)
    assert found.keys() == {"a.jpg", "b.jpg"}
    b = found["b.jpg"]
    assert (b.image_id, b.height, b.width) == (8, HEIGHT, WIDTH)
    assert b.scores == pytest.approx([0.75, 0.5, 0.25])
    assert b.boxes.tolist() == [[4, 2, 8, 12], [0, 0, 40, 30], [0, 0, 1, 1]]
    for n, (x0, y0, x1, y1) in enumerate(b.boxes.astype(int).tolist()):
        expected = np.zeros((HEIGHT, WIDTH), bool)
        expected[y0:y1, x0:x1] = True
        assert np.array_equal(coco_mask.decode(b.rle(n)).astype(bool), expected)
    a = found["a.jpg"]  # cut at the image's border; of pixels those whose center is in the box
    assert a.boxes[0].tolist() == [38, 28, 40, 30] and coco_mask.area(a.rle(0)) == 4
    assert a.boxes[1] == pytest.approx([1.4, 1.4, 4.6, 4.6]) and coco_mask.area(a.rle(1)) == 16
    assert len(json.loads((output / "proposals.json").read_text())) == 5


def test_sizes_from_the_images_themselves(write, tmp_path):
    file, output, _ = write()
    (tmp_path / "images").mkdir()
    for name in BOXES:
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    convert_file(file, output, images=tmp_path / "images")
    sizes = {(image["height"], image["width"]) for image in ProposalStore(output).images().values()}
    assert sizes == {(HEIGHT, WIDTH)}


@pytest.mark.parametrize(
    "changes, options, reason",
    [
        ({}, {"annotations": None}, "without the sizes of their images; give --annotations"),
        ({"images": ["a.jpg", "b.jpg", "other.jpg"]}, {}, "1 of its 3 images .* such as other.jpg"),
        ({"images": ["a.jpg", "b.jpg"]}, {}, "2 images, 3 tables of boxes and 3 of scores"),
        ({"images": ["a.jpg", 5, "b.jpg"]}, {}, r"images\[2\]: expected a file name, got 5"),
        ({"scores": [tensor([0.5])] * 3}, {}, "b.jpg: 3 boxes and 1 scores"),
        ({"boxes": [tensor([[1, 2, 3]])] * 3}, {}, "b.jpg: expected boxes of four finite numbers"),
        ({"boxes": 3}, {}, "boxes: expected a table with an entry for each image"),
        ({"scores": [tensor([0.5, float("nan"), 1])] * 3}, {}, "b.jpg: a score that is not finite"),
    ],
)
def test_what_does_not_fit_is_refused(write, changes, options, reason):
    file, output, annotations = write(**changes)
    with pytest.raises(ValueError, match=f"val.t7: .*{reason}"):
        convert_file(file, output, **{"annotations": annotations, **options})


def test_a_store_that_holds_proposals_is_not_added_to(write):
    file, output, annotations = write()
    convert_file(file, output, annotations=annotations)
    with pytest.raises(ValueError, match="holds proposals already"):
        convert_file(file, output, annotations=annotations)
