#!/usr/bin/env python
r"""Start of a run whose images are all done: seconds and memory, at many images.

    python tools/benchmarks/store.py --images 1000000 --images-per-shard 800

A list of the images, and a store of as many with two proposals each: what a start reads of it is
independent of these. The first start has no index of the shards, the second one has.
"""

import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.command import run_tool
from pipeline.inference.proposal_store import INDEX, ProposalStore
from pipeline.inference.proposals import Proposals
from pipeline.inference.propose_folders import propose_images
from pipeline.inference.shards import GROUP_IMAGES
from tools.benchmarks.timing import make_parser, report

SETTINGS = {"num_proposals": 2}


def main() -> None:
    """Writes a store, and starts on it twice."""
    args = make_parser(__doc__, images=1_000_000, images_per_shard=800).parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as directory:
        images, output = Path(directory) / "images.txt", Path(directory) / "store"
        names = [f"{n % 1000:03}/{n:032x}.jpg" for n in range(args.images)]
        images.write_text("\n".join(names))
        write_store(output, names, args.images_per_shard, Path(directory))
        for name in ("without an index", "with an index"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                rows[name] = pool.apply(start, (images, output))
        rows["with an index"]["MB of the index"] = (output / INDEX).stat().st_size / 2**20
    report({"start": rows}, args.output)


def write_store(output: Path, names: list[str], step: int, folder: Path) -> None:
    """A store in which the images are done."""
    store = ProposalStore(output)
    store.open_for(SETTINGS | {"backend": "torch", "image_folder": str(folder), "exif": None})
    logits, boxes = np.array([2, 1], np.float32), np.array([[0, 0, 9, 9]] * 2, np.float32)
    image = Proposals(1, "", 480, 640, logits, boxes, [b"0hb0hb0", b"1hb0hb0"])
    store.write_shard([image] * step)
    template = pq.read_table(store.shards()[0])
    for index, first in enumerate(range(0, len(names), step)):
        part = names[first : first + step]
        ids = pa.array(range(first + 1, first + len(part) + 1))
        table = template.slice(0, len(part)).set_column(0, "image_id", ids)
        table = table.set_column(1, "file_name", pa.array(part))
        path = output / f"proposals-000-{index:06d}.parquet"
        pq.write_table(table, path, compression="zstd", row_group_size=GROUP_IMAGES)


def start(images: Path, output: Path) -> dict[str, float]:
    """Seconds of a run that finds nothing to do, and its peak of memory beyond the imports'."""
    proposer: Any = None  # is not called
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, begun = peak(), time.perf_counter()
    summary = propose_images(proposer, images, output, settings=SETTINGS, write_json=False)
    assert summary.done == 0 and not summary.broken
    return {"seconds": time.perf_counter() - begun, "MB": peak() - before, "MB in all": peak()}


def peak() -> float:
    """Of this process's resident memory, in MB."""
    [kilobytes] = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) / 2**10


if __name__ == "__main__":
    run_tool(main)
