"""Dense inference over an image against the patch forward, and the ranking of cells."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.deepmask import DeepMask
from models.trunk import build_trunk
from pipeline.inference.paste import paste
from pipeline.inference.propose import (
    Proposer,
    best_cells,
    octave_range,
    pad_and_normalize,
    place_patches,
    resize_image,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DeepMask(
        build_trunk("tiny"), patch_size=96, mask_size=14, reduction=8, embedding=16, score_hidden=8
    ).eval()


@pytest.fixture(scope="module")
def image():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (110, 150, 3)).astype(np.uint8)


def test_octaves():
    assert octave_range(-2.5, 0.5, 0.5) == [-2.5, -2, -1.5, -1, -0.5, 0, 0.5]
    assert octave_range(-2.5, 1, 0.5)[-1] == 1 and octave_range(0, 0, 1) == [0]
    assert len(octave_range(-1, 1, 0.1)) == 21
    for wrong in ((1, 0, 0.5), (0, 1, 0), (0, 1, -1), (float("nan"), 1, 1)):
        with pytest.raises(ValueError, match="MIN MAX STEP"):
            octave_range(*wrong)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(1, 90),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_best_cells_equals_sorting_a_list(sizes, count, ties):
    generator = torch.Generator().manual_seed(len(sizes) * 100 + count)
    maps = [torch.randn(h, w, generator=generator) for h, w in sizes]
    if ties:
        maps = [m.round() for m in maps]
    rows = [
        (-m[i, j].item(), n, i, j)
        for n, m in enumerate(maps)
        for i in range(m.shape[0])
        for j in range(m.shape[1])
    ]
    expected = sorted(rows)[:count]  # equal scores: the earlier scale, then row, then column
    probs, cells = best_cells(maps, count)
    assert cells.tolist() == [list(row[1:]) for row in expected]
    torch.testing.assert_close(probs, torch.tensor([-row[0] for row in expected]).sigmoid())


def test_border_is_gray_and_pixels_are_normalized():
    pixels = torch.tensor([[[0, 128, 255]]], dtype=torch.uint8)
    padded = pad_and_normalize(pixels, 2)
    assert padded.shape == (1, 3, 5, 5)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(
        padded[0, :, 2, 2], (np.array([0, 128 / 255, 1]) - mean) / std, rtol=1e-5
    )
    np.testing.assert_allclose(padded[0, :, 0, 0], (0.5 - mean) / std, rtol=1e-5)


def test_proposals_equal_patch_by_patch_inference(model, image):
    """Every cell on its own, as a patch with all its surroundings.

    Same scores, same masks at the same places.
    """
    octaves, count = (-0.5, 0.0), 40
    proposals = Proposer(
        model, device=CPU, num_proposals=10_000, octaves=octave_range(*octaves, 0.5)
    )(image)
    slow = []
    for octave in octaves:
        scaled = resize_image(image, 2.0**octave)
        factors = (scaled.shape[1] / image.shape[1], scaled.shape[0] / image.shape[0])
        half = model.patch_size // 2
        features = model.trunk(pad_and_normalize(torch.from_numpy(scaled), half))[-1]
        rows, columns = features.shape[2] - 5, features.shape[3] - 5
        assert (rows, columns) == tuple(-(-(side + 96) // 16) - 5 for side in scaled.shape[:2])
        for i in range(rows):
            for j in range(columns):
                with torch.inference_mode():
                    embedding = model.embed(features[..., i : i + 6, j : j + 6])
                    score = model.score(embedding).item()
                    logits = model.decode_masks(embedding.flatten(1))
                pasted = paste(
                    logits,
                    place_patches(np.array([[i, j]]), np.array([factors]), 96),
                    image_size=image.shape[:2],
                    threshold=0.2,
                )
                for counts in pasted.counts:
                    rle = {"size": list(image.shape[:2]), "counts": counts}
                    slow.append((1 / (1 + np.exp(-score)), rle))
    slow.sort(key=lambda row: -row[0])
    assert len(proposals) == len(slow) > count
    np.testing.assert_allclose(proposals.scores, [row[0] for row in slow], atol=1e-5)
    ious = [coco_mask.iou([proposals.rle(n)], [slow[n][1]], [0])[0, 0] for n in range(count)]
    assert min(ious) > 0.99
    assert (np.diff(proposals.scores) <= 0).all()


def test_a_patch_lies_around_its_cell():
    place = place_patches(np.array([[0, 0], [2, 5]]), np.array([[1, 1], [0.5, 0.25]]), 160)
    assert place.left.tolist() == [-80, (16 * 5 - 80) / 0.5]
    assert place.top.tolist() == [-80, (16 * 2 - 80) / 0.25]
    assert place.width.tolist() == [160, 320] and place.height.tolist() == [160, 640]


def test_masks_stay_where_the_object_is():
    """A network that marks red pixels.

    Proposals over the pyramid outline the red square, not a shifted one.
    """

    class RedTrunk(torch.nn.Module):
        name, channels = "red", (1, 1, 1, 3)

        def forward(self, x):
            return [torch.nn.functional.avg_pool2d(x, 16)]

    red = DeepMask(
        RedTrunk(), patch_size=96, context=0, mask_size=6, reduction=3, embedding=36, score_hidden=1
    )
    with torch.no_grad():
        for parameter in red.parameters():
            parameter.zero_()
        red.tail[0].weight[0, :2, 0, 0] = torch.tensor([4.0, -4.0])  # red, not green
        for cell in range(36):
            red.tail[2].weight[cell, 0, cell // 6, cell % 6] = 1
            red.mask_head.weight[cell, cell] = 1
        red.mask_head.bias.fill_(-8)
    picture = np.full((192, 240, 3), 110, np.uint8)
    picture[48:128, 64:160] = (255, 0, 0)
    truth = np.zeros((192, 240), np.uint8)
    truth[48:128, 64:160] = 1
    proposals = Proposer(
        red, device=CPU, num_proposals=10_000, octaves=[-1.0, -0.5, 0.0], mask_threshold=0.5
    )(picture)
    target = coco_mask.encode(np.asfortranarray(truth))
    ious = coco_mask.iou([proposals.rle(n) for n in range(len(proposals))], [target], [0])[:, 0]
    assert ious.max() > 0.9
    best = proposals.boxes[ious.argmax()]
    assert np.abs(best - [64, 48, 160, 128]).max() <= 4  # a quarter of a 16-pixel cell


def test_an_image_smaller_than_a_patch_and_a_long_one(model):
    proposer = Proposer(model, device=CPU, num_proposals=20)
    for shape in ((1, 1, 3), (3, 200, 3), (150, 7, 3)):
        proposals = proposer(np.full(shape, 200, np.uint8))
        assert len(proposals) <= 20
        for n in range(len(proposals)):
            assert coco_mask.decode(proposals.rle(n)).shape == shape[:2]
