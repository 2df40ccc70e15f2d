"""Whether the GPU computes what the CPU does: networks, gradients and whole images.

Every check gives rows of a figure and its limit. `gpu_run_checks.py` has those of runs.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from models.multipathnet import ROI_POOLS, MultiPathNet
from pipeline.config import STAGES, Config
from pipeline.inference.detect import Detector
from pipeline.inference.detections import Detections
from pipeline.inference.paste import Pasted
from pipeline.inference.proposals import Proposals
from pipeline.inference.propose import PyramidScale, best_cells
from pipeline.networks import make_multipathnet
from pipeline.training.stages import Stage
from tools.benchmarks.gpu_setup import (
    CPU,
    NO_DROPOUT,
    Setup,
    at_least,
    at_most,
    full_precision,
    make_stage,
    start_run,
)
from tools.benchmarks.synthetic import draw_boxes, draw_image
from tools.benchmarks.timing import Rows

Masks = tuple[list[PyramidScale], Tensor, Pasted]  # of an image: pyramid, chosen cells, masks
SIZE, QUICK_SIZE = (240, 320), (96, 128)  # of images, which the CPU goes through as well
STEPS = 4
CLASSES = 80


def check_proposals(setup: Setup) -> Rows:
    """Scores, chosen cells and masks of an image; in float32, then in bfloat16."""
    image = draw_image(np.random.default_rng(0), *(QUICK_SIZE if setup.quick else SIZE))
    rows: Rows = {}
    for name, refine in (("DeepMask", False), ("SharpMask", True)):
        on_cpu = setup.proposer(CPU, amp=False, refine=refine)
        pyramid = [on_cpu.run_scale(image, scale) for scale in on_cpu.log2_scales]
        scores = [scale.score_logits for scale in pyramid]
        _, cells = best_cells(scores, sum(map(torch.numel, scores)) // 3)  # leaves some out
        masks = on_cpu._masks(pyramid, cells, image.shape[:2])
        for amp in (False, True):
            proposer = setup.proposer(setup.device, amp=amp, refine=refine)
            with full_precision():
                there = [proposer.run_scale(image, scale) for scale in proposer.log2_scales]
                _, chosen = best_cells([scale.score_logits for scale in there], len(cells))
                found = proposer._masks(there, cells.to(setup.device), image.shape[:2])
            key = f"{name}, {'bfloat16' if amp else 'float32'}"
            same = len(set(map(tuple, cells.tolist())) & set(map(tuple, chosen.tolist())))
            ious = mask_ious(masks, found, len(cells), image.shape[:2])
            rows[f"{key}: cells that are the same"] = at_least(
                same / len(cells), 0.9 if amp else 0.995
            )
            rows[f"{key}: mean mask IoU"] = at_least(ious.mean(), 0.99 if amp else 0.999)
            rows[f"{key}: lowest mask IoU"] = {"measured": ious.min()}
    return rows


def mask_ious(a: Pasted, b: Pasted, count: int, size: tuple[int, int]) -> np.ndarray:
    """IoU of the masks of each cell; 1 where neither has a pixel, 0 where only one has."""
    masks = [dict(zip(part.indices.tolist(), part.rles, strict=True)) for part in (a, b)]
    ious = np.ones(count)
    for cell in range(count):
        pair = [{"size": list(size), "counts": part[cell]} for part in masks if cell in part]
        if len(pair) == 2:
            ious[cell] = coco_mask.iou(pair[:1], pair[1:], [0])[0, 0]
        elif pair:
            ious[cell] = 0
    return ious


def check_detections(setup: Setup) -> Rows:
    """Detections of the published detector in float32, which is all that it knows."""
    config = setup.published()
    image, proposals = detection_input(config, 20 if setup.quick else 100)
    model = make_multipathnet(config, num_classes=CLASSES)
    if setup.quick:  # with few features all classes would score the same
        nn.init.normal_(model.cls_score.weight)
    found = []
    with full_precision():
        for device in (CPU, setup.device):
            found.append(make_detector(config, model, device)(image, proposals))
    on_cpu, there = found
    scores = abs(np.sort(on_cpu.scores) - np.sort(there.scores)).max(initial=0)
    return {
        "detections": at_least(len(there.scores), 1),
        "detections that both have": at_least(common_detections(on_cpu, there), 0.97),
        "largest difference of scores": at_most(float(scores), 1e-3),
    }


def detection_input(config: Config, rois: int) -> tuple[np.ndarray, Proposals]:
    """An image that has the network's size already, and proposals without masks."""
    rng, sampling = np.random.default_rng(0), config.multipathnet.sampling
    height, width = sampling.short_side, sampling.long_side
    boxes = draw_boxes(rng, rois, height, width).astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.linspace(1, 0, rois, dtype=np.float32)
    proposals = Proposals(1, "noise.jpg", height, width, scores, boxes, [b""] * rois)
    return draw_image(rng, height, width), proposals


def make_detector(config: Config, model: MultiPathNet, device: torch.device) -> Detector:
    """A detector of a config, for images of the network's size."""
    return Detector(
        model,
        [{"id": i, "name": str(i)} for i in range(1, CLASSES + 1)],
        device=device,
        short_sides=[config.multipathnet.sampling.short_side],
        long_side=config.multipathnet.sampling.long_side,
        options=config.detect,
    )


def common_detections(a: Detections, b: Detections) -> float:
    """The fraction of `a` that `b` has too: the same class, boxes with an IoU of .99."""
    if not len(a.scores) or not len(b.scores):
        return float(len(a.scores) == len(b.scores))
    overlaps = box_iou(torch.from_numpy(a.boxes), torch.from_numpy(b.boxes)) > 0.99
    same = torch.from_numpy(a.labels)[:, None] == torch.from_numpy(b.labels)
    return (overlaps & same).any(dim=1).float().mean().item()


def check_roi_pooling(setup: Setup) -> Rows:
    """Values and gradients of both kinds; under autocast the features are bfloat16."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 64, 50, 62, generator=generator)
    boxes = draw_boxes(np.random.default_rng(0), 100, 800, 992)
    corners = torch.from_numpy(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
    rois = torch.cat([torch.arange(100)[:, None] % 2, corners], dim=1).float()
    rows: Rows = {}
    for kind, size in itertools.product(ROI_POOLS, (7, 14)):
        pool, weights = ROI_POOLS[kind], torch.randn(100, 64, size, size, generator=generator)
        for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            results = []
            for device in (CPU, setup.device):
                leaf = features.to(device, dtype).contiguous(memory_format=torch.channels_last)
                leaf.requires_grad_()
                autocast = dtype == torch.bfloat16
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    pooled = pool(leaf, rois.to(device), size, 1 / 16)
                (pooled.float() * weights.to(device)).sum().backward()
                assert leaf.grad is not None
                results.append((pooled.detach().float().cpu(), leaf.grad.float().cpu()))
            (values, gradient), (values_there, gradient_there) = results
            key = f"{kind}, {size} x {size} bins, {str(dtype).removeprefix('torch.')}"
            rows[f"{key}: largest difference"] = at_most(
                float((values - values_there).abs().max()), 0
            )
            rows[f"{key}: of the gradient"] = at_most(
                relative_difference(gradient_there, gradient), limit
            )
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
    for name in STAGES:
        for optimizer in ("sgd", "adamw"):
            optim = {"optimizer": optimizer, "lr": 1e-5, "clip_gradient": 10}
            changes = [f"{name}.optim.{key}={value}" for key, value in optim.items()]
            config = setup.published(*changes, *NO_DROPOUT)
            stage = make_stage(name, config)
            weights = {k: v.clone() for k, v in stage.model.state_dict().items()}
            batches = list(stage.training_batches(range(STEPS), CPU))  # DeepMask's: of both heads
            key = f"{name}, {optimizer}"
            with full_precision():
                whole, half = (
                    train_steps(setup, stage, config, weights, batches, amp)
                    for amp in (False, True)
                )
                if optimizer == "sgd":  # the other one has the same
                    difference = abs(whole[0] / loss_on_cpu(stage, weights, batches[0]) - 1)
                    rows[f"{key}: loss against the CPU's"] = at_most(difference, 1e-3)
            difference = max(abs(b / a - 1) for a, b in zip(whole, half, strict=True))
            rows[f"{key}: losses in bfloat16"] = at_most(difference, 0.01)
    return rows


def train_steps(
    setup: Setup, stage: Stage, config: Config, weights: dict, batches: list[dict], amp: bool
) -> list[float]:
    """The loss of each step, from given weights on."""
    stage.model.load_state_dict(weights)
    stage.optim = replace(stage.optim, amp=amp)
    run = start_run(stage, config, setup.device, setup.directory / "steps")
    return [float(run.train_step(to_device(b, setup.device))["loss"]) for b in batches]


def loss_on_cpu(stage: Stage, weights: dict, batch: dict) -> float:
    """The loss of a minibatch before any step; leaves the stage on the CPU."""
    stage.model.to(CPU).load_state_dict(weights)
    with torch.no_grad():
        return float(stage.losses(stage.model, to_device(batch, CPU))["loss"])


def to_device(batch: dict, device: torch.device) -> dict:
    """A minibatch on another device."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


CHECKS: dict[str, Callable[[Setup], Rows]] = {
    "proposals": check_proposals,
    "detections": check_detections,
    "roi_pooling": check_roi_pooling,
    "first_steps": check_first_steps,
}
