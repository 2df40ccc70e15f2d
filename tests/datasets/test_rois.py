"""Pixels and boxes of RoI minibatches, aligned to the sub-pixel."""

import numpy as np
import pytest
import torch

from datasets.images import read_image
from datasets.resize import PixelConfig, denormalize, normalize, resize_sides
from tests.coco_json import painted_rois


def red_rectangle(image, green):
    """Xyxy of what is painted red in a (3, h, w) normalized image, to the sub-pixel."""
    pixels = denormalize(image.numpy()).astype(np.float64)
    # From the texture's color to the rectangle's: on an outline, how much of a pixel is covered.
    coverage = ((pixels[..., 0] - 120) / 130).clip(0, 1)
    coverage[coverage < 0.25] = 0
    rows, columns = coverage.max(axis=1), coverage.max(axis=0)
    y, x = (np.flatnonzero(edge > 0.9) for edge in (rows, columns))
    inner = pixels[y[0] : y[-1] + 1, x[0] : x[-1] + 1, 1]
    assert np.abs(np.median(inner) - green) < 3
    left, top = (i[0] - edge[: i[0]].sum() for i, edge in ((x, columns), (y, rows)))
    right, bottom = (i[-1] + 1 + edge[i[-1] + 1 :].sum() for i, edge in ((x, columns), (y, rows)))
    return np.array([left, top, right, bottom])


@pytest.mark.parametrize(("short_side", "long_side"), [(73, 1000), (120, 160), (400, 301)])
def test_boxes_of_foreground_lie_on_the_painted_object(tmp_path, short_side, long_side):
    """Smaller, unchanged and larger; mirrored or not; in images of several shapes."""
    sampling = {"short_side": short_side, "long_side": long_side}
    sizes = ((120, 160), (150, 111), (97, 133))
    data = painted_rois(tmp_path, sizes=sizes, sampling=sampling)
    flips = set()
    for index in range(24):
        item, sample = data.load(-1, 0, index)
        flips.add(sample.flip)
        painted = red_rectangle(item["image"], green=20 * (sample.image + 1))
        foreground = item["labels"][0] > 0
        assert foreground.any()
        assert set(item["labels"][0, foreground].tolist()) == {(sample.image + 1) % 2 + 1}
        assert torch.equal(item["boxes"][~foreground], item["rois"][~foreground])
        boxes = item["boxes"][foreground].numpy()
        assert np.abs(boxes - boxes[0]).max() < 1e-3
        assert np.abs(boxes[0] - painted).max() < 0.6 * max(1, short_side / 120)
    assert flips == {True, False}


def test_inclusive_boxes_end_at_their_last_pixel(tmp_path):
    """RoIs and boxes end a pixel of the original image before their edges."""
    edges, pixels = (painted_rois(tmp_path, inclusive_boxes=inclusive) for inclusive in (0, 1))
    margin = torch.tensor([0, 0, 133 / 160, 100 / 120])
    for index in range(6):
        outer, inner = (data[-1, 0, index] for data in (edges, pixels))
        for name in ("rois", "boxes"):
            assert torch.allclose(outer[name] - inner[name], margin, atol=1e-4)
    thin = np.array([[5, 6, 5.5, 9]], np.float32)  # a pixel at least
    assert pixels.corners(thin).tolist() == [[5, 6, 6, 8]]


def test_the_released_resizing_is_that_of_detection(tmp_path):
    sides = {"short_side": 217, "long_side": 1000}
    data = painted_rois(tmp_path, sampling=sides, align_corners=True)
    items = [data.load(-1, 0, index) for index in range(8)]
    assert {sample.flip for _, sample in items} == {True, False}
    for item, sample in items:
        image = read_image(tmp_path / f"{sample.image + 1}.png")
        pixels, (scale, _) = resize_sides(image, **sides, align_corners=True)
        pixels = pixels[:, ::-1] if sample.flip else pixels
        np.testing.assert_array_equal(item["image"], normalize(pixels / 255))
        np.testing.assert_allclose(item["rois"], sample.rois * scale, rtol=1e-6)


def test_pixels_come_as_configured(tmp_path):
    config = PixelConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0), bgr=True)
    rgb = denormalize(painted_rois(tmp_path)[-1, 0, 0]["image"].numpy()) / 255
    image = painted_rois(tmp_path, pixels=config)[-1, 0, 0]["image"].numpy()
    expected = (rgb - config.mean) / config.std
    np.testing.assert_allclose(image[::-1].transpose(1, 2, 0), expected, atol=1e-5)


def test_a_minibatch_holds_each_image_and_points_each_roi_to_its_own(tmp_path):
    data = painted_rois(tmp_path, sizes=((120, 160), (160, 120)))
    items = [data[-1, 0, index] for index in range(8)]
    assert {tuple(item["image"].shape) for item in items} == {(3, 100, 133), (3, 133, 100)}
    batch = data.collate(items)
    assert batch["labels"].dtype == torch.int64
    assert batch["images"].dtype == batch["rois"].dtype == batch["boxes"].dtype == torch.float32
    frames = torch.zeros(8, 3, 160, 160)  # 133, in steps of 32
    for frame, item in zip(frames, items, strict=True):
        frame[:, : item["image"].shape[1], : item["image"].shape[2]] = item["image"]
    assert torch.equal(batch["images"], frames)
    assert torch.equal(batch["rois"][:, 0], torch.arange(8.0).repeat_interleave(16))
    assert torch.equal(batch["rois"][:, 1:], torch.cat([item["rois"] for item in items]))
    assert torch.equal(batch["boxes"], torch.cat([item["boxes"] for item in items]))
    assert torch.equal(batch["labels"], torch.cat([item["labels"] for item in items], dim=1))
    # Half of a minibatch of two processes, which has larger images in its other half.
    data.images_per_batch = 8
    items = [data[-1, 0, index] for index in range(8)]
    tall = [item for item in items if item["image"].shape[1] == 133]
    assert data.collate(tall)["images"].shape[2:] == (160, 160)
    one_threshold = data[2, 0, 0]["labels"]
    assert (one_threshold >= 0).any(dim=1).nonzero().tolist() == [[2]]
