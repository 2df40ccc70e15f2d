"""Whether the GPU computes what the CPU does, and whether runs work on it.

Every check gives rows of a figure and its limit.
"""

import copy
import itertools
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from models.multipathnet import ROI_POOLS
from pipeline.checkpoint import LAST, load_checkpoint
from pipeline.config import ROOT, STAGES
from pipeline.data import device_batches
from pipeline.inference.cells import best_cells
from pipeline.inference.paste import Pasted
from pipeline.inference.proposals import Detections
from pipeline.inference.propose import Proposer
from pipeline.inference.propose_folders import propose_images
from pipeline.networks import make_multipathnet
from pipeline.recipe import save_config
from pipeline.training.engine import fit
from tools.benchmarks import gpu_setup as kit
from tools.benchmarks.gpu_setup import CPU, Setup, at_least, at_most
from tools.benchmarks.synthetic import draw_corners, draw_image, draw_rois, make_detector
from tools.benchmarks.timing import Rows

SIZE, QUICK_SIZE = (240, 320), (96, 128)  # of images, which the CPU goes through as well
STEPS = 4
# Dropout draws other numbers on another device, and in another type.
NO_DROPOUT = ("deepmask.dropout=0", "multipathnet.dropout=0")
PATIENCE = 120  # seconds, for a tool to start
IMAGES = {"a": (192, 256), "b": (1536, 2048), "c": (192, 256)}  # `b` does not fit into memory
DIVISOR = 8  # of their sides, if it has to be quick
# By precision: of the cells and detections that are the same, of the mean IoU of masks, of the
# differences of scores and of the gradient of RoI pooling. Without training all classes score
# almost the same: in bfloat16 it is chance which detections are the best.
LIMITS = {
    "fp32": {"cells": 0.995, "masks": 0.999, "boxes": 0.97, "scores": 1e-3, "gradient": 1e-5},
    "bf16": {"cells": 0.9, "masks": 0.99, "boxes": 0, "scores": 1e-2, "gradient": 1e-2},
}


def check_proposals(setup: Setup) -> Rows:
    """Chosen cells and masks of an image in each precision, against the CPU's in full."""
    image = draw_image(np.random.default_rng(0), *(QUICK_SIZE if setup.quick else SIZE))
    rows: Rows = {}
    for name, refine in (("DeepMask", False), ("SharpMask", True)):
        on_cpu = setup.proposer("fp32", refine=refine, device=CPU)
        pyramid = [on_cpu.run_scale(image, scale) for scale in on_cpu.log2_scales]
        scores = [scale.score_logits for scale in pyramid]
        _, cells = best_cells(scores, sum(map(torch.numel, scores)) // 3)  # leaves some out
        masks = on_cpu.paste_cells(pyramid, cells, image.shape[:2])
        for precision, limits in LIMITS.items():
            proposer = setup.proposer(precision, refine=refine)
            there = [proposer.run_scale(image, scale) for scale in proposer.log2_scales]
            _, chosen = best_cells([scale.score_logits for scale in there], len(cells))
            found = proposer.paste_cells(there, cells.to(setup.device), image.shape[:2])
            same = len(set(map(tuple, cells.tolist())) & set(map(tuple, chosen.tolist())))
            ious = mask_ious(masks, found, len(cells), image.shape[:2])
            key = f"{name}, {precision}"
            rows[f"{key}: cells that are the same"] = at_least(same / len(cells), limits["cells"])
            rows[f"{key}: mean mask IoU"] = at_least(ious.mean(), limits["masks"])
            rows[f"{key}: lowest mask IoU"] = {"measured": ious.min()}
    return rows


def mask_ious(a: Pasted, b: Pasted, count: int, size: tuple[int, int]) -> np.ndarray:
    """IoU of the masks of each cell; 1 where neither has a pixel, 0 where only one has."""
    masks = [dict(zip(part.indices.tolist(), part.rles, strict=True)) for part in (a, b)]
    empty = coco_mask.encode(np.zeros(size, np.uint8, order="F"))["counts"]
    ious = np.ones(count)
    for cell in masks[0].keys() | masks[1].keys():
        one, other = ({"size": size, "counts": part.get(cell, empty)} for part in masks)
        ious[cell] = coco_mask.iou([one], [other], [0])[0, 0]
    return ious


def check_detections(setup: Setup) -> Rows:
    """Detections of the published detector in each precision, against the CPU's in full."""
    config = setup.published()
    image, proposals = draw_rois(np.random.default_rng(0), config, 20 if setup.quick else 100)
    torch.manual_seed(0)
    model = make_multipathnet(config, num_classes=80)
    if setup.quick:  # with few features all classes would score the same
        nn.init.normal_(model.cls_score.weight)
    on_cpu = make_detector(config, model, CPU, "fp32")(image, proposals)
    rows: Rows = {}
    for precision, limits in LIMITS.items():
        there = make_detector(config, model, setup.device, precision)(image, proposals)
        # The best first; what only one has is compared with 0.
        pairs = itertools.zip_longest(on_cpu.scores, there.scores, fillvalue=0.0)
        scores, same = max(abs(a - b) for a, b in pairs), common_detections(on_cpu, there)
        rows[f"{precision}: detections"] = at_least(len(there), 1)
        rows[f"{precision}: detections that both have"] = at_least(same, limits["boxes"])
        rows[f"{precision}: largest difference of scores"] = at_most(scores, limits["scores"])
    return rows


def common_detections(a: Detections, b: Detections) -> float:
    """The fraction of `a` that `b` has too: the same class, boxes with an IoU of .99."""
    overlaps = box_iou(torch.from_numpy(a.boxes), torch.from_numpy(b.boxes)) > 0.99
    same = torch.from_numpy(a.labels)[:, None] == torch.from_numpy(b.labels)
    return (overlaps & same).any(dim=1).float().mean().item()


def check_roi_pooling(setup: Setup) -> Rows:
    """Values and gradients of both kinds; under autocast the features are bfloat16."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, 50, 62, generator=generator)
    corners = torch.from_numpy(draw_corners(np.random.default_rng(0), 100, 800, 992))
    rois = torch.cat([torch.arange(100)[:, None] % 2, corners], dim=1)
    rows: Rows = {}
    for kind, size in itertools.product(ROI_POOLS, (7, 14)):
        weights = torch.randn(100, 64, size, size, generator=generator)
        for precision, limits in LIMITS.items():
            results, half = [], precision == "bf16"
            for device in (CPU, setup.device):
                leaf = features.to(device, torch.bfloat16 if half else torch.float32)
                leaf = leaf.contiguous(memory_format=torch.channels_last).requires_grad_()
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    pooled = ROI_POOLS[kind](leaf, rois.to(device), size, 1 / 16)
                (pooled.float() * weights.to(device)).sum().backward()
                assert leaf.grad is not None
                results.append((pooled.detach().float().cpu(), leaf.grad.float().cpu()))
            (values, gradient), (values_there, gradient_there) = results
            largest = float((values - values_there).abs().max())
            relative = relative_difference(gradient_there, gradient)
            key = f"{kind}, {size} x {size} bins, {precision}"
            rows[f"{key}: largest difference"] = at_most(largest, 0)
            rows[f"{key}: of the gradient"] = at_most(relative, limits["gradient"])
    return rows


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a fraction of what was expected."""
    return float((value - expected).norm() / expected.norm())


def check_first_steps(setup: Setup) -> Rows:
    """The first steps of each stage at its published size, with and without bfloat16.

    The rate is low: the later steps show that the optimizer works on these tensors, not what it
    does (`check_resume` does that).
    """
    rows: Rows = {}
    for name, optimizer in itertools.product(STAGES, ("sgd", "adamw")):
        optim = {"optimizer": optimizer, "lr": 1e-6, "clip_gradient": 10}
        changes = [f"{name}.optim.{key}={value}" for key, value in optim.items()]
        stage = kit.make_stage(name, setup.published(*changes, *NO_DROPOUT))
        weights, losses = copy.deepcopy(stage.model.state_dict()), []
        for precision in kit.PRECISIONS:
            stage.model.load_state_dict(weights)
            run = kit.start_run(setup, stage, precision)
            batches = stage.training_batches(range(STEPS), setup.device)  # DeepMask's: both heads
            losses.append([float(run.train_step(batch)["loss"]) for batch in batches])
        full, half = losses
        if optimizer == "sgd":  # the other one has the same
            stage.model.to(CPU).load_state_dict(weights)
            [[batch]] = stage.training_batches(range(1), CPU)
            with torch.no_grad():
                on_cpu = float(stage.losses(stage.model, batch)["loss"])
            rows[f"{name}: loss against the CPU's"] = at_most(abs(full[0] / on_cpu - 1), 1e-3)
        difference = max(abs(b / a - 1) for a, b in zip(full, half, strict=True))
        rows[f"{name}, {optimizer}: losses in bfloat16"] = at_most(difference, 0.01)
    return rows


def train(setup: Setup, name: str, output: Path, device: torch.device, *overrides: str) -> dict:
    """Trains or resumes a stage in fp32; returns its last checkpoint."""
    stage = kit.make_stage(name, setup.tiny(*overrides))
    fit(stage, stage.config, output, device=device, resume=True, precision="fp32")
    return load_checkpoint(output / "checkpoints" / LAST)


def check_phases(setup: Setup) -> Rows:
    """The detector's trunk stays as it is for `frozen_epochs`, and learns afterwards."""
    name, frozen = "multipathnet", "multipathnet.frozen_epochs=1"
    states = [kit.make_stage(name, setup.tiny(frozen)).model.state_dict()]
    for epochs in (1, 2):
        options = (frozen, f"{name}.optim.epochs={epochs}")
        last = train(setup, name, setup.directory / "phases", setup.device, *options)
        states.append(last["model"])
    first, second = (
        max(float((new[k] - old[k]).abs().max()) for k in new if k.startswith("trunk."))
        for old, new in itertools.pairwise(states)
    )
    return {
        "the trunk moves in phase 1": at_most(first, 0),
        "the trunk moves in phase 2": at_least(second, 1e-8),
    }


def check_resume(setup: Setup) -> Rows:
    """An epoch on one device, the next on the other, and back, against the CPU alone."""
    rows: Rows = {}
    stages, optimizers = (STAGES[:1], ("adamw",)) if setup.quick else (STAGES, ("sgd", "adamw"))
    for name, optimizer in itertools.product(stages, optimizers):
        options = (f"{name}.optim.optimizer={optimizer}", *NO_DROPOUT)
        start = kit.make_stage(name, setup.tiny(*options)).model.state_dict()
        steps: list[float] = []
        moves: list[Tensor] = []
        for device in (setup.device, CPU):
            output = setup.directory / f"{name}_{optimizer}_{len(moves)}"
            for epochs, where in enumerate((device, CPU, device), start=1):
                last = train(setup, name, output, where, *options, f"{name}.optim.epochs={epochs}")
            steps.append(last["step"])
            moves.append(torch.cat([(v - start[k]).flatten() for k, v in last["model"].items()]))
        # Where a gradient is almost 0, AdamW's step may go either way.
        limit, key = 0.1 if optimizer == "adamw" else 0.01, f"{name}, {optimizer}"
        rows[f"{key}: steps"] = at_least(*steps)
        rows[f"{key}: how the weights moved"] = at_most(relative_difference(*moves), limit)
    return rows


def check_workers(setup: Setup) -> Rows:
    """Processes that load, started after CUDA, against loading in the training process."""
    torch.ones(1, device=setup.device)
    data = kit.make_stage("deepmask", setup.tiny()).train_data
    loaded = []
    for workers in (0, 2):
        indices = data.batches(range(3), batches_per_epoch=2, batch_size=8)
        batches = device_batches(data, indices, setup.device, workers=workers)
        loaded.append([batch["patches"] for batch in batches])
    same = [torch.equal(a, b) for a, b in zip(*loaded, strict=True)]
    return {"minibatches that are the same": at_least(sum(same), 3)}


def check_signal(setup: Setup) -> Rows:
    """SIGTERM during training: the checkpoint is saved, the exit status is 143."""
    optim = ("batches_per_epoch=100000", "save_every_minutes=0")
    config = setup.tiny(*(f"deepmask.optim.{setting}" for setting in optim), "data.workers=2")
    recipe, output = setup.directory / "signal.yaml", setup.directory / "signal"
    save_config(config, recipe)
    command = [sys.executable, str(ROOT / "tools" / "train_stage.py"), "--stage", "deepmask"]
    command += ["--config", str(recipe), "--output", str(output), "--device", str(setup.device)]
    last = output / "checkpoints" / LAST
    with subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as run:
        try:
            end = time.monotonic() + PATIENCE
            while not last.exists() and run.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            run.send_signal(signal.SIGTERM)
            printed, _ = run.communicate(timeout=PATIENCE)
        finally:
            run.kill()
    print(printed)
    ok = run.returncode == 143 and "--resume" in printed
    row = {"measured": run.returncode, "limit": 143, "ok": float(ok)}
    step = load_checkpoint(last)["step"] if last.exists() else 0
    return {"exit status": row, "step of the checkpoint": at_least(step, 1)}


def check_memory(setup: Setup) -> Rows:
    """An image that does not fit into memory is named, and the next one works."""
    folder, shrink = setup.directory / "images", DIVISOR if setup.quick else 1
    folder.mkdir()
    for name, size in IMAGES.items():
        image = draw_image(np.random.default_rng(0), *(side // shrink for side in size))
        cv2.imwrite(str(folder / f"{name}.jpg"), image)
    proposer, output = setup.proposer("bf16"), setup.directory / "proposals"
    with _little_memory(setup, proposer, image):
        summary = propose_images(proposer, folder, output, settings={}, write_json=False)
    named = [m for m in summary.broken if re.search(r"b\.jpg.*out of memory at", m)]
    return {
        "images that are left out": at_most(len(summary.broken), 1),
        "images named for lack of memory": at_least(len(named), 1),
        "images that are done": at_least(summary.done, 2),
    }


@contextmanager
def _little_memory(setup: Setup, proposer: Proposer, small: np.ndarray) -> Iterator[None]:
    """So little that twice a small image fits, but not a large one; on a CPU by pretense."""
    if setup.device.type == "cpu":
        pixels, _ = proposer.scale(small, max(proposer.log2_scales))
        dense, fits = proposer.dense, 4 * pixels.numel()

        def run(pixels: Tensor) -> tuple[Tensor, ...]:
            if pixels.numel() > fits:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return dense(pixels)

        with mock.patch.object(proposer, "dense", run):
            yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    proposer(small)
    total = torch.cuda.get_device_properties(setup.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1, 2 * torch.cuda.max_memory_reserved() / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def check_tests(setup: Setup) -> Rows:
    """The project's tests that need CUDA; where there is none they are skipped."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in p.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "-rs"]
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout + done.stderr)
    return {"exit status of pytest": at_most(done.returncode, 0)}


# Convolutions of fp32 without TF32, as matrix products are by default.
FULL = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
CHECKS: dict[str, Callable[[Setup], Rows]] = {
    check.__name__.removeprefix("check_"): FULL(check)
    for check in (
        check_proposals, check_detections, check_roi_pooling, check_first_steps, check_phases,
        check_resume, check_workers, check_signal, check_memory, check_tests,
    )
}  # fmt: skip
