"""The three stages: network, samples and losses, put together from a config.

Reading the data and building the network is all that happens here; what a stage starts from is made
or found by `pipeline/training/prepare.py`.
"""

import math
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from datasets.object_sizes import ObjectSides
from datasets.patch_sampler import PatchSamplingConfig
from datasets.patches import PatchDataset
from datasets.proposal_boxes import ProposalBoxes
from models.deepmask import DeepMask
from models.losses import (
    box_loss,
    cell_score_loss,
    count_cells,
    count_samples,
    integral_loss,
    mask_ious,
    mask_loss,
    score_loss,
)
from models.multipathnet import MultiPathNet
from models.sharpmask import SharpMask
from models.trunk import Trunk
from pipeline import distributed
from pipeline.config import Config, OptimConfig
from pipeline.data import (
    delta_statistics,
    device_batches,
    load_split,
    patch_dataset,
    roi_dataset,
    split_files,
)
from pipeline.evaluation.patches import VALIDATION_SEED, evaluate_patches, validation_heads
from pipeline.evaluation.rois import ROI_VALIDATION_SEED, evaluate_rois, sample_ap
from pipeline.inference.detect import Detector
from pipeline.inference.proposal_store import ProposalStore
from pipeline.networks import make_deepmask, make_multipathnet, make_sharpmask
from pipeline.sizes import say_sizes


class Stage:
    """What the training loop needs to know of a stage.

    Attributes:
        name: "pretrain", "deepmask", "sharpmask" or "multipathnet".
        samples: what a minibatch is made of, for its rate: patches, images.
        best_metric: of `validate`; decides which checkpoint is the best.
        model: the network that is trained.
        metadata: what its checkpoints say beside weights and config.
        phase_starts: steps at which other parameters begin to be trained.
        idle_parameters: whether a minibatch may leave some of those that are trained unused.
    """

    name: str
    samples: str
    best_metric: str
    model: nn.Module
    train_data: Any
    metadata: dict[str, Any] = {}
    phase_starts: tuple[int, ...] = ()
    idle_parameters = False

    def __init__(self, config: Config):
        self.config = config
        self.optim: OptimConfig = getattr(config, self.name).optim
        torch.manual_seed(config.seed)  # for the weights that are drawn
        check_batch(config, self.name)

    @property
    def trunk(self) -> Trunk:
        """The network's trunk."""
        return next(module for module in self.model.modules() if isinstance(module, Trunk))

    @property
    def num_parts(self) -> int:
        """Of a minibatch, over all processes."""
        return distributed.world_size() * self.optim.accumulate

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters to train, with a factor on the learning rate and their weight decay.

        The trunk's are apart, and so are biases that do not decay.
        """
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decays = self.optim.decay_biases or not name.endswith(".bias")
                key = name.startswith("trunk."), self.optim.weight_decay if decays else 0.0
                groups.setdefault(key, []).append(parameter)
        return [
            {
                "params": groups[key],
                "lr_factor": self.optim.trunk_lr_factor if key[0] else 1.0,
                "weight_decay": key[1],
            }
            for key in sorted(groups, key=lambda key: (key[0], -key[1]))
        ]

    def start_phase(self, step: int) -> None:
        """Marks the parameters that are trained from this step on."""

    def training_batches(self, steps: range, device: torch.device) -> Generator[list[dict]]:
        """This process's parts of the minibatches of the given steps, on the device."""
        indices = self.train_data.batches(
            steps,
            batches_per_epoch=self.optim.batches_per_epoch,
            batch_size=self.optim.batch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            parts=self.optim.accumulate,
        )
        workers = self.config.data.workers
        with closing(device_batches(self.train_data, indices, device, workers=workers)) as loaded:
            while parts := list(islice(loaded, self.optim.accumulate)):
                # All parts have them, or none, by what the minibatch trains.
                counts = [each for part in parts if (each := self.counts(part)) is not None]
                if counts:
                    mean = distributed.mean(torch.stack(counts).mean(0))
                    parts = [part | {"counts": mean} for part in parts]
                yield parts

    def counts(self, part: dict) -> Tensor | None:
        """What the losses of a part of a minibatch divide by; None: by its number of samples.

        The losses get the mean over all parts, of all processes, as "counts" of the part.
        """
        return None

    def losses(self, model: nn.Module, part: dict) -> dict[str, Tensor]:
        """Scalars of a part of a minibatch; the mean over all parts of "loss" is minimized."""
        raise NotImplementedError

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """Metrics of the network, or of its averaged weights, over all processes' samples."""
        raise NotImplementedError


def check_batch(config: Config, stage: str) -> None:
    """Raises a ValueError if minibatches are not what a stage learns from, cut into equal parts."""
    section = getattr(config, stage)
    if stage == "sharpmask" and section.sampling.mask_batch_prob != 1:
        raise ValueError(
            f"sharpmask.sampling.mask_batch_prob must be 1, got {section.sampling.mask_batch_prob}"
            ": the refinement learns from masks alone"
        )
    size, parts = section.optim.batch_size, section.optim.accumulate
    is_of_patches = stage in ("deepmask", "sharpmask")
    factors = {
        "sampling.patches_per_image": section.sampling.patches_per_image if is_of_patches else 1,
        "optim.accumulate": parts,
        "the number of processes": distributed.world_size(),
    }
    multiple = math.prod(factors.values())
    if size % multiple:
        words = " times ".join(f"{name} {value}" for name, value in factors.items() if value > 1)
        raise ValueError(
            f"{stage}.optim.batch_size {size} must be a multiple of {words}; for example --set "
            f"{stage}.optim.batch_size={-(-size // multiple) * multiple}, with a learning rate "
            "that fits"
        )


class PatchStage(Stage):
    """What DeepMask's and SharpMask's training have in common: patches in, masks out."""

    samples, best_metric = "patches", "iou_above_0.7"

    def __init__(self, config: Config, *, target_size: int):
        super().__init__(config)
        self.sampling = getattr(config, self.name).sampling

        def patches(split: str, seed: int, sampling: PatchSamplingConfig) -> PatchDataset:
            return patch_dataset(
                config.deepmask,
                *load_split(config, split),
                sampling=sampling,
                target_size=target_size,
                seed=seed,
            )

        self.train_data = patches("train", config.seed, self.sampling)
        self.val_data = patches("val", VALIDATION_SEED, self.sampling.for_validation())
        sides = ObjectSides.measure(self.train_data.sampler)
        self.metadata = {"object_sides": sides.to_plain()}
        low, high, _ = say_sizes(sides, config, self.train_data.sampler.canonical)
        for data in (self.train_data, self.val_data):
            data.sampler.draw_negatives_at(low, high)

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """Patch metrics on `validation_batches` minibatches, in parts as in training."""
        parts = self.num_parts
        heads = validation_heads(self.optim.validation_batches, self.sampling.mask_batch_prob)
        return evaluate_patches(
            model,
            self.val_data,
            device,
            heads=[head for head in heads for _ in range(parts)],
            batch_size=self.optim.batch_size // parts,
            workers=self.config.data.workers,
        )


class DeepMaskStage(PatchStage):
    """Trains trunk, tail and both heads."""

    name = "deepmask"
    model: DeepMask
    idle_parameters = True  # either head, in a minibatch of the other

    def __init__(self, config: Config, *, filled: bool = False):
        """`filled`: a checkpoint will fill the network, which needs no weights before."""
        super().__init__(config, target_size=config.deepmask.target_size)
        self.model = make_deepmask(config, pretrained=not filled)
        for level in self.model.trunk.levels[: config.trunk.frozen_levels]:
            level.requires_grad_(False)

    def counts(self, part: dict) -> Tensor | None:
        """Cells at objects and at none, see `count_cells`, if scores of cells are trained."""
        if "targets" in part or not self.sampling.scores_cells:
            return None
        return count_cells(part["labels"])

    def losses(self, model: nn.Module, part: dict) -> dict[str, Tensor]:
        """The mask loss on a mask minibatch, the score loss on a score minibatch, weighted."""
        c = self.config.deepmask
        if "targets" in part:
            loss = mask_loss(model(part["patches"], head="mask")["mask_logits"], part["targets"])
            return {"loss": c.mask_weight * loss, "mask_loss": loss}
        if self.sampling.scores_cells:
            loss = self._cell_score_loss(model, part)
        else:
            outputs = model(part["patches"], head="score")
            loss = score_loss(outputs["score_logits"], part["labels"])
        return {"loss": c.score_weight * loss, "score_loss": loss}

    def _cell_score_loss(self, model: nn.Module, part: dict) -> Tensor:
        decode = part.get("decode")
        if decode is not None and not len(decode):
            decode = None  # no object in this part
        outputs = model(
            part["patches"], head="score", cells=self.sampling.score_cells, decode=decode
        )
        ious = None
        if decode is not None:
            ious = mask_ious(
                outputs["mask_logits"],
                part["iou_targets"],
                areas=part["iou_areas"],
                threshold=self.config.propose.mask_threshold,
            )
        logits = outputs["score_logits"].view(part["labels"].shape)  # of one cell, without its axes
        return cell_score_loss(logits, part["labels"], part["counts"], ious)


class SharpMaskStage(PatchStage):
    """Trains the refinement on top of a trained DeepMask, which stays as it is.

    ECCV 2016, section 3.3: targets have the full resolution of the patch, and all minibatches are
    of mask patches.
    """

    name = "sharpmask"
    model: SharpMask

    def __init__(self, config: Config):
        super().__init__(config, target_size=config.deepmask.patch_size)
        self.model = make_sharpmask(config)

    def losses(self, model: nn.Module, part: dict) -> dict[str, Tensor]:
        """The mask loss at the resolution of the patch."""
        loss = mask_loss(model(part["patches"], head="mask")["mask_logits"], part["targets"])
        return {"loss": self.config.sharpmask.mask_weight * loss, "mask_loss": loss}


class MultiPathNetStage(Stage):
    """Trains the detector on RoIs of proposals."""

    name = "multipathnet"
    samples, best_metric = "images", "roi_accuracy"
    model: MultiPathNet

    def __init__(
        self,
        config: Config,
        proposals: dict[str, ProposalBoxes],
        val_store: ProposalStore,
        *,
        image_ids: dict[str, set[int]] | None = None,
        filled: bool = False,
    ):
        """
        Args:
            image_ids: the images of each split that were searched for proposals.
            filled: a checkpoint will fill the network, which needs no weights before.
        """
        super().__init__(config)
        searched = image_ids or {}
        c, self.val_store = config.multipathnet, val_store
        if c.validation_images:
            self.best_metric = "sample_ap"
        self.train_data = roi_dataset(
            c,
            *load_split(config, "train"),
            proposals["train"],
            seed=config.seed,
            image_ids=searched.get("train"),
        )
        self.val_data = roi_dataset(
            c,
            *load_split(config, "val", like=self.train_data.coco),
            proposals["val"],
            seed=ROI_VALIDATION_SEED,
            image_ids=searched.get("val"),
            all_images=True,
        )
        coco = self.train_data.coco
        self.metadata = {
            "categories": [
                {"id": int(category_id), "name": str(name)}
                for category_id, name in zip(coco.category_ids, coco.category_names, strict=True)
            ]
        }
        torch.manual_seed(config.seed)
        num_classes = len(coco.category_ids)
        self.model = make_multipathnet(config, num_classes=num_classes, pretrained=not filled)
        mean, std = delta_statistics(self.train_data, seed=config.seed)
        self.model.set_delta_statistics(mean, std)
        for level in self.model.trunk.levels[: c.trunk.frozen_levels]:
            level.requires_grad_(False)
        self.phase_starts = (c.frozen_epochs * self.optim.batches_per_epoch,)

    def start_phase(self, step: int) -> None:
        """Phase 1 trains the heads alone; phase 2 the levels that are not frozen, too."""
        in_phase_2 = step >= self.phase_starts[0]
        for level in self.model.trunk.levels[self.config.multipathnet.trunk.frozen_levels :]:
            level.requires_grad_(in_phase_2)

    def counts(self, part: dict) -> Tensor:
        """Samples of each classifier and RoIs of any, see `count_samples`."""
        return count_samples(part["labels"])

    def losses(self, model: nn.Module, part: dict) -> dict[str, Tensor]:
        """Integral loss plus the box regressor's."""
        outputs = model(part["images"], part["rois"])
        targets = self.model.delta_targets(part["rois"][:, 1:], part["boxes"])
        *samples, rois = part["counts"]
        classes = integral_loss(outputs["class_logits"], part["labels"], torch.stack(samples))
        boxes = box_loss(outputs["deltas"], targets, part["labels"], rois)
        loss = classes + self.config.multipathnet.box_weight * boxes
        return {"loss": loss, "class_loss": classes, "box_loss": boxes}

    def validate(self, model: Any, device: torch.device) -> dict[str, float]:
        """RoI metrics on `validation_batches` minibatches, AP on `validation_images`."""
        parts = self.num_parts
        metrics = evaluate_rois(
            model,
            self.val_data,
            device,
            # As many images at once as in training.
            batches=self.optim.validation_batches * parts,
            batch_size=self.optim.batch_size // parts,
            workers=self.config.data.workers,
        )
        c = self.config.multipathnet
        if c.validation_images:
            detector = Detector(
                model,
                self.metadata["categories"],
                device=device,
                config=c,
                options=self.config.detect,
            )
            annotations, images = split_files(self.config, "val")
            ap = sample_ap(
                detector,
                self.val_store,
                annotations,
                images,
                image_ids=set(self.val_data.coco.image_ids.tolist()),
                num_images=c.validation_images,
                chosen=self.config.data.categories,
            )
            metrics["sample_ap"] = ap or 0.0
        return metrics
