"""Images that a list names, one a line or a row, or that lie below a URI."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from datasets.images import SUFFIXES
from datasets.remote import find_file, is_uri, read_bytes

TEXT, PARQUET = ".txt", ".parquet"
COLUMNS = ("file_name", "path", "uri", "url", "image")  # of a Parquet list, the first that it has


@dataclass(frozen=True)
class ListedImages:
    """Names of images relative to a folder, which may be a URI, each once and as listed."""

    folder: str | Path
    names: list[str]


def is_list(source: object) -> bool:
    """Whether a source names images by a list or a URI; else it is a folder, file or glob."""
    suffix = os.path.splitext(str(source))[1].lower()
    return is_uri(source) or (suffix in (TEXT, PARQUET) and not os.path.isdir(str(source)))


def list_named_images(source: str | Path, passed_over: Counter[str] | None = None) -> ListedImages:
    """The images of a list (text or Parquet, which may be a URI) or below a URI.

    Lines are paths or URIs; relative ones are meant from the list's folder on. Empty lines and
    those that begin with # are left out. Whether an image is there shows when it is read.

    Raises:
        ValueError, OSError: no list, no image in it, or local ones and URIs mixed.
    """
    suffix = os.path.splitext(str(source))[1].lower()
    if suffix not in (TEXT, PARQUET):
        return _images_below(str(source), Counter() if passed_over is None else passed_over)
    read_lines = _read_text if suffix == TEXT else _read_parquet
    lines = read_lines(source, read_bytes(source))
    if not lines:
        raise ValueError(f"{source}: names no image")
    if is_uri(source):
        folder = str(source).rpartition("/")[0]
        return _split([line if is_uri(line) else f"{folder}/{line}" for line in lines])
    num_uris = sum(map(is_uri, lines))
    if num_uris == len(lines):
        return _split(lines)
    if num_uris:
        raise ValueError(f"{source}: names local files and URIs; make a list of each")
    return _locate(Path(source).parent, lines)


def _read_text(source: str | Path, data: bytes) -> list[str]:
    try:
        lines = map(str.strip, io.TextIOWrapper(io.BytesIO(data), "utf-8-sig"))
        return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))
    except UnicodeDecodeError:
        raise ValueError(f"{source}: not a text in UTF-8") from None


def _read_parquet(source: str | Path, data: bytes) -> list[str]:
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        column = next((name for name in COLUMNS if name in file.schema_arrow.names), None)
        if column is None:
            raise ValueError(
                f"{source}: has none of the columns {', '.join(COLUMNS)}, but "
                f"{', '.join(file.schema_arrow.names)}"
            )
        paths = file.read(columns=[column])[column].cast(pa.string())
    except pa.ArrowException as error:
        raise ValueError(f"{source}: no Parquet file of paths: {error}") from None
    return list(dict.fromkeys(path for path in paths.to_pylist() if path))


def _split(uris: list[str]) -> ListedImages:
    """URIs by their common folder, at least scheme and bucket."""
    first, last = min(uris), max(uris)
    shared = os.path.commonprefix([first, last]).rpartition("/")[0]
    if shared.count("/") < 2:
        raise ValueError(f"{first} and {last} have no folder or bucket in common")
    return ListedImages(shared, [uri[len(shared) + 1 :] for uri in uris])


def _locate(folder: Path, lines: list[str]) -> ListedImages:
    """Local paths relative to the list's folder, or to that of all if one lies elsewhere."""
    normal = ((line, os.path.normpath(line)) for line in lines)
    # The line itself where it is normal: a copy of a million would take 100 MB.
    names = list(dict.fromkeys(line if line == name else name for line, name in normal))
    if not any(name.startswith((os.pardir, os.sep)) or os.path.isabs(name) for name in names):
        return ListedImages(folder, [Path(n).as_posix() for n in names] if os.sep != "/" else names)
    top = os.path.abspath(folder)
    paths = [os.path.normpath(os.path.join(top, name)) for name in names]
    outside = any(not path.startswith(os.path.join(top, "")) for path in paths)
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if outside else top
    relative = [PurePosixPath(Path(path).relative_to(root)).as_posix() for path in paths]
    return ListedImages(Path(root), list(dict.fromkeys(relative)))


def _images_below(uri: str, passed_over: Counter[str]) -> ListedImages:
    """The image files below a URI, or the one that it names, sorted."""
    files, place = find_file(uri)
    try:
        info = files.get_file_info(place)
        if info.type == fs.FileType.File:
            return _split([uri])
        found = files.get_file_info(fs.FileSelector(place, recursive=True))
    except OSError as error:
        raise ValueError(f"{uri}: {' '.join(str(error).split())}") from None
    top, names = place.strip("/") + "/", []
    for info in found:
        name = info.path.strip("/").removeprefix(top)
        if info.type != fs.FileType.File or f"/{name}".count("/."):
            continue
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in SUFFIXES:
            names.append(name)
        else:
            passed_over[suffix or "without a suffix"] += 1
    if not names:
        raise ValueError(f"{uri}: no image files there ({' '.join(sorted(SUFFIXES))})")
    return ListedImages(uri.rstrip("/"), sorted(names))
