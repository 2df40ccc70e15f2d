"""Trained networks from checkpoints, ready for use."""

import hashlib
from pathlib import Path

import torch

from models.deepmask import DeepMask
from pipeline.checkpoint import load_checkpoint, load_weights
from pipeline.config import Config, config_from_dict
from pipeline.propose import Proposer, octave_range
from pipeline.stages import build_deepmask


def load_deepmask(checkpoint: str | Path) -> tuple[DeepMask, Config]:
    """The network of a DeepMask checkpoint and the config it was trained with.

    Raises:
        FileNotFoundError or ValueError: no file, another kind of file, another stage, weights that
            do not fit.
    """
    content = load_checkpoint(checkpoint, stage="deepmask")
    config = config_from_dict(content["config"], source=str(checkpoint))
    model = build_deepmask(config, pretrained=False)
    load_weights(model, content["model"], source=str(checkpoint))
    return model.eval(), config


def load_proposer(
    checkpoint: str | Path,
    device: torch.device,
    *,
    num_proposals: int | None = None,
    scales: list[float] | None = None,
) -> tuple[Proposer, dict]:
    """A proposer, and the settings that its proposals depend on.

    Args:
        num_proposals, scales: None for the values of the checkpoint's config.
    """
    model, config = load_deepmask(checkpoint)
    count = config.propose.num_proposals if num_proposals is None else num_proposals
    if count < 1:
        raise ValueError(f"--num-proposals must be at least 1, got {count}")
    scales = tuple(config.propose.scales if scales is None else scales)
    octave_range(*scales)
    options = {
        "num_proposals": count,
        "scales": scales,
        "mask_threshold": config.propose.mask_threshold,
    }
    settings = {"checkpoint_sha256": file_sha256(checkpoint), **options, "scales": list(scales)}
    return Proposer(model, device=device, **options), settings


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content: tells checkpoints apart that have the same name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
