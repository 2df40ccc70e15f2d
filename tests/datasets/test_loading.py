"""Minibatches of patches and RoIs: the same whatever the workers, processes and bad files."""

import re
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from datasets.images import ImageError
from datasets.loading import batch_loader
from datasets.patch_sampler import MASK, SCORE
from tests.coco_json import assert_frequency, painted_patches, painted_rois

PATCHES = partial(painted_patches, seed=1)
ROIS = partial(painted_rois, seed=1)
THRESHOLDS = partial(ROIS, sampling={"draw_threshold": True})


@pytest.fixture(params=[PATCHES, THRESHOLDS])
def load(request, tmp_path):
    data = request.param(tmp_path)

    def load_batches(steps=range(6), workers=0):
        indices = data.batches(steps, batches_per_epoch=3, batch_size=4)
        return list(batch_loader(data, indices, data.collate, workers=workers))

    return load_batches


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for x, y in zip(one, other, strict=True):
        assert x.keys() == y.keys() and x["broken"] == y["broken"]
        assert all(torch.equal(x[name], y[name]) for name in x.keys() - {"broken"})


def test_batches_do_not_depend_on_workers_or_on_where_a_run_starts(load):
    whole = load()
    assert_same(whole, load(workers=2))
    assert_same(whole[4:], load(range(4, 6)))
    pixels = [next(iter(batch.values())) for batch in whole]
    assert not torch.equal(pixels[0], pixels[3])  # another epoch


def test_unreadable_images_are_named_and_replaced_the_same_way_every_time(load, tmp_path):
    (tmp_path / "2.png").write_bytes(b"no image")
    (tmp_path / "5.png").unlink()
    cv2.imwrite(str(tmp_path / "3.png"), np.zeros((60, 80, 3), np.uint8))  # not as annotated
    batches = load(range(12))
    named = dict(message.split(": ", 1) for batch in batches for message in batch["broken"])
    assert set(named) == {str(tmp_path / f"{n}.png") for n in (2, 3, 5)}
    assert re.search("80x60.*160x120", named[str(tmp_path / "3.png")])
    assert all(len(next(iter(batch.values()))) == 4 for batch in batches)
    assert_same(batches, load(range(12), workers=2))


def test_a_folder_without_a_readable_image_is_given_up(load, tmp_path):
    for file in tmp_path.glob("*.png"):
        file.unlink()
    with pytest.raises(ImageError, match="in a row could not be read"):
        load()


@pytest.mark.parametrize(
    ("make", "probabilities"),
    [
        (partial(PATCHES, mask_batch_prob=0.0), {SCORE: 1}),
        (partial(PATCHES, mask_batch_prob=0.3), {MASK: 0.3, SCORE: 0.7}),
        (partial(PATCHES, mask_batch_prob=1.0, patches_per_image=2), {MASK: 1}),
        (THRESHOLDS, dict.fromkeys(range(6), 1 / 6)),
        (ROIS, {-1: 1}),
    ],
)
def test_a_minibatch_has_one_head_or_threshold_and_the_next_samples(make, probabilities, tmp_path):
    count, data = 3000, make(tmp_path)
    batches = partial(data.batches, range(count), batches_per_epoch=100, batch_size=4)
    whole = list(batches())
    parts = [batches(rank=rank, world_size=2) for rank in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole
    drawn = [{choice for choice, _, _ in batch} for batch in whole]
    assert {len(choices) for choices in drawn} == {1}
    assert set.union(*drawn) == set(probabilities)
    for choice, probability in probabilities.items():
        assert_frequency(drawn.count({choice}) / count, probability, count)
    groups = [(epoch, group) for batch in whole for _, epoch, group in batch]
    per_epoch = 400 // data.group_size
    assert groups == [(epoch, group) for epoch in range(30) for group in range(per_epoch)]
