"""SharpMask over whole images: equal to patches on their own; coarse masks; NMS on masks."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline.inference.mask_nms import suppress_duplicates
from pipeline.inference.proposals import Proposals
from pipeline.inference.propose import Proposer, gather_windows, pad_and_normalize, resize_image

CPU = torch.device("cpu")
SURROUNDINGS = {"tiny": 5, "vgg11": 6, "resnet18": 12, "densenet121": 40}  # cells that a trunk sees


def build(trunk: str = "tiny", patch_size: int = 64) -> SharpMask:
    torch.manual_seed(0)
    sizes = {"mask_size": 14, "reduction": 8, "embedding": 16, "score_hidden": 8}
    return SharpMask(DeepMask(build_trunk(trunk), patch_size=patch_size, **sizes)).eval()


def at_level(number: int, cells: torch.Tensor) -> torch.Tensor:
    """Rows and columns (n, 2) with the number of their level before them."""
    return torch.nn.functional.pad(cells, (1, 0), value=number)


@pytest.fixture(scope="module")
def model() -> SharpMask:
    return build()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (150, 203, 3), dtype=np.uint8)


@pytest.mark.parametrize("trunk", ["tiny", "vgg11", "resnet18"])
@torch.inference_mode()
def test_dense_refinement_equals_refining_each_patch_on_its_own(trunk):
    """Every patch cut out with all the surroundings that its features depend on."""
    model, cells = build(trunk, 32), 2
    border = 16 * (SURROUNDINGS[trunk] + 3)  # the horizontal nets see three cells more
    side = 2 * border + 32 + 32
    image = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    proposer = Proposer(model, device=CPU)
    level = proposer.run_level(image, 0.0)
    first = border // 16 + 1  # the cell whose patch begins `border` px into the padded image + 1
    chosen = torch.tensor([[first, first], [first + 2, first + 1]])
    together = proposer.decode([level], at_level(0, chosen))
    padded = pad_and_normalize(torch.from_numpy(image), 16)
    for (row, column), mask in zip(chosen.tolist(), together, strict=True):
        top, left = 16 * row - border, 16 * column - border
        size = 2 * border + 32
        patch = padded[..., top : top + size, left : left + size].contiguous()
        assert patch.shape[-2:] == (size, size)
        features = model.deepmask.trunk(patch)
        embedding = model.deepmask.embed(model.deepmask.crop_center(features[-1]))
        windows = [
            each[..., s : s + (cells << i), s : s + (cells << i)]
            for i, each in enumerate(model.horizontal_maps(features))
            for s in [border // 16 << i]
        ]
        alone = model.refine(embedding.flatten(1), windows)[0]
        assert alone.std() > 1e-3
        torch.testing.assert_close(mask, alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_masks_of_the_image_are_those_of_each_cell(model, image):
    """All cells of two scales together, in any order, against one at a time."""
    octaves = [-0.5, 0.0]
    proposer = Proposer(model, device=CPU, num_proposals=10_000, octaves=octaves)
    levels = [proposer.run_level(image, octave) for octave in octaves]
    chosen = torch.cat(
        [
            at_level(n, torch.cartesian_prod(*map(torch.arange, level.score_logits.shape)))
            for n, level in enumerate(levels)
        ]
    )
    chosen = chosen[torch.randperm(len(chosen))]
    together = proposer.decode(levels, chosen)
    for cell, mask in zip(chosen, together, strict=True):
        level = levels[cell[0]]
        alone = proposer.decode([level], at_level(0, cell[None, 1:]))[0]
        torch.testing.assert_close(mask, alone, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_windows_lie_at_their_cells(height, width, power):
    """A map of pixel numbers: window (i, j) starts at (i, j) x step; beyond the map it repeats."""
    step, cells = 1 << power, 2
    numbers = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    rows, columns = (max(1, -(-side // step) - cells + 1) for side in (height, width))
    chosen = torch.tensor([[rows - 1, columns - 1], [0, 0], [rows // 2, columns // 2]])
    windows = gather_windows(numbers, chosen, size=cells * step, step=step)
    for (i, j), window in zip(chosen.tolist(), windows, strict=True):
        y = (i * step + torch.arange(cells * step)).clamp(max=height - 1)
        x = (j * step + torch.arange(cells * step)).clamp(max=width - 1)
        assert torch.equal(window[0], numbers[0][y][:, x])


def test_refinement_changes_the_masks_and_nothing_else(model, image):
    """Same cells, same scores: what makes the two comparable."""
    coarse, refined = Proposer(model.deepmask, device=CPU), Proposer(model, device=CPU)
    levels = [proposer.run_level(image, 0.0) for proposer in (coarse, refined)]
    assert torch.equal(levels[0].score_logits, levels[1].score_logits)
    cells = at_level(0, torch.tensor([[3, 4], [0, 7]]))
    expected = model.deepmask.decode_masks(levels[1].embeddings[:, [3, 0], [4, 7]].T)
    torch.testing.assert_close(coarse.decode(levels[:1], cells), expected)
    assert refined.decode(levels[1:], cells).shape == (2, 64, 64)


def proposals_of(masks: np.ndarray) -> Proposals:
    rles = [coco_mask.encode(np.asfortranarray(m.astype(np.uint8))) for m in masks]
    boxes = np.array([coco_mask.toBbox(r) for r in rles], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.linspace(1, 0, len(masks), dtype=np.float32)
    return Proposals(1, "x.jpg", *masks.shape[1:], scores, boxes, [r["counts"] for r in rles])


@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0]))
@settings(max_examples=80, deadline=None)
def test_nms_equals_the_loop_over_pairs_of_masks(seed, count, limit):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 12, 14), bool)
    for mask in masks:
        y, x, h, w = rng.integers(0, 8, 4)
        mask[y : y + h + 1, x : x + w + 1] = rng.random((h + 1, w + 1))[: 12 - y, : 14 - x] < 0.9
        mask[y, x] = True
    kept = []
    for n, mask in enumerate(masks):
        if all((mask & masks[k]).sum() / (mask | masks[k]).sum() < limit for k in kept):
            kept.append(n)
    proposals = proposals_of(masks)
    result = suppress_duplicates(proposals, limit)
    assert result.counts == [proposals.counts[n] for n in kept]
    np.testing.assert_array_equal(result.boxes, proposals.boxes[kept])
    np.testing.assert_array_equal(result.scores, proposals.scores[kept])


def test_nms_of_nothing_and_in_the_proposer(model, image):
    assert len(suppress_duplicates(proposals_of(np.zeros((0, 5, 5), bool)), 0.5)) == 0
    every = Proposer(model, device=CPU, num_proposals=200)(image)
    few = Proposer(model, device=CPU, num_proposals=200, nms=0.5)(image)
    assert 0 < len(few) < len(every)
    assert few.counts == suppress_duplicates(every, 0.5).counts


def test_zoomed_scale_sees_the_image_doubled(model, image):
    level = Proposer(model, device=CPU).run_level(image, 1.0)
    assert level.factors == (2.0, 2.0)
    height, width = resize_image(image, 2.0).shape[:2]
    assert level.score_logits.shape == (-(-(height + 64) // 16) - 3, -(-(width + 64) // 16) - 3)
