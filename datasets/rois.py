"""Training RoIs: pixels and targets of what `RoiSampler` draws, and their minibatches.

Letters: B images of a minibatch, R RoIs of each, K IoU thresholds, (h, w) a resized image, (H, W)
the frame that all of a minibatch fit in.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.coco import CocoInstances
from datasets.colors import change_colors
from datasets.images import ImageFolder
from datasets.loading import TrainingDataset
from datasets.resize import IMAGENET, PixelConfig, normalize, resize_sides, resized_sides
from datasets.roi_sampler import RoiSample, RoiSampler

PAD_TO = 32  # pixels: whole cells of any trunk's feature maps, and fewer different shapes


class RoiDataset(TrainingDataset):
    """Images with their RoIs by index (threshold, epoch, index), see `RoiSampler.draw`.

    Items are dicts with "image" (3, h, w) float32 normalized; "rois" and "boxes" (R, 4) float32
    xyxy in pixels of that image and "labels" (K, R) int64, see `RoiSample`; "frame" (2,) int64, a
    height and width that all images of the minibatch fit in; and "broken", messages on files that
    could not be read.
    """

    def __init__(
        self,
        coco: CocoInstances,
        images: str | Path | ImageFolder,
        sampler: RoiSampler,
        *,
        pixels: PixelConfig = IMAGENET,
        align_corners: bool = False,
        inclusive_boxes: bool = False,
        images_per_batch: int = 1,
    ):
        """Files are in the folder `images`; `align_corners` as in `resize_sides`.

        `inclusive_boxes`: boxes are given by their first and last pixel (released code).
        `images_per_batch`: of the minibatches of all processes. They share a frame: what a network
        sees beyond an image's edge does not depend on how many processes there are.
        """
        super().__init__(coco, images, sampler)
        self.pixels, self.align_corners = pixels, align_corners
        self.inclusive_boxes, self.images_per_batch = inclusive_boxes, images_per_batch

    def choose(self, rng: np.random.Generator) -> int:
        """The IoU threshold of a minibatch, or -1 for all."""
        thresholds = len(self.sampler.iou_thresholds)
        return int(rng.integers(thresholds)) if self.sampler.config.draw_threshold else -1

    def load(self, threshold: int, epoch: int, index: int) -> tuple[dict, RoiSample]:
        """An item, and the sample that it was made of."""
        sample, image, broken = self.draw_readable(
            lambda attempt: self.sampler.draw(epoch, index, threshold, attempt=attempt),
            lambda sample: sample.image,
        )
        pixels, scale_xy = resize_sides(image, **self._sides(sample.scale))
        if sample.flip:
            pixels = pixels[:, ::-1]
        pixels = change_colors(pixels.astype(np.float32) / 255, sample.colors)
        scales = np.array(scale_xy * 2, np.float32)
        item = {
            "image": torch.from_numpy(normalize(pixels, self.pixels)),
            "rois": torch.from_numpy(self.corners(sample.rois) * scales),
            "boxes": torch.from_numpy(self.corners(sample.boxes) * scales),
            "labels": torch.from_numpy(sample.labels),
            "frame": self._frame(epoch, index),
            "broken": broken,
        }
        return item, sample

    def _frame(self, epoch: int, index: int) -> Tensor:
        first = index - index % self.images_per_batch
        samples = range(first, first + self.images_per_batch)
        images = [self.sampler.draw_image(epoch, i)[:2] for i in samples]
        sizes = [resized_sides(*self.coco.image_sizes[row].tolist(), **self._sides(scale))
                 for row, scale in images]  # fmt: skip
        return torch.tensor(sizes).amax(dim=0)

    def _sides(self, scale: float) -> dict[str, Any]:
        config = self.sampler.config
        return {
            "short_side": max(1, round(config.short_side * scale)),
            "long_side": max(1, round(config.long_side * scale)),
            "align_corners": self.align_corners,
        }

    def corners(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) xyxy as the network is given them, in the same pixels.

        With `inclusive_boxes` by the first and the last pixel, at least 1 apart.
        """
        if not self.inclusive_boxes:
            return boxes
        last = np.maximum(boxes[:, 2:] - 1, boxes[:, :2] + 1)
        return np.concatenate([boxes[:, :2], last], axis=1)

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """Images to one minibatch.

        "images" (B, 3, H, W), each at the top left, the rest 0, which is the mean color; "rois"
        (B * R, 5), the row of the image and xyxy, as torchvision's RoI pooling takes them;
        "boxes" (B * R, 4); "labels" (K, B * R); "broken" joined.
        """
        # An image that replaces an unreadable one may be larger than the frame of the minibatch.
        sizes = [torch.tensor(item["image"].shape[1:]) for item in items]
        frame = torch.stack(sizes + [item["frame"] for item in items]).amax(dim=0)
        height, width = (-(-frame // PAD_TO) * PAD_TO).tolist()
        images = torch.zeros(len(items), 3, height, width)
        for image, item, (h, w) in zip(images, items, sizes, strict=True):
            image[:, :h, :w] = item["image"]
        rois = [F.pad(item["rois"], (1, 0), value=row) for row, item in enumerate(items)]
        return {
            "images": images,
            "rois": torch.cat(rois),
            "boxes": torch.cat([item["boxes"] for item in items]),
            "labels": torch.cat([item["labels"] for item in items], dim=1),
            "broken": [message for item in items for message in item["broken"]],
        }
