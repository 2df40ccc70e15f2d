"""The content of a Torch7 file as a tree of text."""

from typing import Any

from torch import Tensor

from pipeline.torch7.reader import LuaFunction, Torch7Object, cut, short

MAX_ENTRIES = 100  # of a table or an instance that are shown
MAX_FIELDS = 500  # characters of an instance's plain fields


def describe(value: Any) -> str:
    """A line for each class, table and tensor that `read_torch7` gave.

    Plain fields of a class are on its line; its empty tensors and tables, which training leaves,
    are not shown. Lists count from 1, as in Lua. An object in several places is shown in the first;
    the others refer to that. Long content is cut, and says so.
    """
    lines: list[str] = []
    paths: dict[int, str] = {}  # by id, of what is shown

    def show(item: Any, name: str, path: str, indent: str) -> None:
        if id(item) in paths:
            lines.append(f"{indent}{name}same as {paths[id(item)]}")
            return
        if isinstance(item, Torch7Object | dict | list):
            paths[id(item)] = path.lstrip(".") or "the whole"
        lines.append(f"{indent}{name}{_heading(item)}")
        entries = _entries(item)
        for key, value in entries[:MAX_ENTRIES]:
            name = _name(key)
            show(value, f"{name}: ", path + ("" if name[0] == "[" else ".") + name, indent + "  ")
        if len(entries) > MAX_ENTRIES:
            lines.append(f"{indent}  ... {len(entries) - MAX_ENTRIES} more")

    show(value, "", "", "")
    return "\n".join(lines)


def _heading(item: Any) -> str:
    if isinstance(item, Torch7Object):
        # "_type" is that of the module's buffers; each tensor is shown with its own.
        fields = [(k, v) for k, v in _sorted(item.fields) if _is_plain(v) and k != "_type"]
        words = ", ".join(f"{_name(k)}={short(v)}" for k, v in fields)
        return f"{item.typename} ({cut(words, MAX_FIELDS)})" if words else item.typename
    if isinstance(item, Tensor):
        sizes = "x".join(map(str, item.shape)) if item.numel() else "empty"
        return f"{str(item.dtype).removeprefix('torch.')} {sizes}"
    if isinstance(item, list) and item and all(map(_is_plain, item)):
        return f"list of {len(item)}: {cut(str(item[:MAX_ENTRIES]))}"
    if isinstance(item, dict | list):
        return f"{'table' if isinstance(item, dict) else 'list'} of {len(item)}"
    return f"Lua function, {item.num_bytes} bytes" if isinstance(item, LuaFunction) else short(item)


def _entries(item: Any) -> list[tuple[Any, Any]]:
    """What gets a line of its own, by key."""
    if isinstance(item, list):
        return [] if all(map(_is_plain, item)) else list(enumerate(item, 1))
    if isinstance(item, Torch7Object):
        fields = _sorted(item.fields)
        return [(key, value) for key, value in fields if not _is_plain(value) and _size(value)]
    return _sorted(item) if isinstance(item, dict) else []


def _sorted(table: dict) -> list[tuple[Any, Any]]:
    """By key, numbers first: the order in the file is arbitrary."""
    return sorted(table.items(), key=lambda entry: (isinstance(entry[0], str), entry[0]))


def _name(key: Any) -> str:
    return cut(key) if isinstance(key, str) and key.isidentifier() else f"[{short(key)}]"


def _is_plain(item: Any) -> bool:
    return isinstance(item, bool | int | float | str)


def _size(item: Any) -> int:
    if isinstance(item, Tensor):
        return item.numel()
    return len(item) if isinstance(item, dict | list) else 1
