"""Runs a network over many items by workers of Ray Data, on this machine or on a cluster.

Ray Data gives chunks of the items to actors, each with the network, and starts anew what was
killed: a chunk is one task, whose output is one block. Tables come to this process, which alone
writes. Ray is optional: `pip install ".[ray]"`.
"""

import logging
import os
import pickle
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from tqdm import tqdm

from datasets.files import HOST, is_alive
from pipeline.command import describe_error
from pipeline.config import ROOT
from pipeline.inference.image_files import NETWORK_ERRORS, describe_failure
from pipeline.inference.memory import keep_freed_blocks

CHUNKS = 32  # for each worker, so that all end at about the same time
WAVE = 2**15  # chunks of which Ray knows at once: it keeps a kilobyte or two for each
NO_PROGRESS = 6 * 3600  # seconds without a finished chunk after which a run is given up
PATIENCE = 10  # seconds for a cluster to answer, and for killed processes to let go of their files
FOLDER, OWNER = "maskpath-ray-", "owner"  # of a cluster of ours; the process it belongs to
MESSAGE, FAILURE = "message", "failure"  # columns: of an item left out; why a worker cannot work
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
# A cluster of ours answers on this machine alone (the second), and who knows its token.
OURS = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# What of it Ray has read, which it does when it is imported: later clusters of this process need
# the same. Nothing, where somebody else has imported it.
_imported_with: dict[str, str] = {}


@contextmanager
def ray_cluster(
    address: str | None, workers: int | None, *, on_gpus: bool
) -> Iterator[Callable[[Callable], "RayEngine"]]:
    """Engines on the cluster at an address, or on one of this process's own, which ends with it.

    Args:
        address: HOST:PORT, or "auto" for the cluster that this machine belongs to.
        workers: how many; by default one for each GPU of the cluster, or for each CPU.
        on_gpus: each worker has a GPU.

    Raises:
        ValueError: Ray is not installed, no cluster answers, or it has no GPU.
    """
    if address is not None:
        _knock(address)
    elif "ray" not in sys.modules:
        _imported_with.update(OURS, RAY_AUTH_TOKEN=secrets.token_hex(32))
    variables = QUIET if address is not None else QUIET | _imported_with
    variables = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(variables)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError('--engine ray needs Ray: pip install "ray[data]"') from error
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        # Where the checkout lies at the same place on all machines.
        "runtime_env": {"env_vars": {"PYTHONPATH": str(ROOT)}},
    }
    folder = None
    try:
        if address is None:
            folder = _make_folder()
            options |= {"include_dashboard": False, "_temp_dir": str(folder)}
        else:
            print(f"joining the cluster of Ray at {address}; it keeps silent at a wrong token")
        try:
            with _stop_signals_kept(), _no_standard_error():
                ray.init(address or "local", **options)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise ValueError(f"--engine ray: {error}") from None
        _hush(ray)
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 1), resources.get("GPU", 0)
        if on_gpus and not gpus:
            raise ValueError("--engine ray --device cuda: the cluster has no GPU")
        count = workers or max(1, int(gpus if on_gpus else cpus))
        yield lambda load: RayEngine(ray, load, count, cpus / count, on_gpus=on_gpus)
    finally:
        ray.shutdown()
        for name in variables:  # the token is this cluster's
            os.environ.pop(name, None)
        if folder is not None:
            _remove(folder)


class RayEngine:
    """Workers with a network; see `Engine`."""

    def __init__(self, ray: Any, load: Callable, workers: int, cpus: float, *, on_gpus: bool):
        """`cpus`: of each worker."""
        self._ray, self._load, self._workers = ray, load, workers
        self._cpus, self._on_gpus = cpus, on_gpus

    def __call__(
        self, work: Callable, network: Any, items: Sequence[Any], broken: list[str], *, largest: int
    ) -> Iterator[pa.Table]:
        """See `Engine`. A ValueError says why no worker can work."""
        size = min(largest, max(1, len(items) // (self._workers * CHUNKS)))
        for start in range(0, len(items), WAVE * size):
            wave = range(start, min(len(items), start + WAVE * size), size)
            chunks = [{"items": pickle.dumps(items[i : i + size])} for i in wave]
            for table in self._run(work, chunks):
                if FAILURE in table.column_names:
                    raise ValueError(f"a worker cannot work: {table[FAILURE][0]}")
                is_message = table[MESSAGE].is_valid()
                for message in table[MESSAGE].filter(is_message).to_pylist():
                    broken.append(message)
                    tqdm.write(f"skipped: {message}")
                rows = table.filter(pc.invert(is_message)).drop_columns(MESSAGE)
                if len(rows):
                    yield rows

    def _run(self, work: Callable, chunks: list[dict[str, bytes]]) -> Iterator[pa.Table]:
        data, threads = self._ray.data, max(1, int(self._cpus))
        count = min(self._workers, len(chunks))
        # Actors are started again without limit, and so are the tasks of one that was killed: Ray
        # Data's defaults (`max_restarts` and `max_task_retries` of -1), which its newest versions
        # do not let one name.
        dataset = data.from_items(chunks, override_num_blocks=len(chunks)).map_batches(
            Worker,
            fn_constructor_args=(self._load, work, threads, os.getcwd()),
            batch_size=1,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=count),
            num_cpus=1 if self._on_gpus else min(self._cpus, threads),
            num_gpus=1 if self._on_gpus else None,
        )
        try:
            yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        except data.exceptions.ExecutionTimeoutError:
            raise ValueError(
                f"no worker of Ray has finished anything for {NO_PROGRESS // 60} minutes: the "
                "cluster is full, images take very long, or one ends every process it comes to"
            ) from None
        except self._ray.exceptions.RayActorError as error:  # not one that was killed
            last = str(error).strip().splitlines()[-1]
            raise ValueError(
                f"a worker cannot start: {last} (the checkout must lie at {ROOT} on every machine)"
            ) from None


class Worker:
    """A process of Ray's with the network."""

    def __init__(self, load: Callable, work: Callable, threads: int, folder: str):
        """Paths are relative to `folder`, as in the process that has them."""
        keep_freed_blocks()
        torch.set_num_threads(threads)
        with suppress(OSError):  # a machine that has it not: paths are absolute, or URIs
            os.chdir(folder)
        self._work, self._network, self._failure = work, None, ""
        try:
            self._network, _ = load()
        except (ValueError, OSError, *NETWORK_ERRORS) as error:
            self._failure = describe_error(error)
            if isinstance(error, NETWORK_ERRORS):
                self._failure = describe_failure(error, None, "lower --workers")

    def __call__(self, chunk: pa.Table) -> pa.Table:
        """The rows of a chunk, and those of items that were left out, with a message."""
        if self._failure:
            return pa.table({FAILURE: [self._failure]})
        broken: list[str] = []
        items = pickle.loads(chunk["items"][0].as_py())
        try:
            tables = list(self._work(self._network, items, broken))
        except (ValueError, OSError) as error:
            return pa.table({FAILURE: [describe_error(error)]})
        tables.append(pa.table({MESSAGE: pa.array(broken, pa.string())}))
        return pa.concat_tables(tables, promote_options="default").combine_chunks()


def _knock(address: str) -> None:
    """Raises a ValueError if nobody answers at HOST:PORT: Ray itself would wait for a minute."""
    if address == "auto":
        return
    host, mark, port = address.rpartition(":")
    if not mark or "/" in host or not port.isdecimal():
        raise ValueError(f"--address must be HOST:PORT or auto, got {address}")
    try:
        socket.create_connection((host, int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--address {address}: no cluster answers there ({error})") from None


def _hush(ray: Any) -> None:
    """Ray Data prints nothing; progress is shown here, and errors are raised."""
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.target_max_block_size = None  # a task's output is one block: all of it comes, or none
    context.execution_no_progress_timeout_s = NO_PROGRESS


@contextmanager
def _stop_signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself; it shall end as this process does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _no_standard_error() -> Iterator[None]:
    """Ray's C++ says on standard error that it will say nothing there; what fails is raised."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _make_folder() -> Path:
    """A folder for a cluster of this process; those of killed ones are removed."""
    top = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()  # names of sockets are short
    for owner in Path(top).glob(f"{FOLDER}*/{OWNER}"):
        with suppress(OSError, ValueError):
            host, pid = owner.read_text().split()
            if host == HOST and not is_alive(int(pid)):
                shutil.rmtree(owner.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=FOLDER, dir=top))
    (folder / OWNER).write_text(f"{HOST} {os.getpid()}")
    return folder


def _remove(folder: Path) -> None:
    """Removes a cluster's folder, into which its last processes may still write."""
    deadline = time.monotonic() + PATIENCE
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
