"""Mean and deviation of the box deltas that a detector is trained on."""

import numpy as np
import pytest
import torch

from datasets.proposal_boxes import ProposalBoxes
from datasets.roi_sampler import RoiSampler, RoiSamplingConfig
from datasets.rois import RoiDataset
from models.boxes import encode_boxes
from pipeline.data import delta_statistics
from tests.coco_json import rectangle, write_coco


def make_dataset(folder, *, objects=True, offset=0.0, **sampling):
    """Six images, each with one object and proposals `offset` px off; there are no image files."""
    rng = np.random.default_rng(0)
    ids = range(1, 7)
    annotations = [rectangle(n, n, 1, 30, 20, 60, 50) for n in ids] if objects else []
    coco = write_coco(folder / "a.json", dict.fromkeys(ids, (120, 160)), annotations, [1])
    boxes = np.array([30, 20, 90, 70]) + offset + rng.normal(0, 8, (6 * 40, 4))
    proposals = ProposalBoxes.from_rows((np.repeat(ids, 40), boxes, rng.random(len(boxes))))
    config = RoiSamplingConfig(**sampling)
    return RoiDataset(coco, folder, RoiSampler(coco, proposals, config=config))


def test_delta_statistics_are_those_of_all_foreground(tmp_path):
    data = make_dataset(tmp_path, fg_fraction=1.0, rois_per_image=41, flip=False)
    samples = [data.sampler.sample(image, np.random.default_rng(0)) for image in range(6)]
    foreground = np.concatenate([sample.labels[0] > 0 for sample in samples])
    rois = np.concatenate([sample.rois for sample in samples])[foreground]
    boxes = np.concatenate([sample.boxes for sample in samples])[foreground]
    expected = encode_boxes(torch.from_numpy(rois), torch.from_numpy(boxes))
    mean, std = delta_statistics(data)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, expected.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, expected.std(0, unbiased=False), rtol=0, atol=1e-5)
    assert (std > 0.02).all() and len(expected) > 60


def test_delta_statistics_of_some_images_depend_on_the_seed(tmp_path):
    data = make_dataset(tmp_path)
    part = delta_statistics(data, images=2, seed=3)
    assert torch.equal(torch.stack(part), torch.stack(delta_statistics(data, images=2, seed=3)))
    for other in (delta_statistics(data), delta_statistics(data, images=2, seed=4)):
        assert not torch.equal(part[1], other[1])


def test_delta_statistics_without_a_good_proposal_change_nothing_without_an_object_fail(tmp_path):
    statistics = delta_statistics(make_dataset(tmp_path, offset=60))
    assert [values.tolist() for values in statistics] == [[0] * 4, [1] * 4]
    with pytest.raises(ValueError, match="a.json: no image has an object"):
        delta_statistics(make_dataset(tmp_path, objects=False))
