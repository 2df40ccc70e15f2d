"""The content of a Torch7 file as a tree of text."""

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.torch7.objects import LuaFunction, Torch7Object

MAX_ENTRIES = 100  # of a table or an instance that are shown
MAX_INLINE = 8  # of a list of numbers or words
MAX_LEVELS = 60
MAX_TEXT = 60  # characters

Container = Torch7Object | dict | list


def describe(value: Any) -> str:
    """What `read_torch7` gave as a tree: a line each for classes, tables and tensors.

    Fields that are plain values are on the line of their class; empty tensors and tables of a
    class, the buffers that training leaves, are not shown. Lists are numbered from 1, as in Lua.
    An object that is in several places, or in itself, is shown once, and has a number `#n` there
    by which the other places name it. Very long and deep content is cut, and says so.
    """
    shared = _shared(value)
    numbers: dict[int, int] = {}
    lines = []
    pending = [("", value, 0)]
    while pending:
        name, item, level = pending.pop()
        line = "  " * level + (f"{name}: " if name else "") + _heading(item)
        if id(item) in numbers:
            lines.append(f"{line} = #{numbers[id(item)]}")
            continue
        if id(item) in shared:
            numbers[id(item)] = len(numbers) + 1
            line += f" #{numbers[id(item)]}"
        lines.append(line + _plain_fields(item))
        below = _below(item)
        cut = len(below) if level == MAX_LEVELS else max(0, len(below) - MAX_ENTRIES)
        if cut:
            pending.append(("", _Cut(cut), level + 1))
        shown = below[: len(below) - cut]
        pending.extend((name, item, level + 1) for name, item in reversed(shown))
    return "\n".join(lines)


class _Cut(int):
    """How many entries are not shown."""


def _heading(item: Any) -> str:
    if isinstance(item, Torch7Object):
        return item.typename
    if isinstance(item, torch.Tensor):
        sizes = "x".join(map(str, item.shape)) if item.numel() else "empty"
        return f"{str(item.dtype).removeprefix('torch.')} {sizes}"
    if isinstance(item, list) and all(map(_is_plain, item)):
        return _inline(item)
    if isinstance(item, dict | list):
        return f"{'table' if isinstance(item, dict) else 'list'} of {len(item)}"
    if isinstance(item, LuaFunction):
        return f"Lua function, {item.num_bytes} bytes"
    if isinstance(item, _Cut):
        return f"... {int(item)} more"
    return _plain(item)


def _plain_fields(item: Any) -> str:
    if not isinstance(item, Torch7Object):
        return ""
    fields = [(key, value) for key, value in _sorted(item.fields) if _is_plain(value)]
    # "_type" is that of the module's buffers; each tensor is shown with its own.
    fields = [f"{_key(key)}={_plain(value)}" for key, value in fields if key != "_type"]
    more = [f"... {len(fields) - MAX_ENTRIES} more"] if len(fields) > MAX_ENTRIES else []
    return f" ({', '.join(fields[:MAX_ENTRIES] + more)})" if fields else ""


def _below(item: Any) -> list[tuple[str, Any]]:
    """What has a line of its own below the item's, by name."""
    if isinstance(item, Torch7Object):
        fields = _sorted(item.fields)
        return [(_key(k), v) for k, v in fields if not _is_plain(v) and not _is_empty(v)]
    if isinstance(item, dict):
        return [(_key(key), value) for key, value in _sorted(item)]
    if isinstance(item, list) and not all(map(_is_plain, item)):
        return [(_key(number), value) for number, value in enumerate(item, 1)]
    return []


def _shared(value: Any) -> set[int]:
    """The ids of the containers that are in more than one place."""
    seen, shared, pending = set(), set(), [value]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            shared.add(id(item))
        elif isinstance(item, Container):
            seen.add(id(item))
            pending.extend(_content(item))
    return shared


def _content(item: Container) -> Iterator[Any]:
    if isinstance(item, Torch7Object):
        return iter(item.fields.values())
    return iter(item.values() if isinstance(item, dict) else item)


def _sorted(table: dict) -> list[tuple[Any, Any]]:
    """By key, numbers first: the order in the file is arbitrary."""
    return sorted(table.items(), key=lambda entry: (isinstance(entry[0], str), entry[0]))


def _is_plain(item: Any) -> bool:
    return item is None or isinstance(item, bool | int | float | str)


def _is_empty(item: Any) -> bool:
    if isinstance(item, torch.Tensor):
        return item.numel() == 0
    return isinstance(item, dict | list) and not item


def _key(key: Any) -> str:
    return _cut_text(key) if isinstance(key, str) and key.isidentifier() else f"[{_plain(key)}]"


def _plain(value: Any) -> str:
    return _cut_text(repr(value[: MAX_TEXT + 1] if isinstance(value, str) else value))


def _cut_text(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "..."


def _inline(items: list) -> str:
    more = [f"... {len(items) - MAX_INLINE} more"] if len(items) > MAX_INLINE else []
    return "[" + ", ".join([*map(_plain, items[:MAX_INLINE]), *more]) + "]"
