"""The sizes of the training objects: what is said of them, and the patch for them (`auto`)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets.coco import CocoInstances
from datasets.object_sizes import (
    LogScales,
    ObjectSides,
    choose_log2_scales,
    choose_patch_size,
    compare_scales,
    describe_scales,
    explain_patch_size,
    explain_scales,
)
from datasets.patch_sampler import PatchSampler
from models.deepmask import AUTO_PATCH_SIZE, STRIDE
from pipeline import distributed
from pipeline.checkpoint import load_checkpoint
from pipeline.config import Config, DeepMaskStageConfig
from pipeline.data import prepare_data, split_files
from pipeline.recipe import config_from_dict

PUBLISHED = DeepMaskStageConfig()
MIN_MASK_SIZE = 28
ROUND = 4  # sides of masks and targets are a multiple of it


def say_sizes(sides: ObjectSides, config: Config, canonical: int) -> LogScales:
    """Says how large objects are, and which of them the scales of proposals reach.

    Returns:
        These scales.
    """
    distributed.say(sides.summary())
    scales = config.propose.log2_scales
    if scales is None:
        scales = choose_log2_scales(sides, canonical)
        why = explain_scales(sides, canonical)
        distributed.say(f"proposals will be made at {describe_scales(scales)}: {why}")
    if line := compare_scales(sides, scales, canonical):
        distributed.say(line)
    return scales


def is_auto(config: Config) -> bool:
    """Whether the patch size is still to be chosen."""
    return config.deepmask.patch_size == AUTO_PATCH_SIZE


def choose_by_data(config: Config) -> Config:
    """The config with the patch for the training objects; says which and why.

    Reads the training annotations if the config says auto; else it is returned as it is.

    Raises:
        ValueError or FileNotFoundError: annotations that cannot be used.
    """
    if not is_auto(config):
        return config
    prepare_data(config)
    coco = CocoInstances.load(split_files(config, "train")[0], config.data.categories)
    sides = ObjectSides.measure(PatchSampler(coco, config=config.deepmask.sampling))
    patch_size = choose_patch_size(
        sides, multiple=2 * STRIDE if config.deepmask.separate_heads else STRIDE
    )
    return _with_patch(config, patch_size, why=explain_patch_size(sides, patch_size))


def choose_by_checkpoint(config: Config, path: Path) -> Config:
    """The config with the patch of the mask network that a run starts from, if it says auto."""
    if not is_auto(config):
        return config
    checkpoint = load_checkpoint(path)
    theirs = config_from_dict(checkpoint["config"], source=str(path)).deepmask
    if theirs.patch_size == AUTO_PATCH_SIZE:  # a detector of given proposals does not know it
        return config
    return _with_patch(config, theirs.patch_size, why=f"as in {path}", mask_size=theirs.mask_size)


def _with_patch(
    config: Config, patch_size: int, *, why: str, mask_size: int | None = None
) -> Config:
    """The patch size, and the lengths that follow it."""
    factor = patch_size / PUBLISHED.patch_size
    lengths = {
        name: round(getattr(PUBLISHED.sampling, name) * factor, 3)
        for name in ("jitter_shift", "negative_distance")
    }
    target_size = ROUND * round(PUBLISHED.target_size * factor / ROUND)
    coarse = ROUND * round(PUBLISHED.mask_size * factor / ROUND)
    sampling = _replace_defaults(config.deepmask.sampling, **lengths)
    deepmask = _replace_defaults(
        replace(config.deepmask, patch_size=patch_size, sampling=sampling),
        target_size=target_size,
        mask_size=mask_size or max(MIN_MASK_SIZE, coarse),
    )
    refinement_sampling = _replace_defaults(config.sharpmask.sampling, **lengths)
    sharpmask = replace(config.sharpmask, sampling=refinement_sampling)
    distributed.say(
        f"deepmask.patch_size auto: {patch_size}, target_size {deepmask.target_size}, mask_size "
        f"{deepmask.mask_size}, jitter_shift {sampling.jitter_shift:g}, "
        f"negative_distance {sampling.negative_distance:g}; {why}"
    )
    return replace(config, deepmask=deepmask, sharpmask=sharpmask)


def _replace_defaults(section: Any, **values: Any) -> Any:
    """A section with the values, but where a recipe says something else than the default."""
    default = type(section)()
    unnamed = {k: v for k, v in values.items() if getattr(section, k) == getattr(default, k)}
    return replace(section, **unnamed)
