"""A contact sheet of training patches."""

from functools import partial

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from datasets.patch_sampler import MASK, SCORE, Patch
from datasets.patches import PatchDataset
from datasets.resize import denormalize
from pipeline.inference.visualize import put_label

COLUMNS = 8
GREEN, RED, WHITE, YELLOW = (60, 220, 60), (240, 60, 60), (255, 255, 255), (255, 230, 0)


def patch_sheet(data: PatchDataset, *, count: int) -> np.ndarray:
    """`count` mask patches and `count` score patches, as the network gets them: (H, W, 3) uint8.

    Raises:
        ValueError: count is not positive.
    """
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    groups = -(-count // data.group_size)
    tiles: list[np.ndarray] = []
    for head in (MASK, SCORE):
        drawn: list[np.ndarray] = []
        for group in range(groups):
            item, patches = data.load(head, 0, group)
            targets = item.get("targets", [None] * len(patches))
            drawn += map(partial(_tile, data), item["patches"], patches, targets)
        tiles += drawn[:count]
        tiles += [np.full_like(tiles[0], 255)] * (-count % COLUMNS)  # the next head starts a row
    images = [torch.from_numpy(tile).permute(2, 0, 1) for tile in tiles]
    return make_grid(images, COLUMNS, padding=4, pad_value=255).permute(1, 2, 0).numpy()


def _tile(data: PatchDataset, pixels: Tensor, patch: Patch, target: Tensor | None) -> np.ndarray:
    """A patch with its frame and label, (S, S, 3) uint8; `target` (G, G) of a mask patch."""
    tile = np.ascontiguousarray(denormalize(pixels.numpy()))
    border = (data.input_size - data.patch_size) // 2
    if border:
        cv2.rectangle(tile, (border, border), (border + data.patch_size - 1,) * 2, WHITE, 1)
    if target is None:
        color = GREEN if patch.label > 0 else RED
    else:
        color = YELLOW
        mask = (target.numpy() > 0).astype(np.uint8)
        side = (data.patch_size, data.patch_size)
        resized = cv2.resize(mask, side, interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(resized, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tile, contours, -1, color, 1, offset=(border, border))
    cv2.rectangle(tile, (0, 0), (tile.shape[1] - 1, tile.shape[0] - 1), color, 3)
    category = data.coco.category_index[patch.annotation]
    name = data.coco.category_names[category] if patch.annotation >= 0 else "negative"
    put_label(tile, f"{name} x{patch.scale:.2f}", (6, tile.shape[0] - 8), color)
    return tile
