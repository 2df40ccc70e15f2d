"""Parity with the small outputs of the original code that ship with the tests."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from models.multipathnet import MultiPathNet
from models.roi_pooling import roi_pool_lua
from pipeline.config import DetectConfig
from pipeline.inference.cells import best_cells
from pipeline.inference.detect import select_boxes
from pipeline.networks import make_sharpmask
from pipeline.recipe import config_from_dict
from tests.originals.pick import CORNER, OUTPUTS, read_outputs
from tests.pipeline.torch7.lua_networks import assert_near

STRUCTURE = {
    "trunk": {"name": "resnet50", "weights": None, "width": 4, "padding": "symmetric"},
    "deepmask": {"reduction": 16, "embedding": 32, "score_hidden": 64},
    "sharpmask": {"km": 16, "ks": 16, "widths": "halving", "horizontal_widths": [16, 16, 16, 8]},
}
EDGES = torch.tensor([0, 0, 1, 1])  # from a box's first and last pixel to its edges


@pytest.fixture(scope="module")
def original() -> dict[str, torch.Tensor]:
    return read_outputs()


@pytest.fixture(scope="module")
def sharpmask(original):
    """Of the original's structure; of its weights those that ship, the others random."""
    model = make_sharpmask(config_from_dict(STRUCTURE, source="test")).eval()
    state = {
        name.removeprefix("dm/model/"): value
        for name, value in original.items()
        if name.startswith("dm/model/")
    }
    assert len(state) > 40 and not model.load_state_dict(state, strict=False).unexpected_keys
    return model


def test_they_are_small():
    assert OUTPUTS.stat().st_size < 200_000


@torch.no_grad()
def test_a_level_of_the_trunk(original, sharpmask):
    """Its first block has stride 2; what lies beyond the corner is symmetric padding."""
    found = sharpmask.deepmask.trunk.levels[2](original["dm/level_1"])
    assert_near(found[..., :CORNER, :CORNER], original["dm/level_2"])


@torch.no_grad()
def test_score_head(original, sharpmask):
    code = original["dm/code"].reshape(-1, 32, 1, 1)
    score = sharpmask.deepmask.score(code, code)
    assert_near(score.flatten(), original["dm/score"].flatten())


@torch.no_grad()
def test_a_step_of_the_refinement(original, sharpmask):
    module, mask, skip = sharpmask.refinements[0], original["sm/ref_0"], original["sm/neth_1"]
    mask, skip = mask.reshape(1, 16, 10, 10), skip.reshape(1, 8, 10, 10)
    vertical = module.vertical(mask)
    assert_near(vertical, original["sm/netv_1"].reshape(vertical.shape))
    doubled = F.interpolate(module(skip, mask), scale_factor=2, mode="nearest")
    assert_near(doubled, original["sm/ref_1"].reshape(doubled.shape))


@pytest.mark.parametrize("prefix", ["dm", "sm", "smdm"])
def test_best_cells(prefix, original):
    """Scores of the best cells; the cells are moved by the original's slip with an index."""
    scores = [original[f"{prefix}/scores_{i}"] for i in (1, 2, 3)]
    top = original[f"{prefix}/top_scores"]
    logits, cells = best_cells(scores, len(top))
    torch.testing.assert_close(logits.sigmoid(), top[:, 0], rtol=1e-5, atol=0)
    moved = (top[:, 1:] - 1).long() - cells
    assert set(map(tuple, moved.tolist())) <= {(0, -1, 1), (0, 0, 1)}


def test_roi_pooling(original):
    features, theirs = original["det/features"], original["det/pooled"]
    rois = original["det/net_rois"][: len(theirs)] - 1
    assert_near(roi_pool_lua(features, rois, 14, 1 / 16), theirs, tolerance=0)


def test_probabilities_and_boxes(original):
    """The mean of the classifiers' softmax, and the regressor's boxes, of 1-based pixels."""
    logits = original["det/head_logits"].transpose(0, 1)  # (R, K, C + 1)
    deltas = original["det/bbox_raw"].view(*logits.shape[::2], 4)
    statistics = SimpleNamespace(
        delta_mean=original["det/delta_mean"], delta_std=original["det/delta_std"]
    )
    outputs = {"class_logits": logits, "deltas": deltas}
    boxes = original["det/boxes"][: len(logits)] - 1
    probabilities, decoded = MultiPathNet.decode(statistics, outputs, boxes)
    assert_near(probabilities, original["det/probs"])
    assert_near(decoded.flatten(1) + 1, original["det/pred_boxes"][:, 4:])


def test_kept_boxes(original):
    """By both of the original's NMS."""
    scored = original["det/scored_boxes"]
    values, _, boxes, rows = select_boxes(
        torch.stack([1 - scored[:, 4], scored[:, 4]], 1),
        (scored[:, :4] - 1 + EDGES)[:, None],
        DetectConfig(score_threshold=0.0, nms=0.3),
    )
    assert rows.tolist() == (original["det/nms_dense_0.3"] - 1).tolist()
    assert_near(torch.cat([boxes + 1 - EDGES, values[:, None]], 1), original["det/nms_0.3"])
