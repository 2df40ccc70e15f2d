"""Categories that a user chooses by their names, and the names in messages."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

MAX_NAMED = 4  # categories in a message
CHOICE = "data.categories (--categories)"  # where a user chooses them


def choose_categories(
    path: str | Path, known: Mapping[int, str], chosen: Iterable[str]
) -> dict[int, str]:
    """Those of a json's categories, names by id, that are chosen by their names or ids.

    A category named "7" counts before one with the id 7.

    Raises:
        ValueError: one that is not there, is chosen twice or has the name of another; or none at
            all. One line with the file and the category.
    """
    ids_by_name = defaultdict(list)
    for id_, name in known.items():
        ids_by_name[name].append(id_)
    ids_by_word = {str(id_): [id_] for id_ in known} | ids_by_name
    ids: set[int] = set()
    for word in chosen:
        found = ids_by_word.get(word, [])
        if not found:
            raise ValueError(
                f"{path}: {CHOICE}: no category is {short(word)}; {_similar(word, known)}"
            )
        if len(found) > 1:
            raise ValueError(
                f"{path}: {CHOICE}: {len(found)} categories are named {short(word)}; give the id, "
                f"one of {listed(map(str, found))}"
            )
        if ids & set(found):
            raise ValueError(f"{path}: {CHOICE}: {named(found[0], known[found[0]])} is there twice")
        ids.update(found)
    if not ids:
        raise ValueError(f"{path}: {CHOICE}: the list is empty")
    return {id_: name for id_, name in known.items() if id_ in ids}


def _similar(word: str, known: Mapping[int, str]) -> str:
    names = {name.lower(): name for name in known.values()}
    close = difflib.get_close_matches(word.lower(), names, n=MAX_NAMED)
    if close:
        return f"did you mean {listed(short(names[name]) for name in close)}?"
    return f"it has {listed(map(short, known.values())) or 'none'}"


def named(id_: int, name: str) -> str:
    """A category for messages."""
    return f"{short(name)} (id {id_})"


def short(name: str) -> str:
    """A name for messages, of any content."""
    return repr(name if len(name) <= 40 else f"{name[:37]}...")


def listed(items: Iterable[str]) -> str:
    """The first few, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + more
