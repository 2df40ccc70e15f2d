"""What may make training faster on a GPU, measured before it is built; and the loader alone."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.coco import CocoInstances
from datasets.loading import batch_loader
from datasets.patches import PatchDataset, patch_batches
from models.trunk import SymmetricConv2d, build_trunk, fold_norms, symmetric_pad
from pipeline import distributed
from pipeline.data import patch_dataset
from pipeline.training.engine import TrainingRun
from tools.benchmarks.gpu_clock import capture, seconds_within
from tools.benchmarks.gpu_setup import Setup
from tools.benchmarks.gpu_speed import (
    BATCHES,
    QUICK_BATCHES,
    proposal_image,
    proposal_parts,
    rates,
    ready_run,
)
from tools.benchmarks.synthetic import HEIGHT, WIDTH, draw_dataset, draw_image
from tools.benchmarks.timing import Calls, Rows

IMAGES = 128  # for the loader, of COCO's size and as many objects
LOADING_SECONDS = 3.0
# Channels and sides of maps of ResNet-50 in training.
MAPS = ((64, 48), (128, 24), (256, 12))


def time_loading(setup: Setup) -> Rows:
    """Patches a second of the loading processes alone, then with training."""
    rng, folder = np.random.default_rng(0), setup.directory / "loading"
    folder.mkdir()
    content = draw_dataset(rng, 8 if setup.quick else IMAGES)
    (folder / "instances.json").write_text(json.dumps(content))
    for image in content["images"]:
        cv2.imwrite(str(folder / image["file_name"]), draw_image(rng, HEIGHT, WIDTH))
    c, coco = setup.published().deepmask, CocoInstances.load(folder / "instances.json")
    rows: Rows = {}
    size = 8 if setup.quick else 256
    cores = os.cpu_count() or 1
    for shared in (1, 4):
        sampling = replace(c.sampling, patches_per_image=shared)
        data = patch_dataset(c, coco, folder, sampling=sampling, target_size=c.target_size, seed=0)
        for workers in (1,) if setup.quick else sorted({4, 8, cores}):
            loader = load(setup, data, size, workers)
            rows[f"{shared} from an image, {workers} workers, patches"] = {
                "measured": size / seconds_within(setup, loader, budget(setup))
            }
    workers = 1 if setup.quick else cores
    run, _ = ready_run(setup, "deepmask", size, f"data.workers={workers}")
    steps = training_steps(run, setup)
    rows[f"training DeepMask, batch {size}, {workers} workers, patches"] = {
        "measured": size / seconds_within(setup, steps, budget(setup))
    }
    return rows


def budget(setup: Setup) -> float:
    """Seconds for each figure of the loader."""
    return 0.2 if setup.quick else LOADING_SECONDS


def load(setup: Setup, data: PatchDataset, size: int, workers: int) -> Iterator[dict]:
    """Minibatches of so many patches, in pinned memory."""
    indices = patch_batches(
        range(100_000),
        batches_per_epoch=1000,
        groups_per_batch=size // data.patches_per_image,
    )
    pin_memory = setup.device.type == "cuda"
    yield from batch_loader(data, indices, data.collate, workers=workers, pin_memory=pin_memory)


def training_steps(run: TrainingRun, setup: Setup) -> Iterator[None]:
    """The training loop, without a validation; the last wait is for the device."""
    for batch in run.stage.training_batches(range(100_000), setup.device):
        run.train_step(batch)
        yield


def time_step(setup: Setup) -> Rows:
    """DeepMask's training step, and changes of it."""
    rows: Rows = {}
    for size in QUICK_BATCHES if setup.quick else BATCHES:
        run, batch = ready_run(setup, "deepmask", size)
        step, bare = partial(run.train_step, batch), forward_and_backward(run, batch)
        calls: Calls = {
            "as it is": step,
            "without the check for finite losses": without_check(step),
            "cudnn.benchmark": with_benchmark(step),
            "forward and backward alone": bare,
        }
        found = rates(setup, calls, size)
        rows |= {f"batch {size}, {name}, patches": row for name, row in found.items()}
        del run, batch, step, bare, calls
    return rows


def time_graphs(setup: Setup) -> Rows:
    """CUDA graphs, which take the launching of kernels off the CPU; sizes must repeat."""
    rows: Rows = {}
    for size in QUICK_BATCHES if setup.quick else BATCHES:
        run, batch = ready_run(setup, "deepmask", size)
        graph = capture(setup, forward_and_backward(run, batch))
        name = f"DeepMask, batch {size}, forward and backward, patches"
        rows |= rates(setup, {name: graph}, size)
        del run, batch, graph
    image = proposal_image(setup)
    for name, refine in (("DeepMask", False), ("SharpMask", True)):
        proposer = setup.proposer(setup.device, amp=True, refine=refine)
        network = proposal_parts(proposer, image)["network"]
        rows |= rates(setup, {f"{name}, network, images": capture(setup, network)})
    return rows


def without_check(step: Callable[[], object]) -> Callable[[], object]:
    """The step without its wait for the loss."""

    def call() -> None:
        with mock.patch.object(distributed, "any_process", lambda *flags, device: [False]):
            step()

    return call


def with_benchmark(step: Callable[[], object]) -> Callable[[], object]:
    """The step with cuDNN choosing its algorithms by timing them."""

    def call() -> None:
        with benchmark():
            step()

    return call


@contextmanager
def benchmark() -> Iterator[None]:
    """Turns cudnn.benchmark on."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def forward_and_backward(run: TrainingRun, batch: dict) -> Callable[[], None]:
    """A training step without the optimizer's and without a wait."""
    device = run.device.type

    def call() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = run.stage.losses(run.model, batch)
        losses["loss"].backward()

    return call


def time_compile(setup: Setup) -> Rows:
    """`torch.compile` of DeepMask, forward and backward."""
    rows: Rows = {}
    for size in QUICK_BATCHES if setup.quick else BATCHES[:1]:
        run, batch = ready_run(setup, "deepmask", size)
        bare = forward_and_backward(run, batch)
        rows |= rates(setup, {f"batch {size}, as it is, patches": bare}, size)
        # Without a compiler, to see on any machine whether it works.
        backend = "eager" if setup.quick else "inductor"
        compiled: Any = torch.compile(run.model, backend=backend)
        run.model = compiled
        start = time.monotonic()
        bare()
        setup.synchronize()
        rows[f"batch {size}, seconds of compiling"] = {"measured": time.monotonic() - start}
        rows |= rates(setup, {f"batch {size}, compiled, patches": bare}, size)
    return rows


def time_trunk(setup: Setup) -> Rows:
    """Variants of the trunk, forward and backward in bfloat16."""
    config = setup.published()
    size, side = (2, 64) if setup.quick else (256, config.deepmask.patch_size + 32)
    pixels = torch.randn(size, 3, side, side, device=setup.device)
    last = pixels.contiguous(memory_format=torch.channels_last)
    calls: Calls = {}
    for padding in ("symmetric", "zero"):
        for folded in (False, True):
            trunk = build_trunk(config.trunk.name, padding=padding)
            if folded:
                fold_norms(trunk)
            trunk.to(setup.device).to(memory_format=torch.channels_last)
            name = f"padding {padding}{', norms folded' if folded else ''}"
            calls[name] = partial(trunk_step, trunk, last)
    half = build_trunk(config.trunk.name, padding="zero").to(setup.device).bfloat16()
    half.to(memory_format=torch.channels_last)
    calls["padding zero, weights in bfloat16"] = partial(trunk_step, half, last.bfloat16())
    planes = build_trunk(config.trunk.name).to(setup.device)
    calls["padding symmetric, channels first"] = partial(trunk_step, planes, pixels)
    calls["padding symmetric, cudnn.benchmark"] = with_benchmark(calls["padding symmetric"])
    return {f"{name}, patches": row for name, row in rates(setup, calls, size).items()}


def trunk_step(trunk: nn.Module, pixels: Tensor) -> None:
    """Forward and backward."""
    trunk.zero_grad(set_to_none=True)
    with torch.autocast(pixels.device.type, torch.bfloat16):
        features = trunk(pixels)[-1]
    features.float().sum().backward()


def time_padding(setup: Setup) -> Rows:
    """Convolutions by their padding, forward and backward; which layout padded maps have."""
    rows: Rows = {}
    for channels, side in MAPS[-1:] if setup.quick else MAPS:
        shape = (2 if setup.quick else 256, channels, side, side)
        maps = torch.randn(shape, device=setup.device, dtype=torch.bfloat16)
        maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
        replicate = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="replicate")
        layers: dict[str, nn.Module] = {
            "F.pad": replicate,
            "cat": SymmetricConv2d(channels, channels, 3, padding=1),
            "zero": nn.Conv2d(channels, channels, 3, padding=1),
        }
        calls: Calls = {}
        for name, layer in layers.items():
            layer.to(setup.device).to(memory_format=torch.channels_last)
            calls[name] = partial(convolve, layer, maps)
        padded: dict[str, Tensor] = {
            "F.pad": F.pad(maps, (1, 1, 1, 1), mode="replicate"),
            "cat": symmetric_pad(maps, 1),
        }
        for name, row in rates(setup, calls, shape[0]).items():
            if name in padded:
                is_last = padded[name].is_contiguous(memory_format=torch.channels_last)
                row["channels last"] = float(is_last)
            rows[f"{channels} x {side} x {side}, {name}, maps"] = row
    return rows


def convolve(layer: nn.Module, maps: Tensor) -> None:
    """Forward and backward of a layer."""
    maps.grad = None
    layer.zero_grad(set_to_none=True)
    with torch.autocast(maps.device.type, torch.bfloat16):
        convolved = layer(maps)
    convolved.sum().backward()


PARTS: dict[str, Callable[[Setup], Rows]] = {
    "loading": time_loading,
    "step": time_step,
    "graphs": time_graphs,
    "trunk": time_trunk,
    "padding": time_padding,
    "compiling": time_compile,
}
