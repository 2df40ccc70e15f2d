"""Losses against their formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.losses import (
    box_loss,
    cell_score_loss,
    count_cells,
    count_samples,
    integral_loss,
    mask_ious,
    mask_loss,
    score_loss,
    soft_margin,
)


def test_soft_margin_is_its_formula_and_survives_large_logits():
    for f in (-3.0, 0.0, 2.5):
        for y in (-1.0, 1.0):
            value = soft_margin(torch.tensor(f), torch.tensor(y)).item()
            assert math.isclose(value, math.log(1 + math.exp(-y * f)), rel_tol=1e-6)
    assert soft_margin(torch.tensor(1e4), torch.tensor(-1.0)).item() == 1e4
    assert soft_margin(torch.tensor(1e4), torch.tensor(1.0)).item() == 0


def test_mask_and_score_loss_are_means_over_patches_and_pixels():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 4), torch.randn(3, 4, 4).sign()
    margins = (targets * logits).flatten().tolist()
    slow = sum(math.log(1 + math.exp(-margin)) for margin in margins) / 48
    assert math.isclose(mask_loss(logits, targets).item(), slow, rel_tol=1e-5)
    scores = score_loss(logits.flatten(), targets.flatten())
    assert math.isclose(scores.item(), slow, rel_tol=1e-5)
    assert mask_loss(logits, torch.ones(3, 9, 9)).isfinite()  # resized to the targets


def test_cells_at_objects_and_at_none_weigh_the_same():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 3).requires_grad_()
    labels = torch.randint(-1, 2, (2, 3, 3)).float()
    counts, at, none = count_cells(labels), labels > 0, labels < 0
    loss = cell_score_loss(logits, labels, counts)
    halves = score_loss(logits[at], labels[at]), score_loss(logits[none], labels[none])
    torch.testing.assert_close(loss, sum(halves) / 2)
    # Learning an IoU, a score is best when it is its logit.
    ious = torch.rand(int(at.sum()))
    cell_score_loss(logits, labels, counts, ious).backward()
    slope = logits.detach().sigmoid()[at] - ious
    torch.testing.assert_close(logits.grad[at], 0.5 * slope / len(ious))
    assert cell_score_loss(logits, -torch.ones(2, 3, 3), torch.tensor([0.0, 18])).isfinite()


def test_ious_are_of_masks_at_a_threshold_and_count_what_lies_beyond_the_patch():
    targets = -torch.ones(3, 4, 4)
    targets[0, :2], targets[1, :2] = 1, 1
    logits = torch.full((3, 4, 4), -9.0)
    logits[0, :2], logits[1, :2] = 9, -0.5
    assert mask_ious(logits, targets).tolist() == [1, 0, 1]  # 1: both are empty
    areas = torch.tensor([8.0, 16, 5])  # of the second half is outside, of the third all
    assert mask_ious(logits, targets, areas=areas, threshold=0.2).tolist() == [1, 0.5, 0]


@st.composite
def integral_labels(draw) -> torch.Tensor:
    """(K, R) of 2 classes: any number of thresholds and RoIs, some of them no sample."""
    num_thresholds, num_rois = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    label = st.lists(st.integers(-1, 2), min_size=num_rois, max_size=num_rois)
    return torch.tensor(draw(st.lists(label, min_size=num_thresholds, max_size=num_thresholds)))


def slow_cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(z) for z in logits)) - logits[label]


def slow_integral_loss(class_logits: torch.Tensor, labels: torch.Tensor) -> float:
    means = []
    for k, row in enumerate(labels.tolist()):
        losses = [
            slow_cross_entropy(class_logits[r, k].tolist(), label)
            for r, label in enumerate(row)
            if label >= 0
        ]
        if losses:
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means) if means else 0.0


@given(integral_labels(), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_integral_loss_is_the_mean_over_thresholds_of_the_mean_over_samples(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(labels.shape[1], labels.shape[0], 3, generator=generator)
    logits.requires_grad_()
    loss = integral_loss(logits, labels, count_samples(labels)[:-1])
    assert math.isclose(loss.item(), slow_integral_loss(logits, labels), rel_tol=1e-4, abs_tol=1e-5)
    loss.backward()
    # What is no sample does not teach; what is one does.
    assert torch.equal(logits.grad.abs().sum(-1).T > 0, labels >= 0)


def slow_box_loss(deltas: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> float:
    total, samples = 0.0, 0
    for r in range(len(deltas)):
        column = labels[:, r].tolist()
        samples += any(label >= 0 for label in column)
        classes = {label for label in column if label > 0}  # one at most: of the nearest object
        for c in classes:
            for i in range(4):
                error = abs(deltas[r, c, i].item() - targets[r, i].item())
                total += 0.5 * error**2 if error < 1 else error - 0.5
    return total / samples if samples else 0.0


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_box_loss_is_its_sum_over_foreground_by_the_number_of_samples(thresholds, rois, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    # Each RoI has one object; a threshold takes it for that class, for background or not at all.
    labels = draw(1, 4, rois) * draw(0, 2, thresholds, rois)
    labels[draw(0, 3, thresholds, rois) == 0] = -1
    deltas = 2 * torch.randn(rois, 4, 4, generator=generator)
    targets = torch.randn(rois, 4, generator=generator)
    deltas.requires_grad_()
    loss = box_loss(deltas, targets, labels, count_samples(labels)[-1])
    assert math.isclose(
        loss.item(), slow_box_loss(deltas, targets, labels), rel_tol=1e-4, abs_tol=1e-6
    )
    loss.backward()
    taught = torch.zeros(rois, 4, dtype=torch.bool)  # the labeled class of foreground
    for r in range(rois):
        taught[r, labels[:, r].clamp(min=0)] = True
    taught[:, 0] = False
    assert torch.equal(deltas.grad.abs().sum(-1) > 0, taught)


@given(integral_labels(), st.integers(0, 1000), st.data())
@settings(max_examples=60, deadline=None)
def test_losses_of_parts_average_to_those_of_the_whole(labels, seed, data):
    """As processes average gradients: divided by the parts' mean counts, however unequal."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(labels.shape[1], labels.shape[0], 3, generator=generator)
    deltas, targets = (torch.randn(labels.shape[1], *shape, generator=generator)
                       for shape in ((3, 4), (4,)))  # fmt: skip

    def both(rows: slice, counts: torch.Tensor) -> torch.Tensor:
        part = labels[:, rows]
        integral = integral_loss(logits[rows], part, counts[:-1])
        return torch.stack([integral, box_loss(deltas[rows], targets[rows], part, counts[-1])])

    whole = both(slice(None), count_samples(labels))
    cut = data.draw(st.integers(0, labels.shape[1]))
    rows = (slice(0, cut), slice(cut, None))
    mean = sum(count_samples(labels[:, part]) for part in rows) / 2
    torch.testing.assert_close(sum(both(part, mean) for part in rows) / 2, whole)


@pytest.mark.parametrize("label", [0, -1])
def test_without_foreground_or_samples_the_losses_stay_finite(label):
    labels = torch.full((2, 3), label)
    deltas = torch.randn(3, 4, 4, requires_grad=True)
    loss = box_loss(deltas, torch.randn(3, 4), labels, count_samples(labels)[-1])
    loss.backward()
    assert loss.item() == 0 and not deltas.grad.any()
    logits = torch.randn(3, 2, 4, requires_grad=True)
    loss = integral_loss(logits, labels, count_samples(labels)[:-1])
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert (loss.item() == 0) == (label == -1)


def test_losses_of_logits_in_bfloat16_are_computed_in_float32():
    torch.manual_seed(0)
    masks, classes, deltas = torch.randn(4, 8, 8), torch.randn(4, 2, 3), torch.randn(4, 3, 4)
    signs, labels = torch.randn(4, 16, 16).sign(), torch.randint(0, 3, (2, 4))
    *samples, rois = count_samples(labels)
    samples = torch.stack(samples)
    losses = {
        masks: lambda logits: mask_loss(logits, signs),
        masks[:, 0, 0]: lambda logits: score_loss(logits, signs[:, 0, 0]),
        classes: lambda logits: integral_loss(logits, labels, samples),
        deltas: lambda logits: box_loss(logits, torch.ones(4, 4), labels, rois),
    }
    for logits, loss in losses.items():
        low = logits.bfloat16()
        assert loss(low).dtype == torch.float32 and loss(low) == loss(low.float())
