"""Pixels and boxes of RoI minibatches: aligned, the same whatever the workers and bad files."""

import cv2
import numpy as np
import pytest
import torch

from datasets.images import ImageError, read_image
from datasets.loading import batch_loader
from datasets.proposal_boxes import ProposalBoxes
from datasets.resize import PixelConfig, denormalize, normalize, resize_sides
from datasets.roi_sampler import RoiSampler, RoiSamplingConfig
from datasets.rois import RoiBatchSampler, RoiDataset
from tests.coco_json import rectangle, write_coco

SAMPLING = {"rois_per_image": 16, "short_side": 100, "long_side": 160}


def make_dataset(folder, *, count=6, sizes=((120, 160),), sampling=None, **options):
    """Images with one red rectangle each, and proposals around it; image n's differs.

    Args:
        sizes: heights and widths, in turn.
    """
    rng = np.random.default_rng(0)
    sizes = {n: sizes[n % len(sizes)] for n in range(1, count + 1)}
    annotations, boxes = [], []
    for n, (height, width) in sizes.items():
        x, y, w, h = 20 + 5 * n, 10 + 3 * n, 60, 50
        pixels = rng.integers(100, 140, (height, width, 3), np.uint8)
        pixels[y : y + h, x : x + w] = (250, 20 * n, 5)
        cv2.imwrite(str(folder / f"{n}.png"), pixels[..., ::-1])
        annotations.append(rectangle(n, n, n % 2 + 1, x, y, w, h))
        boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 12, (40, 4)))
    coco = write_coco(folder / "instances.json", sizes, annotations, categories=[1, 2])
    ids = np.arange(1, count + 1).repeat(40)
    proposals = ProposalBoxes.from_rows(ids, np.concatenate(boxes), rng.random(len(ids)))
    config = RoiSamplingConfig(**SAMPLING | (sampling or {}))
    return RoiDataset(coco, folder, RoiSampler(coco, proposals, config=config), **options)


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
    return np.array(
        [
            x[0] - columns[: x[0]].sum(),
            y[0] - rows[: y[0]].sum(),
            x[-1] + 1 + columns[x[-1] + 1 :].sum(),
            y[-1] + 1 + rows[y[-1] + 1 :].sum(),
        ]
    )


@pytest.mark.parametrize(("short_side", "long_side"), [(73, 1000), (120, 160), (400, 301)])
def test_boxes_of_foreground_lie_on_the_painted_object(tmp_path, short_side, long_side):
    """Smaller, unchanged and larger; mirrored or not; in images of several shapes."""
    sampling = {"short_side": short_side, "long_side": long_side}
    sizes = ((120, 160), (150, 111), (97, 133))
    data = make_dataset(tmp_path, sizes=sizes, sampling=sampling)
    flips = set()
    for index in range(24):
        item, sample = data.load(0, index)
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
    edges, pixels = (make_dataset(tmp_path, inclusive_boxes=inclusive) for inclusive in (0, 1))
    margin = torch.tensor([0, 0, 133 / 160, 100 / 120])
    for index in range(6):
        outer, inner = (data[0, index, -1] for data in (edges, pixels))
        for name in ("rois", "boxes"):
            assert torch.allclose(outer[name] - inner[name], margin, atol=1e-4)
    thin = np.array([[5, 6, 5.5, 9]], np.float32)  # a pixel at least
    assert pixels.corners(thin).tolist() == [[5, 6, 6, 8]]


def test_the_released_resizing_is_that_of_detection(tmp_path):
    sides = {"short_side": 217, "long_side": 1000}
    data = make_dataset(tmp_path, sampling=sides, align_corners=True)
    flips = set()
    for index in range(24):
        item, sample = data.load(0, index)
        flips.add(sample.flip)
        image = read_image(tmp_path / f"{sample.image + 1}.png")
        pixels, scales = resize_sides(image, **sides, align_corners=True)
        pixels = pixels[:, ::-1] if sample.flip else pixels
        np.testing.assert_array_equal(item["image"], normalize(pixels / 255))
        assert scales == (217 / 120,) * 2
        np.testing.assert_allclose(item["rois"], sample.rois * (217 / 120), rtol=1e-6)
    assert flips == {True, False}


def test_pixels_come_as_configured(tmp_path):
    config = PixelConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0), bgr=True)
    rgb = denormalize(make_dataset(tmp_path)[0, 0, -1]["image"].numpy()) / 255
    image = make_dataset(tmp_path, pixels=config)[0, 0, -1]["image"].numpy()
    for channel in range(3):  # of RGB
        expected = (rgb[..., channel] - config.mean[channel]) / config.std[channel]
        assert np.abs(image[2 - channel] - expected).max() < 1e-5


def test_items_have_the_contracts_shapes_and_types(tmp_path):
    item, sample = make_dataset(tmp_path).load(0, 0)
    assert item["image"].shape == (3, 100, 133) and item["image"].dtype == torch.float32
    assert item["rois"].shape == item["boxes"].shape == (16, 4)
    assert item["rois"].dtype == item["boxes"].dtype == torch.float32
    assert item["labels"].shape == (6, 16) and item["labels"].dtype == torch.int64
    for name in ("rois", "boxes"):
        original = getattr(sample, name)
        assert np.allclose(item[name], original * ([133 / 160, 100 / 120] * 2), rtol=1e-5)
    assert item["broken"] == []


def test_a_minibatch_holds_each_image_and_points_each_roi_to_its_own(tmp_path):
    data = make_dataset(tmp_path, sizes=((120, 160), (160, 120)))
    items = [data[0, index, -1] for index in range(8)]
    assert len({item["image"].shape for item in items}) == 2
    batch = data.collate(items)
    assert batch["images"].shape == (8, 3, 160, 160)  # 133, in steps of 32
    assert batch["rois"].shape == (128, 5) and batch["labels"].shape == (6, 128)
    for row, item in enumerate(items):
        height, width = item["image"].shape[1:]
        assert torch.equal(batch["images"][row, :, :height, :width], item["image"])
        assert not batch["images"][row, :, height:].any()
        assert not batch["images"][row, :, :, width:].any()
        of_image = batch["rois"][:, 0] == row
        assert torch.equal(batch["rois"][of_image, 1:], item["rois"])
        assert torch.equal(batch["labels"][:, of_image], item["labels"])
        assert torch.equal(batch["boxes"][of_image], item["boxes"])


def run_epochs(data, *, workers=0, steps=range(6), **options):
    sizes = {"batches_per_epoch": 3, "images_per_batch": 4, "seed": 1}
    indices = RoiBatchSampler(steps, **sizes, num_thresholds=6, **options)
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
    assert not torch.equal(whole[0]["rois"], whole[3]["rois"])  # another epoch


def test_processes_share_the_minibatches_of_one_process(tmp_path):
    data = make_dataset(tmp_path)
    parts = [run_epochs(data, rank=rank, world_size=2) for rank in range(2)]
    for batch, first, second in zip(run_epochs(data), *parts, strict=True):
        second["rois"][:, 0] += 2
        for name, dim in (("images", 0), ("rois", 0), ("boxes", 0), ("labels", 1)):
            assert torch.equal(batch[name], torch.cat([first[name], second[name]], dim))


def test_a_minibatch_is_for_one_drawn_threshold_or_for_all(tmp_path):
    data = make_dataset(tmp_path)
    for batch in run_epochs(data):
        (used,) = torch.nonzero((batch["labels"] >= 0).any(dim=1)).tolist()
        assert (batch["labels"][used[0]] > 0).any()
    sizes = {"batches_per_epoch": 100, "images_per_batch": 2}
    (every,) = batch_loader(data, RoiBatchSampler(range(1), **sizes), data.collate, workers=0)
    assert (every["labels"] >= 0).any(dim=1).all()
    batches = list(RoiBatchSampler(range(6000), num_thresholds=6, **sizes))
    thresholds = [{threshold for _, _, threshold in batch} for batch in batches]
    assert all(len(one) == 1 for one in thresholds)
    counts = np.bincount([one.pop() for one in thresholds], minlength=6)
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(6000 * 1 / 6 * 5 / 6)
    samples = [(epoch, index) for batch in batches for epoch, index, _ in batch]
    assert samples == [(epoch, index) for epoch in range(60) for index in range(200)]


def test_unreadable_images_are_named_and_replaced_the_same_way_every_time(tmp_path):
    data = make_dataset(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "5.png").unlink()
    cv2.imwrite(str(tmp_path / "3.png"), np.zeros((60, 80, 3), np.uint8))  # not as annotated
    batches = run_epochs(data, steps=range(12))
    named = {
        message.split(":")[0].rsplit("/", 1)[-1] for batch in batches for message in batch["broken"]
    }
    assert named == {"2.png", "3.png", "5.png"}
    assert all(len(batch["images"]) == 4 for batch in batches)
    assert_same_batches(batches, run_epochs(data, workers=2, steps=range(12)))


def test_a_folder_without_a_readable_image_is_given_up(tmp_path):
    data = make_dataset(tmp_path)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(ImageError, match="in a row could not be read"):
        data[0, 0, -1]
