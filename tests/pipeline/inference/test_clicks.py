"""A click gives the masks of the patches around it, as the proposer and the patches alone do."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline.inference.clicks import NEAR_DUPLICATE, ClickableImage, MasksAtPoint
from pipeline.inference.mask_crops import contains
from pipeline.inference.propose import Proposer

CPU = torch.device("cpu")
HEIGHT, WIDTH = 90, 130


def build(memory: float | None = None) -> Proposer:
    torch.manual_seed(0)
    sizes = {"patch_size": 64, "mask_size": 14, "reduction": 8, "embedding": 16}
    model = SharpMask(DeepMask(build_trunk("tiny"), **sizes, score_hidden=8)).eval()
    with torch.no_grad():
        model.predict.weight *= 100  # steep edges, as trained masks have
    return Proposer(
        model, device=CPU, num_proposals=60, log2_scales=(-1.0, 0.5, 0.5), memory=memory
    )


PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def run(proposer: Proposer, pixels: np.ndarray = PIXELS) -> ClickableImage:
    clickable = ClickableImage(proposer, pixels)
    reports: list[float] = []
    assert len(list(clickable.run(reports.append))) == len(proposer.log2_scales)
    assert reports == sorted(reports) and 0.8 < reports[-1] <= 1
    return clickable


@pytest.fixture(scope="module")
def clickable() -> ClickableImage:
    return run(build())


def assert_same(masks: MasksAtPoint, others: MasksAtPoint) -> None:
    assert masks.rles == others.rles
    for name in ("boxes", "contain", "patch_sides"):
        np.testing.assert_array_equal(getattr(masks, name), getattr(others, name))
    np.testing.assert_allclose(masks.logits, others.logits, atol=1e-5)


def test_proposals_are_those_of_the_proposer(clickable):
    expected, found = clickable.proposer(clickable.image), clickable.proposals()
    assert 30 < len(found) == len(expected) and found.rles == expected.rles
    np.testing.assert_array_equal(found.logits, expected.logits)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert found.num_cut_off == expected.num_cut_off
    fewer = clickable.proposals(7)
    assert fewer.rles == expected.rles[: len(fewer)] and len(fewer) <= 7


def test_a_click_on_the_center_of_a_proposals_cell_gives_its_mask(clickable):
    """Cell (i, j) of a scale has its center at the pixel (16 j, 16 i) there."""
    proposals, clicked = clickable.proposals(), 0
    for logit, rle in zip(proposals.logits, proposals.rles, strict=True):
        [(band, row, column)] = [
            (band, *cell)
            for band in clickable.bands
            for cell in np.argwhere(band.score_logits.numpy() == logit).tolist()
        ]
        x, y = 16 * column / band.scale_xy[0], 16 * row / band.scale_xy[1]
        if x < WIDTH and y < HEIGHT:
            masks = clickable.masks_at(x, y)
            own = masks.logits == logit
            if own.any():
                assert [masks.rles[i] for i in np.flatnonzero(own)] == [rle]
                assert masks.patch_sides[own].tolist() == [64 / max(band.scale_xy)]
                clicked += 1
            else:  # near duplicates of others are left out
                rles = [masks.rle(i) for i in range(len(masks))]
                near = coco_mask.iou(rles, [masks.rle(0) | {"counts": rle}], [0])
                assert near.max() >= NEAR_DUPLICATE
    assert clicked > 20


@given(st.floats(0, WIDTH, exclude_max=True), st.floats(0, HEIGHT, exclude_max=True))
@settings(max_examples=25, deadline=None)
def test_masks_at_equal_the_patches_decoded_alone(clickable, x, y):
    """One of the cells after the other, by the network and by hand in the image."""
    proposer, found = clickable.proposer, {}
    for index, band in enumerate(clickable.bands):
        rows, columns = band.score_logits.shape
        centers = [
            (((16 * j / band.scale_xy[0] - x) ** 2 + (16 * i / band.scale_xy[1] - y) ** 2), i, j)
            for i in range(rows)
            for j in range(columns)
        ]
        (distance, row, column), (second, *_) = sorted(centers)[:2]
        assume(second - distance > 1e-6)  # midway between two cells, either is right
        alone = proposer.paste_cells(
            clickable.bands, torch.tensor([[index, row, column]]), (90, 130)
        )
        for rle in alone.rles:
            found[rle] = band.score_logits[row, column].item()
    masks = clickable.masks_at(x, y)
    assert set(masks.rles) <= set(found)
    for rle in set(found) - set(masks.rles):
        near = coco_mask.iou(
            [masks.rle(i) for i in range(len(masks))], [masks.rle(0) | {"counts": rle}], [0]
        )
        assert near.max() >= NEAR_DUPLICATE
    decoded = [coco_mask.decode(masks.rle(i)) for i in range(len(masks))]
    inside = [bool(mask[int(y), int(x)]) for mask in decoded]
    assert masks.contain.tolist() == inside == sorted(inside, reverse=True)
    order = [
        (not contained, -found[rle]) for contained, rle in zip(inside, masks.rles, strict=True)
    ]
    assert order == sorted(order)


def test_an_image_in_bands_answers_as_the_whole(clickable):
    banded = run(build(memory=1e-4))
    assert len(banded.bands) > len(clickable.bands)
    for x, y in ((0, 0), (64.5, 41), (129.9, 89.9), (20, 75)):
        assert_same(banded.masks_at(x, y), clickable.masks_at(x, y))


def test_two_images_in_bands_take_turns(clickable):
    """After every scale; within one, the network's layers hold rows of the image."""
    proposer, mirrored = build(memory=1e-4), PIXELS[::-1].copy()
    first, other = ClickableImage(proposer, PIXELS), ClickableImage(proposer, mirrored)
    for _ in zip(first.run(), other.run(), strict=True):
        pass
    assert_same(first.masks_at(64.5, 41), clickable.masks_at(64.5, 41))
    alone = run(build(), mirrored)
    assert_same(other.masks_at(20, 75), alone.masks_at(20, 75))


@pytest.mark.parametrize("point", [(-1, 5), (WIDTH, 5), (5, HEIGHT), (float("nan"), 5)])
def test_there_is_no_mask_outside(clickable, point):
    assert len(clickable.masks_at(*point)) == 0


def test_contains_is_the_pixel_of_the_mask():
    mask = np.random.default_rng(1).random((7, 9)) < 0.5
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    for (y, x), inside in np.ndenumerate(mask):
        assert contains(rle["counts"], 7, x + 0.9, y + 0.1) == inside
