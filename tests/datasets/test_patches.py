"""Pixels and targets of patches: right to the sub-pixel, whatever the workers and bad files."""

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.images import ImageError
from datasets.loading import batch_loader, read_annotated_image
from datasets.patch_sampler import MASK, SCORE, Patch, PatchSampler, PatchSamplingConfig
from datasets.patches import PatchBatchSampler, PatchDataset, crop_patch, mask_target, rasterize
from datasets.resize import denormalize
from tests.coco_json import rectangle, write_coco

SIZE = 64


def patch_at(x, y, scale, *, flip=False, annotation=0):
    return Patch(0, annotation, 1, x, y, scale, flip)


def smooth_picture(y, x):
    """A picture without fine detail, as a function of continuous coordinates."""
    channels = [
        127 + 100 * np.sin(x / 31 + y / 47),
        127 + 100 * np.cos(x / 53),
        40 + 0.2 * y + 0.1 * x,
    ]
    return np.stack(channels, axis=-1)


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


def make_dataset(folder, *, rle=False, count=6, **sampling):
    """Images with one polygon (or RLE) each; image n's object differs."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    annotations = []
    for n in range(1, count + 1):
        noise = rng.integers(0, 255, (12, 16, 3), np.uint8)
        pixels = cv2.resize(noise, (160, 120), interpolation=cv2.INTER_CUBIC)
        ring = np.array([[30.5, 20.25], [110.0 + n, 25], [100, 90.75], [40, 100]])
        segmentation = [ring.ravel().tolist()]
        encoded = coco_mask.frPyObjects(segmentation, 120, 160)[0]
        pixels[coco_mask.decode(encoded).astype(bool)] = (250, 20 * n, 5)
        cv2.imwrite(str(folder / f"{n}.png"), pixels[..., ::-1])
        if rle:
            segmentation = encoded | {"counts": encoded["counts"].decode()}
        bbox = [*ring.min(0), *(ring.max(0) - ring.min(0))]
        annotations.append(rectangle(n, n, 1, *bbox, segmentation=segmentation))
    sizes = dict.fromkeys(range(1, count + 1), (120, 160))
    coco = write_coco(folder / "instances.json", sizes, annotations, categories=[1])
    sampler = PatchSampler(coco, patch_size=SIZE, config=PatchSamplingConfig(**sampling))
    return PatchDataset(coco, folder, sampler, patch_size=SIZE, context=32, target_size=48)


def test_rle_targets_agree_with_polygon_targets(tmp_path):
    polygons, rles = make_dataset(tmp_path / "p"), make_dataset(tmp_path / "r", rle=True)
    for n, flip in ((0, False), (3, True)):
        for scale in (0.4, 0.8, 1.7):
            patch = patch_at(70 + n, 50, scale, flip=flip, annotation=n)
            a, b = (
                mask_target(data.coco, patch, patch_size=SIZE, target_size=48) > 0
                for data in (polygons, rles)
            )
            assert (a & b).sum() / (a | b).sum() > 0.96


def test_target_and_pixels_of_a_mask_patch_show_the_same_object(tmp_path):
    """Where the target is 1 the pixels are red as the painted polygon, mirrored or not."""
    data = make_dataset(tmp_path)
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
    data = make_dataset(tmp_path, patches_per_image=3)
    mask, score = data[(MASK, 0, 0)], data[(SCORE, 0, 1)]
    assert mask["patches"].shape == (3, 3, 96, 96) and mask["patches"].dtype == torch.float32
    assert mask["targets"].shape == (3, 48, 48) and mask["targets"].dtype == torch.float32
    assert set(mask["targets"].unique().tolist()) == {-1.0, 1.0} and mask["broken"] == []
    assert score["labels"].shape == (3,) and set(score["labels"].tolist()) <= {-1.0, 1.0}


def run_epochs(data, *, workers=0, steps=range(6), **ranks):
    indices = PatchBatchSampler(steps, batches_per_epoch=3, groups_per_batch=4, seed=1, **ranks)
    return list(batch_loader(data, indices, data.collate, workers=workers))


def assert_same_batches(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and x["broken"] == y["broken"]
        for name in x.keys() - {"broken"}:
            assert torch.equal(x[name], y[name]), name


def test_batches_do_not_depend_on_workers_or_on_where_a_run_starts(tmp_path):
    data = make_dataset(tmp_path)
    whole = run_epochs(data)
    assert_same_batches(whole, run_epochs(data, workers=2))
    assert_same_batches(whole[4:], run_epochs(data, steps=range(4, 6)))
    assert not torch.equal(whole[0]["patches"], whole[3]["patches"])  # another epoch


def test_processes_share_the_minibatches_of_one_process(tmp_path):
    data = make_dataset(tmp_path)
    parts = [run_epochs(data, rank=rank, world_size=2) for rank in range(2)]
    joined = [data.collate(list(batches)) for batches in zip(*parts, strict=True)]
    assert_same_batches(run_epochs(data), joined)


@pytest.mark.parametrize("mask_batch_prob", [0.0, 0.3, 1.0])
def test_every_minibatch_trains_one_head_drawn_with_its_probability(mask_batch_prob):
    batches = list(
        PatchBatchSampler(
            range(3000),
            batches_per_epoch=100,
            groups_per_batch=2,
            mask_batch_prob=mask_batch_prob,
        )
    )
    heads = [{head for head, _, _ in batch} for batch in batches]
    assert all(len(head) == 1 for head in heads)
    deviation = (mask_batch_prob * (1 - mask_batch_prob) / 3000) ** 0.5
    assert abs(heads.count({MASK}) / 3000 - mask_batch_prob) <= 4.5 * deviation
    samples = [(epoch, group) for batch in batches for _, epoch, group in batch]
    assert samples == [(epoch, group) for epoch in range(30) for group in range(200)]


def test_unreadable_images_are_named_and_replaced_the_same_way_every_time(tmp_path):
    data = make_dataset(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "5.png").unlink()
    batches = run_epochs(data, steps=range(12))
    named = {
        message.split(":")[0].rsplit("/", 1)[-1] for batch in batches for message in batch["broken"]
    }
    assert named == {"2.png", "5.png"}
    assert all(len(batch["patches"]) == 4 for batch in batches)
    assert_same_batches(batches, run_epochs(data, workers=2, steps=range(12)))


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path):
    data = make_dataset(tmp_path)
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((60, 80, 3), np.uint8))
    with pytest.raises(ImageError, match="1.png.*80x60.*160x120"):
        read_annotated_image(data.coco, tmp_path, 0)


def test_a_folder_without_a_readable_image_is_given_up(tmp_path):
    data = make_dataset(tmp_path)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(ImageError, match="in a row could not be read"):
        data[(MASK, 0, 0)]
