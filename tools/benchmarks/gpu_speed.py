"""Training, proposals and detection on a GPU, of what their time is made, and what may be faster.

All figures are a second. The floor of a call is a bare loop of its trunk in bfloat16 on tensors
that are ready, forward and, where the trunk is trained, backward. The aims are for an H100.
"""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.loading import batch_loader
from models.inference import optimize_for_inference
from models.trunk import SymmetricConv2d, Trunk, build_trunk, symmetric_pad
from pipeline import distributed
from pipeline.data import patch_dataset
from pipeline.inference.cells import best_cells
from pipeline.inference.detect import Detector, select_boxes
from pipeline.inference.propose import MASK_CHUNK, Proposer
from pipeline.networks import make_multipathnet
from pipeline.training.engine import TrainingRun
from tools.benchmarks import gpu_setup as kit
from tools.benchmarks.gpu_setup import Call, Setup, measure, rates
from tools.benchmarks.synthetic import draw_image, draw_rois, make_detector, write_dataset
from tools.benchmarks.timing import Calls, Rows

AIMS = {"deepmask": 3000, "sharpmask": 6000, "multipathnet": 12, "proposer": 25, "detector": 20}
BATCHES, QUICK_BATCHES = (32, 256), (8,)  # patches
ROIS = 400
FROZEN_LEVELS = {"coco.yaml": 4, "coco_1gpu.yaml": 1}  # of the detector's trunk, by recipe
NETWORKS = {"DeepMask": False, "SharpMask": True}  # whether masks are refined
IMAGES = 128  # for the loader, of COCO's size and as many objects
LOADING_SECONDS = 3.0  # for each figure of the loader
MAPS = ((64, 48), (128, 24), (256, 12))  # channels and sides of maps of ResNet-50 in training
# cuDNN chooses its algorithms by timing them.
with_benchmark = torch.backends.cudnn.flags(enabled=True, benchmark=True)


def time_training(setup: Setup) -> Rows:
    """The whole training step of each stage on a minibatch that is ready."""
    rows: Rows = {}

    def add(title: str, name: str, size: int, *options: str, trained: bool) -> None:
        run, batch = ready_run(setup, name, size, *options)
        pixels = batch["images" if name == "multipathnet" else "patches"]
        floor = one_pass(run.stage.trunk, pixels, trained=trained)
        step = partial(run.train_step, [batch])
        rows[title] = measure(setup, step, floor, aim=AIMS[name], samples=len(pixels))

    for name in ("deepmask", "sharpmask"):
        for size in batch_sizes(setup):
            add(f"{name}, batch {size}, patches", name, size, trained=name == "deepmask")
    size = 2 if setup.quick else 4
    for recipe, levels in FROZEN_LEVELS.items():
        frozen = f"multipathnet.trunk.frozen_levels={levels}"
        title = f"multipathnet, as {recipe}, batch {size}, images"
        add(title, "multipathnet", size, frozen, trained=levels < 4)
    return rows


def batch_sizes(setup: Setup) -> tuple[int, ...]:
    """Of minibatches of patches."""
    return QUICK_BATCHES if setup.quick else BATCHES


def ready_run(
    setup: Setup, name: str, size: int, *overrides: str
) -> tuple[TrainingRun, dict[str, Any]]:
    """A run of a stage in bfloat16, and a minibatch of mask patches or images on the device."""
    options = [f"{name}.optim.batch_size={size}", *overrides]
    if name != "multipathnet":
        sampling = f"{name}.sampling"
        options += [f"{sampling}.mask_batch_prob=1", f"{sampling}.patches_per_image=4"]
    stage = kit.make_stage(name, setup.published(*options))
    run = kit.start_run(setup, stage, "bf16")
    [[batch]] = stage.training_batches(range(1), setup.device)
    return run, batch


def one_pass(module: nn.Module, *inputs: Tensor, trained: bool = True) -> Call:
    """A call of a module in bfloat16 on each input: forward and, if it is trained, backward."""

    def call() -> None:
        module.zero_grad(set_to_none=True)
        for pixels in inputs:
            pixels.grad = None
            autocast = torch.autocast(pixels.device.type, torch.bfloat16)
            with torch.set_grad_enabled(trained), autocast:
                found = module(pixels)
            if trained:
                (found[-1] if isinstance(module, Trunk) else found).float().sum().backward()

    return call


def time_proposals(setup: Setup) -> Rows:
    """Proposals of an image as RLE, and of what their time is made."""
    rows: Rows = {}
    for name, refine in NETWORKS.items():
        proposer = setup.proposer("bf16", refine=refine)
        calls, count = proposal_calls(setup, proposer), proposer.options.num_proposals
        title = f"{name}, {count} masks, {len(proposer.log2_scales)} scales, images"
        call, floor = calls.pop("all"), calls.pop("floor")
        rows[title] = measure(setup, call, floor, aim=AIMS["proposer"])
        rows |= rates(setup, calls, row=f"{name}, {{}}")
    return rows


def proposal_calls(setup: Setup, proposer: Proposer) -> Calls:
    """A proposer's call, its floor, and its steps on what the steps before have left."""
    image = draw_image(np.random.default_rng(0), *((96, 128) if setup.quick else ()))
    scales, count = proposer.log2_scales, proposer.options.num_proposals
    pixels = [proposer.scale(image, scale)[0] for scale in scales]
    pyramid = [proposer.run_scale(image, scale) for scale in scales]
    logits = [scale.score_logits for scale in pyramid]
    _, cells = best_cells(logits, count)
    chunks, size, inference = cells.split(MASK_CHUNK), image.shape[:2], torch.inference_mode()
    return {
        "all": partial(proposer, image),
        "floor": one_pass(proposer.deepmask.trunk, *pixels, trained=False),
        "resizing": lambda: [proposer.scale(image, scale) for scale in scales],
        "network": inference(lambda: [proposer.dense(each) for each in pixels]),
        "best cells": lambda: best_cells(logits, count),
        "masks": inference(lambda: [proposer.decode(pyramid, chunk) for chunk in chunks]),
        "masks, pasted": inference(lambda: proposer.paste_cells(pyramid, cells, size)),
    }


def time_detection(setup: Setup) -> Rows:
    """Detection in an image of the network's size, and of what its time is made."""
    config, rows = setup.published(), Rows()
    image, proposals = draw_rois(np.random.default_rng(0), config, 20 if setup.quick else ROIS)
    model = make_multipathnet(config, num_classes=80)
    height, width = image.shape[:2]
    pixels = torch.rand(1, 3, height, width, device=setup.device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    for precision in kit.PRECISIONS:
        detector = make_detector(config, model, setup.device, precision)
        title = f"{precision}, {len(proposals)} RoIs, {width} x {height}, images"
        call = partial(detector, image, proposals)
        floor = one_pass(detector.model.trunk, pixels, trained=False)
        rows[title] = measure(setup, call, floor, aim=AIMS["detector"])
        parts = detection_parts(detector, image, proposals.boxes)
        rows |= rates(setup, parts, row=f"{precision}, {{}}")
    return rows


@torch.inference_mode()
def detection_parts(detector: Detector, image: np.ndarray, corners: np.ndarray) -> Calls:
    """The steps of `Detector.__call__` on what the steps before have left."""
    boxes, options = torch.tensor(corners, device=detector.device), detector.options
    views, size = detector._views(image), image.shape[:2]
    found = detector._classify(views, boxes, size)
    inference = torch.inference_mode()
    return {
        "image and trunk": inference(lambda: detector._views(image)),
        "RoIs": inference(lambda: detector._classify(views, boxes, size)),
        "selection": lambda: select_boxes(*found, options),
        "selection on the CPU": lambda: select_boxes(found[0].cpu(), found[1].cpu(), options),
    }


def time_loading(setup: Setup) -> Rows:
    """Patches a second of the loading processes alone, then with training."""
    folder = setup.directory / "loading"
    coco = write_dataset(np.random.default_rng(0), 8 if setup.quick else IMAGES, folder)
    c, cuda = setup.published().deepmask, setup.device.type == "cuda"
    cores, size = (1, 8) if setup.quick else (os.cpu_count() or 1, 256)
    rows: Rows = {}
    for shared in (1, 4):
        sampling = replace(c.sampling, patches_per_image=shared)
        data = patch_dataset(c, coco, folder, sampling=sampling, target_size=c.target_size, seed=0)
        for workers in (1,) if setup.quick else sorted({4, 8, cores}):
            indices = data.batches(range(100_000), batches_per_epoch=1000, batch_size=size)
            loader = batch_loader(data, indices, data.collate, workers=workers, pin_memory=cuda)
            rows[f"{shared} from an image, {workers} workers, patches"] = pace(setup, loader, size)
    run, _ = ready_run(setup, "deepmask", size, f"data.workers={cores}")
    batches = run.stage.training_batches(range(100_000), setup.device)
    title = f"training DeepMask, batch {size}, {cores} workers, patches"
    return rows | {title: pace(setup, map(run.train_step, batches), size)}


def pace(setup: Setup, minibatches: Iterable, size: int) -> dict[str, float]:
    """Samples a second of minibatches that come, from the first one on."""
    items, budget = iter(minibatches), 0.2 if setup.quick else LOADING_SECONDS
    next(items)
    setup.synchronize()
    start, count = time.monotonic(), 0
    while count == 0 or time.monotonic() - start < budget:
        next(items)
        count += 1
    setup.synchronize()
    return {"measured": count * size / (time.monotonic() - start)}


def time_step(setup: Setup) -> Rows:
    """DeepMask's training step, and changes of it."""
    rows: Rows = {}
    for size in batch_sizes(setup):
        run, batch = ready_run(setup, "deepmask", size)
        step = partial(run.train_step, [batch])
        # Without waiting for the loss.
        unchecked = mock.patch.object(distributed, "any_process", lambda *_, device: [False])
        calls: Calls = {
            "as it is": step,
            "without the check for finite losses": unchecked(step),
            "cudnn.benchmark": with_benchmark(step),
            "forward and backward alone": forward_and_backward(run, batch),
        }
        rows |= rates(setup, calls, size, row=f"batch {size}, {{}}, patches")
    return rows


def forward_and_backward(run: TrainingRun, batch: dict) -> Call:
    """A training step without the optimizer's and without a wait."""

    def call() -> None:
        run.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(run.device.type, torch.bfloat16):
            losses = run.stage.losses(run.model, batch)
        losses["loss"].backward()

    return call


def time_graphs(setup: Setup) -> Rows:
    """CUDA graphs, which take the launching of kernels off the CPU; sizes must repeat."""
    rows: Rows = {}
    for size in batch_sizes(setup):
        name = f"DeepMask, batch {size}, forward and backward, patches"
        call = forward_and_backward(*ready_run(setup, "deepmask", size))
        rows |= rates(setup, {name: capture(setup, call)}, size)
    for name, refine in NETWORKS.items():
        network = proposal_calls(setup, setup.proposer("bf16", refine=refine))["network"]
        rows |= rates(setup, {f"{name}, network, images": capture(setup, network)})
    return rows


def capture(setup: Setup, call: Call) -> Call:
    """A CUDA graph of a call, to be replayed; where there is no CUDA, the call."""
    if setup.device.type != "cuda":
        return call
    aside = torch.cuda.Stream(setup.device)
    aside.wait_stream(torch.cuda.current_stream(setup.device))
    with torch.cuda.stream(aside):
        for _ in range(3):  # what is made once must not be part of the graph
            call()
    torch.cuda.current_stream(setup.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def time_compile(setup: Setup) -> Rows:
    """`torch.compile` of DeepMask, forward and backward."""
    size = batch_sizes(setup)[0]
    run, batch = ready_run(setup, "deepmask", size)
    call, row = forward_and_backward(run, batch), f"batch {size}, {{}}, patches"
    rows = rates(setup, {"as it is": call}, size, row=row)
    # Without a compiler, to see on any machine whether it works.
    compiled: Any = torch.compile(run.model, backend="eager" if setup.quick else "inductor")
    run.model, start = compiled, time.monotonic()
    call()
    setup.synchronize()
    rows[f"batch {size}, seconds of compiling"] = {"measured": time.monotonic() - start}
    return rows | rates(setup, {"compiled": call}, size, row=row)


def time_trunk(setup: Setup) -> Rows:
    """Variants of the trunk, forward and backward in bfloat16."""
    config = setup.published()
    size, side = (2, 64) if setup.quick else (256, config.deepmask.patch_size + 32)
    planes = torch.randn(size, 3, side, side, device=setup.device)
    pixels = planes.contiguous(memory_format=torch.channels_last)
    build = partial(build_trunk, config.trunk.name)
    trunks = {
        "padding symmetric": build(),
        "padding symmetric, norms folded": optimize_for_inference(build()),
        "padding zero": build(padding="zero"),
        "padding zero, norms folded": optimize_for_inference(build(padding="zero")),
        "padding zero, weights in bfloat16": build(padding="zero").bfloat16(),
    }
    calls: Calls = {"padding symmetric, channels first": one_pass(build().to(setup.device), planes)}
    for name, trunk in trunks.items():
        trunk.to(setup.device).to(memory_format=torch.channels_last)
        calls[name] = one_pass(trunk, pixels.to(next(trunk.parameters()).dtype))
    calls["padding symmetric, cudnn.benchmark"] = with_benchmark(calls["padding symmetric"])
    return rates(setup, calls, size, row="{}, patches")


def time_padding(setup: Setup) -> Rows:
    """Convolutions by their padding, forward and backward; which layout padded maps have."""
    rows: Rows = {}
    for channels, side in MAPS[-1:] if setup.quick else MAPS:
        shape = (2 if setup.quick else 256, channels, side, side)
        maps = torch.randn(shape, device=setup.device, dtype=torch.bfloat16)
        maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
        convolution = partial(nn.Conv2d, channels, channels, 3, padding=1)
        layers: dict[str, nn.Module] = {
            "F.pad": convolution(padding_mode="replicate"),
            "cat": SymmetricConv2d(channels, channels, 3, padding=1),
            "zero": convolution(),
        }
        for layer in layers.values():
            layer.to(setup.device).to(memory_format=torch.channels_last)
        title = f"{channels} x {side} x {side}, {{}}, maps"
        calls: Calls = {name: one_pass(layer, maps) for name, layer in layers.items()}
        rows |= rates(setup, calls, shape[0], row=title)
        padded = {
            "F.pad": F.pad(maps, (1, 1, 1, 1), mode="replicate"),
            "cat": symmetric_pad(maps, 1),
        }
        for name, each in padded.items():
            is_last = each.is_contiguous(memory_format=torch.channels_last)
            rows[title.format(name)]["channels last"] = float(is_last)
    return rows


TIMINGS: dict[str, Callable[[Setup], Rows]] = {
    "training": time_training, "proposing": time_proposals, "detecting": time_detection,
    "loading": time_loading, "step": time_step, "graphs": time_graphs, "trunk": time_trunk,
    "padding": time_padding, "compiling": time_compile,
}  # fmt: skip
