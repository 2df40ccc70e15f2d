"""Losses against their formula, and dropout that belongs to the sample."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.dropout import KeyedDropout, keyed_uniform
from models.losses import mask_loss, score_loss, soft_margin


def test_soft_margin_is_its_formula_and_survives_large_logits():
    for f in (-3.0, 0.0, 2.5):
        for y in (-1.0, 1.0):
            value = soft_margin(torch.tensor(f), torch.tensor(y)).item()
            assert math.isclose(value, math.log(1 + math.exp(-y * f)), rel_tol=1e-6)
    assert soft_margin(torch.tensor(1e4), torch.tensor(-1.0)).item() == 1e4
    assert soft_margin(torch.tensor(1e4), torch.tensor(1.0)).item() == 0


def test_mask_loss_is_the_mean_over_patches_and_pixels():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 4, 4), torch.randn(3, 4, 4).sign()
    slow = (
        sum(
            math.log(1 + math.exp(-targets[b, i, j].item() * logits[b, i, j].item()))
            for b in range(3)
            for i in range(4)
            for j in range(4)
        )
        / 48
    )
    assert math.isclose(mask_loss(logits, targets).item(), slow, rel_tol=1e-5)
    assert mask_loss(logits, torch.ones(3, 9, 9)).isfinite()  # resized to the targets


def test_losses_of_halves_average_to_the_loss_of_the_whole():
    torch.manual_seed(0)
    logits, targets = torch.randn(8, 4, 4), torch.randn(8, 4, 4).sign()
    halves = (mask_loss(logits[:4], targets[:4]) + mask_loss(logits[4:], targets[4:])) / 2
    torch.testing.assert_close(mask_loss(logits, targets), halves)
    scores, labels = torch.randn(8), torch.randn(8).sign()
    torch.testing.assert_close(
        score_loss(scores, labels),
        (score_loss(scores[:4], labels[:4]) + score_loss(scores[4:], labels[4:])) / 2,
    )


def test_dropout_belongs_to_the_sample():
    drop = KeyedDropout(0.5, stream=0)
    x = torch.ones(6, 400, 1, 1)
    keys = torch.tensor([5, 9, 1 << 40, 3, 77, 12345678901])
    whole = drop(x, keys=keys)
    parts = torch.cat([drop(x[:2], keys=keys[:2]), drop(x[2:], keys=keys[2:])])
    assert torch.equal(whole, parts)
    assert set(whole.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(whole, KeyedDropout(0.5, stream=1)(x, keys=keys))
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(drop.eval()(x, keys=None), x)


@given(st.integers(0, 2**62), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_keyed_uniform_is_uniform(first, stream):
    values = keyed_uniform(torch.arange(first, first + 50), 400, stream=stream)
    assert 0 <= values.min() and values.max() < 1
    # 20,000 draws: the mean's deviation is .002, a decile's share has .0021.
    assert abs(values.mean().item() - 0.5) < 0.012
    shares = torch.histc(values, bins=10, min=0, max=1) / values.numel()
    assert (shares - 0.1).abs().max() < 0.013
    neighbours = (values[:, 1:] - 0.5) * (values[:, :-1] - 0.5)
    assert abs(neighbours.mean().item()) < 0.005
