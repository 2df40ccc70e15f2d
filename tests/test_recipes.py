"""The published recipes at their real sizes: two minibatches of every stage on real images.

Slow (`make test-slow`): the detector has 624 M parameters, 598 M of them in the fully connected
layers of its five towers; with gradients and momentum that is 7 GiB before the first feature.
Prints seconds and memory of each stage.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from datasets.coco import CocoInstances
from pipeline.checkpoint import load_checkpoint
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Proposals
from tests.real_data import COCO_MINI, needs

ROOT = Path(__file__).resolve().parents[1]
DATA = COCO_MINI
pytestmark = [
    pytest.mark.slow,
    needs(DATA),
]
NEEDED = 12 * 2**30  # bytes: the largest stage's, and room for the page cache of its checkpoint
TRAIN = """
import resource, sys, runpy
sys.argv[0] = "train_stage.py"
try:
    runpy.run_path(sys.argv.pop(1), run_name="__main__")
finally:
    print("peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def data_overrides() -> list[str]:
    overrides = []
    for split in ("train", "val"):
        overrides += [
            f"data.{split}.annotations={DATA}/annotations/instances_{split}.json",
            f"data.{split}.images={DATA}/images/{split}",
        ]
    return [*overrides, "data.workers=0", "trunk.weights=null", "multipathnet.trunk.weights=null"]


def short(stage: str, batch: int) -> list[str]:
    """Two minibatches of `batch`, one of validation."""
    return [
        f"{stage}.optim.{setting}"
        for setting in (
            f"batch_size={batch}",
            "batches_per_epoch=2",
            "epochs=1",
            "validation_batches=1",
            "log_every=1",
        )
    ]


def train(stage: str, config: str, output: Path, overrides: list[str]) -> tuple[float, int]:
    """Seconds and MB of a stage in a process of its own."""
    command = [sys.executable, "-c", TRAIN, str(ROOT / "tools" / "train_stage.py")]
    command += ["--stage", stage, "--config", f"configs/{config}.yaml", "--output", str(output)]
    command += ["--device", "cpu", "--set", *data_overrides(), *overrides]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.rsplit("peak MB", 1)[1])
    return time.monotonic() - start, peak


def jittered_objects(directory: Path, split: str) -> Path:
    """A store whose proposals are the annotated boxes, shifted: what they are does not matter."""
    coco = CocoInstances.load(DATA / "annotations" / f"instances_{split}.json")
    rng, store = np.random.default_rng(0), ProposalStore(directory)
    store.open_for({})
    images = []
    for image in range(len(coco)):
        rows = slice(coco.image_starts[image], coco.image_starts[image + 1])
        height, width = coco.image_sizes[image].tolist()
        boxes = np.repeat(coco.boxes[rows], 20, axis=0)
        boxes = boxes + rng.normal(0, 8, boxes.shape)
        boxes = boxes.clip(0, [width, height, width, height]).astype(np.float32)
        boxes = boxes[(boxes[:, 2:] - boxes[:, :2] > 1).all(1)]
        scores = np.sort(rng.random(len(boxes)).astype(np.float32))[::-1]
        name = coco.file_name(image)
        identity = (int(coco.image_ids[image]), name, height, width)
        images.append(Proposals(*identity, scores, boxes, [b"0"] * len(boxes)))
    store.write_shard(images)
    return directory


@pytest.mark.parametrize("config", ["coco", "coco_vgg", "voc"])
def test_every_stage_of_a_published_recipe_runs_at_its_real_size(config, tmp_path, capsys):
    stores = [f"init.{s}_proposals={jittered_objects(tmp_path / s, s)}" for s in ("train", "val")]
    for stage, batch in (("deepmask", 4), ("sharpmask", 4), ("multipathnet", 1)):
        if stage == "multipathnet" and psutil.virtual_memory().available < NEEDED:
            pytest.skip(f"{config}: {stage} needs {NEEDED >> 30} GiB of free memory")
        output = tmp_path / stage
        seconds, peak = train(stage, config, output, [*short(stage, batch), *stores])
        with capsys.disabled():  # at once: the next stage may not get to its end
            print(f"\n{config} {stage}: {seconds:.0f} s, {peak} MB", flush=True)
        checkpoint = load_checkpoint(output / "checkpoints" / "last.pt", stage=stage)
        assert checkpoint["step"] == 2
        assert all(torch.isfinite(v).all() for v in checkpoint["model"].values())
    shutil.rmtree(tmp_path)  # 10 GB of checkpoints, which pytest would keep
