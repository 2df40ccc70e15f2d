"""Freed memory: kept between images of one size, given back between others."""

import numpy as np
import pytest

from pipeline.inference import memory
from pipeline.inference.memory import MAX_KEPT, release_between_sizes

UNREADABLE = ValueError("no image")


@pytest.mark.parametrize(
    ("sides", "releases"),
    [
        ([4, 4, 5, 5, 4], [0, 0, 1, 1, 2]),
        ([4, None, 4], [0, 0, 0]),  # an unreadable image is no other size
        ([4] * (2 * MAX_KEPT + 1), [*[0] * MAX_KEPT, *[1] * MAX_KEPT, 2]),  # now and then
    ],
)
def test_memory_is_given_back_before_another_size(monkeypatch, sides, releases):
    calls, passed = [], []
    monkeypatch.setattr(memory, "_call_libc", lambda name, *_: calls.append(name))
    images = [np.zeros((side, 8, 3), np.uint8) if side else UNREADABLE for side in sides]
    for (item, image), expected in zip(
        release_between_sizes(enumerate(images)), releases, strict=True
    ):
        assert image is images[item]
        passed.append(item)
        assert calls.count("malloc_trim") == expected, f"before image {item}"
    assert passed == list(range(len(images)))
