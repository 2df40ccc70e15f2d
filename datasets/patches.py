"""Training patches: pixels and targets of what `PatchSampler` draws, and the loader serving them.

A patch of S pixels at scale s covers an S / s square of the original image around its center.
Image and target are both resampled from that square with sub-pixel positions, so they stay
aligned at any scale.

Letters: m patches of a group (one decoded image), B batch, S input size P + C, G target size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.coco import CocoInstances
from datasets.loading import batch_loader, draw_until_readable, read_annotated_image, share_of_batch
from datasets.patch_sampler import MASK, SCORE, Patch, PatchSampler
from datasets.transforms import GRAY, normalize


def crop_patch(image: np.ndarray, patch: Patch, size: int) -> np.ndarray:
    """The pixels that a patch covers, resampled; gray .5 outside the image.

    Args:
        image: (H, W, 3) uint8. size: S.

    Returns:
        (S, S, 3) float32 in [0, 1], mirrored if the patch says so.
    """
    pixels = resample(image, patch, size).astype(np.float32) / 255
    inside = _inside_share(image.shape, patch, size)
    if inside is not None:
        pixels = inside[..., None] * pixels + (1 - inside[..., None]) * GRAY
    return pixels[:, ::-1] if patch.flip else pixels


def resample(image: np.ndarray, patch: Patch, size: int) -> np.ndarray:
    """The patch's square, edges repeated outside.

    Where several original pixels fall on one of the patch, whole blocks are averaged first, and
    the remaining factor (.75 to 1.5) is bilinear: close to an exact area average at a fraction of
    its cost, and sub-pixel at any scale.

    Args:
        image: (H, W) or (H, W, C) uint8.

    Returns:
        (size, size) or (size, size, C) uint8.
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
    return cv2.warpAffine(
        source,
        matrix,
        (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _block_range(low: float, high: float, length: int, block: int) -> tuple[int, int]:
    """Original pixels that [low, high] needs, with a block to spare; never empty.

    They start on a block.
    """
    first = min(max(int(low // block) - 1, 0), (length - 1) // block)
    last = min(max(int(high // block) + 2, first + 1), -(-length // block))
    return first * block, min(last * block, length)


def _inside_share(shape: tuple[int, ...], patch: Patch, size: int) -> np.ndarray | None:
    """How much of each patch pixel lies inside the image.

    Returns:
        (size, size) float32; None when all of all do.
    """
    shares = []
    for center, length in ((patch.y, shape[0]), (patch.x, shape[1])):
        edges = center + (np.arange(size + 1) - size / 2) / patch.scale
        shares.append(np.diff(np.clip(edges, 0, length)) * patch.scale)
    if shares[0].min() > 1 - 1e-6 and shares[1].min() > 1 - 1e-6:
        return None
    return np.outer(*shares).astype(np.float32)


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
        square = Patch(**{**vars(patch), "scale": patch.scale * target_size / patch_size})
        # The edge is repeated by the resampling; outside the image there is no object.
        inside = _inside_share(full.shape, square, target_size)
        soft = resample(full, square, target_size) * (1 if inside is None else inside)
        mask = soft > 127
    else:
        mask = rasterize(polygons, patch, patch_size=patch_size, target_size=target_size)
    mask = mask[:, ::-1] if patch.flip else mask
    return np.where(mask, np.float32(1), np.float32(-1))


def rasterize(
    polygons: list[np.ndarray], patch: Patch, *, patch_size: int, target_size: int
) -> np.ndarray:
    """Union of polygons, drawn in the patch's frame.

    Args:
        polygons: each (n, 2), in the original frame.

    Returns:
        (G, G) bool, not mirrored.
    """
    factor = patch.scale * target_size / patch_size
    shift = target_size / 2 - factor * np.array([patch.x, patch.y])
    rings = [(ring * factor + shift).ravel().tolist() for ring in polygons]
    rles = coco_mask.frPyObjects(rings, target_size, target_size)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


class PatchDataset(Dataset):
    """Groups of patches by key: item (kind, epoch, group) is the patches of that group.

    There are `patches_per_image` (m) of them. Items are dicts with "patches" (m, 3, S, S) float32
    normalized, "keys" (m,) int64 that identify the samples, "broken" (list of messages on files
    that could not be read), and "targets" (m, G, G) in {-1, 1} for mask groups or "labels" (m,) in
    {-1, 1} for score groups.
    """

    def __init__(
        self,
        coco: CocoInstances,
        images: str | Path,
        sampler: PatchSampler,
        *,
        patch_size: int = 160,
        context: int = 32,
        target_size: int = 112,
        patches_per_image: int = 1,
    ):
        self.coco, self.images, self.sampler = coco, Path(images), sampler
        self.patch_size, self.input_size, self.target_size = (
            patch_size,
            patch_size + context,
            target_size,
        )
        self.patches_per_image = patches_per_image

    def __getitem__(self, key: tuple[str, int, int]) -> dict:
        return self.load(*key)[0]

    def load(self, kind: str, epoch: int, group: int) -> tuple[dict, list[Patch]]:
        """The item of a key, and the patches that it was made of."""
        patches, image, broken = draw_until_readable(
            lambda attempt: self.sampler.draw(
                kind, epoch, group, self.patches_per_image, attempt=attempt
            ),
            lambda patches: self.read_image(patches[0].image),
        )
        pixels = np.stack([normalize(crop_patch(image, p, self.input_size)) for p in patches])
        item = {
            "patches": torch.from_numpy(pixels),
            "keys": sample_keys(
                self.sampler.seed, epoch, group * self.patches_per_image, len(patches)
            ),
            "broken": broken,
        }
        if kind == MASK:
            sizes = {"patch_size": self.patch_size, "target_size": self.target_size}
            item["targets"] = torch.from_numpy(
                np.stack([mask_target(self.coco, p, **sizes) for p in patches])
            )
        else:
            item["labels"] = torch.tensor([p.label for p in patches], dtype=torch.float32)
        return item, patches

    def read_image(self, row: int) -> np.ndarray:
        """Image `row` of the dataset, (H, W, 3) uint8.

        Raises:
            ImageError: the file cannot be read, or its size is not the annotations'.
        """
        return read_annotated_image(self.coco, self.images, row)


def sample_keys(seed: int, epoch: int, first: int, count: int) -> torch.Tensor:
    """Keys that tell sample `first`, `first` + 1, ... of an epoch of a seed from all others.

    Returns:
        (count,) int64, distinct from the keys of all other samples of a run.
    """
    run = (seed * 0x9E3779B1 + epoch) % (1 << 31)
    return (run << 32) + torch.arange(first, first + count, dtype=torch.int64)


class BatchKeys:
    """A batch sampler: this process's share of the keys of the minibatches of a range of steps.

    The steps are training steps. The kind of a minibatch depends on (seed, epoch, batch) and is
    the same in every process; the groups of a minibatch are dealt out to the processes in order.
    """

    def __init__(
        self,
        steps: range,
        *,
        batches_per_epoch: int,
        groups_per_batch: int,
        seed: int = 0,
        mask_share: float = 0.5,
        share: tuple[int, int] = (0, 1),
    ):
        """
        Args:
            steps: minibatches counted over all epochs (a resumed run starts in the middle of one).
            groups_per_batch: of the whole minibatch, over all processes.
            mask_share: probability of a minibatch of mask patches.
            share: (index, count) of this process; the count divides `groups_per_batch`.
        """
        self.steps, self.batches_per_epoch, self.seed, self.mask_share = (
            steps,
            batches_per_epoch,
            seed,
            mask_share,
        )
        self.groups_per_batch, self.share = groups_per_batch, share
        assert groups_per_batch % share[1] == 0, (groups_per_batch, share)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[str, int, int]]]:
        for step in self.steps:
            epoch, batch = divmod(step, self.batches_per_epoch)
            yield batch_keys(
                self.kind(epoch, batch), epoch, batch, self.groups_per_batch, self.share
            )

    def kind(self, epoch: int, batch: int) -> str:
        """Mask or score, by a coin whose sides have the given shares."""
        coin = np.random.default_rng([self.seed, epoch, batch, 1 << 30]).random()
        return MASK if coin < self.mask_share else SCORE


def batch_keys(
    kind: str, epoch: int, batch: int, groups: int, share: tuple[int, int]
) -> list[tuple[str, int, int]]:
    """Keys of one process's share of one minibatch of `groups` groups."""
    return [(kind, epoch, group) for group in share_of_batch(batch, groups, share)]


def collate_groups(items: list[dict]) -> dict:
    """Groups to one minibatch: tensors concatenated, B = groups x m; "broken" joined."""
    batch = {key: torch.cat([item[key] for item in items]) for key in items[0] if key != "broken"}
    batch["broken"] = [message for item in items for message in item["broken"]]
    return batch


def patch_loader(
    dataset: PatchDataset,
    keys: Iterable[list],
    *,
    workers: int,
    pin_memory: bool = False,
    prefetch: int = 4,
) -> DataLoader:
    """Serves the minibatches whose keys are given, in order."""
    return batch_loader(
        dataset, keys, collate_groups, workers=workers, pin_memory=pin_memory, prefetch=prefetch
    )
