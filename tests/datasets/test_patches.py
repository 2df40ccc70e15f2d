"""Pixels and targets of patches, right to the sub-pixel."""

from dataclasses import replace

import cv2
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.colors import ColorFactors, change_colors
from datasets.images import read_image
from datasets.patch_sampler import MASK, SCORE, Patch
from datasets.patches import crop_patch, mask_target, rasterize
from datasets.resize import denormalize
from tests.coco_json import painted_patches

SIZE = 64


def patch_at(x, y, scale, *, flip=False, annotation=0):
    return Patch(0, annotation, 1, x, y, scale, flip)


def smooth_picture(y, x):
    """A picture without fine detail, as a function of continuous coordinates."""
    red, green = 127 + 100 * np.sin(x / 31 + y / 47), 127 + 100 * np.cos(x / 53)
    return np.stack([red, green, 40 + 0.2 * y + 0.1 * x], axis=-1)


@given(x=st.floats(0, 400), y=st.floats(0, 300), log2_scale=st.floats(-3, 2), flip=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_patch_shows_its_square_of_the_image_to_the_sub_pixel(x, y, log2_scale, flip):
    scale = 2.0**log2_scale
    image = smooth_picture(*np.mgrid[0.5:300, 0.5:400]).round().astype(np.uint8)
    pixels = crop_patch(image, patch_at(x, y, scale, flip=flip), SIZE) * 255
    offset = (np.arange(SIZE) + 0.5 - SIZE / 2) / scale
    px, py = np.meshgrid(x + (offset[::-1] if flip else offset), y + offset)
    margin = 2 / min(scale, 1) + 1.5  # near the border the average is over repeated edge or gray
    inside = (px > margin) & (px < 400 - margin) & (py > margin) & (py < 300 - margin)
    outside = (px < -margin) | (px > 400 + margin) | (py < -margin) | (py > 300 + margin)
    if inside.any():
        # A block average of a curved function differs a little from its value at the center.
        assert np.abs(pixels - smooth_picture(py, px))[inside].max() < 3 + (1 / scale) ** 2 * 0.15
    assert np.allclose(pixels[outside], 127.5)


def test_gray_begins_exactly_at_the_image_border():
    image = np.full((40, 40, 3), 255, np.uint8)
    pixels = crop_patch(image, patch_at(0, 20, 1.0), 32)[..., 0]
    assert np.allclose(pixels[:, :16], 0.5) and np.allclose(pixels[:, 16:], 1)
    # The border falls in the middle of pixel 15.
    half = crop_patch(image, patch_at(0.5, 20, 1.0), 32)[16, :, 0]
    assert np.allclose(half[:15], 0.5) and np.isclose(half[15], 0.75) and np.allclose(half[16:], 1)


def test_colors_change_in_the_image_and_not_around_it():
    image = np.full((40, 40, 3), 255, np.uint8)
    patch = replace(patch_at(0, 20, 1.0), colors=ColorFactors(0.6, 1.3, 0.8))
    pixels = crop_patch(image, patch, 32)
    assert np.allclose(pixels[:, :16], 0.5)
    assert np.allclose(pixels[:, 16:], 0.6, atol=1e-6)  # a contrast of one color is none


@given(st.floats(-2, 1.5), st.floats(-30, 30), st.floats(-30, 30), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_targets_agree_with_rasterizing_at_8x_and_averaging(log2_scale, dx, dy, seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 12))
    radii = rng.uniform(15, 45, 12)
    scale = 2.0**log2_scale
    ring = [200, 150] + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None] / scale
    patch = patch_at(200 + dx / scale, 150 + dy / scale, scale)
    target, fine = (
        rasterize([ring.astype(np.float32)], patch, patch_size=160, target_size=size)
        for size in (112, 8 * 112)
    )
    coverage = fine.reshape(112, 8, 112, 8).mean((1, 3))
    wrong = target != (coverage > 0.5)
    # COCO's rule rounds the outline to a fifth of a pixel: what is wrong is nearly half covered,
    # but at sharp corners.
    assert np.abs(coverage[wrong] - 0.5).sum() < 0.004 * coverage.sum() + 0.5
    assert abs(target.mean() - coverage.mean()) < 0.006


def test_rle_targets_agree_with_polygon_targets(tmp_path):
    polygons, rles = painted_patches(tmp_path / "p"), painted_patches(tmp_path / "r", rle=True)
    for scale in (0.4, 0.8, 1.7):
        for n, flip in ((0, False), (3, True)):
            patch = patch_at(70 + 5 * n, 50, scale, flip=flip, annotation=n)
            a, b = (
                mask_target(data.coco, patch, patch_size=SIZE, target_size=48) > 0
                for data in (polygons, rles)
            )
            assert (a & b).sum() / (a | b).sum() > 0.96


def test_target_and_pixels_of_a_mask_patch_show_the_same_object(tmp_path):
    """Where the target is 1 the pixels are red as the painted polygon, mirrored or not."""
    data = painted_patches(tmp_path)
    flips = set()
    for group in range(30):
        item, (patch,) = data.load(MASK, 0, group)
        flips.add(patch.flip)
        pixels = denormalize(item["patches"][0].numpy())[16:-16, 16:-16].astype(int)
        target = (item["targets"][0].numpy() > 0).astype(np.uint8)
        target = cv2.resize(target, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)
        border = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
        inner, outer = (  # without what is near an outline
            cv2.erode(side, np.ones((5, 5), np.uint8), **border) > 0
            for side in (target, 1 - target)
        )
        green = 20 * (patch.image + 1)
        red = (pixels[..., 0] > 225) & (np.abs(pixels[..., 1] - green) < 30) & (pixels[..., 2] < 30)
        assert red[inner].mean() > 0.995 and red[outer].mean() < 0.005
    assert flips == {True, False}


def test_items_have_the_contracts_shapes_and_values(tmp_path):
    data = painted_patches(tmp_path, patches_per_image=3)
    mask, score = data[(MASK, 0, 0)], data[(SCORE, 0, 1)]
    assert mask["patches"].shape == (3, 3, 96, 96) and mask["patches"].dtype == torch.float32
    assert mask["targets"].shape == (3, 48, 48) and mask["targets"].dtype == torch.float32
    assert set(mask["targets"].unique().tolist()) == {-1.0, 1.0} and mask["broken"] == []
    assert score["labels"].shape == (3,) and set(score["labels"].tolist()) <= {-1.0, 1.0}


def test_cells_of_a_score_patch_are_patches_sixteen_pixels_apart(tmp_path):
    """Their pixels, and the masks that their IoUs are learned from, mirrored or not."""
    data = painted_patches(tmp_path, score_targets="iou", score_cells=3)
    seen = 0
    for group in range(40):
        item, (window,) = data.load(SCORE, 0, group)
        assert item["patches"].shape[-1] == 96 + 2 * 16 and item["labels"].shape == (1, 3, 3)
        assert (
            item["decode"].tolist()
            == torch.nonzero(item["labels"].flatten() == 1).flatten().tolist()
        )
        image = read_image(tmp_path / f"{window.image + 1}.png")
        pixels = denormalize(item["patches"][0].numpy()).astype(int)
        for k, cell in enumerate(item["decode"].tolist()):
            row, column = divmod(cell, 3)
            dy, dx = (np.array([row, column]) - 1) * 16 / window.scale
            dx = -dx if window.flip else dx
            own = replace(window, x=window.x + dx, y=window.y + dy, annotation=window.image)
            shown = pixels[16 * row : 16 * row + 96, 16 * column : 16 * column + 96]
            assert np.abs(shown - crop_patch(image, own, 96) * 255).mean() < 3
            target = mask_target(data.coco, own, patch_size=64, target_size=16) > 0
            np.testing.assert_array_equal(item["iou_targets"][k], target)
            area = data.coco.areas[window.image] * (window.scale / 4) ** 2
            assert np.isclose(item["iou_areas"][k], area) and target.sum() < 1.1 * area + 8
            seen += 1
    assert seen > 10


def test_colors_change_within_their_range_and_nothing_else_does(tmp_path):
    plain, jittered = painted_patches(tmp_path), painted_patches(tmp_path, jitter_color=0.3)
    changed = 0
    for group in range(6):
        (item, [patch]), (other, [moved]) = (d.load(MASK, 0, group) for d in (plain, jittered))
        assert all(0.7 <= factor <= 1.3 for factor in moved.colors)
        assert replace(moved, colors=patch.colors) == patch
        assert torch.equal(item["targets"], other["targets"])
        changed += not torch.equal(item["patches"], other["patches"])
    assert changed == 6
    image = np.random.default_rng(0).random((5, 6, 3), np.float32)
    assert change_colors(image, ColorFactors()) is image
    gray = change_colors(image, ColorFactors(saturation=0))
    assert np.ptp(gray, axis=2).max() < 1e-6
    np.testing.assert_allclose(
        change_colors(image, ColorFactors(brightness=0.5)), image / 2, rtol=1e-5
    )
