"""DeepMask and SharpMask as stages: network, patches and loss, put together from a config."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets.coco import CocoInstances
from datasets.patch_sampler import MASK, SCORE, PatchSampler, SamplingRules
from datasets.patches import BatchKeys, PatchDataset, batch_keys, patch_loader
from models.losses import mask_loss, score_loss
from pipeline import distributed
from pipeline.batches import device_batches
from pipeline.config import Config, DeepMaskConfig, SamplingConfig, SharpMaskConfig
from pipeline.data import BrokenFiles, load_split, prepare_data
from pipeline.evaluation.patches import mask_ious, score_hits, summarize
from pipeline.initial_weights import load_initial_deepmask
from pipeline.networks import build_deepmask, build_sharpmask

VALIDATION_SEED = 20151207  # validation patches are the same in every run


class PatchStage:
    """What DeepMask's and SharpMask's training have in common: patches in, masks out."""

    name: str
    samples, best_metric = "patches", "iou_above_0.7"
    phase_starts, facts = (), {}
    model: nn.Module

    def __init__(self, config: Config, *, target_size: int):
        """Reads the data; the network is the stage's own part.

        Args:
            target_size: side of the mask targets.

        Raises:
            ValueError or FileNotFoundError: data that is not there or does not fit.
        """
        self.config = config
        self.section: DeepMaskConfig | SharpMaskConfig = getattr(config, self.name)
        self.optim = self.section.optim
        self._check_batch()
        prepare_data(config)

        def patches(split: str, seed: int) -> PatchDataset:
            coco, images = load_split(config, split)
            return patch_dataset(
                config.deepmask,
                coco,
                images,
                sampling=self.section.sampling,
                target_size=target_size,
                seed=seed,
            )

        self.train_data = patches("train", config.seed)
        self.val_data = patches("val", VALIDATION_SEED)
        self.broken = BrokenFiles(len(self.train_data.coco), config.data.max_broken_share)

    def start_phase(self, step: int) -> None:
        """There is one phase only."""

    def train_mode(self) -> None:
        """Dropout on (batch norm is frozen by construction)."""
        self.model.train()

    def training_batches(self, steps: range, device: torch.device) -> Iterator[dict]:
        """Minibatches on the device."""
        sampling = self.section.sampling
        keys = BatchKeys(
            steps,
            batches_per_epoch=self.optim.batches_per_epoch,
            groups_per_batch=self.optim.batch_size // sampling.patches_per_image,
            seed=self.config.seed,
            mask_share=sampling.mask_share,
            share=distributed.share(),
        )
        for batch in patch_batches(self.train_data, keys, device, workers=self.config.data.workers):
            self.broken.note(batch["broken"])
            yield batch

    def validate(self, device: torch.device) -> dict[str, float]:
        """Patch metrics on `validation_batches` minibatches."""
        return evaluate_patches(
            self.model,
            self.val_data,
            device,
            kinds=validation_kinds(self.optim.validation_batches, self.section.sampling.mask_share),
            batch_size=self.optim.batch_size,
            workers=self.config.data.workers,
        )

    def _check_batch(self) -> None:
        size, shared = self.optim.batch_size, self.section.sampling.patches_per_image
        processes = distributed.share()[1]
        if size % (shared * processes):
            raise ValueError(
                f"{self.name}.optim.batch_size {size} must be a multiple of "
                f"sampling.patches_per_image {shared} times the number of processes {processes}"
            )


class DeepMaskStage(PatchStage):
    """Trains trunk, tail and both heads."""

    name = "deepmask"

    def __init__(self, config: Config):
        """
        Raises:
            ValueError or FileNotFoundError: data or weights that are not there or do not fit.
        """
        super().__init__(config, target_size=config.deepmask.target_size)
        torch.manual_seed(config.seed)  # for the weights that are drawn
        self.model = build_deepmask(config, pretrained=config.init.weights is None)
        for level in self.model.trunk.levels[: config.trunk.frozen_levels]:
            level.requires_grad_(False)

    def parameter_groups(self) -> list[dict]:
        """The trunk with its own factor on the learning rate, and everything else."""
        trunk = [p for p in self.model.trunk.parameters() if p.requires_grad]
        ids = {id(p) for p in self.model.trunk.parameters()}
        rest = [p for p in self.model.parameters() if id(p) not in ids]
        groups = [{"params": rest, "lr_factor": 1.0}]
        return groups + (
            [{"params": trunk, "lr_factor": self.optim.trunk_lr_factor}] if trunk else []
        )

    def losses(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        """The mask loss on a mask minibatch, the score loss on a score minibatch.

        They are weighted by the config's weights.
        """
        c = self.section
        if "targets" in batch:
            loss = mask_loss(model(batch["patches"], head="mask")["mask_logits"], batch["targets"])
            return {"loss": c.mask_weight * loss, "mask_loss": loss}
        logits = model(batch["patches"], head="score", keys=batch["keys"])["score_logits"]
        loss = score_loss(logits, batch["labels"])
        return {"loss": c.score_weight * loss, "score_loss": loss}


class SharpMaskStage(PatchStage):
    """Trains the refinement on top of a trained DeepMask, which stays as it is.

    ECCV 2016, section 3.3: targets have the full resolution of the patch, and all minibatches are
    of mask patches.
    """

    name = "sharpmask"

    def __init__(self, config: Config, deepmask: Path | None):
        """
        Args:
            deepmask: checkpoint of the DeepMask; None when a checkpoint of this stage is going to
                fill the whole model.

        Raises:
            ValueError or FileNotFoundError: data or a DeepMask that does not fit the config.
        """
        super().__init__(config, target_size=config.deepmask.patch_size)
        torch.manual_seed(config.seed)
        self.model = build_sharpmask(config)
        if deepmask is not None:
            load_initial_deepmask(self.model.deepmask, config, deepmask)
            self.model.start_from_deepmask()

    def parameter_groups(self) -> list[dict]:
        """The refinement."""
        return [
            {"params": [p for p in self.model.parameters() if p.requires_grad], "lr_factor": 1.0}
        ]

    def losses(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        """The mask loss at the resolution of the patch."""
        loss = mask_loss(model(batch["patches"], head="mask")["mask_logits"], batch["targets"])
        return {"loss": self.section.mask_weight * loss, "mask_loss": loss}


def sampling_rules(c: SamplingConfig) -> SamplingRules:
    """The sampler's numbers of a config."""
    return SamplingRules(
        jitter_shift=c.jitter_shift,
        jitter_scale=c.jitter_scale,
        min_area=c.min_area,
        min_side=c.min_side,
        score_scales=tuple(c.score_scales),
        flip=c.flip,
        negative_distance=c.negative_distance,
        negative_octaves=c.negative_octaves,
    )


def patch_dataset(
    c: DeepMaskConfig,
    coco: CocoInstances,
    images: str | Path,
    *,
    sampling: SamplingConfig,
    target_size: int,
    seed: int,
) -> PatchDataset:
    """Patches of annotated images, for a DeepMask and by the sampling rules of a stage."""
    sampler = PatchSampler(coco, patch_size=c.patch_size, rules=sampling_rules(sampling), seed=seed)
    return PatchDataset(
        coco,
        images,
        sampler,
        patch_size=c.patch_size,
        context=c.context,
        target_size=target_size,
        patches_per_image=sampling.patches_per_image,
    )


def patch_batches(
    data: PatchDataset, keys, device: torch.device, *, workers: int
) -> Iterator[dict]:
    """Minibatches of the given keys, moved to the device.

    Raises:
        ImageError: too many images in a row cannot be read.
    """
    loader = patch_loader(data, keys, workers=workers, pin_memory=device.type == "cuda")
    return device_batches(loader, device, pixels="patches")


@torch.inference_mode()
def evaluate_patches(
    model: nn.Module,
    data: PatchDataset,
    device: torch.device,
    *,
    kinds: list[str],
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """Patch metrics over the first minibatches of a dataset.

    The processes share the minibatches and all get the result.

    Args:
        kinds: of each minibatch, "mask" or "score".
    """
    model.eval()
    groups = max(1, batch_size // data.patches_per_image)
    index, count = distributed.share()
    keys = [batch_keys(kinds[b], 0, b, groups, (0, 1)) for b in range(index, len(kinds), count)]
    ious, hits = [torch.empty(0)], [torch.empty(0, dtype=torch.bool)]
    for batch in patch_batches(data, keys, device, workers=workers):
        if "targets" in batch:
            ious.append(
                mask_ious(
                    model(batch["patches"], head="mask")["mask_logits"], batch["targets"]
                ).cpu()
            )
        else:
            hits.append(
                score_hits(
                    model(batch["patches"], head="score")["score_logits"], batch["labels"]
                ).cpu()
            )
    shares = distributed.gather((torch.cat(ious), torch.cat(hits)))
    return summarize(torch.cat([s[0] for s in shares]), torch.cat([s[1] for s in shares]))


def validation_kinds(batches: int, mask_share: float = 0.5) -> list[str]:
    """Kinds of validation minibatches: mask and score in turn; all mask if no score is trained."""
    return [MASK if mask_share == 1 or batch % 2 == 0 else SCORE for batch in range(batches)]
