"""The pretended GPU as a fixture; importing it before any test runs is part of it."""

from collections.abc import Iterator

import pytest

from tests.pretend_cuda import PretendedCuda, guard, pretended_cuda


@pytest.fixture(autouse=True)
def can_pretend() -> None:
    if guard() is None:
        pytest.skip("there is a real GPU, or no compiler for the pretended one")


@pytest.fixture
def gpu(can_pretend) -> Iterator[PretendedCuda]:
    with pretended_cuda() as gpu:
        yield gpu
