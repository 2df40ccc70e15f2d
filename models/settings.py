"""The check that classes of settings make of their own values."""

from collections.abc import Callable, Iterable
from typing import Any


def require(settings: Any, words: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises a ValueError if a field that is set is not what `words` say."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise ValueError(f"{name} must be {words}, got {value!r}")


def require_one_of(settings: Any, name: str, choices: Iterable[str]) -> None:
    """Raises a ValueError if a field is none of the choices."""
    require(settings, f"one of {', '.join(choices)}", list(choices).__contains__, name)
