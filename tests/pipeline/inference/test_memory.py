"""Freed memory: kept between images of one size, given back between others."""

import numpy as np
import pytest

from pipeline.inference import memory
from pipeline.inference.memory import MOST_KEPT, release_between_sizes


@pytest.fixture
def releases(monkeypatch):
    """Counts, for every image that is taken, how often memory had been given back by then."""
    calls, counted = [], []
    monkeypatch.setattr(memory, "_call_libc", lambda name, *_: calls.append(name))

    def count(images):
        for _ in release_between_sizes(images):
            counted.append(calls.count("malloc_trim"))
        return counted

    return count


def _images(*sides: int) -> list:
    return [(n, np.zeros((side, 8, 3), np.uint8)) for n, side in enumerate(sides)]


def test_images_pass_through_as_they_are():
    images = [*_images(4, 4, 5), ("broken", ValueError("no image")), *_images(5)]
    passed = list(release_between_sizes(images))
    assert [item for item, _ in passed] == [item for item, _ in images]
    assert all(a is b for (_, a), (_, b) in zip(passed, images, strict=True))


def test_memory_is_given_back_before_another_size(releases):
    assert releases(_images(4, 4, 5, 5, 4)) == [0, 0, 1, 1, 2]


def test_an_unreadable_image_is_no_other_size(releases):
    images = [*_images(4), ("broken", ValueError("no image")), *_images(4)]
    assert releases(images) == [0, 0, 0]


def test_memory_is_given_back_now_and_then_between_images_of_one_size(releases):
    assert releases(_images(*[4] * (2 * MOST_KEPT + 1))) == [
        *[0] * MOST_KEPT,
        *[1] * MOST_KEPT,
        2,
    ]
