"""Training, proposals and detection on a GPU, beside the floor and the project's aims for an H100.

All figures are a second. The floor of a call is a bare loop of its trunk in bfloat16 on tensors
that are ready, forward and, where the trunk is trained, backward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.trunk import Trunk
from pipeline.inference.detect import Detector
from pipeline.inference.propose import Proposer, best_cells
from pipeline.networks import make_multipathnet
from pipeline.training.engine import TrainingRun
from tools.benchmarks.gpu_checks import CLASSES, detection_input, make_detector
from tools.benchmarks.gpu_clock import measure, median_seconds
from tools.benchmarks.gpu_setup import Setup, make_stage, start_run
from tools.benchmarks.synthetic import HEIGHT, WIDTH, draw_image
from tools.benchmarks.timing import Calls, Rows

AIMS = {
    "deepmask": 3000, "sharpmask": 6000, "multipathnet": 12, "proposals": 25, "detection": 20
}  # fmt: skip
BATCHES, QUICK_BATCHES = (32, 256), (8,)  # patches
ROIS = 400
FROZEN_LEVELS = {"coco.yaml": 4, "coco_1gpu.yaml": 1}  # of the detector's trunk, by recipe


def time_training(setup: Setup) -> Rows:
    """The whole training step of each stage on a minibatch that is ready."""
    rows: Rows = {}
    for name in ("deepmask", "sharpmask"):
        for size in QUICK_BATCHES if setup.quick else BATCHES:
            run, batch = ready_run(setup, name, size)
            row = measure(setup, partial(run.train_step, batch), samples=size)
            floor = trunk_call(run.stage.model, batch["patches"], trained=name == "deepmask")
            rows[f"{name}, batch {size}, patches"] = row | {
                "floor": size / seconds_of(setup, floor),
                "aim": AIMS[name],
            }
            del run, batch, floor  # before the next one needs memory
    for recipe, frozen in FROZEN_LEVELS.items():
        option = f"multipathnet.trunk.frozen_levels={frozen}"
        run, batch = ready_run(setup, "multipathnet", 2 if setup.quick else 4, option)
        size = len(batch["images"])
        row = measure(setup, partial(run.train_step, batch), samples=size)
        floor = trunk_call(run.stage.model, batch["images"], trained=frozen < 4)
        rows[f"multipathnet, as {recipe}, batch {size}, images"] = row | {
            "floor": size / seconds_of(setup, floor),
            "aim": AIMS["multipathnet"],
        }
        del run, batch, floor
    return rows


def ready_run(
    setup: Setup, name: str, size: int, *overrides: str
) -> tuple[TrainingRun, dict[str, Any]]:
    """A run of a stage, and a minibatch of mask patches or images on the device."""
    options = [f"{name}.optim.batch_size={size}", *overrides]
    if name != "multipathnet":
        sampling = f"{name}.sampling"
        options += [f"{sampling}.mask_batch_prob=1", f"{sampling}.patches_per_image=4"]
    config = setup.published(*options)
    stage = make_stage(name, config)
    run = start_run(stage, config, setup.device, setup.directory / "speed")
    return run, next(iter(stage.training_batches(range(1), setup.device)))


def trunk_call(model: nn.Module, pixels: Tensor, *, trained: bool) -> Callable[[], None]:
    """A pass of a network's trunk in bfloat16, and one back if it is trained."""
    trunk = next(module for module in model.modules() if isinstance(module, Trunk))

    def call() -> None:
        trunk.zero_grad(set_to_none=True)
        with (
            torch.set_grad_enabled(trained),
            torch.autocast(pixels.device.type, torch.bfloat16),
        ):
            features = trunk(pixels)[-1]
        if trained:
            features.sum().backward()

    return call


def seconds_of(setup: Setup, call: Callable[[], object]) -> float:
    """Seconds of one call."""
    return median_seconds(setup, {"call": call})["call"]


def rates(setup: Setup, calls: Calls, samples: int = 1) -> Rows:
    """Rows of alternatives, by name."""
    seconds = median_seconds(setup, calls)
    return {name: {"measured": samples / each} for name, each in seconds.items()}


def time_proposals(setup: Setup) -> Rows:
    """Proposals of an image as RLE, and of what their time is made."""
    rows: Rows = {}
    image = proposal_image(setup)
    for name, refine in (("DeepMask", False), ("SharpMask", True)):
        proposer = setup.proposer(setup.device, amp=True, refine=refine)
        row = measure(setup, partial(proposer, image))
        pixels = [proposer.scale(image, scale)[0] for scale in proposer.log2_scales]
        trunks = [trunk_call(proposer.deepmask, each, trained=False) for each in pixels]
        row["floor"] = 1 / sum(seconds_of(setup, call) for call in trunks)
        title = f"{name}, {proposer.num_proposals} masks, {len(pixels)} scales, images"
        rows[title] = row | {"aim": AIMS["proposals"]}
        parts = rates(setup, proposal_parts(proposer, image))
        rows |= {f"{name}, {part}": row for part, row in parts.items()}
    return rows


def proposal_image(setup: Setup) -> np.ndarray:
    """The image that is proposed for."""
    size = (96, 128) if setup.quick else (HEIGHT, WIDTH)
    return draw_image(np.random.default_rng(0), *size)


def proposal_parts(proposer: Proposer, image: np.ndarray) -> Calls:
    """The steps of `Proposer.__call__` on what the steps before have left."""
    pixels = [proposer.scale(image, scale)[0] for scale in proposer.log2_scales]
    pyramid = [proposer.run_scale(image, scale) for scale in proposer.log2_scales]
    logits = [scale.score_logits for scale in pyramid]
    _, cells = best_cells(logits, proposer.num_proposals)

    @torch.inference_mode()
    def network() -> None:
        with proposer._autocast():
            for each in pixels:
                proposer.dense(each)

    return {
        "resizing": lambda: [proposer.scale(image, scale) for scale in proposer.log2_scales],
        "network": network,
        "best cells": lambda: best_cells(logits, proposer.num_proposals),
        "masks": torch.inference_mode()(
            lambda: [proposer.decode(pyramid, chunk) for chunk in cells.split(128)]
        ),
        "masks, pasted": torch.inference_mode()(
            lambda: proposer._masks(pyramid, cells, image.shape[:2])
        ),
    }


def time_detection(setup: Setup) -> Rows:
    """Detection in an image of the network's size, and of what its time is made."""
    config = setup.published()
    image, proposals = detection_input(config, 20 if setup.quick else ROIS)
    model = make_multipathnet(config, num_classes=CLASSES)
    detector = make_detector(config, model, setup.device)
    row = measure(setup, partial(detector, image, proposals))
    height, width = image.shape[:2]
    pixels = torch.rand(1, 3, height, width, device=setup.device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    row["floor"] = 1 / seconds_of(setup, trunk_call(model, pixels, trained=False))
    title = f"{len(proposals)} RoIs, {width} x {height}, images"
    rows: Rows = {title: row | {"aim": AIMS["detection"]}}

    def in_bfloat16(call: Callable[[], object]) -> Callable[[], object]:
        return torch.autocast(setup.device.type, torch.bfloat16)(call)

    parts = detection_parts(detector, image, proposals.boxes)
    parts["all under autocast"] = in_bfloat16(partial(detector, image, proposals))
    for part in ("image and trunk", "RoIs"):
        parts[f"{part} under autocast"] = in_bfloat16(parts[part])
    return rows | rates(setup, parts)


@torch.inference_mode()
def detection_parts(detector: Detector, image: np.ndarray, corners: np.ndarray) -> Calls:
    """The steps of `Detector.__call__` on what the steps before have left."""
    boxes = torch.tensor(corners, device=detector.device)
    views, size = detector._views(image), image.shape[:2]
    found = detector._classify(views, boxes, size)
    inference = torch.inference_mode()
    return {
        "image and trunk": inference(lambda: detector._views(image)),
        "RoIs": inference(lambda: detector._classify(views, boxes, size)),
        "selection": inference(lambda: detector._select(*found)),
        "selection on the CPU": inference(lambda: detector._select(*(v.cpu() for v in found))),
    }


PARTS: dict[str, Callable[[Setup], Rows]] = {
    "training": time_training,
    "proposing": time_proposals,
    "detecting": time_detection,
}
