"""The released detector against the original's own outputs, from the image to what NMS keeps."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_pool

from datasets.roi_sampler import mirror
from pipeline.config import DetectConfig
from pipeline.inference.detect import Detector, load_detector, select_boxes
from pipeline.inference.proposals import Proposals
from pipeline.torch7.convert import convert_file
from tests.pipeline.torch7.lua_networks import assert_near, image_of
from tests.real_data import TORCH7, needs

DATA = TORCH7 / "multipathnet"
pytestmark = needs(DATA)  # files of the original code

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest value, and of each probability
CORNER = torch.tensor([0, 0, 1, 1])  # from a box's first and last pixel to its edges


def reference(name: str) -> Tensor:
    return torch.from_numpy(np.load(DATA / f"{name}.npy"))


def proposals_of(boxes: np.ndarray, height: int, width: int) -> Proposals:
    scores = np.ones(len(boxes), np.float32)
    return Proposals(1, "x", height, width, scores, boxes, [b""] * len(boxes))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("detector") / "detector.pt"
    lines = convert_file(DATA / "model.t7", path)
    # 6 convolutions of stem and layer1 with 2 parameters, 15 others with 3, 7 linears, BBoxNorm
    assert 5 * 2 + 15 * 3 + 7 * 2 + 2 == 71
    assert "71 parameters used, each once; 0 not used" in lines
    return path


@pytest.fixture(scope="module")
def detector(checkpoint) -> Detector:
    return load_detector(checkpoint, CPU)[0]


@pytest.fixture(scope="module")
@torch.inference_mode()
def outputs(detector) -> dict[str, Tensor]:
    """Everything between the original's input and its boxes."""
    model, rois = detector.model, reference("net_rois") - 1  # Lua counts from 1
    layers = model.layers(reference("net_input"))
    pooled = model.pool_regions(layers, rois)[1.0, 16]
    heads = model.classify_rois(layers, rois)
    probabilities, boxes = model.decode(heads, reference("boxes") - 1)
    return {
        "features": layers[16],
        "pooled": pooled[:8],
        "roi_code": model.towers[0].head(model.towers[0].pooling([pooled])),
        "head_logits": heads["class_logits"].transpose(0, 1),
        "bbox_raw": heads["deltas"].flatten(1),
        "bbox_deltas": (heads["deltas"] * model.delta_std + model.delta_mean).flatten(1),
        "probs": probabilities,
        "probs_direct": probabilities,
        "pred_boxes": boxes.flatten(1) + 1,
    }


def test_every_intermediate_is_the_originals(outputs):
    for name, ours in outputs.items():
        theirs = reference(name)
        # We do not decode the background's box.
        assert_near(ours, theirs[:, 4:] if name == "pred_boxes" else theirs)
    relative = (outputs["probs"] - reference("probs")).abs() / reference("probs")
    assert float(relative.max()) <= TOLERANCE


def test_pooling_of_fast_rcnn_would_not_be_the_originals(outputs):
    """What the choice of `roi_pool` is for."""
    other = roi_pool(outputs["features"], reference("net_rois")[:8] - 1, 14, 1 / 16)
    assert float((other - reference("pooled")).abs().max()) > 1


@pytest.mark.parametrize("scores", ["of the original", "of ours"])
def test_kept_boxes_are_the_originals(scores, outputs):
    """The boxes that the original scored, by both of its two NMS."""
    scored = reference("scored_boxes")
    best = scored[:, 4] if scores == "of the original" else outputs["probs"][:, 1:].amax(1)
    values, _, boxes, rows = select_boxes(
        torch.stack([1 - best, best], 1),
        (scored[:, :4] - 1 + CORNER)[:, None],
        DetectConfig(score_threshold=0.0, nms=0.3),
    )
    assert rows.tolist() == (reference("nms_dense_0.3") - 1).tolist()
    kept = torch.cat([boxes + 1 - CORNER, values[:, None]], 1)
    assert_near(kept, reference("nms_0.3"))
    assert_near(kept[:, 4], reference("nms_0.3")[:, 4])


def original_selection(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[tuple]:
    """The Lua test's clamp and NMS of each class, best first: (R, C + 1), (R, C + 1, 4) 1-based."""
    kept, limits = [], torch.tensor([size[1], size[0]] * 2)
    for label in range(1, probabilities.shape[1]):
        rows = torch.minimum(boxes[:, label].clamp(min=1), limits).double().numpy()
        xywh = np.hstack([rows[:, :2], rows[:, 2:] - rows[:, :2] + 1])
        ious = coco_mask.iou(xywh, xywh, [0] * len(xywh))
        left = probabilities[:, label].argsort(descending=True, stable=True).tolist()
        while left:
            best, *left = left
            kept.append((label, float(probabilities[best, label]), rows[best]))
            left = [n for n in left if ious[best, n] <= 0.3]
    return sorted(kept, key=lambda row: -row[1])


def test_mirrored_views_of_inclusive_boxes_agree(checkpoint):
    """The mean over an image and its mirror is, for the mirrored image, the mirrored mean."""
    options = {"short_sides": [96], "flip": True, "score_threshold": 0.01, "nms": 1.0}
    detector, _ = load_detector(checkpoint, CPU, overrides=options)
    image = np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)
    boxes = np.array([[8, 9, 70, 50]], np.float32)
    there = detector(image, proposals_of(boxes, 64, 96))
    back = detector(image[:, ::-1].copy(), proposals_of(mirror(boxes, 96), 64, 96))
    assert len(there) > 5 and there.labels.tolist() == back.labels.tolist()
    np.testing.assert_allclose(there.scores, back.scores, rtol=1e-4)
    np.testing.assert_allclose(there.boxes, mirror(back.boxes, 96), atol=0.01)


# From the original's image on.


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return image_of(DATA)


@pytest.fixture(scope="module")
def whole(checkpoint) -> Detector:
    """Detects from images, at the original's scale."""
    options = {"short_sides": [240], "score_threshold": 0.0, "max_detections": 10_000}
    return load_detector(checkpoint, CPU, overrides=options)[0]


@torch.inference_mode()
def classified(detector: Detector, image: np.ndarray) -> tuple[Tensor, Tensor]:
    """Probabilities and 1-based boxes, not clipped, of the original's proposals."""
    (view,) = detector._views(image)
    probabilities, boxes = detector._classify_in(view, reference("boxes") - 1)
    return probabilities, boxes.flatten(1) + 1


def test_probabilities_and_boxes_are_the_originals(whole, image):
    probabilities, boxes = classified(whole, image)
    assert_near(probabilities, reference("probs"))
    assert_near(boxes, reference("pred_boxes")[:, 4:])


def test_detections_are_those_of_the_originals_outputs(whole, image):
    boxes = reference("pred_boxes").view(24, 81, 4)
    theirs = original_selection(reference("probs"), boxes, image.shape[:2])
    found = whole(image, proposals_of((reference("boxes") - 1 + CORNER).numpy(), 256, 192))
    assert len(found) == len(theirs) > 800
    ids = np.array([whole.categories[row[0] - 1]["id"] for row in theirs])
    scores = np.array([row[1] for row in theirs])
    np.testing.assert_allclose(found.scores, scores, rtol=TOLERANCE)
    # By category: of near equals of two categories either may come first.
    ours, theirs_first = np.argsort(found.labels, kind="stable"), np.argsort(ids, kind="stable")
    np.testing.assert_array_equal(found.labels[ours], ids[theirs_first])
    boxes = np.array([row[2] for row in theirs])[theirs_first]
    found_boxes = (found.boxes + 1 - CORNER.numpy())[ours]
    np.testing.assert_allclose(found_boxes, boxes, atol=TOLERANCE * 256)


def test_resizing_by_area_would_move_the_boxes(whole, image):
    """What `multipathnet.align_corners` is for."""
    by_area = copy.copy(whole)
    by_area.config = replace(whole.config, align_corners=False)
    _, boxes = classified(by_area, image)
    assert 1 < float((boxes - reference("pred_boxes")[:, 4:]).abs().max()) < 5


def test_tool_detects_with_it(checkpoint, tiny_sharpmask, shapes_directory, tmp_path, call_tool):
    (tmp_path / "images").mkdir()
    first = min((shapes_directory / "images" / "val").iterdir())
    (tmp_path / "images" / first.name).write_bytes(first.read_bytes())
    arguments = ("--proposal-checkpoint", tiny_sharpmask, "--device", "cpu")
    arguments += ("--images", tmp_path / "images", "--output", tmp_path / "out")
    assert call_tool("detect", "--checkpoint", checkpoint, *arguments) == 0
    assert (tmp_path / "out" / "detections.json").stat().st_size > 1000
