"""The best and the worst images: which they are, and how they are drawn."""

import base64

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.coco import CocoInstances
from pipeline.report.pictures import (
    FAINT,
    FULL,
    NUM_EXAMPLES,
    Mark,
    choose_examples,
    draw_marks,
    read_examples,
)
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    EVERYTHING,
    NUM_WITH_OBJECTS,
    SQUARE,
    STORE,
    make_dataset,
    object_of,
    proposals_of,
    rle_of,
    write_dataset,
    write_store,
)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


def examples_of(tmp_path, dataset, proposals):
    write_store(tmp_path / "store", proposals)
    annotations, images = dataset
    return read_examples(tmp_path / "store", coco=CocoInstances.load(annotations), images=images)


def test_found_is_best_and_missed_is_worst(tmp_path, dataset):
    examples = examples_of(tmp_path, dataset, STORE)
    assert [e.file_name for e in examples.best] == ["found.png", "half.png"]
    assert [e.file_name for e in examples.worst] == ["missed.png"]
    assert [e.quality for e in examples.best + examples.worst] == [1, 0.5, 0]
    assert [e.num_found for e in examples.best + examples.worst] == [1, 1, 0]
    assert examples.num_images == NUM_WITH_OBJECTS


def test_only_the_proposals_with_the_highest_scores_count(tmp_path, dataset):
    late = [ELSEWHERE] * 100 + [SQUARE]
    in_time = late[1:]
    proposals = [proposals_of(1, "found.png", in_time), proposals_of(2, "missed.png", late)]
    examples = examples_of(tmp_path, dataset, proposals)
    assert [examples.best[0].quality, examples.worst[0].quality] == [1, 0]
    assert examples.num_images == 2, "an image that is not in the store was not looked at"


def test_image_without_a_proposal_is_missed(tmp_path, dataset):
    proposals = [proposals_of(1, "found.png", [SQUARE]), proposals_of(2, "missed.png", [])]
    examples = examples_of(tmp_path, dataset, proposals)
    assert [e.file_name for e in examples.worst] == ["missed.png"]
    assert examples.worst[0].quality == 0
    assert len(examples.worst[0].pictures) == 3


def test_quality_is_the_mean_over_the_objects(tmp_path):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE), object_of(1, EVERYTHING, iscrowd=1)]
    dataset = write_dataset(tmp_path / "data", ["two.png"], objects)
    [example] = examples_of(tmp_path, dataset, [proposals_of(1, "two.png", [SQUARE])]).best
    assert sorted(example.ious) == [0, 1]
    assert example.quality == 0.5


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1)))
def test_choice_is_ordered_and_no_image_is_chosen_twice(qualities):
    best, worst = choose_examples(qualities)
    assert len(best) + len(worst) == min(len(qualities), 2 * NUM_EXAMPLES)
    assert 0 <= len(best) - len(worst) <= 1
    chosen = best + worst[::-1]
    assert len(set(chosen)) == len(chosen)
    values = [qualities[image] for image in chosen]
    assert values == sorted(values, reverse=True)
    left_out = [value for image, value in qualities.items() if image not in chosen]
    if left_out:
        assert qualities[worst[-1]] <= min(left_out) and max(left_out) <= qualities[best[-1]]


# Drawing.


def test_marks_are_drawn_where_their_masks_are_on_a_smaller_picture():
    image = np.full((100, 150, 3), 200, np.uint8)
    box = (60, 40, 200, 120)  # on 300 x 200
    picture = draw_marks(image, [Mark(rle_of(box, 200, 300), (255, 0, 0), FULL)])
    outside = picture.copy()
    outside[18:62, 28:102] = 200
    assert (outside == 200).all(), "something is drawn beside the mask and its outline"
    inside = picture[23:57, 33:97]
    assert (inside[..., 0] > 200).all() and (inside[..., 1:] < 200).all()
    assert (image == 200).all(), "the image itself was changed"


def test_label_stands_at_the_top_left_of_its_mask():
    image = np.full((200, 200, 3), 255, np.uint8)
    marks = [Mark(rle_of((160, 80, 400, 400), 400, 400), (9, 9, 9), 0, "0.12")]
    unlabeled = draw_marks(image, [Mark(marks[0].rle, marks[0].rgb, 0)])
    rows, columns = np.nonzero((draw_marks(image, marks) != unlabeled).any(axis=-1))
    assert (rows.max(), columns.min()) == pytest.approx((40, 80), abs=6)


def test_labels_of_masks_at_one_place_do_not_cover_each_other():
    image = np.full((200, 200, 3), 255, np.uint8)
    marks = [Mark(rle_of((0, 0, 200, 200), 200, 200), (9, 9, 9), FAINT, "0.12") for _ in range(4)]
    dark = [
        (draw_marks(image, marks[:n])[4:190, 4:190].sum(axis=-1) < 250).any(axis=1).sum()
        for n in (1, 2, 4)
    ]
    assert dark[1] == pytest.approx(2 * dark[0], abs=6)
    assert dark[2] == pytest.approx(4 * dark[0], abs=12)


def test_labels_at_fractions_of_a_pixel_find_a_place():
    """At y = 63 * 480 / 500, where y + 17 - y is rounded to less than 17, the height of a label."""
    image = np.zeros((300, 480, 3), np.uint8)
    draw_marks(image, [Mark(rle_of((9, 63, 99, 99), 300, 500), (9, 9, 9), 0, "0.12")] * 2)


def test_large_picture_is_scaled_down(tmp_path):
    path, images = write_dataset(tmp_path / "data", ["large.png"], [object_of(1, SQUARE)])
    cv2.imwrite(str(images / "large.png"), np.zeros((1000, 700, 3), np.uint8))
    [example] = examples_of(tmp_path, (path, images), [proposals_of(1, "large.png", [SQUARE])]).best
    data = np.frombuffer(base64.b64decode(example.pictures[0].split(",")[1]), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (480, 336, 3)
