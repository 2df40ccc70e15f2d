"""One run at a time writes into a directory."""

import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from datasets.files import HOST, is_alive, remove_temporaries
from datasets.remote import AnyPath, RemotePath, to_path
from pipeline import distributed

try:
    import fcntl
except ImportError:  # Windows: two runs are not noticed
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
PATIENCE = 15  # seconds for children of a killed process to follow it
P = ParamSpec("P")
T = TypeVar("T")
_held: dict[Path, list[IO[str]]] = {}


def locks_output(function: Callable[P, T]) -> Callable[P, T]:
    """Has a function hold the lock of its argument `output`, a directory, while it runs.

    With an argument `shard`, (i, n), if it is given, see `locked_directory`.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def locked(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs).arguments
        with locked_directory(given["output"], shard=given.get("shard")):
            return function(*args, **kwargs)

    return locked


@contextmanager
def locked_directory(
    directory: str | AnyPath, *, shard: tuple[int, int] | None = None
) -> Iterator[None]:
    """Makes a directory and keeps runs of other processes out of it.

    The main process holds the lock for all of a run; it may take it again. The system frees it when
    its holder dies. Machines that share a network drive see each other's locks only if the drive
    has them (NFS from version 4 on, Lustre with `flock`). Object stores have none: nobody is kept
    out. What killed runs have left is removed.

    Args:
        shard: the process writes part i of n (1 to n), and others may write other parts of the n.

    Raises:
        ValueError: another process writes there, or the same part, or one of another number.
        OSError: the directory cannot be written.
    """
    directory = to_path(directory)
    if isinstance(directory, RemotePath):
        yield
        return
    path = directory.absolute()
    if path in _held or not distributed.is_main():
        distributed.stop_with_main()
        yield
        return
    created = not path.exists()
    with distributed.telling_errors():
        path.mkdir(parents=True, exist_ok=True)
        _held[path] = [_lock(path / LOCK, directory, shared=shard is not None)]
        try:
            if shard is not None:
                _lock_shard(path, directory, *shard)
        except ValueError:
            _release(path)
            raise
        remove_temporaries(path)
    try:
        yield
    finally:
        _release(path)
        if created:
            with suppress(OSError):
                path.rmdir()  # if nothing was written


def _lock_shard(path: Path, directory: str | Path, part: int, count: int) -> None:
    _held[path].append(_lock(path / f"{LOCK}-{part}-of-{count}", directory))
    for other in other_shards(path):
        if other[1] != count:
            raise ValueError(
                f"{directory} is in use: shard {other[0]}/{other[1]} is written there, and "
                f"{part}/{count} may have the same images; wait for it or stop it"
            )


def _release(path: Path) -> None:
    """Removes the lock files that nobody else holds, and lets go of them."""
    for file in reversed(_held.pop(path)):
        if not _is_held_elsewhere(file):
            with suppress(OSError):  # on a drive that has gone
                Path(file.name).unlink()
        file.close()


def _is_held_elsewhere(file: IO[str]) -> bool:
    """Whether another process holds the lock, too, or alone."""
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a drive without locks
        pass
    return False


def other_shards(directory: str | AnyPath) -> list[tuple[int, int]]:
    """The parts i of n of a directory that other processes write now; no object store knows."""
    if isinstance(directory, RemotePath):
        return []
    path, found = Path(directory).absolute(), []
    mine = {file.name for file in _held.get(path, [])}
    for lock in path.glob(f"{LOCK}-*-of-*"):
        if str(lock) not in mine:
            with suppress(FileNotFoundError), lock.open("r+") as file:
                if _is_held_elsewhere(file):
                    part, _, count = lock.name.removeprefix(f"{LOCK}-").partition("-of-")
                    found.append((int(part), int(count)))
    return found


def _lock(path: Path, directory: str | Path, *, shared: bool = False) -> IO[str]:
    """The lock's open file, which holds host and process."""
    deadline = time.monotonic() + PATIENCE
    while True:
        file = path.open("a+")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
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
    for file in itertools.chain.from_iterable(_held.values()):
        file.close()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
