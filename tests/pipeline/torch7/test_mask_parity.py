"""Parity: converted networks against what the original Lua code computed, layer by layer.

The reference networks are narrow and random, of the released structure. Errors are relative to the
largest value of a layer's output.
"""

import copy

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datasets.resize import resize_align_corners
from models.inference import optimize_for_inference
from pipeline.inference import propose
from pipeline.inference.cells import best_cells
from pipeline.inference.propose import Proposer
from pipeline.networks import load_network
from pipeline.torch7.convert import convert_file
from tests.pipeline.torch7.lua_networks import assert_near, image_of
from tests.real_data import TORCH7, needs

DATA = TORCH7 / "deepmask_sharpmask"
pytestmark = needs(DATA)  # files of the original code

CPU = torch.device("cpu")
LOG2_SCALES = [-1.0, -0.5, 0.0]


def reference(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(DATA / f"{name}.npy").astype(np.float32))


def check(ours: torch.Tensor, name: str) -> None:
    """Our output, reshaped as the original's, is the original's."""
    theirs = reference(name)
    assert_near(ours.reshape(theirs.shape), theirs)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """DeepMask and SharpMask from their converted checkpoints."""
    folder = tmp_path_factory.mktemp("converted")
    found = {}
    for name in ("deepmask", "sharpmask"):
        convert_file(DATA / f"{name}.t7", folder / f"{name}.pt")
        found[name], config, _ = load_network(folder / f"{name}.pt")
        assert config.propose.align_corners
    return found


@pytest.fixture(scope="module")
def folded(networks):
    """The networks as inference runs them: batch norm is in the convolutions."""
    return {
        name: optimize_for_inference(copy.deepcopy(network)) for name, network in networks.items()
    }


class Comparison:
    """Compares outputs in the order in which they are computed, and gives the next layer's input.

    Along the chain that is our own output, computed in float64: what is left of the difference is
    then the original's rounding (8e-5 of the score, a small difference of large sums) and not ours
    besides, which depends on the number of threads. Layer by layer it is the original's output, in
    float32.
    """

    def __init__(self, networks: dict, chain: bool):
        self.chain, self.dtype = chain, torch.float64 if chain else torch.float32
        self.deepmask = copy.deepcopy(networks["deepmask"]).to(self.dtype)
        self.sharpmask = copy.deepcopy(networks["sharpmask"]).to(self.dtype)

    def input(self, name: str) -> torch.Tensor:
        return reference(name).to(self.dtype)

    def __call__(self, ours: torch.Tensor, name: str) -> torch.Tensor:
        check(ours, name)
        return ours if self.chain else self.input(name).view(-1, *ours.shape[1:])


@pytest.fixture(scope="module", params=[True, False], ids=["chain", "layer by layer"])
def compare(request, networks):
    return Comparison(networks, request.param)


@torch.no_grad()
def test_trunk_module_by_module(compare):
    model, x = compare.deepmask, compare.input("patch_input")[:1]
    stem, one, two, three = model.trunk.levels
    for i, layer in enumerate((stem.conv1, stem.bn1, torch.relu), 1):
        x = compare(layer(x), f"dm_patch_trunk_{i:02}")
    compare(one.maxpool(x), "dm_patch_trunk_04")
    reduce, _, embed = model.tail
    layers = (one, two, three, model.crop_center, reduce, torch.relu, nn.Identity(), embed)
    for i, layer in enumerate(layers, 5):
        x = compare(layer(x), f"dm_patch_trunk_{i:02}")


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["dm", "sm"])
def test_embedding_and_heads(compare, prefix):
    model = compare.deepmask if prefix == "dm" else compare.sharpmask.deepmask
    features = model.crop_center(model.trunk(compare.input("patch_input"))[-1])
    code = compare(model.embed(features), f"{prefix}_patch_code")
    compare(model.score(code, features).flatten(), f"{prefix}_patch_score")
    logits = model.decode_masks(code.flatten(1))
    logits = compare(logits, "dm_patch_mask56")
    # To the size of the training's target the original resizes corners to corners, and this project
    # by areas; that is part of the loss, and of no checkpoint.
    large = F.interpolate(logits[:, None], size=(112, 112), mode="bilinear", align_corners=True)
    compare(large, "dm_patch_mask" if prefix == "dm" else "sm_patch_maskDM")


@torch.no_grad()
def test_refinement_step_by_step(compare):
    model, patch = compare.sharpmask, compare.input("patch_input")
    features = model.deepmask.trunk(patch)
    code = model.deepmask.embed(model.deepmask.crop_center(features[-1]))
    code = compare(code, "sm_patch_code")[:1].flatten(1)
    horizontal = model.horizontal_maps([level[:1] for level in model.crop_windows(features)])
    mask = model.encode(code).view(1, model.km, model.cells, model.cells)
    mask = compare(mask, "sm_patch_ref_0")
    for i, (module, skip) in enumerate(zip(model.refinements, horizontal, strict=True), 1):
        skip = compare(skip, f"sm_patch_neth_{i}")
        compare(module.vertical(mask), f"sm_patch_netv_{i}")
        mask = F.interpolate(module(skip, mask), size=2 * skip.shape[-1], mode="nearest")
        if i < 4:  # the original's last step predicts the mask, too
            mask = compare(mask, f"sm_patch_ref_{i}")
    compare(model.predict(mask), "sm_patch_ref_4")


@torch.no_grad()
def test_whole_patch_forward(folded):
    patch = reference("patch_input")
    check(folded["deepmask"](patch, head="mask")["mask_logits"], "dm_patch_mask56")
    check(folded["sharpmask"](patch, head="mask")["mask_logits"], "sm_patch_mask")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return image_of(DATA)


@pytest.fixture(scope="module", params=["dm", "sm", "smdm"])
def whole_image(request, folded, image):
    """Prefix of the references, proposer, its pyramid."""
    model = folded["deepmask" if request.param == "dm" else "sharpmask"]
    model = model.deepmask if request.param == "smdm" else model
    settings = {"log2_scales": (-1.0, 0.0, 0.5), "align_corners": True, "num_proposals": 10}
    proposer = Proposer(model, device=CPU, **settings)
    return request.param, proposer, [proposer.run_scale(image, scale) for scale in LOG2_SCALES]


def test_pyramid(image):
    assert np.allclose(np.load(DATA / "scales.npy"), np.exp2(LOG2_SCALES))
    for i, log2_scale in enumerate(LOG2_SCALES, 1):
        scaled = torch.from_numpy(resize_align_corners(image, 2.0**log2_scale)) / 255
        assert scaled.permute(2, 0, 1).shape == reference(f"dm_pyr_{i}").shape
        check(scaled.permute(2, 0, 1), f"dm_pyr_{i}")


def test_dense_scores(whole_image):
    prefix, _, pyramid = whole_image
    for i, scale in enumerate(pyramid, 1):
        assert scale.score_logits.shape == reference(f"{prefix}_scores_{i}").shape
        check(scale.score_logits, f"{prefix}_scores_{i}")


def their_cells(prefix: str) -> torch.Tensor:
    """The original's top list as (N, 3) scale, row, column from 0 on."""
    return (reference(f"{prefix}_top_scores")[:, 1:] - 1).long()


def test_best_cells_are_those_of_the_originals_scores(whole_image):
    """The originals' cells are not: by an index slip they lie to the right, most of them a row up.

    Their scores are the best cells', their masks those of the neighbors.
    """
    prefix, _, pyramid = whole_image
    logits, cells = best_cells([scale.score_logits for scale in pyramid], 10)
    theirs = reference(f"{prefix}_top_scores")[:, 0]
    torch.testing.assert_close(logits.sigmoid(), theirs, rtol=1e-4, atol=0)
    found = [pyramid[s].score_logits[r, c] for s, r, c in cells.tolist()]
    torch.testing.assert_close(torch.stack(found), logits)
    moved = set(map(tuple, (their_cells(prefix) - cells).tolist()))
    assert moved <= {(0, -1, 1), (0, 0, 1)}  # no further up than the first row


def ious_of_masks(proposer: Proposer, prefix: str, image: np.ndarray, monkeypatch) -> list[float]:
    """IoU with the original's masks, proposed at the original's cells."""
    cells = their_cells(prefix)
    monkeypatch.setattr(propose, "best_cells", lambda *_: (torch.linspace(1, 0, 10), cells))
    proposals = proposer(image)
    theirs = np.load(DATA / f"{prefix}_top_masks.npy") > 0
    assert len(proposals) == len(theirs)
    masks = [coco_mask.decode(proposals.rle(i)).astype(bool) for i in range(len(theirs))]
    return [(a & b).sum() / (a | b).sum() for a, b in zip(masks, theirs, strict=True)]


def test_masks_of_the_originals_cells(whole_image, image, monkeypatch):
    prefix, proposer, pyramid = whole_image
    logits = proposer.decode(pyramid, their_cells(prefix))
    for i, theirs in enumerate(reference(f"{prefix}_top_logits")):
        assert_near(logits[i], theirs)
    assert min(ious_of_masks(proposer, prefix, image, monkeypatch)) >= 0.99


def test_masks_by_area_lie_elsewhere(whole_image, image, monkeypatch):
    """What `propose.align_corners` is for."""
    prefix, proposer, _ = whole_image
    model = proposer.refinement or proposer.deepmask
    other = Proposer(model, device=CPU, log2_scales=(-1.0, 0.0, 0.5))
    monkeypatch.setattr(other, "run_bands", proposer.run_bands)  # so only the placing differs
    assert 0.8 < min(ious_of_masks(other, prefix, image, monkeypatch)) < 0.96
