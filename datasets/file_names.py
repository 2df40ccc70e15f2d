"""Which files of a folder the file names of a COCO json mean.

Names come from other systems: with backslashes, %20, absolute, from another folder, with a blank at
their end, in another normalization of Unicode. A name that a file has is taken as it is; of others,
the longest end that one file of the folder clearly has. What a name says never leads out of the
folder.
"""

import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from urllib.parse import unquote

Parts = tuple[str, ...]


@dataclass(frozen=True)
class NamedFiles:
    """The files that names mean.

    Attributes:
        names: relative to the folder, in the order of those given; a file need not be there.
        message: one line on the names that were resolved and those without a file; or empty.
    """

    names: list[str]
    message: str


def find_named_files(names: Sequence[str], folder: str | Path, source: str | Path) -> NamedFiles:
    """The files of a folder that the names in `source`, a COCO json, mean.

    Raises:
        ValueError: the folder has none of them; one line with the first name.
    """
    tree = _Tree(Path(folder))
    found = {name: name for name in names if tree.has(name)}
    odd = [name for name in dict.fromkeys(names) if name not in found]
    # A file that two different names may mean is not clearly meant, unless one is its very path.
    claims: defaultdict[str, defaultdict[Parts, list[str]]]
    claims = defaultdict(lambda: defaultdict(list))
    for name in odd:
        parts, file = next(filter(None, map(tree.find, candidate_parts(name))), ((), ""))
        if file:
            claims[file][_keys(parts)].append(name)
    for file, by_path in claims.items():
        itself = _keys(tuple(file.split("/")))
        if len(by_path) > 1 or file in found:
            found |= dict.fromkeys(by_path.get(itself, []), file)
        else:
            found |= dict.fromkeys(chain.from_iterable(by_path.values()), file)
    if names and not found:
        raise ValueError(
            f"{folder}: none of the {len(names)} images of {source} is there: it names "
            f"{names[0]!r:.200}, the folder has {tree.example()}; give the folder that the names "
            "are relative to"
        )
    resolved = [name for name in odd if name in found]
    missing = [name for name in odd if name not in found]
    texts = []
    if resolved:
        texts.append(
            f"{len(resolved):,} file names are not as in {folder}, such as "
            f"{resolved[0]!r:.200}, taken for {found[resolved[0]]!r:.200}"
        )
    if missing:
        texts.append(f"{len(missing):,} files are not in {folder}, such as {missing[0]!r:.200}")
    message = f"{source}: {'; '.join(texts)}" if texts else ""
    return NamedFiles([found.get(name) or _inside(name) for name in names], message)


def match_paths(paths: Iterable[Path], names: Iterable[str]) -> dict[Path, tuple[str, str]]:
    """The name that each path ends in, if any, and that end of the path as it is.

    The longest end counts: several folders may have files of one name. Of a name that is no plain
    path (absolute, from another folder or system) an end is enough, if no other name has it too.
    """
    by_end: defaultdict[Parts, set[str]] = defaultdict(set)
    for name in names:
        is_plain = _is_plain(name) and "\\" not in name and "?" not in name
        for parts in candidate_parts(name):
            for start in range(1 if is_plain else len(parts)):
                by_end[_keys(parts[start:])].add(name)
    found = {}
    for path in paths:
        parts = path.absolute().parts
        for start in range(len(parts)):
            end, alike = "/".join(parts[start:]), by_end.get(_keys(parts[start:]), set())
            if end in alike or len(alike) == 1:
                found[path] = (end if end in alike else next(iter(alike))), end
                break
    return found


def candidate_parts(name: str) -> Iterable[Parts]:
    """What a name may stand for, as parts of a path, the likeliest first."""
    texts = dict.fromkeys([name, unquote(name)])
    for text in list(texts):  # addresses: ...?token=1, and Label Studio's /local-files/?d=path
        path, _, query = text.partition("?")
        texts |= dict.fromkeys([query.partition("d=")[2].partition("&")[0], path])
    return filter(None, dict.fromkeys(_parts(text.replace("\\", "/")) for text in texts))


def _parts(text: str) -> Parts:
    path = posixpath.normpath(text.strip())
    return tuple(part for part in path.split("/") if part not in ("", "."))


def _keys(parts: Parts) -> Parts:
    return tuple(map(_key, parts))


def _key(part: str) -> str:
    """Equal for names that differ in %20, normalization, case, or blanks at an end alone."""
    return unicodedata.normalize("NFC", unquote(part)).strip().casefold()


def leads_out(name: str) -> bool:
    """Whether a name may mean a file outside of the folder that it should be relative to."""
    path = PurePath(name)
    return bool(path.anchor) or ".." in path.parts


def _is_plain(name: str) -> bool:
    """Whether a name is a path in the folder, without detours."""
    is_inside = not name.startswith(("/", "../")) and name not in (".", "..")
    return is_inside and posixpath.normpath(name) == name


def _inside(name: str) -> str:
    """A name without a file, as a path that stays in the folder and in one line."""
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    text = "/".join(parts) or "?"
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


class _Tree:
    """A folder's files, of which only the subfolders that are asked for are listed."""

    def __init__(self, root: Path):
        self.root = root
        self.listed: dict[str, set[str]] = {}
        self.by_key: dict[str, dict[str, list[str]]] = {}

    def entries(self, folder: str) -> set[str]:
        """The names in a subfolder; none if there is no such one."""
        if folder not in self.listed:
            try:
                self.listed[folder] = set(os.listdir(self.root / folder))
            except (OSError, ValueError):
                self.listed[folder] = set()
        return self.listed[folder]

    def has(self, name: str) -> bool:
        """Whether a file has this very name, which does not lead out of the folder."""
        folder, _, file = name.rpartition("/")
        return _is_plain(name) and file in self.entries(folder)

    def find(self, parts: Parts) -> tuple[Parts, str] | None:
        """The file that the longest end of a path means, with the path; None if none is clear."""
        for start in range(len(parts)):
            found = ""
            for part in parts[start:]:
                entry = self._entry(found, part)
                if entry is None:
                    break
                found = f"{found}/{entry}" if found else entry
            else:
                if not (self.root / found).is_dir():
                    return parts, found
        return None

    def _entry(self, folder: str, part: str) -> str | None:
        names = self.entries(folder)
        if part in names:
            return part
        if folder not in self.by_key:
            keyed: defaultdict[str, list[str]] = defaultdict(list)
            for name in names:
                keyed[_key(name)].append(name)
            self.by_key[folder] = keyed
        alike = self.by_key[folder].get(_key(part), [])
        return alike[0] if len(alike) == 1 else None

    def example(self) -> str:
        """A file of the folder, for a message."""
        names = sorted(name for name in self.entries("") if not name.startswith("."))
        return repr(names[0]) if names else "no files"
