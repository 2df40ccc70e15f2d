"""Training RoIs: pixels and targets of what `RoiSampler` draws, and the loader serving them.

Letters: B images of a minibatch, R RoIs of each, K IoU thresholds, (h, w) a resized image, (H, W)
the frame that all of a minibatch fit in.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datasets.coco import CocoInstances
from datasets.loading import batch_loader, draw_until_readable, read_annotated_image, share_of_batch
from datasets.resize import resize_sides
from datasets.roi_sampler import RoiRules, RoiSample, RoiSampler, box_corners
from datasets.transforms import IMAGENET, PixelRules, normalize

PAD_TO = 32  # pixels: whole cells of any trunk's feature maps, and fewer different shapes


class RoiDataset(Dataset):
    """Images with their RoIs by key: item (epoch, index, threshold), see `RoiSampler.draw`.

    Items are dicts with "image" (3, h, w) float32 normalized; "rois" (R, 4) float32 xyxy in pixels
    of that image; "labels" (K, R) int64 and "targets" (R, 4) float32, see `RoiSample`; and "broken"
    (list of messages on files that could not be read).
    """

    def __init__(
        self,
        coco: CocoInstances,
        images: str | Path,
        sampler: RoiSampler,
        *,
        pixels: PixelRules = IMAGENET,
    ):
        self.coco, self.images, self.sampler = coco, Path(images), sampler
        self.pixels = pixels

    def __getitem__(self, key: tuple[int, int, int]) -> dict:
        return self.load(*key)[0]

    def load(self, epoch: int, index: int, threshold: int = -1) -> tuple[dict, RoiSample]:
        """The item of a key, and the sample that it was made of."""
        sample, image, broken = draw_until_readable(
            lambda attempt: self.sampler.draw(epoch, index, threshold, attempt=attempt),
            lambda sample: read_annotated_image(self.coco, self.images, sample.image),
        )
        rules = self.sampler.rules
        pixels, (x_factor, y_factor) = resize_sides(
            image,
            short_side=rules.short_side,
            long_side=rules.long_side,
            resampling=rules.resampling,
        )
        if sample.flip:
            pixels = pixels[:, ::-1]
        factors = np.array([x_factor, y_factor] * 2, np.float32)
        item = {
            "image": torch.from_numpy(normalize(pixels.astype(np.float32) / 255, self.pixels)),
            "rois": torch.from_numpy(box_corners(sample.rois, rules.inclusive_boxes) * factors),
            "labels": torch.from_numpy(sample.labels),
            "targets": torch.from_numpy(sample.targets),
            "broken": broken,
        }
        return item, sample


class RoiBatchKeys:
    """A batch sampler: this process's share of the keys of the minibatches of a range of steps.

    The steps are training steps. The threshold of a minibatch depends on (seed, epoch, batch) and
    is the same in every process; its images are dealt out to the processes in order.
    """

    def __init__(
        self,
        steps: range,
        *,
        rules: RoiRules,
        batches_per_epoch: int,
        images_per_batch: int,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        """
        Args:
            steps: minibatches counted over all epochs (a resumed run starts in the middle of one).
            rules: of the dataset: whether a threshold is drawn, and from how many.
            images_per_batch: of the whole minibatch, over all processes.
            share: (index, count) of this process; the count divides `images_per_batch`.
        """
        self.steps, self.rules, self.seed = steps, rules, seed
        self.batches_per_epoch, self.images_per_batch = batches_per_epoch, images_per_batch
        self.share = share
        assert images_per_batch % share[1] == 0, (images_per_batch, share)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for step in self.steps:
            epoch, batch = divmod(step, self.batches_per_epoch)
            threshold = self.threshold(epoch, batch)
            indices = share_of_batch(batch, self.images_per_batch, self.share)
            yield [(epoch, index, threshold) for index in indices]

    def threshold(self, epoch: int, batch: int) -> int:
        """Index of the minibatch's IoU threshold, each with the same probability; -1 for all."""
        if not self.rules.draw_threshold:
            return -1
        rng = np.random.default_rng([self.seed, epoch, batch, 1 << 30])
        return int(rng.integers(len(self.rules.thresholds)))


def collate_rois(items: list[dict]) -> dict:
    """Images to one minibatch.

    Returns:
        "images" (B, 3, H, W), each at the top left, the rest 0, which is the mean color;
        "rois" (B * R, 5), the row of the image and xyxy, as torchvision's RoI pooling takes them;
        "labels" (K, B * R); "targets" (B * R, 4); "broken" joined.
    """
    sizes = torch.tensor([item["image"].shape[1:] for item in items])
    height, width = (-(-sizes.amax(dim=0) // PAD_TO) * PAD_TO).tolist()
    images = torch.zeros(len(items), 3, height, width)
    for frame, item, (h, w) in zip(images, items, sizes.tolist(), strict=True):
        frame[:, :h, :w] = item["image"]
    rois = [
        torch.nn.functional.pad(item["rois"], (1, 0), value=row) for row, item in enumerate(items)
    ]
    return {
        "images": images,
        "rois": torch.cat(rois),
        "labels": torch.cat([item["labels"] for item in items], dim=1),
        "targets": torch.cat([item["targets"] for item in items]),
        "broken": [message for item in items for message in item["broken"]],
    }


def roi_loader(
    dataset: RoiDataset,
    keys: Iterable[list],
    *,
    workers: int,
    pin_memory: bool = False,
    prefetch: int = 2,
) -> DataLoader:
    """Serves the minibatches whose keys are given, in order."""
    return batch_loader(
        dataset, keys, collate_rois, workers=workers, pin_memory=pin_memory, prefetch=prefetch
    )


def target_statistics(
    dataset: RoiDataset, *, images: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the box targets, over what training draws as foreground.

    Args:
        images: how many to measure on, chosen by `seed` among those with an object (all of them if
            there are fewer). No pixel is read.

    Returns:
        Two arrays (4,) float32. A deviation is 1 where the targets are all the same, as they are
        when no proposal but the ground-truth boxes is foreground.

    Raises:
        ValueError: no image of the dataset has an object.
    """
    sampler, rng = dataset.sampler, np.random.default_rng(seed)
    if len(sampler.object_images) == 0:
        raise ValueError(f"{dataset.coco.path}: no image has an object (not a crowd)")
    rows = rng.permutation(sampler.object_images)[:images].tolist()
    samples = [sampler.sample(row, rng) for row in rows]
    targets = np.concatenate([s.targets[s.labels.max(axis=0) > 0] for s in samples])
    mean, std = targets.mean(axis=0, dtype=np.float64), targets.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32)
