"""Files by their path or URI: on this machine, or in an object store."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from datasets.file_names import leads_out

if TYPE_CHECKING:  # who reads images on this machine alone does without Arrow
    from pyarrow import fs

S3 = "s3"


def is_uri(path: object) -> bool:
    """Whether a path is a URI, as s3://bucket/folder/image.jpg."""
    scheme, mark, _ = str(path).partition("://")
    return bool(mark) and scheme.isidentifier() and isinstance(path, str)


def join(folder: str | Path, name: str) -> str | Path:
    """The path, or the URI, of a name in a folder."""
    return f"{folder}/{name}" if is_uri(folder) else Path(folder, name)


def open_file(path: str | Path) -> BinaryIO:
    """Opens a file for reading; OSError if it is not there."""
    if not is_uri(path):
        return Path(path).open("rb")
    files, place = find_file(str(path))
    return _reading(files.open_input_file, place)


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; OSError if it is not there."""
    if not is_uri(path):
        return Path(path).read_bytes()
    files, place = find_file(str(path))
    with _reading(files.open_input_stream, place) as stream:
        return stream.read()


def _reading(opened: Any, place: str) -> Any:
    from pyarrow import ArrowInvalid

    try:
        return opened(place)
    except ArrowInvalid as error:
        raise OSError(str(error)) from None


def find_file(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI and the path there.

    S3 is Arrow's, with keys and region by AWS's environment variables and files; AWS_ENDPOINT_URL
    names another server. All other schemes are fsspec's.

    Raises:
        ValueError: a URI without a bucket, or a scheme that is not known here.
    """
    parts = urlsplit(uri)
    if parts.scheme == S3:
        if not parts.netloc or leads_out(place := uri.partition("://")[2].strip("/")):
            raise ValueError(f"{uri}: expected s3://BUCKET/PATH")
        return _s3(parts.netloc), place
    from pyarrow import fs

    try:
        from fsspec.core import url_to_fs

        files, place = url_to_fs(uri)
    except (ImportError, ValueError) as error:  # a package for the scheme is missing
        raise ValueError(f"{uri}: {error}") from None
    return fs.PyFileSystem(fs.FSSpecHandler(files)), place


@lru_cache
def _s3(bucket: str) -> fs.FileSystem:
    from pyarrow import fs

    # Arrow itself does not look at the endpoint's variables.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not endpoint and not region:
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(endpoint_override=endpoint, region=region)
