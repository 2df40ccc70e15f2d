"""Categories of two sources, matched by name and id: of two data sets, or of a detector and one."""

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import count as count_from
from itertools import zip_longest

import numpy as np

from datasets.category_names import listed, named, short
from datasets.coco import CocoInstances


def match_categories(these: Mapping[int, str], those: Mapping[int, str]) -> dict[int, int]:
    """Ids of `those` for the ids of `these` that certainly are the same category.

    That is one of the same name and id, or else the only one of that name on either side. The
    classes of a converted detector may have no names but their ids: the id alone counts there.

    Args:
        these, those: category names by id.
    """
    counts, known = Counter(these.values()), Counter(those.values())
    id_of = {name: id_ for id_, name in those.items()}
    matched = {}
    for id_, name in these.items():
        theirs = those.get(id_, "")
        is_unnamed = theirs == f"class {id_}" and not known[name] and not counts[theirs]
        if theirs == name or is_unnamed:
            matched[id_] = id_
        elif counts[name] == known[name] == 1:
            matched[id_] = id_of[name]
    return matched


def use_categories(
    coco: CocoInstances,
    categories: Mapping[int, str],
    *,
    source: str,
    keep_others: bool = False,
    taken: Collection[int] = (),
) -> str:
    """Gives annotations the ids and the order of these categories, whose names are by id.

    Those that no annotation is of need not be known, and any may be missing.

    Args:
        source: whose categories they are, for messages.
        keep_others: if all of these are found, the annotations' others stay, for scores: a detector
            may know a part of the categories.
        taken: more ids that such others may not have, since results of another category have them.

    Returns:
        A line on what differed; empty if nothing did.

    Raises:
        ValueError: annotations are of a category that none of `categories` certainly is; one line
            with the difference.
    """
    own = dict(zip(coco.category_ids.tolist(), coco.category_names, strict=True))
    if own == categories:
        return ""
    matched = match_categories(own, categories)
    num_objects = np.bincount(coco.category_index, minlength=len(own)).tolist()
    lacking = sorted(categories.keys() - matched.values())
    if keep_others and not lacking:
        taken = {*categories, *taken}
        free = count_from(max([*taken, *own]) + 1)
        others = {id_: name for id_, name in own.items() if id_ not in matched}
        matched |= {id_: next(free) if id_ in taken else id_ for id_ in others}
        categories = {**categories, **{matched[id_]: name for id_, name in others.items()}}
    missing = [named(id_, categories[id_]) for id_ in lacking]
    unknown = []
    for (id_, name), count in zip(own.items(), num_objects, strict=True):
        if id_ not in matched and count:
            there = f", id {id_} is {short(categories[id_])} there" if id_ in categories else ""
            unknown.append(f"{named(id_, name)} of {count:,} annotations{there}")
    if unknown:
        raise ValueError(
            f"{coco.path}: its categories are not those of {source}: unknown there "
            f"{listed(unknown)}; missing here {listed(missing) or 'none'}; "
            "give both the same names and ids"
        )
    # The rows of the new categories; that of an unmatched one is never looked up.
    ids = sorted(categories)
    row_of = {id_: row for row, id_ in enumerate(ids)}
    rows = [row_of[matched[id_]] if id_ in matched else -1 for id_ in own]
    coco.category_index = np.array(rows, np.int32)[coco.category_index]
    coco.category_ids = np.array(ids, np.int64)
    coco.category_names = [categories[id_] for id_ in ids]
    renumbered = sum(id_ != other for id_, other in matched.items())
    differences = {
        "with another id": renumbered,
        "left out that no annotation is of": len(own) - len(matched),
        "missing": len(missing),
    }
    counts = ", ".join(f"{count} {what}" for what, count in differences.items() if count)
    if not counts:
        return ""
    return f"{coco.path}: categories matched by name with those of {source}: {counts}"


def check_same_outputs(was: list[dict], now: list[dict], *, source: str) -> None:
    """A detector's outputs are in the order of its categories; their ids may be others now.

    Args:
        was: the categories of `source`, a checkpoint, as {"name", "id"}.
        now: those of the annotations.

    Raises:
        ValueError: an output would be of another category; one line with the first few.
    """
    pairs = zip_longest(*([category["name"] for category in side] for side in (was, now)))
    changes = [f"{short(a or 'none')} -> {short(b or 'none')}" for a, b in pairs if a != b]
    if changes:
        raise ValueError(
            f"{source} was trained on other categories, or other ids order them "
            f"({listed(changes)}); restore the annotations, or choose another --output"
        )
