"""MultiPathNet as a stage: network, RoIs of a proposal store, and loss, from a config."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.coco import CocoInstances
from datasets.patches import sample_keys
from datasets.proposal_boxes import ProposalBoxes
from datasets.roi_sampler import RoiRules, RoiSampler
from datasets.rois import RoiBatchKeys, RoiDataset, roi_loader, target_statistics
from datasets.transforms import PixelRules
from models.losses import box_loss, integral_loss
from pipeline import distributed
from pipeline.batches import device_batches
from pipeline.checkpoint import load_checkpoint
from pipeline.config import Config, MultiPathNetConfig
from pipeline.data import BrokenFiles, load_split, prepare_data
from pipeline.networks import build_multipathnet, load_trunk

VALIDATION_SEED = 20160914  # validation RoIs are the same in every run


class MultiPathNetStage:
    """Trains the detector on RoIs of proposals."""

    name = "multipathnet"
    samples, best_metric = "images", "roi_accuracy"

    def __init__(
        self,
        config: Config,
        proposals: dict[str, ProposalBoxes],
        *,
        trunk_checkpoint: Path | None = None,
    ):
        """
        Args:
            proposals: of the "train" and "val" images.
            trunk_checkpoint: of the mask network whose trunk this one starts from; needed only for
                trunk weights "deepmask".

        Raises:
            ValueError or FileNotFoundError: data or weights that are not there or do not fit.
        """
        self.config, self.section = config, config.multipathnet
        self.optim = self.section.optim
        self._check_batch()
        prepare_data(config)
        self.train_data = roi_dataset(
            self.section,
            *load_split(config, "train"),
            proposals["train"],
            seed=config.seed,
            max_images=self.section.sampling.max_images,
        )
        self.val_data = roi_dataset(
            self.section, *load_split(config, "val"), proposals["val"], seed=VALIDATION_SEED
        )
        coco = self.train_data.coco
        self.broken = BrokenFiles(len(coco), config.data.max_broken_share)
        self.facts = {
            "categories": [
                {"id": int(number), "name": str(name)}
                for number, name in zip(coco.category_ids, coco.category_names, strict=True)
            ]
        }
        torch.manual_seed(config.seed)
        self.model = build_multipathnet(
            config,
            num_classes=len(coco.category_ids),
            pretrained=config.init.weights is None,
        )
        if trunk_checkpoint is not None:
            content = load_checkpoint(trunk_checkpoint, stage=("deepmask", "sharpmask"))
            load_trunk(self.model.trunk, content["model"], source=str(trunk_checkpoint))
        mean, std = target_statistics(self.train_data, seed=config.seed)
        self.model.delta_mean.copy_(torch.from_numpy(mean))
        self.model.delta_std.copy_(torch.from_numpy(std))
        self.phase_starts = (self.section.frozen_epochs * self.optim.batches_per_epoch,)

    def parameter_groups(self) -> list[dict]:
        """The trunk with its own factor on the learning rate, and everything else."""
        levels = list(self.model.trunk.levels)
        trunk = [p for level in levels[self._frozen_levels() :] for p in level.parameters()]
        ids = {id(p) for p in self.model.trunk.parameters()}
        rest = [p for p in self.model.parameters() if id(p) not in ids]
        groups = [{"params": rest, "lr_factor": 1.0}]
        return groups + (
            [{"params": trunk, "lr_factor": self.optim.trunk_lr_factor}] if trunk else []
        )

    def start_phase(self, step: int) -> None:
        """Phase 1 trains the heads alone; phase 2 the levels that are not frozen, too."""
        frozen = self._frozen_levels() if step >= self.phase_starts[0] else None
        for number, level in enumerate(self.model.trunk.levels):
            level.requires_grad_(frozen is not None and number >= frozen)

    def _frozen_levels(self) -> int:
        return self.section.trunk.frozen_levels

    def train_mode(self) -> None:
        """Dropout on (batch norm is frozen by construction)."""
        self.model.train()

    def training_batches(self, steps: range, device: torch.device) -> Iterator[dict]:
        """Minibatches on the device."""
        keys = RoiBatchKeys(
            steps,
            rules=self.train_data.sampler.rules,
            batches_per_epoch=self.optim.batches_per_epoch,
            images_per_batch=self.optim.batch_size,
            seed=self.config.seed,
            share=distributed.share(),
        )
        workers = self.config.data.workers
        for batch, drawn in zip(
            roi_batches(self.train_data, keys, device, workers=workers), keys, strict=True
        ):
            self.broken.note(batch["broken"])
            batch["keys"] = dropout_keys(drawn, len(batch["rois"]), self.config.seed).to(device)
            yield batch

    def losses(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        """Integral loss plus the box regressor's."""
        outputs = model(batch["images"], batch["rois"], keys=batch["keys"])
        targets = self.model.normalize_deltas(batch["targets"])
        classes = integral_loss(outputs["class_logits"], batch["labels"])
        boxes = box_loss(outputs["deltas"], targets, batch["labels"])
        loss = classes + self.section.box_weight * boxes
        return {"loss": loss, "class_loss": classes, "box_loss": boxes}

    @torch.inference_mode()
    def validate(self, device: torch.device) -> dict[str, float]:
        """How many RoIs of the validation images get the right class.

        "roi_accuracy" is the mean of the shares among foreground (IoU >= the lowest threshold) and
        background: guessing background for all RoIs gives 0.5.
        """
        self.model.eval()
        index, count = distributed.share()
        keys = RoiBatchKeys(
            range(self.optim.validation_batches),
            rules=self.val_data.sampler.rules,
            batches_per_epoch=self.optim.validation_batches,
            images_per_batch=self.optim.batch_size,
            seed=VALIDATION_SEED,
        )
        hits: list[Tensor] = [torch.empty(0, 2, dtype=torch.bool)]
        mine = [batch for number, batch in enumerate(keys) if number % count == index]
        for batch in roi_batches(self.val_data, mine, device, workers=self.config.data.workers):
            logits = self.model(batch["images"], batch["rois"])["class_logits"]
            predicted = logits.softmax(-1).mean(1).argmax(-1)
            labels = batch["labels"].amax(0)
            known = labels >= 0
            hits.append(torch.stack([predicted == labels, labels > 0], 1)[known].cpu())
        return accuracies(torch.cat([h for share in distributed.gather(hits) for h in share]))

    def _check_batch(self) -> None:
        processes = distributed.share()[1]
        if self.optim.batch_size % processes:
            raise ValueError(
                f"multipathnet.optim.batch_size {self.optim.batch_size} must be a multiple of the "
                f"number of processes {processes}"
            )


def roi_dataset(
    c: MultiPathNetConfig,
    coco: CocoInstances,
    images: Path,
    proposals: ProposalBoxes,
    *,
    seed: int,
    max_images: int | None = None,
) -> RoiDataset:
    """RoIs of annotated images, by the sampling rules of a config.

    Raises:
        ValueError: no proposal is of these images.
    """
    if not set(proposals.image_ids.tolist()) & set(coco.image_ids.tolist()):
        raise ValueError(f"the proposals are of other images than {coco.path}: no id is in both")
    s = c.sampling
    rules = RoiRules(
        thresholds=tuple(c.thresholds),
        draw_threshold=c.draw_threshold,
        rois_per_image=s.rois_per_image,
        foreground_share=s.foreground_share,
        background_low=s.background_low,
        crowd_overlap=s.crowd_overlap,
        max_proposals=s.max_proposals,
        max_images=max_images,
        short_side=s.short_side,
        long_side=s.long_side,
        resampling=c.resampling,
        flip=s.flip,
        inclusive_boxes=c.inclusive_boxes,
    )
    sampler = RoiSampler(coco, proposals, rules=rules, seed=seed)
    return RoiDataset(coco, images, sampler, pixels=PixelRules(**vars(c.pixels)))


def roi_batches(data: RoiDataset, keys, device: torch.device, *, workers: int) -> Iterator[dict]:
    """Minibatches of the given keys, moved to the device; raises as `device_batches`."""
    loader = roi_loader(data, keys, workers=workers, pin_memory=device.type == "cuda")
    return device_batches(loader, device, pixels="images")


def dropout_keys(drawn: list[tuple[int, int, int]], rois: int, seed: int) -> Tensor:
    """Keys (R,) int64 that tell every RoI of a minibatch from all others of the run."""
    each = rois // len(drawn)
    keys = [sample_keys(seed, epoch, index * each, each) for epoch, index, _ in drawn]
    return torch.cat(keys)


def accuracies(hits: Tensor) -> dict[str, float]:
    """From (n, 2) bool: right, foreground. What cannot be measured is left out."""
    right, foreground = hits.unbind(1)
    shares = {
        name: float(right[rows].float().mean())
        for name, rows in (
            ("foreground_accuracy", foreground),
            ("background_accuracy", ~foreground),
        )
        if rows.any()
    }
    return {"roi_accuracy": sum(shares.values()) / len(shares), **shares} if shares else {}
