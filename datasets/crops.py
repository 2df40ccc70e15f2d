"""Crops to classify: the objects of annotated images, or whole images of class folders.

Letters: n crops of a data set, B crops of a minibatch, S the side of a network's input.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import v2

from datasets.class_folder import ClassFolder
from datasets.coco import CocoInstances
from datasets.images import ImageFolder
from datasets.loading import TrainingDataset
from datasets.resize import MEAN, STD
from datasets.sharing import SharedArrays


@dataclass(frozen=True)
class CropConfig:
    """How crops are cut and varied, by torchvision's transforms (He et al., CVPR 2016)."""

    size: int = 224  # S, pixels
    context: float = 0.1  # around an object, as a fraction of its longer side, on every side
    min_side: float = 16.0  # pixels of an object's longer side; smaller ones are left out
    scale: tuple[float, float] = (0.08, 1.0)  # area of a random crop, as a fraction of all
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # of a random crop's width to its height
    flip: bool = True  # mirror half of the crops
    jitter_color: float = 0.0  # largest change of brightness, contrast and saturation, up to 1
    center: float = 0.875  # side of the center crop in validation, as a fraction of the short side

    def __post_init__(self) -> None:
        for name, low, high in (
            ("size", 1, 4096), ("context", 0, 10), ("min_side", 0, math.inf),
            ("jitter_color", 0, 1), ("center", 0.1, 1),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        for name, high in (("scale", 1), ("ratio", 100)):
            values = getattr(self, name)
            if not 0 < values[0] <= values[1] <= high:
                raise ValueError(f"{name} must be ascending, above 0 and at most {high}: {values}")

    def training_transform(self) -> v2.Transform:
        """(3, h, w) uint8 to a random crop, (3, S, S) float32 normalized."""
        jitter = self.jitter_color
        return v2.Compose([
            v2.RandomResizedCrop(self.size, scale=self.scale, ratio=self.ratio, antialias=True),
            *([v2.RandomHorizontalFlip()] if self.flip else []),
            *([v2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
            *_normalization(),
        ])  # fmt: skip

    def validation_transform(self) -> v2.Transform:
        """(3, h, w) uint8 to the crop of the center, (3, S, S) float32 normalized."""
        side = max(self.size, round(self.size / self.center))
        resize = v2.Resize(side, antialias=True)
        return v2.Compose([resize, v2.CenterCrop(self.size), *_normalization()])


def _normalization() -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


class LabeledCrops(SharedArrays):
    """Regions of images, each with a label.

    Attributes:
        files: the images.
        image_index: (n,) int64, row of `files`.
        boxes: (n, 4) float32 xyxy of objects in pixels; None for whole images.
        labels: (n,) int64, row of `categories`.
        categories: {"id", "name"} of each.
    """

    files: CocoInstances | ClassFolder
    image_index: np.ndarray
    boxes: np.ndarray | None
    labels: np.ndarray
    categories: list[dict]

    @classmethod
    def of_objects(cls, coco: CocoInstances, *, min_side: float = 0) -> "LabeledCrops":
        """The objects of annotated images, without crowds, difficult and tiny ones.

        Raises:
            ValueError: there is none, or only one category.
        """
        self = cls()
        longest = (coco.boxes[:, 2:] - coco.boxes[:, :2]).max(axis=1, initial=0)
        single = ~coco.is_crowd & ~coco.is_difficult
        rows = np.flatnonzero(single & (longest >= min_side))
        if not len(rows):
            unfit = {
                "difficult": int(coco.is_difficult.sum()),
                f"smaller than {min_side:g} px": int((single & (longest < min_side)).sum()),
            }
            raise ValueError(f"{coco.path}: no object to classify: {coco.why_none(unfit)}")
        self.files, self.boxes = coco, coco.boxes[rows]
        self.image_index = coco.image_index[rows].astype(np.int64)
        self.labels = coco.category_index[rows].astype(np.int64)
        self.categories = [
            {"id": int(id_), "name": str(name)}
            for id_, name in zip(coco.category_ids, coco.category_names, strict=True)
        ]
        self._check()
        return self

    @classmethod
    def of_folder(cls, folder: ClassFolder) -> "LabeledCrops":
        """The images of a folder of class folders.

        Raises:
            ValueError: there is only one class.
        """
        self = cls()
        self.files, self.boxes, self.labels = folder, None, folder.labels
        self.image_index = np.arange(len(folder))
        self.categories = [
            {"id": id_, "name": name} for id_, name in enumerate(folder.classes, start=1)
        ]
        self._check()
        return self

    def _check(self) -> None:
        if len(self.categories) < 2:
            raise ValueError(f"{self.files.path}: one category; classification needs two at least")

    def __len__(self) -> int:
        """The number of crops."""
        return len(self.labels)

    def cut(self, row: int, image: np.ndarray, *, context: float) -> np.ndarray:
        """The region of a crop in its image (H, W, 3).

        Of an object, a square around its box with some context, as far as the image reaches.
        """
        if self.boxes is None:
            return image
        x1, y1, x2, y2 = self.boxes[row].tolist()
        half = max(x2 - x1, y2 - y1) * (0.5 + context)
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        height, width = image.shape[:2]
        left, top = max(0, math.floor(x - half)), max(0, math.floor(y - half))
        right, bottom = min(width, math.ceil(x + half)), min(height, math.ceil(y + half))
        return image[min(top, height - 1) : bottom, min(left, width - 1) : right]


class Draw(NamedTuple):
    """A crop's row, and the seed of how it is varied."""

    row: int
    seed: int


class CropSampler:
    """Draws crops: all of them in random order, then all again in another."""

    def __init__(self, crops: LabeledCrops, *, samples_per_epoch: int, seed: int = 0):
        """`samples_per_epoch` of the run's epochs, which need not be as long as the data set."""
        self.crops, self.samples_per_epoch, self.seed = crops, samples_per_epoch, seed
        self._round, self._order = -1, np.empty(0, np.int64)

    def draw(self, epoch: int, index: int, *, attempt: int = 0) -> Draw:
        """Sample `index` of an epoch; `attempt` counts up when its image was unreadable."""
        seeds = np.random.SeedSequence([self.seed, epoch, index, attempt])
        if attempt:
            row = int(np.random.default_rng(seeds).integers(len(self.crops)))
        else:
            position = epoch * self.samples_per_epoch + index
            row = self._row(*divmod(position, len(self.crops)))
        return Draw(row, int(seeds.generate_state(1, np.uint64)[0]))

    def _row(self, rounds: int, position: int) -> int:
        if rounds != self._round:
            rng = np.random.default_rng([self.seed, rounds])
            self._round, self._order = rounds, rng.permutation(len(self.crops))
        return int(self._order[position])


class CropDataset(TrainingDataset):
    """Crops by index (None, epoch, index), see `CropSampler.draw`.

    Items are dicts with "images" (3, S, S) float32 normalized; "labels" () int64; and "broken",
    messages on files that could not be read.
    """

    def __init__(
        self,
        crops: LabeledCrops,
        images: str | Path | ImageFolder,
        sampler: CropSampler,
        *,
        config: CropConfig,
        training: bool,
    ):
        """Files are in the folder `images`; crops are varied in `training`, else of the center."""
        super().__init__(crops.files, images, sampler)
        self.crops, self.config = crops, config
        self.transform = config.training_transform() if training else config.validation_transform()

    def choose(self, rng: np.random.Generator) -> None:
        """There is one thing to train."""

    def load(self, _: None, epoch: int, index: int) -> tuple[dict, Draw]:
        """An item, and the draw that it was made of."""
        draw, image, broken = self.draw_readable(
            lambda attempt: self.sampler.draw(epoch, index, attempt=attempt),
            lambda draw: int(self.crops.image_index[draw.row]),
        )
        region = self.crops.cut(draw.row, image, context=self.config.context)
        with torch.random.fork_rng(devices=[]):  # the transforms draw from PyTorch's generator
            torch.default_generator.manual_seed(draw.seed)
            pixels = self.transform(torch.from_numpy(region).permute(2, 0, 1))
        label = torch.tensor(self.crops.labels[draw.row])
        return {"images": pixels, "labels": label, "broken": broken}, draw

    @staticmethod
    def collate(items: list[dict]) -> dict:
        """Crops to one minibatch: "images" (B, 3, S, S), "labels" (B,), "broken" joined."""
        return {
            "images": torch.stack([item["images"] for item in items]),
            "labels": torch.stack([item["labels"] for item in items]),
            "broken": [message for item in items for message in item["broken"]],
        }
