"""Metrics of patches and RoIs, by hand."""

import pytest
import torch

from models.deepmask import resize_mask_logits
from models.losses import mask_ious
from pipeline.evaluation.patches import patch_metrics, validation_heads
from pipeline.evaluation.rois import roi_metrics


def test_mask_ious_are_of_masks_at_probability_one_half():
    """The left half against the upper half, both empty, and the mask itself, enlarged."""
    logits, targets = -torch.ones(3, 4, 4), -torch.ones(3, 8, 8)
    logits[0, :, :2] = logits[2, :2, :3] = 1
    targets[0, :4] = 1
    targets[2] = resize_mask_logits(logits[2:], 8)[0].sign()
    assert mask_ious(logits, targets).tolist() == pytest.approx([1 / 3, 1, 1])


def test_patch_metrics_leave_out_what_was_not_measured():
    ious, hits = torch.tensor([0.4, 0.6, 0.8]), torch.tensor([True, True, False, False])
    masks = {"mean_iou": 0.6, "median_iou": 0.6, "iou_above_0.5": 2 / 3, "iou_above_0.7": 1 / 3}
    assert patch_metrics(ious, hits) == pytest.approx(masks | {"score_accuracy": 0.5})
    assert patch_metrics(ious, hits[:0]) == pytest.approx(masks)
    assert patch_metrics(ious[:0], hits) == {"score_accuracy": 0.5}


def test_validation_has_no_score_patches_where_no_scores_are_trained():
    assert validation_heads(3) == ["mask", "score", "mask"]
    assert validation_heads(3, mask_batch_prob=1) == ["mask"] * 3


def test_roi_accuracy_weighs_foreground_and_background_alike():
    hits = torch.tensor([[1, 1], [0, 1], [1, 0], [1, 0], [1, 0]], dtype=torch.bool)
    accuracies = {"foreground_accuracy": 0.5, "background_accuracy": 1.0}
    assert roi_metrics(hits) == {"roi_accuracy": 0.75, **accuracies}
    assert roi_metrics(hits[2:]) == {"roi_accuracy": 1.0, "background_accuracy": 1.0}
    assert roi_metrics(hits[:0]) == {}
