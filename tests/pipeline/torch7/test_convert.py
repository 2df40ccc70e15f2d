"""Parity: converted networks against what the original Lua code computed, layer by layer.

The original's index slip in its list of the best cells is in this file only (`released_top`): it
makes all ten masks those of a neighboring cell (score .32 on average, where the list says .75; IoU
with the mask meant .39 to .49, SharpMask .67 to .80).

The reference networks are narrow and random, of the released structure. Errors are relative to the
largest value of a layer's output.
"""

import copy

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F
from pipeline.load import load_mask_network

from models.trunk import symmetric_pad
from pipeline.inference.paste import Pasted
from pipeline.inference.propose import Proposer, best_cells, resize_released
from pipeline.torch7.convert import convert_file
from tests.real_data import TORCH7

DATA = TORCH7 / "deepmask_sharpmask"
if not DATA.is_dir():
    pytest.skip("data/torch7, files of the original code, is not here", allow_module_level=True)

TOLERANCE = 1e-4
OCTAVES = [-1.0, -0.5, 0.0]
IMAGE_SIZE = (256, 192)


def reference(name: str) -> torch.Tensor:
    return torch.from_numpy(np.load(DATA / f"{name}.npy").astype(np.float32))


def check(own: torch.Tensor, name: str) -> None:
    """Our output, reshaped as the original's, is the original's."""
    theirs = reference(name)
    error = float((own.reshape(theirs.shape) - theirs).abs().max() / theirs.abs().max())
    assert error <= TOLERANCE, f"{name}: {error:.1e}"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """DeepMask and SharpMask from their converted checkpoints."""
    folder = tmp_path_factory.mktemp("converted")
    found = {}
    for name in ("deepmask", "sharpmask"):
        convert_file(DATA / f"{name}.t7", folder / f"{name}.pt")
        found[name], config = load_mask_network(folder / f"{name}.pt")
        assert config.propose.resampling == "corners"
    return found


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

    def __call__(self, own: torch.Tensor, name: str) -> torch.Tensor:
        check(own, name)
        return own if self.chain else self.input(name).view(-1, *own.shape[1:])


@pytest.fixture(scope="module", params=[True, False], ids=["chain", "layer by layer"])
def compare(request, networks):
    return Comparison(networks, request.param)


@torch.no_grad()
def test_trunk_module_by_module(compare):
    model, x = compare.deepmask, compare.input("patch_input")[:1]
    stem, one, two, three = model.trunk.levels
    # Our convolution has the batch norm in it; its own weight gives the output before.
    raw = F.conv2d(symmetric_pad(x, 3), stem.conv1.weight, stride=2)
    raw = compare(raw, "dm_patch_trunk_01")
    scale, shift = (values[:, None, None] for values in (stem.conv1.scale, stem.conv1.shift))
    compare(raw * scale + shift, "dm_patch_trunk_02")
    x = compare(stem.conv1(x), "dm_patch_trunk_02")
    x = compare(x.relu(), "dm_patch_trunk_03")
    compare(one.maxpool(x), "dm_patch_trunk_04")
    for level, name in ((one, "05"), (two, "06"), (three, "07")):
        x = compare(level(x), f"dm_patch_trunk_{name}")
    x = compare(model.crop_center(x), "dm_patch_trunk_08")
    x = compare(model.tail[0](x), "dm_patch_trunk_09")
    x = compare(x.relu(), "dm_patch_trunk_10")
    x = compare(x, "dm_patch_trunk_11")
    compare(model.tail[2](x), "dm_patch_trunk_12")


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["dm", "sm"])
def test_embedding_and_heads(compare, prefix):
    model = compare.deepmask if prefix == "dm" else compare.sharpmask.deepmask
    code = model.embed(model.crop_center(model.trunk(compare.input("patch_input"))[-1]))
    code = compare(code, f"{prefix}_patch_code")
    compare(model.score(code).flatten(), f"{prefix}_patch_score")
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
    for number, (module, skip) in enumerate(zip(model.refinements, horizontal, strict=True), 1):
        skip = compare(skip, f"sm_patch_neth_{number}")
        compare(module.vertical(mask), f"sm_patch_netv_{number}")
        mask = F.interpolate(module(skip, mask), size=2 * skip.shape[-1], mode="nearest")
        if number < 4:  # the original's last step predicts the mask, too
            mask = compare(mask, f"sm_patch_ref_{number}")
    compare(model.predict(mask), "sm_patch_ref_4")


@torch.no_grad()
def test_whole_patch_forward(networks):
    patch = reference("patch_input")
    check(networks["deepmask"](patch, head="mask")["mask_logits"], "dm_patch_mask56")
    check(networks["sharpmask"](patch, head="mask")["mask_logits"], "sm_patch_mask")


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """(H, W, 3) float32 from 0 to 255: the original's was scaled and is not of whole numbers."""
    return (reference("image") * 255).permute(1, 2, 0).contiguous().numpy()


@pytest.fixture(scope="module", params=["dm", "sm", "smdm"])
def whole_image(request, networks, image):
    """Prefix of the references, proposer, its levels."""
    model = networks["deepmask" if request.param == "dm" else "sharpmask"]
    model = model.deepmask if request.param == "smdm" else model
    proposer = Proposer(
        model, device=torch.device("cpu"), octaves=OCTAVES, resampling="corners", num_proposals=10
    )
    return request.param, proposer, [proposer.run_level(image, octave) for octave in OCTAVES]


def test_pyramid(image):
    assert np.allclose(np.load(DATA / "scales.npy"), [2.0**octave for octave in OCTAVES])
    for number, octave in enumerate(OCTAVES, 1):
        scaled = torch.from_numpy(resize_released(image, 2.0**octave)) / 255
        theirs = reference(f"dm_pyr_{number}")
        assert scaled.permute(2, 0, 1).shape == theirs.shape
        check(scaled.permute(2, 0, 1), f"dm_pyr_{number}")


def test_dense_scores(whole_image):
    prefix, _, levels = whole_image
    for number, level in enumerate(levels, 1):
        assert level.score_logits.shape == reference(f"{prefix}_scores_{number}").shape
        check(level.score_logits, f"{prefix}_scores_{number}")


def released_top(score_logits: list[torch.Tensor], count: int) -> np.ndarray:
    """The original's list with its slip: probability, scale, row, column, all from 1 on.

    Its scales are merged in order; of equal scores the earlier scale's comes first. For the cell of
    the flat index t, from 1 on, it takes row floor(t / w) and column t mod w + 1.
    """
    flat = [logits.flatten().sigmoid() for logits in score_logits]
    orders = [scores.argsort(descending=True) for scores in flat]
    rows, next_of = [], [0] * len(flat)
    for _ in range(min(count, len(flat[-1]))):
        scale = max(
            range(len(flat)),
            key=lambda s: (
                float(flat[s][orders[s][next_of[s]]]) if next_of[s] < len(flat[s]) else -1
            ),
        )
        t = int(orders[scale][next_of[scale]]) + 1
        width = score_logits[scale].shape[1]
        score = float(flat[scale][t - 1])
        rows.append([score, scale + 1, max(t // width, 1), t % width + 1])
        next_of[scale] += 1
    return np.array(rows)


def theirs_as_chosen(prefix: str) -> torch.Tensor:
    """The original's top list as (N, 3) level, row, column from 0 on."""
    return (reference(f"{prefix}_top_scores")[:, 1:] - 1).long()


def test_top_list_with_the_originals_slip(whole_image):
    prefix, _, levels = whole_image
    own = released_top([level.score_logits for level in levels], 10)
    theirs = reference(f"{prefix}_top_scores").numpy()
    assert np.array_equal(own[:, 1:], theirs[:, 1:])
    np.testing.assert_allclose(own[:, 0], theirs[:, 0], rtol=TOLERANCE)


def test_product_takes_the_cells_that_have_the_scores(whole_image):
    """What the slip does: the scores are the best cells', the masks those of their neighbors."""
    prefix, _, levels = whole_image
    maps = [level.score_logits for level in levels]
    probs, chosen = best_cells(maps, 10)
    theirs = theirs_as_chosen(prefix)
    at_ours, at_theirs = (
        torch.stack([maps[s][r, c].sigmoid() for s, r, c in cells.tolist()])
        for cells in (chosen, theirs)
    )
    torch.testing.assert_close(probs, reference(f"{prefix}_top_scores")[:, 0], rtol=1e-4, atol=0)
    torch.testing.assert_close(at_ours, probs)
    assert torch.equal(chosen[:, 0], theirs[:, 0])
    assert not (chosen == theirs).all(1).any()  # not one of the ten is the cell of its score
    moved = (theirs - chosen)[:, 1:]
    assert set(map(tuple, moved.tolist())) <= {
        (-1, 1),
        (0, 1),
    }  # up and to the right; no further up
    assert at_theirs.mean() < at_ours.mean() - 0.1


def ious(own: Pasted, theirs: np.ndarray) -> list[float]:
    assert own.indices.tolist() == list(range(len(theirs)))
    rles = [{"size": list(IMAGE_SIZE), "counts": counts} for counts in own.rles]
    masks = [coco_mask.decode(rle).astype(bool) for rle in rles]
    return [(a & b).sum() / (a | b).sum() for a, b in zip(masks, theirs, strict=True)]


def test_masks_of_the_originals_cells(whole_image):
    prefix, proposer, levels = whole_image
    chosen = theirs_as_chosen(prefix)
    logits = proposer.decode(levels, chosen)
    for n in range(10):
        theirs = reference(f"{prefix}_top_logits")[n]
        error = float((logits[n] - theirs).abs().max() / theirs.abs().max())
        assert error <= TOLERANCE, f"{n}: {error:.1e}"
    masks = np.load(DATA / f"{prefix}_top_masks.npy") > 0
    found = ious(proposer._masks(levels, chosen, IMAGE_SIZE), masks)
    assert min(found) >= 0.99, found


def test_masks_by_area_lie_elsewhere(whole_image):
    """Why the released placing is a choice of `propose.resampling`, and not left away."""
    prefix, proposer, levels = whole_image
    model = proposer.refinement or proposer.deepmask
    other = Proposer(model, device=torch.device("cpu"), octaves=OCTAVES)
    masks = np.load(DATA / f"{prefix}_top_masks.npy") > 0
    own = other._masks(levels, theirs_as_chosen(prefix), IMAGE_SIZE)
    assert 0.8 < min(ious(own, masks)) < 0.96
