"""Fuzzed tests: 250 cases each in the suite, as many as asked for in a campaign (`make fuzz`)."""

import os
from collections import Counter
from collections.abc import Callable
from functools import wraps

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

CASES = int(os.environ.get("MASKPATH_FUZZ_CASES", "250"))
RUN: Counter[str] = Counter()  # cases by test


def fuzzed(**strategies: SearchStrategy) -> Callable[[Callable], Callable]:
    """A test of `CASES` drawn inputs, each of which is counted."""

    def decorate(test: Callable) -> Callable:
        @pytest.mark.fuzz
        @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(**strategies)
        @wraps(test)
        def run(*args: object, **kwargs: object) -> None:
            RUN[f"{test.__module__}.{test.__name__}"] += 1
            test(*args, **kwargs)

        return run

    return decorate
