"""Files by their path or URI: on this machine, or in an object store."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from datasets.file_names import leads_out

if TYPE_CHECKING:  # who reads images on this machine alone does without Arrow
    from pyarrow import NativeFile, fs

S3 = "s3"


@dataclass(frozen=True)
class RemotePath:
    """A file or folder in an object store; its methods are those of `pathlib.Path`.

    Folders need not be made. `datasets.files.atomic_path` writes files.
    """

    uri: str

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.uri}/{name}")

    @property
    def name(self) -> str:
        """The last part."""
        return self.uri.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> RemotePath:
        """The folder that it is in."""
        return RemotePath(self.uri.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        """Another file of the folder."""
        return self.parent / name

    def with_suffix(self, suffix: str) -> RemotePath:
        """The file of another suffix."""
        return self.with_name(self.stem + suffix)

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self

    def _info(self) -> fs.FileInfo:
        files, place = find_file(self.uri)
        return files.get_file_info(place)

    def exists(self) -> bool:
        """Whether there is a file, or a folder with one."""
        return self._info().type.name != "NotFound"

    def is_file(self) -> bool:
        """Whether it is a file."""
        return self._info().is_file

    def is_dir(self) -> bool:
        """Whether it is a folder, which has a file in it."""
        return self._info().type.name == "Directory"

    def read_bytes(self) -> bytes:
        """The file's content."""
        return read_bytes(self.uri)

    def read_text(self) -> str:
        """The file's content, in UTF-8."""
        return self.read_bytes().decode()

    def upload(self, file: Path) -> None:
        """Copies a file of this machine here; a reader sees all of it or nothing."""
        from pyarrow import fs

        files, place = find_file(self.uri)
        if not isinstance(files, fs.S3FileSystem):
            files.create_dir(place.rpartition("/")[0])  # where a scheme has folders
        # In one call: a stream that an interruption closes would leave half a file.
        fs.copy_files(str(file), place, fs.LocalFileSystem(), files)


AnyPath = Path | RemotePath


def to_path(path: str | AnyPath) -> AnyPath:
    """The path of a file or folder, on this machine or, of a URI, in an object store."""
    if isinstance(path, RemotePath):
        return path
    return RemotePath(str(path).rstrip("/")) if is_uri(path) else Path(path)


def list_files(folder: AnyPath) -> dict[str, list[int]]:
    """Size in bytes and time of last change in ns of each file in a folder, by name, sorted.

    Empty if there is no folder.
    """
    found = {}
    if isinstance(folder, RemotePath):
        from pyarrow.fs import FileSelector

        files, place = find_file(folder.uri)
        for info in files.get_file_info(FileSelector(place, allow_not_found=True)):
            if info.is_file:
                found[info.base_name] = [info.size, info.mtime_ns or 0]
    elif folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process's temporary file
                    if entry.is_file():
                        stat = entry.stat()
                        found[entry.name] = [stat.st_size, stat.st_mtime_ns]
    return dict(sorted(found.items()))


def remove_folder(folder: AnyPath) -> None:
    """Deletes a folder and what is in it."""
    if isinstance(folder, RemotePath):
        files, place = find_file(folder.uri)
        files.delete_dir(place)
    else:
        shutil.rmtree(folder)


def arrow_source(path: AnyPath) -> Path | NativeFile:
    """What Arrow's readers take."""
    if isinstance(path, RemotePath):
        files, place = find_file(path.uri)
        return _reading(files.open_input_file, place)
    return path


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

        files, place = url_to_fs(uri, use_listings_cache=False)  # other processes write, too
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
