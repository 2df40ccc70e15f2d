"""The pretended GPU as a fixture; importing it before any test runs is part of it."""

from collections.abc import Iterator

import pytest

from tests.pretend_cuda import PretendedCuda, guard, pretended_cuda


@pytest.fixture
def gpu() -> Iterator[PretendedCuda]:
    """The pretended GPU; what is made once for all tests is made before, without it."""
    if guard() is None:
        pytest.skip("there is a real GPU, or no compiler for the pretended one")
    with pretended_cuda() as gpu:
        yield gpu
