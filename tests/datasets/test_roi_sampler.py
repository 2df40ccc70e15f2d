"""Drawn RoIs against the rules spelled out pair by pair, and how often what is drawn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.proposal_boxes import ProposalBoxes
from datasets.roi_sampler import IOU_THRESHOLDS, RoiSampler, RoiSamplingConfig, mirror
from tests.coco_json import assert_frequency, rectangle, write_coco

WIDTH, HEIGHT = 640, 480
CATEGORIES = (3, 7, 20)
OBJECT = (100.0, 100.0, 200.0, 200.0)


def load(path, annotations, images=4, flag="iscrowd"):
    """Images 1 ... `images`; annotations are (image, category, xyxy box, whether `flag` is set)."""
    rectangles = [
        rectangle(i, image, category, x1, y1, x2 - x1, y2 - y1, **{flag: int(flagged)})
        for i, (image, category, (x1, y1, x2, y2), flagged) in enumerate(annotations, 1)
    ]
    sizes = dict.fromkeys(range(1, images + 1), (HEIGHT, WIDTH))
    return write_coco(path, sizes, rectangles, CATEGORIES)


def proposals_of(boxes_by_image):
    """{image id: boxes, best first}."""
    ids = [i for i, boxes in boxes_by_image.items() for _ in boxes]
    boxes = np.array([b for boxes in boxes_by_image.values() for b in boxes], np.float32)
    scores = -np.arange(len(ids), dtype=np.float32)
    return ProposalBoxes.from_rows((np.array(ids, np.int64), boxes.reshape(-1, 4), scores))


def make_sampler(coco, proposals, *, seed=0, iou_thresholds=IOU_THRESHOLDS, **config):
    config = RoiSamplingConfig(**config)
    return RoiSampler(coco, proposals, config=config, iou_thresholds=iou_thresholds, seed=seed)


def random_boxes(rng, count):
    corner = rng.uniform(0, (WIDTH - 130, HEIGHT - 130), (count, 2))
    return np.concatenate([corner, corner + rng.uniform(8, 120, (count, 2))], axis=1).round(2)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Images with none to six objects, with and without crowds, and proposals around them.

    Proposals are far, near and in crowds; every fifth image has none.
    """
    rng, annotations, proposals = np.random.default_rng(0), [], {}
    for image in range(1, 31):
        objects, crowds = random_boxes(rng, image % 7), random_boxes(rng, image % 3)
        annotations += [(image, 3, b, True) for b in crowds.tolist()]
        annotations += [(image, rng.choice(CATEGORIES).item(), b, False) for b in objects.tolist()]
        around = np.concatenate([objects, crowds]).repeat(12, axis=0)
        around += rng.normal(0, 12, around.shape) * rng.random((len(around), 1))
        around = around[((around[:, 2:] - around[:, :2]) > 4).all(axis=1)]
        boxes = rng.permutation(np.concatenate([around, random_boxes(rng, 20)]))
        proposals[image] = boxes if image % 5 else []
    path = tmp_path_factory.mktemp("scene") / "instances.json"
    return load(path, annotations, images=30), proposals_of(proposals)


# The rules, box by box and pair by pair ----------------------------------------------------------


def area(box):
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def intersection(a, b):
    return area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])


def iou(a, b):
    return intersection(a, b) / (area(a) + area(b) - intersection(a, b))


def slow_candidates(coco, proposals, image, options):
    """{box: (highest IoU, its annotation)} of what may be drawn."""
    rows = range(*coco.image_starts[image : image + 2])
    objects = {a: coco.boxes[a].tolist() for a in rows if not coco.is_crowd[a]}
    crowds = [coco.boxes[a].tolist() for a in rows if coco.is_crowd[a]]
    boxes = list(objects.values())
    for box in proposals.of(coco.image_ids[image])[: options["max_proposals"]].tolist():
        in_crowd = max((intersection(box, crowd) / area(box) for crowd in crowds), default=0)
        if in_crowd <= options["crowd_overlap"]:
            boxes.append(box)
    return {
        tuple(box): max(((iou(box, other), -a) for a, other in objects.items()), default=(0.0, 0))
        for box in boxes
    }


@given(
    image=st.integers(0, 29),
    twentieths=st.lists(st.integers(10, 19), min_size=1, max_size=6, unique=True).map(sorted),
    options=st.builds(
        dict,
        crowd_overlap=st.sampled_from([0.3, 0.7]),
        max_proposals=st.sampled_from([5, 30, 1000]),
        bg_iou_low=st.sampled_from([0.0, 0.1, 0.3]),
        rois_per_image=st.sampled_from([1, 8, 40, 200]),
        fg_fraction=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    ),
    one=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=150, deadline=None)
def test_samples_follow_the_rules_pair_by_pair(scene, image, twentieths, options, one, seed):
    coco, proposals = scene
    thresholds = tuple(t / 20 for t in twentieths)
    low, count = options["bg_iou_low"], options["rois_per_image"]
    sampler = make_sampler(coco, proposals, iou_thresholds=thresholds, flip=False, **options)
    candidates = slow_candidates(coco, proposals, image, options)
    assert (image in sampler.drawable) == bool(candidates)
    if not candidates:
        return
    threshold = seed % len(thresholds) if one else -1
    sample = sampler.sample(image, np.random.default_rng(seed), threshold)
    used = [threshold] if one else range(len(thresholds))
    lowest = min(thresholds[k] for k in used)
    real = sample.labels.max(axis=0) >= 0
    drawn = [tuple(box) for box in sample.rois[real].tolist()]
    assert len(set(drawn)) == len(drawn) and set(map(tuple, sample.rois.tolist())) == set(drawn)
    for row in np.flatnonzero(real):
        overlap, minus_annotation = candidates[tuple(sample.rois[row].tolist())]
        for k, limit in enumerate(thresholds):
            foreground = coco.category_index[-minus_annotation] + 1 if overlap >= limit else 0
            assert sample.labels[k, row] == (foreground if k in used else -1)
        box = coco.boxes[-minus_annotation] if overlap >= lowest else sample.rois[row]
        assert np.array_equal(sample.boxes[row], box)
    assert np.array_equal(sample.boxes[~real], sample.rois[~real])

    def count_kinds(overlaps):
        """Foreground, background that touches an object, and other background."""
        return np.bincount(np.digitize(overlaps, [low, lowest]), minlength=3)[::-1].tolist()

    foreground, near, far = count_kinds([overlap for overlap, _ in candidates.values()])
    foreground = min(foreground, max(1, round(options["fg_fraction"] * count)))
    near = min(near, count - foreground)
    far = min(far, count - foreground - near)
    assert count_kinds([candidates[box][0] for box in drawn]) == [foreground, near, far]


# What is drawn ------------------------------------------------------------------------------------


def test_an_overlap_of_just_the_threshold_is_foreground_and_just_the_low_one_background(tmp_path):
    coco = load(tmp_path / "a.json", [(1, 7, OBJECT, False)], images=1)
    half, tenth, less = (100, 100, 150, 200), (100, 100, 110, 200), (100, 100, 109, 200)
    proposals = proposals_of({1: [half, tenth, less]})
    sample = make_sampler(coco, proposals, rois_per_image=4, fg_fraction=0.5).draw(0, 0)
    widths = (sample.rois[:, 2] - sample.rois[:, 0]).tolist()
    labels = dict(zip(widths, sample.labels.T.tolist(), strict=True))
    assert labels == {100: [2] * 6, 50: [2, 0, 0, 0, 0, 0], 10: [0] * 6, 9: [0] * 6}


@pytest.mark.parametrize("flag", ["iscrowd", "ignore"])
def test_in_a_crowd_a_proposal_is_ignored_and_an_annotated_object_is_not(tmp_path, flag):
    """And in one of VOC's difficult objects, which is no foreground itself."""
    annotations = [(1, 7, OBJECT, False), (1, 7, (90, 90, 400, 400), True)]
    coco = load(tmp_path / "a.json", annotations, images=1, flag=flag)
    inside, on_the_object = (250, 250, 300, 300), (100, 100, 200, 190)
    at_the_border, deeper = (362, 100, 462, 200), (329, 100, 429, 200)  # 38 % and 71 %
    proposals = proposals_of({1: [inside, on_the_object, at_the_border, deeper]})
    sample = make_sampler(coco, proposals, flip=False).draw(0, 0)
    assert {tuple(box) for box in sample.rois.tolist()} == {OBJECT, at_the_border}
    assert (sample.labels.max(axis=0) >= 0).sum() == 2


def test_images_without_an_object_give_background_and_those_without_a_proposal_foreground(tmp_path):
    """Image 1 has both, 2 only objects, 3 only proposals, 4 neither."""
    annotations = [(1, 7, OBJECT, False), (2, 7, OBJECT, False), (2, 20, (5, 5, 40, 50), False)]
    boxes = random_boxes(np.random.default_rng(1), 100)
    coco = load(tmp_path / "a.json", annotations)
    sampler = RoiSampler(coco, proposals_of({1: boxes, 3: boxes}))
    assert sampler.drawable.tolist() == [0, 1, 2] and sampler.object_images.tolist() == [0, 1]
    objects, background = (sampler.sample(i, np.random.default_rng(0)) for i in (1, 2))
    assert sorted(objects.labels[0].tolist()) == [-1] * 62 + [2, 3]
    assert np.array_equal(objects.boxes, objects.rois)  # the ground-truth boxes themselves
    assert (background.labels == 0).all() and len(np.unique(background.rois, axis=0)) == 64


def test_images_that_were_not_searched_for_proposals_are_not_drawn(tmp_path):
    """A store that is not complete: an image without proposals would have foreground alone."""
    coco = load(tmp_path / "a.json", [(image, 7, OBJECT, False) for image in (1, 2, 3)])
    proposals = proposals_of({1: [OBJECT], 3: [OBJECT], 4: [OBJECT]})
    sampler = RoiSampler(coco, proposals, image_ids={1, 2, 4})  # none was found in image 2
    assert sampler.drawable.tolist() == [0, 1, 3] and sampler.object_images.tolist() == [0, 1]
    assert sampler.num_not_searched == 1
    assert RoiSampler(coco, proposals).num_not_searched == 0


def test_images_without_an_object_are_half_of_the_samples_at_most(tmp_path):
    coco = load(tmp_path / "a.json", [(1, 7, OBJECT, False)], images=9)
    sampler = RoiSampler(coco, proposals_of({image: [OBJECT] for image in range(1, 10)}))
    images = np.array([sampler.draw_image(0, index)[0] for index in range(2000)])
    assert_frequency(np.mean(images == 0), 1 / 2, len(images))
    assert_frequency(np.mean(images == 8), 1 / 16, len(images))


def test_a_dataset_without_any_annotation_still_gives_background(tmp_path):
    sampler = RoiSampler(load(tmp_path / "a.json", []), proposals_of({2: [OBJECT]}))
    sample = sampler.draw(0, 0)
    assert sample.image == 1 and sorted(sample.labels[5].tolist()) == [-1] * 63 + [0]


@pytest.mark.parametrize("annotations", [[], [(1, 7, (90, 90, 400, 400), True)]])
def test_a_dataset_with_nothing_to_draw_is_an_error_not_a_hang(tmp_path, annotations):
    coco = load(tmp_path / "a.json", annotations)
    in_the_crowd, of_another_dataset = {1: [OBJECT]}, {99: [OBJECT]}
    with pytest.raises(ValueError, match="a.json: no image to train on.*proposal"):
        RoiSampler(coco, proposals_of(in_the_crowd if annotations else of_another_dataset))


def test_where_annotations_were_left_out_only_what_touches_an_object_is_background(tmp_path):
    too_thin = (50, 50, 50, 90)
    annotations = [(1, 7, OBJECT, False), (1, 7, too_thin, False), (2, 7, too_thin, False)]
    coco = load(tmp_path / "a.json", annotations, images=3)
    assert coco.has_left_out.tolist() == [True, True, False]
    touching, clear = (150, 100, 250, 200), (400, 300, 500, 400)
    proposals = proposals_of({1: [touching, clear], 2: [clear], 3: [clear]})
    sampler = make_sampler(coco, proposals, flip=False)
    assert sampler.drawable.tolist() == [0, 2]
    boxes = sampler.sample(0, np.random.default_rng(0)).rois
    assert {tuple(box) for box in boxes.tolist()} == {OBJECT, touching}


def test_images_flips_and_candidates_are_drawn_evenly(tmp_path):
    """Of twelve foreground boxes four are drawn, of 24 background boxes twelve."""
    near = [(100 - n, 100, 200, 200) for n in range(1, 12)]
    far = [(150 - n, 100, 250 - n, 200) for n in range(12)]
    far += [(150, 100 + n, 250, 200 + n) for n in range(1, 13)]
    annotations = [(image, 7, OBJECT, False) for image in (1, 2, 3)]
    coco = load(tmp_path / "a.json", annotations)
    proposals = proposals_of({image: near + far for image in (1, 2)})
    sampler = make_sampler(coco, proposals, rois_per_image=16)
    draws = 3000
    samples = [sampler.draw(0, index) for index in range(draws)]
    for image in range(3):
        assert_frequency(np.mean([s.image == image for s in samples]), 1 / 3, draws)
    assert_frequency(np.mean([s.flip for s in samples]), 1 / 2, draws)
    rois = [mirror(s.rois, WIDTH) if s.flip else s.rois for s in samples if s.image != 2]
    boxes, counts = np.unique(np.concatenate(rois), axis=0, return_counts=True)
    assert len(boxes) == 36
    for box, count in zip(boxes.tolist(), counts.tolist(), strict=True):
        expected = 4 / 12 if iou(box, OBJECT) >= 0.5 else 12 / 24
        assert_frequency(count / len(rois), expected, len(rois))


@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 99), st.integers(-1, 5))
@settings(max_examples=40, deadline=None)
def test_a_sample_depends_on_seed_epoch_and_index_alone(scene, seed, epoch, index, threshold):
    sampler = RoiSampler(*scene, seed=seed)
    first = sampler.draw(epoch, index, threshold)
    sampler.draw(epoch + 1, index, threshold)  # what was drawn before does not matter
    np.testing.assert_equal(vars(sampler.draw(epoch, index, threshold)), vars(first))

    def images(sampler=sampler, epoch=epoch, start=index, attempt=0):
        return [sampler.draw(epoch, i, attempt=attempt).image for i in range(start, start + 9)]

    other_seed = dict(sampler=RoiSampler(*scene, seed=seed + 1))
    for change in (other_seed, dict(epoch=epoch + 1), dict(start=index + 1), dict(attempt=1)):
        assert images(**change) != images()


def test_flipping_mirrors_the_boxes_and_changes_nothing_else(scene):
    flipping, plain = (make_sampler(*scene, flip=flip) for flip in (True, False))
    samples = [(flipping.draw(0, index), plain.draw(0, index)) for index in range(40)]
    for one, other in samples:
        mirrored = {"flip": one.flip}
        if one.flip:
            for name in ("rois", "boxes"):
                x1, y1, x2, y2 = getattr(other, name).T
                mirrored[name] = np.stack([WIDTH - x2, y1, WIDTH - x1, y2], axis=1)
        np.testing.assert_equal(vars(one), vars(other) | mirrored)
        assert not other.flip
    assert 8 < sum(one.flip for one, _ in samples) < 32
