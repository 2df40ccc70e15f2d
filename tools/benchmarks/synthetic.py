"""What the benchmarks run on: random images, networks and COCO data of realistic sizes."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from datasets.coco import CocoInstances
from datasets.files import write_json
from models.deepmask import AUTO_PATCH_SIZE, DeepMaskConfig
from models.multipathnet import MultiPathNet
from pipeline.checkpoint import save_checkpoint
from pipeline.config import Config
from pipeline.inference.detect import Detector
from pipeline.inference.proposals import Proposals
from pipeline.networks import make_sharpmask
from pipeline.recipe import config_to_dict, load_config

# Of COCO: the mean number of objects of an image, and a common size.
OBJECTS, HEIGHT, WIDTH = 7.3, 480, 640
CATEGORIES = 10


def draw_image(rng: np.random.Generator, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth noise, (height, width, 3) uint8."""
    noise = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Config:
    """A recipe; the published patch where it says auto, as there are no objects to choose by."""
    config = load_config(path, list(overrides))
    if config.deepmask.patch_size != AUTO_PATCH_SIZE:
        return config
    patch_size = DeepMaskConfig().patch_size
    return replace(config, deepmask=replace(config.deepmask, patch_size=patch_size))


def write_sharpmask(config: Config, path: Path) -> None:
    """A checkpoint with random weights, but masks with about as many runs as trained ones have.

    They are disks of half the patch, whose edges the embedding moves smoothly.
    """
    torch.manual_seed(0)
    model = make_sharpmask(config)
    head, size = model.deepmask.mask_head, model.deepmask.mask_size
    pixels = torch.linspace(-1, 1, size)
    radius = (pixels[:, None] ** 2 + pixels**2).sqrt()
    bumps = F.interpolate(torch.randn(head.in_channels, 1, 5, 5), (size, size), mode="bicubic")
    with torch.no_grad():
        head.bias = nn.Parameter((4 * (0.6 - radius)).flatten())
        head.weight.copy_(0.05 * bumps.flatten(1).T[:, :, None, None])
    model.start_from_deepmask()
    values = {"config": config_to_dict(config), "model": model.state_dict()}
    save_checkpoint(path, {"stage": "sharpmask", **values})


def draw_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Boxes of all sizes in an image, (count, 4) xywh."""
    sizes = np.exp(rng.uniform(np.log(12), np.log([width * 0.8, height * 0.8]), (count, 2)))
    return np.concatenate([rng.uniform(0, [width, height] - sizes), sizes], axis=1)


def draw_corners(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """The same as (count, 4) float32 xyxy."""
    boxes = draw_boxes(rng, count, height, width)
    boxes[:, 2:] += boxes[:, :2]
    return boxes.astype(np.float32)


def draw_rois(rng: np.random.Generator, config: Config, count: int) -> tuple[np.ndarray, Proposals]:
    """An image that has the detector's size already, and proposals in it.

    Detection only hands their masks on: empty strings will do.
    """
    size = config.multipathnet.sampling.short_side, config.multipathnet.sampling.long_side
    boxes, logits = draw_corners(rng, count, *size), np.linspace(5, -5, count, dtype=np.float32)
    return draw_image(rng, *size), Proposals(1, "noise.jpg", *size, logits, boxes, [b""] * count)


def make_detector(
    config: Config, model: MultiPathNet, device: torch.device, precision: str, **options: Any
) -> Detector:
    """A detector with a copy of a network; `options` are fields of `DetectConfig`."""
    return Detector(
        copy.deepcopy(model),
        [{"id": i, "name": str(i)} for i in range(1, model.num_classes + 1)],
        device=device,
        config=config.multipathnet,
        options=replace(config.detect, **options),
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
    )


def draw_polygon(
    rng: np.random.Generator, box: np.ndarray, size: tuple[int, int] = (HEIGHT, WIDTH)
) -> list[float]:
    """A star-shaped outline in a box, in hundredths of a pixel, with as many points as COCO's.

    It is cut off at the edge of the image of this size, (height, width).
    """
    count = int(np.clip(rng.lognormal(2.75, 0.65), 4, 300))
    angles = np.sort(rng.random(count)) * 2 * np.pi
    offsets = rng.uniform(0.7, 1, (count, 1)) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    points = box[:2] + box[2:] / 2 * (1 + offsets)
    return points.clip(0, size[::-1]).round(2).ravel().tolist()


def draw_dataset(rng: np.random.Generator, images: int) -> dict:
    """An instances json with as many objects and points as COCO's, but without crowds."""
    size = {"height": HEIGHT, "width": WIDTH}
    annotations: list[dict] = []
    for image_id in range(1, images + 1):
        for box in draw_boxes(rng, max(1, rng.poisson(OBJECTS)), HEIGHT, WIDTH):
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0,
                "category_id": int(rng.integers(1, CATEGORIES + 1)),
                "segmentation": [draw_polygon(rng, box)],
                "bbox": box.round(2).tolist(), "area": float(box[2] * box[3] * 0.6),
            })  # fmt: skip
    return {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg"} | size for i in range(1, images + 1)],
        "categories": [{"id": i, "name": f"{i}"} for i in range(1, CATEGORIES + 1)],
        "annotations": annotations,
    }


def write_dataset(rng: np.random.Generator, images: int, folder: Path) -> CocoInstances:
    """Such a dataset with its images, in a new folder."""
    folder.mkdir()
    content, path = draw_dataset(rng, images), folder / "instances.json"
    write_json(path, content)
    for image in content["images"]:
        cv2.imwrite(str(folder / image["file_name"]), draw_image(rng))
    return CocoInstances.load(path)
