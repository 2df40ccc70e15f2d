"""Training patches: pixels and targets of what `PatchSampler` draws, and their minibatches.

A patch of S pixels at scale s covers an S / s square of the original image around its center.
Image and target are both resampled from that square with sub-pixel positions, so they stay
aligned at any scale.

Letters: m patches of a group (one decoded image), B batch, S input size P + C, G target size.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch import Tensor

from datasets.coco import CocoInstances
from datasets.colors import change_colors
from datasets.images import ImageFolder
from datasets.loading import TrainingDataset
from datasets.patch_sampler import IOU, MASK, SCORE, STRIDE, Patch, PatchSampler
from datasets.resize import GRAY, normalize

IOU_STRIDE = 4  # pixels of a patch for each of a mask whose IoU is learned
MIN_CROP = 10  # pixels of the original that a score patch shows at least (released code)


def crop_patch(image: np.ndarray, patch: Patch, size: int) -> np.ndarray:
    """The pixels of an image (H, W, 3) uint8 that a patch covers; gray .5 outside the image.

    Returns:
        (size, size, 3) float32 in [0, 1], with colors changed and mirrored if the patch says so.
    """
    pixels = _resample(image, patch, size).astype(np.float32) / 255
    pixels = change_colors(pixels, patch.colors)  # not the gray, which is always the same
    inside = _coverage(image.shape, patch, size)
    if inside is not None:
        pixels = inside[..., None] * pixels + (1 - inside[..., None]) * np.float32(GRAY)
    return pixels[:, ::-1] if patch.flip else pixels


def _resample(image: np.ndarray, patch: Patch, size: int) -> np.ndarray:
    """The patch's square of a uint8 image, with or without channels; edges repeated outside.

    Where several original pixels fall on one of the patch, whole blocks are averaged first, and
    the remaining factor (.75 to 1.5) is bilinear: close to an exact area average at a fraction of
    its cost, and sub-pixel at any scale.
    """
    height, width = image.shape[:2]
    block = max(1, round(1 / patch.scale))
    half = size / (2 * patch.scale)
    x0, x1 = _block_range(patch.x - half, patch.x + half, width, block)
    y0, y1 = _block_range(patch.y - half, patch.y + half, height, block)
    source = image[y0:y1, x0:x1]
    if block > 1:
        down, right = -source.shape[0] % block, -source.shape[1] % block
        if down or right:
            source = cv2.copyMakeBorder(source, 0, down, 0, right, cv2.BORDER_REPLICATE)
        target = (source.shape[1] // block, source.shape[0] // block)
        source = cv2.resize(source, target, interpolation=cv2.INTER_AREA)
    step = 1 / (patch.scale * block)
    # cv2 counts from pixel centers: output u (center u + .5) to the source's pixel coordinate - .5.
    left = (patch.x - half - x0) / block + step / 2 - 0.5
    top = (patch.y - half - y0) / block + step / 2 - 0.5
    matrix = np.array([[step, 0, left], [0, step, top]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(
        source, matrix, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


def _block_range(low: float, high: float, length: int, block: int) -> tuple[int, int]:
    """Original pixels that [low, high] needs, from a block's first; a block to spare, not empty."""
    first = min(max(int(low // block) - 1, 0), (length - 1) // block)
    last = min(max(int(high // block) + 2, first + 1), -(-length // block))
    return first * block, min(last * block, length)


def _coverage(shape: tuple[int, ...], patch: Patch, size: int) -> np.ndarray | None:
    """How much of each patch pixel lies inside the image, (size, size); None for all of all."""
    offsets = (np.arange(size + 1) - size / 2) / patch.scale
    edges = np.clip([patch.y + offsets, patch.x + offsets], 0, [[shape[0]], [shape[1]]])
    rows, columns = np.diff(edges) * patch.scale
    if min(rows.min(), columns.min()) > 1 - 1e-6:
        return None
    return np.outer(rows, columns).astype(np.float32)


def mask_target(
    coco: CocoInstances, patch: Patch, *, patch_size: int, target_size: int
) -> np.ndarray:
    """The annotation's mask in the patch's central P x P square.

    Polygons are moved into the patch's frame and rasterized there by COCO's own rule; only an
    annotation that is stored as RLE is decoded at full size.

    Returns:
        (G, G) float32 in {-1, 1}, mirrored if the patch says so.
    """
    polygons = coco.polygons(patch.annotation)
    if polygons is None:
        full = coco_mask.decode(coco.rle(patch.annotation)) * np.uint8(255)
        square = replace(patch, scale=patch.scale * target_size / patch_size)
        # The edge is repeated by the resampling; outside the image there is no object.
        inside = _coverage(full.shape, square, target_size)
        mask = _resample(full, square, target_size) * (1 if inside is None else inside) > 127
    else:
        mask = rasterize(polygons, patch, patch_size=patch_size, target_size=target_size)
    return np.where(mask[:, ::-1] if patch.flip else mask, np.float32(1), np.float32(-1))


def rasterize(
    polygons: list[np.ndarray], patch: Patch, *, patch_size: int, target_size: int
) -> np.ndarray:
    """Union of polygons, each (n, 2), drawn in the patch's frame: (G, G) bool, not mirrored."""
    factor = patch.scale * target_size / patch_size
    shift = target_size / 2 - factor * np.array([patch.x, patch.y])
    rings = [(ring * factor + shift).ravel().tolist() for ring in polygons]
    rles = coco_mask.frPyObjects(rings, target_size, target_size)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


class PatchDataset(TrainingDataset):
    """Groups of patches by index (head, epoch, group), the patches of one image each.

    Items are dicts with "patches" (m, 3, S, S) float32 normalized; "broken", messages on files that
    could not be read; and "targets" (m, G, G) in {-1, 1} for the mask head or "labels" (m,) in
    {-1, 1} for the score head.

    Score patches of n x n cells are 16 (n - 1) pixels larger, and their "labels" are (m, n, n), see
    `ScoredCells`. To learn IoUs they have "decode" (k,), indices of cells of (m, n, n), with the
    objects' "iou_targets" (k, F, F) in {0, 1}, F pixels of 4 in the cell's patch, and
    "iou_areas" (k,), in the same pixels and beyond the patch.
    """

    def __init__(
        self,
        coco: CocoInstances,
        images: str | Path | ImageFolder,
        sampler: PatchSampler,
        *,
        patch_size: int = 160,
        context: int = 32,
        target_size: int = 112,
    ):
        """Sizes are as in `models.deepmask.DeepMaskConfig`; `images` is the folder of the files."""
        super().__init__(coco, images, sampler)
        self.patch_size, self.target_size = patch_size, target_size
        self.input_size = patch_size + context
        self.group_size = sampler.config.patches_per_image
        self.cells_size = STRIDE * (sampler.config.score_cells - 1)

    def choose(self, rng: np.random.Generator) -> str:
        """The head that a minibatch trains."""
        return MASK if rng.random() < self.sampler.config.mask_batch_prob else SCORE

    def load(self, head: str, epoch: int, group: int) -> tuple[dict, list[Patch]]:
        """An item, and the patches that it was made of."""
        patches, image, broken = self.draw_readable(
            lambda attempt: self.sampler.draw(head, epoch, group, attempt=attempt),
            lambda patches: patches[0].image,
        )
        if head == SCORE:
            largest = self.input_size / MIN_CROP
            patches = [replace(p, scale=min(p.scale, largest)) for p in patches]
        size = self.input_size + (0 if head == MASK else self.cells_size)
        pixels = np.stack([normalize(crop_patch(image, p, size)) for p in patches])
        item: dict[str, Any] = {"patches": torch.from_numpy(pixels), "broken": broken}
        if head == MASK:
            sizes = {"patch_size": self.patch_size, "target_size": self.target_size}
            targets = np.stack([mask_target(self.coco, p, **sizes) for p in patches])
            item["targets"] = torch.from_numpy(targets)
        elif self.sampler.config.scores_cells:
            item |= self._cells(patches)
        else:
            item["labels"] = torch.tensor([p.label for p in patches], dtype=torch.float32)
        return item, patches

    def _cells(self, patches: list[Patch]) -> dict[str, Tensor]:
        """Labels of score patches with cells and, to learn IoUs, what is near objects."""
        scored = [self.sampler.score_cells(patch) for patch in patches]
        item = {"labels": torch.from_numpy(np.stack([each.labels for each in scored])).float()}
        if self.sampler.config.score_targets != IOU:
            return item
        count, side = self.sampler.config.score_cells, self.patch_size // IOU_STRIDE
        chosen, targets, areas = [], [], []
        for i, (patch, cells) in enumerate(zip(patches, scored, strict=True)):
            for index, row in cells.on.tolist():
                # The cell's own patch: as seen in the mirror, if it is mirrored.
                y, x = (STRIDE * (v - (count - 1) / 2) / patch.scale for v in divmod(index, count))
                own = replace(
                    patch, annotation=row, x=patch.x - x if patch.flip else patch.x + x,
                    y=patch.y + y,
                )  # fmt: skip
                sizes = {"patch_size": self.patch_size, "target_size": side}
                targets.append(mask_target(self.coco, own, **sizes) > 0)
                areas.append(self.coco.areas[row] * (patch.scale / IOU_STRIDE) ** 2)
                chosen.append(i * count**2 + index)
        item["decode"] = torch.tensor(chosen, dtype=torch.int64)
        item["iou_targets"] = torch.from_numpy(np.array(targets, bool).reshape(-1, side, side))
        item["iou_areas"] = torch.tensor(areas, dtype=torch.float32)
        return item

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """Groups to one minibatch: tensors concatenated, B = groups x m; "broken" joined."""
        tensors = {n: torch.cat([item[n] for item in items]) for n in items[0] if n != "broken"}
        if "decode" in tensors:  # of the cells of all groups
            cells = items[0]["labels"].numel()
            decode = [item["decode"] + i * cells for i, item in enumerate(items)]
            tensors["decode"] = torch.cat(decode)
        return tensors | {"broken": [message for item in items for message in item["broken"]]}
