"""The stage before the others: a trunk learns to classify."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.class_folder import ClassFolder
from datasets.coco import CocoInstances
from datasets.crops import CropDataset, CropSampler, LabeledCrops
from datasets.image_survey import AUTO
from datasets.images import APPLY, ImageFolder
from models.classifier import Classifier
from pipeline import distributed
from pipeline.config import PRETRAIN, Config
from pipeline.data import load_split
from pipeline.evaluation.classes import CROP_VALIDATION_SEED, evaluate_classes
from pipeline.networks import make_classifier
from pipeline.recipe import find_path
from pipeline.training.stages import Stage


class PretrainStage(Stage):
    """Trains a trunk and a linear classifier on crops, with live batch norm."""

    name = PRETRAIN
    samples, best_metric = "images", "accuracy"
    model: Classifier

    def __init__(self, config: Config, *, filled: bool = False):
        """`filled`: a checkpoint will fill the network, which needs no weights before."""
        super().__init__(config)
        self.train_data = self._crops("train", seed=config.seed)
        crops = self.train_data.crops
        self.val_data = self._crops("val", seed=CROP_VALIDATION_SEED, like=crops)
        self.metadata = {"categories": crops.categories}
        torch.manual_seed(config.seed)
        num_classes = len(crops.categories)
        self.model = make_classifier(config, num_classes=num_classes, pretrained=not filled)

    def _crops(self, split: str, *, seed: int, like: LabeledCrops | None = None) -> CropDataset:
        c, data = self.config.pretrain, self.config.data
        key = f"{split}_folder"
        if given := getattr(c, key):
            classes = [category["name"] for category in like.categories] if like else None
            path = find_path(given, key=f"pretrain.{key}")
            crops = LabeledCrops.of_folder(ClassFolder(path, classes=classes))
            exif = APPLY if data.exif == AUTO else data.exif
            images = ImageFolder(path, exif, data.max_pixels)
        else:
            files = like.files if like else None
            known = files if isinstance(files, CocoInstances) else None
            coco, images = load_split(self.config, split, like=known)
            crops = LabeledCrops.of_objects(coco, min_side=c.crops.min_side)
        distributed.say(f"{split}: {len(crops):,} crops of {len(crops.categories)} categories")
        samples = self.optim.batches_per_epoch * self.optim.batch_size
        return CropDataset(
            crops,
            images,
            CropSampler(crops, samples_per_epoch=samples, seed=seed),
            config=c.crops,
            training=split == "train",
        )

    def losses(self, model: nn.Module, part: dict) -> dict[str, Tensor]:
        """Cross-entropy, and the fraction of crops whose best class is wrong."""
        logits = model(part["images"]).float()
        error = (logits.argmax(1) != part["labels"]).float().mean()
        return {"loss": F.cross_entropy(logits, part["labels"]), "error": error}

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """Loss and error on the validation crops, or on `validation_batches` minibatches of them.

        As many crops at once as a training step has in each process.
        """
        return evaluate_classes(
            model,
            self.val_data,
            device,
            limit=self.optim.validation_batches * self.optim.batch_size,
            batch_size=self.optim.batch_size // distributed.world_size(),
            workers=self.config.data.workers,
        )
