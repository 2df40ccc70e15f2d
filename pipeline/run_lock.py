"""One run at a time writes into a directory."""

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from datasets.files import HOST, is_alive, remove_temporaries
from pipeline import distributed

try:
    import fcntl
except ImportError:  # Windows: two runs are not noticed
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PATIENCE = 15  # seconds for children of a killed process to follow it
P = ParamSpec("P")
T = TypeVar("T")
_held: dict[Path, IO[str]] = {}


def locks_output(function: Callable[P, T]) -> Callable[P, T]:
    """Has a function hold the lock of its argument `output`, a directory, while it runs."""
    signature = inspect.signature(function)

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        with locked_directory(signature.bind(*args, **kwargs).arguments["output"]):
            return function(*args, **kwargs)

    return locked


@contextmanager
def locked_directory(directory: str | Path) -> Iterator[None]:
    """Makes a directory and keeps runs of other processes out of it.

    The main process holds the lock for all of a run; it may take it again. The system frees it when
    its holder dies. Machines that share a network drive see each other's locks only if the drive
    has them (NFS from version 4 on, Lustre with `flock`). What killed runs have left is removed.

    Raises:
        ValueError: another process writes there.
        OSError: the directory cannot be written.
    """
    path = Path(directory).absolute()
    if path in _held or not distributed.is_main():
        distributed.stop_with_main()
        yield
        return
    created = not path.exists()
    with distributed.telling_errors():
        path.mkdir(parents=True, exist_ok=True)
        _held[path] = _lock(path / LOCK, directory)
        remove_temporaries(path)
    try:
        yield
    finally:
        with suppress(OSError):  # on a drive that has gone
            (path / LOCK).unlink()
            if created:
                path.rmdir()  # if nothing was written
        _held.pop(path).close()


def _lock(path: Path, directory: str | Path) -> IO[str]:
    """The lock's open file, which holds host and process."""
    deadline = time.monotonic() + PATIENCE
    while True:
        file = path.open("a+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            host, _, pid = file.read().strip().partition(" ")
            file.close()
            dead = host == HOST and pid.isdecimal() and not is_alive(int(pid))
            if dead and time.monotonic() < deadline:
                time.sleep(0.2)
                continue
            raise ValueError(
                f"{directory} is in use: process {pid or '?'} on {host or '?'} writes there; "
                "wait for it or stop it, or choose another --output"
            ) from None
        except OSError:  # a drive without locks
            return file
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"{HOST} {os.getpid()}\n")
                file.flush()
                return file
        file.close()  # its last holder has removed it meanwhile


def _forget() -> None:
    """A forked child must not hold the lock when its parent has died."""
    for file in _held.values():
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
