"""Who runs a network over many items: this process, or workers of Ray."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow as pa

from pipeline.inference.ray_engine import ray_cluster

# Of a network, items, and a list that gets a line for each item that is left out: tables of what
# the network finds. It is pickled, so a function at the top of a file, or a `partial` of one.
Work = Callable[[Any, Sequence[Any], list[str]], Iterator[pa.Table]]
Load = Callable[[], tuple[Any, dict]]  # the network and its settings, as `load_proposer`


class Engine(Protocol):
    """Does some work for all items; tables come in any order."""

    def __call__(
        self, work: Work, network: Any, items: Sequence[Any], broken: list[str], *, largest: int
    ) -> Iterator[pa.Table]:
        """Tables of what a network finds.

        Args:
            work, items, broken: see `Work`.
            network: this process's.
            largest: number of items that may be done at once: what a worker that is killed loses.
        """
        ...


def in_this_process(
    work: Work, network: Any, items: Sequence[Any], broken: list[str], *, largest: int
) -> Iterator[pa.Table]:
    """The engine without any."""
    return work(network, items, broken)


@contextmanager
def open_engines(
    name: str, *, workers: int | None, address: str | None, device: str
) -> Iterator[Callable[[Load], Engine]]:
    """What makes engines, given what loads the network in a worker; see `command.add_engine`.

    Raises:
        ValueError: options that do not go together, no Ray, or no cluster.
    """
    if name == "local":
        if workers is not None or address is not None:
            raise ValueError("--workers and --address go with --engine ray")
        yield lambda load: in_this_process
        return
    if "RANK" in os.environ:
        raise ValueError("--engine ray starts workers itself; leave out torchrun")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    if ":" in device:
        raise ValueError(f"--device {device}: with --engine ray every worker has a GPU; give cuda")
    with ray_cluster(address, workers, on_gpus=device == "cuda") as engines:
        yield engines
