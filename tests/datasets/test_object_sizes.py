"""How large objects are, and the scales and the patch that reach them."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datasets.coco import CocoInstances
from datasets.object_sizes import (
    HIGHEST,
    PATCH_SIZES,
    PUBLISHED_LOG2_SCALES,
    ObjectSides,
    choose_log2_scales,
    choose_patch_size,
    compare_scales,
    explain_patch_size,
    explain_scales,
    reached_sides,
)
from datasets.patch_sampler import PatchSampler, PatchSamplingConfig, canonical_side
from tests.real_data import COCO_MINI

SIDES = st.lists(st.floats(1, 5000), min_size=1, max_size=200).map(np.array)
CANONICAL = st.sampled_from([canonical_side(size) for size in PATCH_SIZES])
C = canonical_side(160)


@settings(max_examples=300, deadline=None)
@given(SIDES, CANONICAL)
def test_chosen_scales_reach_the_objects_or_are_the_published_ones(sides, canonical):
    measured = ObjectSides.of(sides)
    low, high, step = scales = choose_log2_scales(measured, canonical)
    assert low <= high and step == 0.5 and low % 0.5 == high % 0.5 == 0
    smallest, largest = reached_sides(PUBLISHED_LOG2_SCALES, canonical)
    pixels = np.array(measured.pixels)
    reached = np.mean((pixels >= smallest) & (pixels <= largest))
    if canonical == C and reached >= 0.5:
        assert scales == PUBLISHED_LOG2_SCALES
        return
    grid = np.arange(low, high + step / 2, step)
    first, last = np.percentile(sides, [2, 98])
    if high == HIGHEST:  # smaller ones would take too long
        first = max(first, canonical / 2 ** (HIGHEST + step / 2))
    for side in sides[(sides >= first) & (sides <= last)]:
        # Percentiles are kept with two decimals.
        assert np.abs(grid - math.log2(canonical / side)).min() <= step / 2 + 0.01


@settings(max_examples=100, deadline=None)
@given(SIDES)
def test_twice_the_size_is_an_octave_less(sides):
    # Sides whose percentiles are whole pixels: none is rounded.
    sides = np.repeat(sides.round(), 101)
    once, twice = (choose_log2_scales(ObjectSides.of(s), 37) for s in (sides, 2 * sides))
    assume(once[1] < HIGHEST)
    assert twice == (once[0] - 1, once[1] - 1, 0.5)


@settings(max_examples=100, deadline=None)
@given(SIDES, st.sampled_from([16, 32]))
def test_the_chosen_patch_is_the_largest_that_needs_no_high_scale(sides, multiple):
    measured = ObjectSides.of(sides)
    chosen = choose_patch_size(measured, multiple=multiple)
    highest = {
        size: choose_log2_scales(measured, canonical_side(size))[1]
        for size in PATCH_SIZES
        if size % multiple == 0
    }
    assert chosen in highest
    assert all(high > 2 for size, high in highest.items() if size > chosen)
    assert highest[chosen] <= 2 or chosen == min(highest)
    assert f"up to {highest[chosen]:g}" in explain_patch_size(measured, chosen)


@given(SIDES)
def test_checkpoints_keep_the_distribution(sides):
    measured = ObjectSides.of(sides)
    assert ObjectSides.from_plain(measured.to_plain(), source="x.pt") == measured


@pytest.mark.parametrize(
    "values",
    [
        None, 7, {}, {"count": 3}, {"count": 3, "percentiles": [1.0]},
        {"count": 3, "percentiles": 5}, {"count": math.inf, "percentiles": []},
        {"count": 0, "percentiles": [1.0] * 101}, {"count": 3, "percentiles": [0.0] * 101},
        {"count": 3, "percentiles": [*[1.0] * 100, math.inf]}, {"count": "x", "percentiles": "y"},
        {"count": 3, "percentiles": [*[1.0] * 50, math.nan, *[1.0] * 50]},
        {"count": 3, "percentiles": list(range(101, 0, -1))},
    ],
)  # fmt: skip
def test_another_distribution_in_a_checkpoint_is_one_line(values):
    with pytest.raises(ValueError, match="x.pt: object_sides must be") as error:
        ObjectSides.from_plain(values, source="x.pt")
    assert "\n" not in str(error.value)


def test_a_line_says_what_scales_do_not_reach():
    sides = ObjectSides.of(np.repeat([10.0, 30.0, 100.0], [600, 300, 100]))
    line = compare_scales(sides, PUBLISHED_LOG2_SCALES, C)
    assert (
        "90% of the objects are smaller than the smallest size proposed (55 px), 0% larger" in line
    )
    assert "scales -2.5 to 0.5" in line and "--scales auto takes scales -0.5 to 3.5" in line
    assert compare_scales(sides, choose_log2_scales(sides, C), C) == ""
    assert sides.summary() == (
        "longest sides of 1,000 objects: 2% 10 px, 25% 10 px, median 10 px, 75% 30 px, 98% 100 px"
    )
    assert "96% of 1,000 training objects are 10 to 100 px" in explain_scales(sides, C)


def test_objects_are_those_that_mask_patches_are_drawn_from():
    coco = CocoInstances()
    coco.path, coco.without_mask, coco.left_out = "x.json", {}, {}
    sides = np.array([[20, 40], [4, 300], [30, 30], [50, 10], [60, 60]], np.float32)
    coco.boxes = np.concatenate([np.zeros_like(sides), sides], axis=1)
    coco.areas = sides.prod(axis=1)
    coco.is_crowd = np.array([0, 0, 1, 0, 0], bool)
    coco.has_mask = np.array([1, 1, 1, 1, 0], bool)
    coco.image_index = coco.category_index = np.zeros(5, np.int32)
    coco.image_starts, coco.has_left_out = np.array([0, 5]), np.zeros(1, bool)
    sampler = PatchSampler(coco, config=PatchSamplingConfig())
    measured = ObjectSides.measure(sampler)
    assert measured.count == 2 and (measured.pixels[0], measured.pixels[100]) == (40, 50)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason="data/coco-mini is not there")
def test_coco_gets_the_published_scales_and_patch():
    coco = CocoInstances.load(COCO_MINI / "annotations" / "instances_train.json")
    sides = ObjectSides.measure(PatchSampler(coco))
    assert choose_log2_scales(sides, C) == PUBLISHED_LOG2_SCALES
    assert choose_patch_size(sides) == 160
    assert explain_scales(sides, C).startswith("published: they reach 6")
    assert "3" in compare_scales(sides, PUBLISHED_LOG2_SCALES, C)
