"""A contact sheet of training patches."""

import cv2
import numpy as np

from datasets.patch_sampler import MASK, SCORE, Patch
from datasets.patches import PatchDataset
from datasets.resize import denormalize
from pipeline.inference.visualize import contact_sheet, put_label

COLUMNS = 8
GREEN, RED, WHITE, YELLOW = (60, 220, 60), (240, 60, 60), (255, 255, 255), (255, 230, 0)


def patch_sheet(data: PatchDataset, *, count: int) -> np.ndarray:
    """`count` mask patches and `count` score patches, as the network gets them: (H, W, 3) uint8.

    Raises:
        ValueError: count is not positive.
    """
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    tiles = []
    for head in (MASK, SCORE):
        made = [
            tile
            for group in range(-(-count // data.patches_per_image))
            for tile in _tiles(data, head, group)
        ]
        tiles += made[:count]
        tiles += [np.full_like(tiles[0], 255)] * (
            -count % COLUMNS
        )  # score patches start a row of their own
    return contact_sheet(tiles, COLUMNS)


def _tiles(data: PatchDataset, head: str, group: int) -> list[np.ndarray]:
    item, patches = data.load(head, 0, group)
    targets = item.get("targets")
    return [
        _tile(
            data,
            denormalize(item["patches"][n].numpy()),
            patch,
            None if targets is None else targets[n].numpy(),
        )
        for n, patch in enumerate(patches)
    ]


def _tile(
    data: PatchDataset, pixels: np.ndarray, patch: Patch, target: np.ndarray | None
) -> np.ndarray:
    tile = np.ascontiguousarray(pixels)
    border = (data.input_size - data.patch_size) // 2
    if border:
        cv2.rectangle(tile, (border, border), (border + data.patch_size - 1,) * 2, WHITE, 1)
    if target is not None:
        side = (data.patch_size, data.patch_size)
        mask = cv2.resize((target > 0).astype(np.uint8), side, interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(
            mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE, offset=(border, border)
        )
        cv2.drawContours(tile, contours, -1, YELLOW, 1)
        frame = YELLOW
    else:
        frame = GREEN if patch.label > 0 else RED
    cv2.rectangle(tile, (0, 0), (tile.shape[1] - 1, tile.shape[0] - 1), frame, 3)
    name = (
        data.coco.category_names[data.coco.category_index[patch.annotation]]
        if patch.annotation >= 0
        else "negative"
    )
    put_label(tile, f"{name} x{patch.scale:.2f}", (6, tile.shape[0] - 8), frame)
    return tile
