"""What the GPU's checks and timings share: a device, configs, stages on synthetic data."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.coco import CocoInstances
from datasets.proposal_boxes import ProposalBoxes
from pipeline.config import STAGES, Config
from pipeline.data import load_split, prepare_data
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.recipe import load_config
from pipeline.training.engine import TrainingRun
from pipeline.training.stages import DeepMaskStage, MultiPathNetStage, SharpMaskStage, Stage
from tools.benchmarks.synthetic import draw_boxes, write_sharpmask
from tools.benchmarks.timing import Rows

CPU = torch.device("cpu")
PROPOSALS = 200  # boxes of an image that the detector is trained on
TINY = (
    *(
        f"{stage}.optim.{setting}"
        for stage in STAGES
        for setting in (
            "batches_per_epoch=2", "epochs=1", "validation_batches=1", "log_every=1", "lr=1e-4",
            "warmup_batches=0",
        )
    ),
    "deepmask.optim.batch_size=8", "sharpmask.optim.batch_size=8",
    "multipathnet.optim.batch_size=2", "multipathnet.width=8", "multipathnet.features=16",
    "multipathnet.pooled_size=3", "multipathnet.sampling.short_side=96",
    "multipathnet.sampling.long_side=128", "propose.log2_scales=[-1,0,0.5]",
    "propose.num_proposals=60",
)  # fmt: skip
RANDOM = ("trunk.weights=null", "multipathnet.trunk.weights=null")
# Dropout draws other numbers on another device, and in another type.
NO_DROPOUT = ("deepmask.dropout=0", "multipathnet.dropout=0")


@dataclass(frozen=True)
class Setup:
    """Where a part runs, and how large.

    Attributes:
        device: what is checked and measured, against the CPU.
        quick: tiny sizes: whether every line works, not whether the figures are good.
        directory: for data, checkpoints and runs; not kept.
    """

    device: torch.device
    quick: bool
    directory: Path

    def tiny(self, *overrides: str) -> Config:
        """Small networks, for what does not depend on the size."""
        return self._load("configs/shapes.yaml", *TINY, *overrides)

    def published(self, *overrides: str) -> Config:
        """ResNet-50 and VGG-16, as published; small ones if it has to be quick."""
        if self.quick:
            return self.tiny(*overrides)
        return self._load("configs/coco.yaml", "data.workers=0", *overrides)

    def _load(self, path: str, *overrides: str) -> Config:
        images = (12, 4) if self.quick else (64, 16)
        shapes = f"{{directory: {self.directory / 'shapes'}, train_images: {images[0]}, "
        shapes += f"val_images: {images[1]}}}"
        config = load_config(path, [f"data.shapes={shapes}", *RANDOM, *overrides])
        prepare_data(config)
        return config

    @cached_property
    def sharpmask(self) -> Path:
        """A checkpoint of published size whose masks have smooth outlines."""
        path = self.directory / "sharpmask.pt"
        write_sharpmask(self.published(), path)
        return path

    def proposer(self, device: torch.device, *, amp: bool, refine: bool = True) -> Proposer:
        """A proposer with the weights of `sharpmask`."""
        proposer, _ = load_proposer(self.sharpmask, device, refine=refine)
        proposer.amp = amp
        return proposer

    def synchronize(self) -> None:
        """Waits until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_stage(name: str, config: Config) -> Stage:
    """A stage with random weights; a SharpMask that starts from its DeepMask, drawn proposals."""
    if name == "deepmask":
        return DeepMaskStage(config)
    if name == "multipathnet":
        splits = {split: load_split(config, split)[0] for split in ("train", "val")}
        return MultiPathNetStage(config, {s: draw_proposals(coco) for s, coco in splits.items()})
    stage = SharpMaskStage(config)
    stage.model.start_from_deepmask()
    return stage


def draw_proposals(coco: CocoInstances) -> ProposalBoxes:
    """Boxes of all sizes in every image."""
    rng = np.random.default_rng(0)
    boxes = [draw_boxes(rng, PROPOSALS, *size) for size in coco.image_sizes.tolist()]
    corners = np.concatenate(boxes)
    corners[:, 2:] += corners[:, :2]
    ids = np.repeat(coco.image_ids, PROPOSALS)
    return ProposalBoxes.from_rows(ids, corners, rng.random(len(ids)))


def start_run(stage: Stage, config: Config, device: torch.device, output: Path) -> TrainingRun:
    """A run that is ready for `train_step`; nothing is written."""
    run = TrainingRun(stage, config, output, device)
    stage.start_phase(0)
    run.model = stage.model
    stage.model.train()
    return run


@contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions and matrix products of float32 without TF32."""
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def at_least(measured: float, limit: float) -> dict[str, float]:
    """A row of a check; a figure that is not a number fails."""
    return {"measured": measured, "limit": limit, "ok": float(measured >= limit)}


def at_most(measured: float, limit: float) -> dict[str, float]:
    """As `at_least`."""
    return {"measured": measured, "limit": limit, "ok": float(measured <= limit)}


def failed(rows: Rows) -> list[str]:
    """The rows whose check failed."""
    return [name for name, row in rows.items() if row.get("ok") == 0]
