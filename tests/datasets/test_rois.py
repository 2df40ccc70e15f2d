"""Pixels and boxes of RoI minibatches.

They stay aligned, are the same whatever the workers, and bad files are replaced.
"""

import json

import cv2
import numpy as np
import pytest
import torch
from datasets.transforms import PixelRules, denormalize, normalize

from datasets.coco import CocoInstances
from datasets.images import ImageError, read_image
from datasets.proposal_boxes import ProposalBoxes
from datasets.resize import resize_sides
from datasets.roi_sampler import RoiRules, RoiSampler
from datasets.rois import (
    RoiBatchKeys,
    RoiDataset,
    collate_rois,
    roi_loader,
    target_statistics,
)

RULES = {"rois_per_image": 16, "short_side": 100, "long_side": 160}


def make_dataset(folder, *, count=6, sizes=((120, 160),), seed=0, **rules):
    """Images with one red rectangle each, and proposals around it; image n's differs.

    Args:
        sizes: heights and widths, in turn.
    """
    rng = np.random.default_rng(0)
    images, annotations, boxes = [], [], []
    for n in range(1, count + 1):
        height, width = sizes[n % len(sizes)]
        x, y, w, h = 20 + 5 * n, 10 + 3 * n, 60, 50
        pixels = rng.integers(100, 140, (height, width, 3), np.uint8)
        pixels[y : y + h, x : x + w] = (250, 20 * n, 5)
        cv2.imwrite(str(folder / f"{n}.png"), pixels[..., ::-1])
        images.append({"id": n, "file_name": f"{n}.png", "width": width, "height": height})
        annotations.append(
            {
                "id": n,
                "image_id": n,
                "category_id": n % 2 + 1,
                "iscrowd": 0,
                "area": w * h,
                "bbox": [x, y, w, h],
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
        boxes.append(np.array([x, y, x + w, y + h]) + rng.normal(0, 12, (40, 4)))
    path = folder / "instances.json"
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    coco = CocoInstances.load(path)
    ids = np.arange(1, count + 1).repeat(40)
    proposals = ProposalBoxes.from_rows(ids, np.concatenate(boxes), rng.random(len(ids)))
    sampler = RoiSampler(coco, proposals, rules=RoiRules(**RULES | rules), seed=seed)
    return RoiDataset(coco, folder, sampler)


def red_rectangle(image, green):
    """Xyxy of what is painted red in a (3, h, w) normalized image, to the sub-pixel."""
    pixels = denormalize(image.numpy()).astype(np.float64)
    # From the texture's color to the rectangle's; on an outline, the share that is covered.
    share = ((pixels[..., 0] - 120) / 130).clip(0, 1)
    share[share < 0.25] = 0
    rows, columns = share.max(axis=1), share.max(axis=0)
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


def decode(rois, targets):
    """(n, 4) boxes that the targets move the RoIs onto."""
    size = rois[:, 2:] - rois[:, :2]
    center = (rois[:, 2:] + rois[:, :2]) / 2 + targets[:, :2] * size
    half = size * np.exp(targets[:, 2:]) / 2
    return np.concatenate([center - half, center + half], axis=1)


@pytest.mark.parametrize(("short_side", "long_side"), [(73, 1000), (120, 160), (400, 301)])
def test_boxes_moved_by_their_targets_lie_on_the_painted_object(tmp_path, short_side, long_side):
    """Smaller, unchanged and larger; mirrored or not; in images of several shapes."""
    data = make_dataset(
        tmp_path,
        sizes=((120, 160), (150, 111), (97, 133)),
        short_side=short_side,
        long_side=long_side,
    )
    flips = set()
    for index in range(24):
        item, sample = data.load(0, index)
        flips.add(sample.flip)
        painted = red_rectangle(item["image"], green=20 * (sample.image + 1))
        foreground = item["labels"][0].numpy() > 0
        assert foreground.any() and not item["targets"][~foreground].any()
        assert set(item["labels"][0, foreground].tolist()) == {(sample.image + 1) % 2 + 1}
        boxes = decode(item["rois"].numpy()[foreground], item["targets"].numpy()[foreground])
        assert np.abs(boxes - boxes[0]).max() < 1e-3
        assert np.abs(boxes[0] - painted).max() < 0.6 * max(1, short_side / 120)
    assert flips == {True, False}


def test_inclusive_boxes_end_at_their_last_pixel(tmp_path):
    """RoIs and what their targets move them onto: a pixel of the original less than the edges."""
    edges, pixels = (make_dataset(tmp_path, inclusive_boxes=inclusive) for inclusive in (0, 1))
    for index in range(6):
        (outer, sample), (inner, _) = (data.load(0, index) for data in (edges, pixels))
        margin = torch.tensor([0, 0, 133 / 160, 100 / 120])
        assert torch.allclose(outer["rois"] - inner["rois"], margin, atol=1e-4)
        foreground = outer["labels"][0].numpy() > 0
        boxes = [
            decode(i["rois"].numpy(), i["targets"].numpy())[foreground] for i in (outer, inner)
        ]
        assert np.allclose(boxes[0] - boxes[1], margin, atol=1e-3)


def test_the_released_resizing_is_that_of_detection(tmp_path):
    data = make_dataset(tmp_path, short_side=217, long_side=1000, resampling="corners")
    flips = set()
    for index in range(24):
        item, sample = data.load(0, index)
        flips.add(sample.flip)
        image = read_image(tmp_path / f"{sample.image + 1}.png")
        pixels, factors = resize_sides(image, short_side=217, long_side=1000, resampling="corners")
        pixels = pixels[:, ::-1] if sample.flip else pixels
        np.testing.assert_array_equal(item["image"], normalize(pixels / 255))
        assert factors == (217 / 120,) * 2
        np.testing.assert_allclose(item["rois"], sample.rois * (217 / 120), rtol=1e-6)
    assert flips == {True, False}


def test_pixels_come_as_the_rules_say(tmp_path):
    rules = PixelRules(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0), bgr=True)
    plain = make_dataset(tmp_path)
    data = RoiDataset(plain.coco, tmp_path, plain.sampler, pixels=rules)
    rgb = denormalize(plain[0, 0, -1]["image"].numpy()) / 255
    image = data[0, 0, -1]["image"].numpy()
    for channel in range(3):  # of RGB
        expected = (rgb[..., channel] - rules.mean[channel]) / rules.std[channel]
        assert np.abs(image[2 - channel] - expected).max() < 1e-5


def test_items_have_the_contracts_shapes_and_types(tmp_path):
    item, sample = make_dataset(tmp_path).load(0, 0)
    assert item["image"].shape == (3, 100, 133) and item["image"].dtype == torch.float32
    assert item["rois"].shape == item["targets"].shape == (16, 4)
    assert item["rois"].dtype == item["targets"].dtype == torch.float32
    assert item["labels"].shape == (6, 16) and item["labels"].dtype == torch.int64
    assert np.allclose(item["rois"], sample.rois * ([133 / 160, 100 / 120] * 2), rtol=1e-5)
    assert item["broken"] == []


def test_a_minibatch_holds_each_image_and_points_each_roi_to_its_own(tmp_path):
    data = make_dataset(tmp_path, sizes=((120, 160), (160, 120)))
    items = [data[0, index, -1] for index in range(8)]
    assert len({item["image"].shape for item in items}) == 2
    batch = collate_rois(items)
    assert batch["images"].shape == (8, 3, 160, 160)  # 133, in steps of 32
    assert batch["rois"].shape == (128, 5) and batch["labels"].shape == (6, 128)
    for row, item in enumerate(items):
        height, width = item["image"].shape[1:]
        assert torch.equal(batch["images"][row, :, :height, :width], item["image"])
        assert not batch["images"][row, :, height:].any()
        assert not batch["images"][row, :, :, width:].any()
        own = batch["rois"][:, 0] == row
        assert torch.equal(batch["rois"][own, 1:], item["rois"])
        assert torch.equal(batch["labels"][:, own], item["labels"])
        assert torch.equal(batch["targets"][own], item["targets"])


def run_epoch(data, *, workers=0, share=(0, 1), steps=range(6)):
    keys = RoiBatchKeys(
        steps,
        rules=data.sampler.rules,
        batches_per_epoch=3,
        images_per_batch=4,
        seed=1,
        share=share,
    )
    return list(roi_loader(data, keys, workers=workers))


def assert_same_batches(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and x["broken"] == y["broken"]
        for name in x.keys() - {"broken"}:
            assert torch.equal(x[name], y[name]), name


def test_batches_do_not_depend_on_workers_or_on_where_a_run_starts(tmp_path):
    data = make_dataset(tmp_path, draw_threshold=True)
    whole = run_epoch(data)
    assert_same_batches(whole, run_epoch(data, workers=2))
    assert_same_batches(whole[4:], run_epoch(data, steps=range(4, 6)))
    assert not torch.equal(whole[0]["rois"], whole[3]["rois"])  # another epoch


def test_processes_share_the_minibatches_of_one_process(tmp_path):
    data = make_dataset(tmp_path, draw_threshold=True)
    whole = run_epoch(data)
    shares = [run_epoch(data, share=(index, 2)) for index in range(2)]
    for batch, first, second in zip(whole, *shares, strict=True):
        assert torch.equal(batch["images"], torch.cat([first["images"], second["images"]]))
        second["rois"][:, 0] += 2
        assert torch.equal(batch["rois"], torch.cat([first["rois"], second["rois"]]))
        assert torch.equal(batch["targets"], torch.cat([first["targets"], second["targets"]]))
        assert torch.equal(batch["labels"], torch.cat([first["labels"], second["labels"]], dim=1))


def test_a_minibatch_is_for_one_drawn_threshold_or_for_all(tmp_path):
    drawn, every = (make_dataset(tmp_path, draw_threshold=draw) for draw in (True, False))
    for batch in run_epoch(drawn):
        (used,) = torch.nonzero((batch["labels"] >= 0).any(dim=1)).tolist()
        assert (batch["labels"][used[0]] > 0).any()
    for batch in run_epoch(every):
        assert (batch["labels"] >= 0).any(dim=1).all()
    keys = RoiBatchKeys(
        range(6000), rules=drawn.sampler.rules, batches_per_epoch=100, images_per_batch=2
    )
    thresholds = [{threshold for _, _, threshold in batch} for batch in keys]
    assert all(len(one) == 1 for one in thresholds)
    counts = np.bincount([one.pop() for one in thresholds], minlength=6)
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(6000 * 1 / 6 * 5 / 6)


def test_unreadable_images_are_named_and_replaced_the_same_way_every_time(tmp_path):
    data = make_dataset(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "5.png").unlink()
    cv2.imwrite(str(tmp_path / "3.png"), np.zeros((60, 80, 3), np.uint8))  # not as annotated
    batches = run_epoch(data, steps=range(12))
    named = {
        message.split(":")[0].rsplit("/", 1)[-1] for batch in batches for message in batch["broken"]
    }
    assert named == {"2.png", "3.png", "5.png"}
    assert all(len(batch["images"]) == 4 for batch in batches)
    assert_same_batches(batches, run_epoch(data, workers=2, steps=range(12)))


def test_a_folder_without_a_readable_image_is_given_up(tmp_path):
    data = make_dataset(tmp_path)
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(ImageError, match="in a row could not be read"):
        data[0, 0, -1]


def test_target_statistics_are_those_of_the_minibatches(tmp_path):
    data = make_dataset(tmp_path, foreground_share=1.0, rois_per_image=41, flip=False)
    targets = np.concatenate(
        [
            sample.targets[sample.labels[0] > 0]
            for sample in (
                data.sampler.sample(image, np.random.default_rng(0)) for image in range(6)
            )
        ]
    )
    for file in tmp_path.glob("*.png"):  # no pixel is needed
        file.unlink()
    mean, std = target_statistics(data)
    assert mean.dtype == std.dtype == np.float32
    assert np.allclose(mean, targets.mean(axis=0), atol=1e-5)
    assert np.allclose(std, targets.std(axis=0), atol=1e-5)
    assert (std > 0.02).all() and len(targets) > 60
    part = target_statistics(data, images=2, seed=3)
    assert not np.allclose(part[1], std)
    assert np.array_equal(part, target_statistics(data, images=2, seed=3))


def test_target_statistics_without_a_good_proposal_change_nothing(tmp_path):
    data = make_dataset(tmp_path, max_proposals=0)
    assert [values.tolist() for values in target_statistics(data)] == [[0] * 4, [1] * 4]


def test_target_statistics_need_an_object(tmp_path):
    path = tmp_path / "a.json"
    image = {"id": 1, "file_name": "1.png", "width": 80, "height": 60}
    path.write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
    coco = CocoInstances.load(path)
    proposals = ProposalBoxes.from_rows(np.ones(1, int), np.array([[1, 2, 30, 40]]), np.ones(1))
    data = RoiDataset(coco, tmp_path, RoiSampler(coco, proposals))
    with pytest.raises(ValueError, match="a.json: no image has an object"):
        target_statistics(data)
