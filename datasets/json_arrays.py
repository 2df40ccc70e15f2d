"""The big arrays of a JSON object a chunk at a time: the tree of dicts never exists as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator, Iterator
from pathlib import Path

CHUNK = 256  # elements: numpy works in bulk, and they stay in a 1 MB cache

_decode = json.JSONDecoder().raw_decode  # json's C scanner, from a position on
_skip_space = re.compile(r"[ \t\n\r]*").match
_find_separator = re.compile(r"[ \t\n\r]*([,:\]}])[ \t\n\r]*").match

Chunk = tuple[str, int, list]


def read_arrays(path: str | Path, names: Collection[str]) -> Iterator[Chunk]:
    """Yield (name, index of the first element, elements) for each chunk of the arrays `names`.

    The arrays are members of the file's top-level object, in any order; an empty array gives one
    empty chunk. Other members are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON (with line and column), or lacks one of the arrays.
    """
    seen = set()
    try:
        for name, first, elements in _walk_object(_read_text(path), names):
            if first == 0 and name in seen:
                raise ValueError(f'has "{name}" twice')
            seen.add(name)
            yield name, first, elements
        for name in names:
            if name not in seen:
                raise ValueError(f'has no "{name}" array')
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise ValueError(f"{path}: not valid JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_text(path: str | Path) -> str:
    path = Path(path)
    if path.is_dir():
        raise ValueError("a folder, expected a JSON file")
    try:
        return path.read_bytes().decode("utf-8-sig")  # some editors put a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid JSON: not UTF-8 text at byte {error.start}") from None


def _walk_object(text: str, names: Collection[str]) -> Iterator[Chunk]:
    at = _skip_space(text).end()
    if text[at : at + 1] != "{":
        _decode(text, at)  # says so where it is no JSON at all
        raise ValueError(f"the top level is no object with {', '.join(map(repr, names))}")
    at = _skip_space(text, at + 1).end()
    more = text[at : at + 1] != "}"
    if not more:
        at += 1
    while more:
        name, at = _decode(text, at)
        if not isinstance(name, str):
            raise json.JSONDecodeError("Expecting a property name in double quotes", text, at)
        _, at = _separator(text, at, ":")
        if name in names:
            at = yield from _walk_array(name, text, at)
        else:
            _, at = _decode(text, at)
        more, at = _separator(text, at, ",}")
    if _skip_space(text, at).end() != len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _walk_array(name: str, text: str, at: int) -> Generator[Chunk, None, int]:
    """Yield the array that starts at `at` in chunks; return the position after it."""
    if text[at : at + 1] != "[":
        value, _ = _decode(text, at)
        raise ValueError(f'"{name}" is of type {type(value).__name__}, expected an array')
    at = _skip_space(text, at + 1).end()
    first, elements = 0, []
    more = text[at : at + 1] != "]"
    if not more:
        at += 1
    while more:
        element, at = _decode(text, at)
        elements.append(element)
        more, at = _separator(text, at, ",]")
        if more and len(elements) == CHUNK:
            yield name, first, elements
            first, elements = first + CHUNK, []
    yield name, first, elements
    return at


def _separator(text: str, at: int, allowed: str) -> tuple[bool, int]:
    """Step over one of the characters `allowed`; true if it was not the closing one."""
    found = _find_separator(text, at)
    if not found or found[1] not in allowed:
        at = _skip_space(text, at).end()
        raise json.JSONDecodeError(f"Expecting one of {' '.join(allowed)}", text, at)
    return found[1] in ",:", found.end()
