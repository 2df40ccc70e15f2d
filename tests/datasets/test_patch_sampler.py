"""The draws of the patch sampler against the published procedure, 20,000 draws each."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.coco import CocoInstances
from datasets.patch_sampler import (
    MASK,
    NO_SCALE,
    SCORE,
    PatchSampler,
    PatchSamplingConfig,
    canonical_quarter,
)
from tests.coco_json import assert_frequency, rectangle, write_coco
from tests.real_data import COCO_MINI, needs

DRAWS = 20_000
CANONICAL = 92
WIDTH, HEIGHT = 640, 480


def load(path, annotations, images=(1, 2, 3, 4), size=(HEIGHT, WIDTH)):
    return write_coco(path, dict.fromkeys(images, size), annotations, (3, 7, 20, 80, 90))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Image 1 has three objects, 2 has two and a crowd, 3 has three, 4 is empty.

    Category 80 has no object that is large enough for a mask patch, 90 no annotation.
    """
    annotations = [
        rectangle(1, 1, 3, 30, 40, 100, 50),
        rectangle(2, 1, 7, 300, 200, 40, 160),
        rectangle(3, 1, 7, 500, 20, 60, 60),
        rectangle(4, 2, 7, 100, 100, 300, 200),
        rectangle(5, 2, 20, 10, 10, 6, 90),
        rectangle(6, 2, 20, 420, 330, 200, 140, iscrowd=1),
        rectangle(7, 3, 3, 200, 150, 21, 33),
        rectangle(8, 3, 20, 400, 300, 9, 9),  # area below 100
        rectangle(9, 3, 80, 300, 300, 4, 60),  # a side below 5
    ]
    return load(tmp_path_factory.mktemp("coco") / "instances.json", annotations)


def make_sampler(coco, per_group=1, seed=0, **options):
    config = PatchSamplingConfig(patches_per_image=per_group, **options)
    return PatchSampler(coco, config=config, seed=seed)


@cache
def draw_many(coco, head, per_group=1):
    sampler = make_sampler(coco, per_group)
    return [p for group in range(DRAWS // per_group) for p in sampler.draw(head, 0, group)]


def assert_frequencies(values, expected, draws):
    """Of values by name: no other occurs. Patches of a group count as one draw."""
    names, counts = np.unique(np.asarray(values), return_counts=True)
    assert set(names.tolist()) == set(expected)
    for name, count in zip(names.tolist(), counts.tolist(), strict=True):
        assert_frequency(count / len(values), expected[name], draws)


def assert_even(values):
    """Uniform on [-1, 1], by Kolmogorov and Smirnov's distance (p < 1e-5 beyond)."""
    ordered = np.sort((np.asarray(values) + 1) / 2)
    distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert distance < 2.5 / math.sqrt(len(ordered)), distance


@pytest.mark.parametrize("per_group", [1, 4])
def test_mask_patches_draw_a_category_then_one_of_its_annotations(coco, per_group):
    """Sharing a decoded image must not change how often an annotation is drawn."""
    patches = draw_many(coco, MASK, per_group)
    # Categories 3, 7 and 20 have 2, 3 and 1 annotations that are large enough and no crowd.
    expected = {1: 1 / 6, 7: 1 / 6, 2: 1 / 9, 3: 1 / 9, 4: 1 / 9, 5: 1 / 3}
    annotations = coco.annotation_ids[[p.annotation for p in patches]]
    assert_frequencies(annotations, expected, DRAWS / per_group)


def test_mask_patches_jitter_scale_and_center_evenly(coco):
    patches = draw_many(coco, MASK)
    boxes = coco.boxes[[p.annotation for p in patches]]
    longest = (boxes[:, 2:] - boxes[:, :2]).max(1)
    scale = np.array([p.scale for p in patches])
    scale_jitter = -np.log2(scale) - np.log2(longest / CANONICAL)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    # Shifts are in pixels of the patch.
    shift = (np.array([(p.x, p.y) for p in patches]) - centers) * scale[:, None]
    for values, bound in ((scale_jitter, 0.25), (shift[:, 0], 16), (shift[:, 1], 16)):
        assert np.abs(values).max() <= bound * (1 + 1e-5)
        assert_even(values / bound)
    correlations = np.corrcoef([scale_jitter, *shift.T])
    assert np.abs(correlations - np.eye(3)).max() < 0.03
    assert_frequency(np.mean([p.flip for p in patches]), 0.5, DRAWS)
    assert all(p.label == 1 for p in patches)


@pytest.mark.parametrize("per_group", [1, 4])
def test_score_patches_are_balanced_and_empty_images_give_negatives(coco, per_group):
    patches = draw_many(coco, SCORE, per_group)
    draws = DRAWS / per_group
    assert_frequencies([p.label for p in patches], {-1: 0.5, 1: 0.5}, draws)
    assert_frequency(np.mean([p.flip for p in patches]), 0.5, DRAWS)
    for label, images in ((-1, (1, 2, 3, 4)), (1, (1, 2, 3))):
        drawn = coco.image_ids[[p.image for p in patches if p.label == label]]
        assert_frequencies(drawn, dict.fromkeys(images, 1 / len(images)), draws / 2)


def test_positives_are_centered_and_of_canonical_size_up_to_a_quarter_octave(coco):
    positives = [p for p in draw_many(coco, SCORE) if p.label > 0]
    boxes = coco.boxes[[p.annotation for p in positives]]
    assert np.allclose((boxes[:, :2] + boxes[:, 2:]) / 2, [(p.x, p.y) for p in positives])
    longest = (boxes[:, 2:] - boxes[:, :2]).max(1) * [p.scale for p in positives]
    quarters = 4 * np.log2([p.scale for p in positives])
    assert np.allclose(quarters, quarters.round()) and quarters.max() > 8
    assert (longest > CANONICAL * (1 - 1e-6)).all()
    assert (longest <= CANONICAL * 2**0.25 * (1 + 1e-6)).all()
    assert not coco.is_crowd[[p.annotation for p in positives]].any()


def test_positives_draw_an_image_a_scale_in_it_then_an_object_at_it(tmp_path):
    """Two objects of one scale share its probability with the single object of another."""
    annotations = [
        rectangle(1, 1, 3, 0, 0, 100, 50),
        rectangle(2, 1, 3, 200, 0, 50, 100),
        rectangle(3, 1, 3, 0, 200, 400, 200),
        rectangle(4, 2, 3, 9, 9, 50, 50),
    ]
    patches = draw_many(load(tmp_path / "a.json", annotations, images=(1, 2)), SCORE)
    drawn = [p.annotation + 1 for p in patches if p.label > 0]
    assert_frequencies(drawn, {1: 1 / 8, 2: 1 / 8, 3: 1 / 4, 4: 1 / 2}, DRAWS / 2)
    assert_frequencies([p.label for p in patches], {-1: 0.5, 1: 0.5}, DRAWS)  # none is empty


@needs(COCO_MINI)
def test_positives_of_photographs_have_the_scales_of_the_released_procedure():
    """Its steps, one by one: an image, a scale of those that its objects have, an object."""
    coco = CocoInstances.load(COCO_MINI / "annotations" / "instances_train.json")
    by_image = {}
    for image, box in zip(
        coco.image_index[~coco.is_crowd], coco.boxes[~coco.is_crowd], strict=True
    ):
        longest = max(box[2] - box[0], box[3] - box[1])
        for s in range(-32, 33):  # quarter octaves, from small objects to large ones
            if CANONICAL * 2 ** ((s - 1) / 4) < longest <= CANONICAL * 2 ** ((s + 1) / 4):
                by_image.setdefault(int(image), set()).add(-s)
                break
    expected = dict.fromkeys(sorted(set().union(*by_image.values())), 0.0)
    for scales in by_image.values():
        for quarter in scales:
            expected[quarter] += 1 / len(by_image) / len(scales)
    positives = [p for p in draw_many(coco, SCORE) if p.label > 0]
    drawn = np.rint(4 * np.log2([p.scale for p in positives])).astype(int)
    # Scales that are hardly ever drawn count as one.
    rare = {quarter for quarter, p in expected.items() if p < 20 / len(drawn)}
    pooled = {q: p for q, p in expected.items() if q not in rare}
    if rare:
        pooled[999] = sum(expected[q] for q in rare)
    assert_frequencies([999 if q in rare else q for q in drawn.tolist()], pooled, len(drawn))
    beyond = sum(p for q, p in expected.items() if q > 8)
    assert_frequency(np.mean(drawn > 8), beyond, len(drawn))
    assert 0.08 < beyond < 0.11  # of objects smaller than a negative's largest scale reaches


def test_jittered_positives_are_spread_as_mask_patches_are(coco):
    """NIPS 2015, section 3.2: within 16 pixels and a quarter octave of canonical."""
    sampler = PatchSampler(coco, config=PatchSamplingConfig(jitter_positives=True))
    positives = [p for group in range(4000) for p in sampler.draw(SCORE, 0, group) if p.label > 0]
    rows = [p.annotation for p in positives]
    scale = np.array([p.scale for p in positives])
    shift = (np.array([(p.x, p.y) for p in positives]) - sampler.centers[rows]) * scale[:, None]
    sides = coco.boxes[rows][:, 2:] - coco.boxes[rows][:, :2]
    off = np.log2(scale * sides.max(axis=1) / CANONICAL)
    for values, bound in ((off, 0.25), (shift[:, 0], 16), (shift[:, 1], 16)):
        assert np.abs(values).max() <= bound * (1 + 1e-5)
        assert_even(values / bound)


def test_negatives_keep_their_distance_from_objects_of_similar_scale(coco):
    sampler = PatchSampler(coco)
    negatives = [p for p in draw_many(coco, SCORE) if p.label < 0]
    for p in negatives:
        assert 0 <= p.x <= WIDTH and 0 <= p.y <= HEIGHT and p.annotation == -1
        start, stop = coco.image_starts[p.image : p.image + 2]
        for a in range(start, stop):
            x1, y1, x2, y2 = coco.boxes[a]
            if coco.is_crowd[a]:
                assert not (x1 <= p.x < x2 and y1 <= p.y < y2)
                continue
            difference = abs(math.log2(p.scale) - sampler.object_quarter[a] / 4)
            distance = math.hypot(p.x - (x1 + x2) / 2, p.y - (y1 + y2) / 2) * p.scale
            assert difference > 2.5 or distance >= 48 * (1 - 1e-5)
    empty = [p for p in negatives if coco.image_ids[p.image] == 4]
    quarters = np.rint(4 * np.log2([p.scale for p in empty])).astype(int)
    assert_frequencies(quarters, dict.fromkeys(range(-12, 9), 1 / 21), len(empty))
    assert_even(np.array([p.x for p in empty]) / WIDTH * 2 - 1)
    assert_even(np.array([p.y for p in empty]) / HEIGHT * 2 - 1)


def test_negatives_come_at_all_scales_of_proposals(coco):
    for options, highest in (({}, 3.5), ({"negative_log2_scales": (-1.0, 1.0)}, 1.0)):
        sampler = make_sampler(coco, **options)
        sampler.draw_negatives_at(-2.5, 3.5)
        patches = [p for group in range(2000) for p in sampler.draw(SCORE, 0, group)]
        assert max(math.log2(p.scale) for p in patches if p.label < 0) == highest


def test_an_image_with_no_room_for_a_negative_gives_the_farthest_draw(tmp_path):
    only = rectangle(1, 1, 3, 2, 2, 16, 16)
    coco = load(tmp_path / "small.json", [only], images=(1,), size=(20, 20))
    config = PatchSamplingConfig(negative_distance=1000, negative_scale_distance=6)
    sampler = PatchSampler(coco, config=config)
    patches = [p for group in range(50) for p in sampler.draw(SCORE, 0, group)]
    distances = [math.hypot(p.x - 10, p.y - 10) * p.scale for p in patches if p.label < 0]
    # A corner at the largest scale, 4, is the farthest from the object in the middle.
    farthest = math.hypot(10, 10) * 4
    assert 0.4 * farthest < min(distances) <= max(distances) <= farthest


def test_an_image_whose_annotations_were_left_out_is_not_taken_for_empty(tmp_path):
    broken = rectangle(9, 4, 3, 10, 10, 50, 50, segmentation=[[1, 2, 3]])
    coco = load(tmp_path / "a.json", [rectangle(1, 1, 3, 30, 40, 100, 50), broken])
    assert coco.image_ids[PatchSampler(coco).empty_images].tolist() == [2, 3]


def test_a_dataset_without_usable_objects_is_an_error_not_a_hang(tmp_path):
    coco = load(tmp_path / "a.json", [rectangle(1, 1, 3, 0, 0, 4, 4)], images=(1,))
    with pytest.raises(
        ValueError, match="a.json: no annotation to train masks on: area below 100 px 1$"
    ):
        PatchSampler(coco)


@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 99), st.sampled_from([MASK, SCORE]))
@settings(max_examples=60, deadline=None)
def test_a_sample_depends_on_seed_epoch_and_index_alone(coco, seed, epoch, group, head):
    sampler = make_sampler(coco, 3, seed=seed)
    first = sampler.draw(head, epoch, group)
    others = [
        sampler.draw(head, epoch + 1, group),
        sampler.draw(head, epoch, group + 1),
        sampler.draw(head, epoch, group, attempt=1),
        make_sampler(coco, 3, seed=seed + 1).draw(head, epoch, group),
    ]
    assert sampler.draw(head, epoch, group) == first  # whatever was drawn before
    assert first not in others
    assert len({p.image for p in first}) == 1


@given(st.lists(st.floats(1, 3000), min_size=1, max_size=20))
def test_the_canonical_scale_is_the_first_at_which_the_object_is_small_enough(longest):
    quarters = canonical_quarter(np.array(longest), CANONICAL)
    limit = CANONICAL * 2**0.25 * (1 + 1e-9)
    for side, quarter in zip(longest, quarters.tolist(), strict=True):
        small_enough = (q for q in range(32, -33, -1) if side * 2 ** (q / 4) <= limit)
        assert quarter == next(small_enough, NO_SCALE)


@pytest.mark.parametrize(("patch", "canonical"), [(160, 92), (224, 128), (112, 64)])
def test_canonical_size(coco, patch, canonical):
    assert PatchSampler(coco, patch_size=patch).canonical == canonical


@pytest.mark.parametrize("targets", ["iou", "label"])
def test_cells_know_what_they_are_near(coco, targets):
    """By the definition, cell by cell: in shift and scale, outside the image, in a crowd."""
    sampler = make_sampler(coco, score_targets=targets, score_cells=4)
    counts = {-1: 0, 0: 0, 1: 0}
    for patch in (p for group in range(300) for p in sampler.draw(SCORE, 0, group)):
        cells = sampler.score_cells(patch)
        rows = range(*coco.image_starts[patch.image : patch.image + 2])
        on = dict(cells.on.tolist())
        for i, j in np.ndindex(4, 4):
            x = patch.x + (j - 1.5) * 16 / patch.scale * (-1 if patch.flip else 1)
            y = patch.y + (i - 1.5) * 16 / patch.scale
            expected, near, nearest = -1, False, {}
            for row in rows:
                x1, y1, x2, y2 = coco.boxes[row]
                if coco.is_crowd[row]:
                    if x1 <= x < x2 and y1 <= y < y2:
                        expected = 0
                    continue
                shift = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) * patch.scale
                octaves = abs(math.log2(patch.scale * max(x2 - x1, y2 - y1) / CANONICAL))
                if shift <= 32 and octaves <= 0.75 and expected != 0:
                    near = True
                    if shift <= 8 and octaves <= 0.25:
                        nearest[row] = shift
            if expected != 0 and near:
                expected = 1 if nearest else 0
            if not (0 <= x <= WIDTH and 0 <= y <= HEIGHT):
                expected = 0
            assert cells.labels[i, j] == expected
            counts[expected] += 1
            assert (4 * i + j in on) == (expected == 1)
            if expected == 1:
                assert on[4 * i + j] == min(nearest, key=nearest.get)
    assert min(counts.values()) > 20


def test_all_objects_are_drawn_alike_without_balance(coco):
    sampler = make_sampler(coco, balance_categories=False)
    drawn = [p.annotation for group in range(6000) for p in sampler.draw(MASK, 0, group)]
    counts = np.bincount(drawn, minlength=len(coco.image_index))[np.sort(sampler.mask_rows)]
    assert counts.sum() == len(drawn) and len(counts) == 6
    assert np.abs(counts - 1000).max() < 5 * math.sqrt(1000)
