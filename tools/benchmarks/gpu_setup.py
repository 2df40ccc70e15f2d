"""What the GPU's checks and timings share: stages on synthetic data, figures of calls, limits."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from datasets.coco import CocoInstances
from datasets.proposal_boxes import ProposalBoxes
from pipeline.config import STAGES, Config
from pipeline.data import load_split, prepare_data
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.recipe import load_config
from pipeline.training.engine import TrainingRun
from pipeline.training.stages import DeepMaskStage, MultiPathNetStage, SharpMaskStage, Stage
from tools.benchmarks.synthetic import draw_corners, write_sharpmask
from tools.benchmarks.timing import Calls, Rows, interleave

CPU = torch.device("cpu")
PRECISIONS = ("fp32", "bf16")
Call = Callable[[], object]
PROPOSALS = 200  # boxes of an image that the detector is trained on
TINY_OPTIM = (
    "batches_per_epoch=2", "epochs=1", "validation_batches=1", "log_every=1", "lr=1e-4",
    "warmup_batches=0",
)  # fmt: skip
TINY = (
    *(f"{stage}.optim.{setting}" for stage in STAGES for setting in TINY_OPTIM),
    "deepmask.optim.batch_size=8", "sharpmask.optim.batch_size=8",
    "multipathnet.optim.batch_size=2", "multipathnet.width=8", "multipathnet.features=16",
    "multipathnet.pooled_size=3", "multipathnet.sampling.short_side=96",
    "multipathnet.sampling.long_side=128", "propose.log2_scales=[-1,0,0.5]",
    "propose.num_proposals=60",
)  # fmt: skip
RANDOM = ("trunk.weights=null", "multipathnet.trunk.weights=null")
ROUNDS, SECONDS = 3, 0.25  # of a call, which repeats as often as fits in so many seconds
MAX_REPEATS = 50


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
        train, val = (12, 4) if self.quick else (64, 16)
        directory = self.directory / "shapes"
        shapes = f"{{directory: {directory}, train_images: {train}, val_images: {val}}}"
        config = load_config(path, [f"data.shapes={shapes}", *RANDOM, *overrides])
        prepare_data(config)
        return config

    @cached_property
    def sharpmask(self) -> Path:
        """A checkpoint of published size whose masks have smooth outlines."""
        path = self.directory / "sharpmask.pt"
        write_sharpmask(self.published(), path)
        return path

    def proposer(
        self, precision: str, *, refine: bool = True, device: torch.device | None = None
    ) -> Proposer:
        """A proposer with the weights of `sharpmask`."""
        where = device or self.device
        return load_proposer(self.sharpmask, where, refine=refine, precision=precision)[0]

    def synchronize(self) -> None:
        """Waits until the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def make_stage(name: str, config: Config) -> Stage:
    """A stage with random weights; a SharpMask that starts from its DeepMask, drawn proposals."""
    if name == "deepmask":
        return DeepMaskStage(config)
    if name == "multipathnet":
        boxes = {s: draw_proposals(load_split(config, s)[0]) for s in ("train", "val")}
        return MultiPathNetStage(config, boxes, ProposalStore(Path()))  # of masks: there are none
    stage = SharpMaskStage(config)
    stage.model.start_from_deepmask()
    return stage


def draw_proposals(coco: CocoInstances) -> ProposalBoxes:
    """Boxes of all sizes in every image."""
    rng = np.random.default_rng(0)
    sizes = coco.image_sizes.tolist()
    corners = np.concatenate([draw_corners(rng, PROPOSALS, *size) for size in sizes])
    ids = np.repeat(coco.image_ids, PROPOSALS)
    return ProposalBoxes.from_rows((ids, corners, rng.random(len(ids))))


def start_run(setup: Setup, stage: Stage, precision: str) -> TrainingRun:
    """A run that is ready for `train_step`; nothing is written."""
    run = TrainingRun(stage, stage.config, setup.directory / "run", setup.device)
    run.precision = precision
    stage.start_phase(0)
    run.model = stage.model.train()
    return run


def median_seconds(setup: Setup, calls: Calls) -> dict[str, float]:
    """Seconds of each alternative, called in turn and each repeated without a wait between."""
    repeats = dict.fromkeys(calls, 1 if setup.quick else 3)

    def repeated() -> Calls:
        return {name: partial(run, setup, call, repeats[name]) for name, call in calls.items()}

    if not setup.quick:  # the first round warms up: memory, plans of cuDNN
        for name, [seconds] in interleave(repeated(), rounds=1).items():
            repeats[name] = max(1, min(MAX_REPEATS, round(SECONDS * repeats[name] / seconds)))
    times = interleave(repeated(), rounds=1 if setup.quick else ROUNDS)
    return {name: statistics.median(times[name]) / repeats[name] for name in calls}


def run(setup: Setup, call: Call, repeats: int) -> None:
    """Calls it so often, and waits for the device at the end."""
    for _ in range(repeats):
        call()
    setup.synchronize()


def rates(setup: Setup, calls: Calls, samples: int = 1, *, row: str = "{}") -> Rows:
    """How many samples a second, for each alternative; a call has so many `samples`.

    `row` is the name of a row, given that of its alternative.
    """
    seconds = median_seconds(setup, calls)
    return {row.format(name): {"measured": samples / each} for name, each in seconds.items()}


def measure(
    setup: Setup, call: Call, floor: Call, *, aim: float, samples: int = 1
) -> dict[str, float]:
    """A row: samples a second, peak memory, how much of the time the GPU idles, floor and aim."""
    row, cuda = {}, setup.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(setup.device)
    [seconds] = median_seconds(setup, {"call": call}).values()
    row["measured"] = samples / seconds
    if cuda:
        row["peak GB"] = torch.cuda.max_memory_allocated(setup.device) / 1e9
    if busy := busy_seconds(setup, call):  # the profiler may not be allowed to see the GPU
        row["idle"] = max(0.0, 1 - busy / seconds)
    [least] = median_seconds(setup, {"floor": floor}).values()
    return row | {"floor": samples / least, "aim": aim}


def busy_seconds(setup: Setup, call: Call) -> float:
    """Seconds of a call in which at least one kernel ran.

    From the profiler, which slows down what launches the kernels, but not the kernels.
    """
    cuda, repeats = setup.device.type == "cuda", 1 if setup.quick else 3
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run(setup, call, repeats)
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    events: list[Any] = [
        event
        for event in profiler.events() or ()
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    busy, end = 0.0, -math.inf
    for start, stop in sorted((e.time_range.start, e.time_range.end) for e in events):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6 / repeats


def at_least(measured: float, limit: float) -> dict[str, float]:
    """A row of a check; a figure that is not a number fails."""
    return {"measured": measured, "limit": limit, "ok": float(measured >= limit)}


def at_most(measured: float, limit: float) -> dict[str, float]:
    """As `at_least`."""
    return {"measured": measured, "limit": limit, "ok": float(measured <= limit)}


def failed(rows: Rows) -> list[str]:
    """The rows whose check failed."""
    return [name for name, row in rows.items() if row.get("ok") == 0]
