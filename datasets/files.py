"""Output files that are whole or absent."""

import errno
import json
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from datasets.remote import AnyPath, RemotePath

HOST = re.sub(r"[^\w-]", "-", platform.node())[:40]
TEMPORARY = re.compile(r"\..*\.(?P<host>[\w-]*)\.(?P<pid>\d+)\.tmp", re.DOTALL)
ABANDONED = 3600  # seconds without a byte after which a temporary file is another machine's rest
# Errors of a disk: those of Python's file objects and of Arrow name no file.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def atomic_path(path: str | AnyPath) -> Iterator[Path]:
    """A temporary path beside `path`: renamed to it when the block ends well, else removed.

    Folders above it are made; no reader and no second writer meets half a file. For an object
    store the file is in the folder of temporary files, and copied there.

    Raises:
        OSError: the disk is full or read-only, or the name too long; names `path`.
    """
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder, path.name)
            path.upload(Path(folder, path.name))
        return
    path = Path(path)
    # Any name that fits is short enough for its temporary file, too.
    temporary = path.with_name(f".{path.name[:40]}.{HOST}.{os.getpid()}.tmp")
    try:
        with naming_file(path, instead_of=temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`: renamed to it when the block ends well, else removed.

    Raises:
        ValueError: there is something at `path` other than an empty folder.
        OSError: see `atomic_path`.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file; a folder is written")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; choose another --output or delete it")
    with ExitStack() as stack, atomic_path(path) as temporary:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)  # if it was not renamed
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process of the same number
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            path.rmdir()  # a folder does not replace one everywhere


@contextmanager
def naming_file(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Has the system's errors about writing a file name it, not its temporary file or nothing."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None and error.errno in DISK_ERRORS
        if unnamed or (instead_of is not None and str(error.filename) == str(instead_of)):
            assert error.errno is not None
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def remove_temporaries(folder: Path) -> None:
    """Removes the temporary files that killed processes have left in a folder and those in it."""
    for file in (*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp"), *folder.glob("*/*/.*.tmp")):
        match = TEMPORARY.fullmatch(file.name)
        with suppress(OSError):  # gone meanwhile, or not ours to remove
            if match and _is_abandoned(file, match["host"], int(match["pid"])):
                file.unlink()


def _is_abandoned(file: Path, host: str, pid: int) -> bool:
    if host == HOST and (pid == os.getpid() or not is_alive(pid)):
        return True  # this process, which is about to start, has none yet
    return time.time() - file.stat().st_mtime > ABANDONED


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_atomically(path: str | AnyPath, data: bytes) -> None:
    """Writes a file."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | AnyPath, value: Any) -> None:
    """Writes `value` as indented JSON; NaN is refused, since it is no JSON."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
