"""Trained networks from checkpoints, ready for use."""

import hashlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from datasets.transforms import PixelRules
from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.svd import compress_towers
from models.trunk import fold_norms
from pipeline.checkpoint import load_checkpoint, load_weights, save_checkpoint
from pipeline.config import Config, check_value, config_from_dict
from pipeline.inference.detect import Detector
from pipeline.inference.propose import Proposer, octave_range
from pipeline.networks import build_deepmask, build_multipathnet, build_sharpmask


def load_mask_network(checkpoint: str | Path) -> tuple[DeepMask | SharpMask, Config]:
    """The network of a DeepMask or SharpMask checkpoint and the config it was trained with.

    Raises:
        FileNotFoundError or ValueError: no file, another kind of file, another stage, weights that
            do not fit.
    """
    content = load_checkpoint(checkpoint, stage=tuple(BUILDERS))
    config = config_from_dict(content["config"], source=str(checkpoint))
    model = BUILDERS[content["stage"]](config)
    load_weights(model, content["model"], source=str(checkpoint))
    return model.eval(), config


BUILDERS = {
    "deepmask": partial(build_deepmask, pretrained=False),
    "sharpmask": build_sharpmask,
}


def load_proposer(
    checkpoint: str | Path,
    device: torch.device,
    *,
    num_proposals: int | None = None,
    scales: list[float] | None = None,
    zoom: bool = False,
    refine: bool = True,
    nms: float | None = None,
) -> tuple[Proposer, dict]:
    """A proposer, and the settings that its proposals depend on.

    Args:
        num_proposals, scales, nms: None for the values of the checkpoint's config.
        zoom: adds the scale 2^1.
        refine: False gives the coarse masks of the DeepMask that a SharpMask is built on.
    """
    model, config = load_mask_network(checkpoint)
    count = config.propose.num_proposals if num_proposals is None else num_proposals
    if count < 1:
        raise ValueError(f"--num-proposals must be at least 1, got {count}")
    scales = tuple(config.propose.scales if scales is None else scales)
    octaves = sorted({*octave_range(*scales), *([1.0] if zoom else [])})
    nms = config.propose.nms if nms is None else nms
    if nms is not None and not 0 < nms <= 1:
        raise ValueError(f"--nms must be above 0 and at most 1, got {nms:g}")
    if isinstance(model, SharpMask) and not refine:
        model = model.deepmask
    options = {
        "num_proposals": count,
        "octaves": octaves,
        "mask_threshold": config.propose.mask_threshold,
        "nms": nms,
        "resampling": config.propose.resampling,
    }
    refined = isinstance(model, SharpMask)
    settings = {"checkpoint_sha256": file_sha256(checkpoint), "refine": refined, **options}
    fold_norms(model)
    return Proposer(model, device=device, amp=config.propose.amp, **options), settings


def load_detector(
    checkpoint: str | Path, device: torch.device, *, overrides: dict | None = None
) -> tuple[Detector, dict]:
    """A detector from a MultiPathNet checkpoint, and the settings that its detections depend on.

    Args:
        overrides: values for the config's `detect` section.

    Raises:
        FileNotFoundError or ValueError: no file, another kind of file, another stage, weights that
            do not fit; an override that cannot be.
    """
    for name, value in (overrides or {}).items():
        check_value(name, value, place=f"--{name.replace('_', '-')}")
    content = load_checkpoint(checkpoint, stage="multipathnet")
    if "categories" not in content:
        raise ValueError(f"{checkpoint} does not say which categories it detects; train it anew")
    config = config_from_dict(content["config"], source=str(checkpoint))
    categories = content["categories"]
    model = build_multipathnet(config, num_classes=len(categories), pretrained=False)
    if rank := content.get("compressed_fc"):
        compress_towers(model, rank)
    load_weights(model, content["model"], source=str(checkpoint))
    options = replace(config.detect, **(overrides or {}))
    sampling = config.multipathnet.sampling
    detector = Detector(
        model,
        categories,
        device=device,
        short_sides=options.short_sides or [sampling.short_side],
        long_side=sampling.long_side,
        resampling=config.multipathnet.resampling,
        options=options,
        pixels=PixelRules(**vars(config.multipathnet.pixels)),
        inclusive_boxes=config.multipathnet.inclusive_boxes,
    )
    settings = asdict(options) | {"checkpoint_sha256": file_sha256(checkpoint)}
    del settings["chunk"]  # changes the memory only
    return detector, settings


def compress_checkpoint(checkpoint: str | Path, rank: int, output: Path) -> str:
    """Writes a detector's checkpoint again, its fc6 and fc7 truncated to a rank.

    Returns:
        A line that says what it has become.

    Raises:
        ValueError: a rank below 1, another checkpoint, or one without such layers.
    """
    if rank < 1:
        raise ValueError(f"--compress-fc must be at least 1, got {rank}")
    content = load_checkpoint(checkpoint, stage="multipathnet")
    if content.get("compressed_fc"):
        raise ValueError(f"{checkpoint} is compressed already; take the one it was made from")
    detector, _ = load_detector(checkpoint, torch.device("cpu"))
    before = sum(p.numel() for p in detector.model.parameters())
    try:
        compress_towers(detector.model, rank)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    after = sum(p.numel() for p in detector.model.parameters())
    kept = {name: content[name] for name in ("format", "stage", "config", "categories")}
    path = output / f"rank{rank}.pt"
    save_checkpoint(path, kept | {"model": detector.model.state_dict(), "compressed_fc": rank})
    return f"{path}: {before / 1e6:.2f} M parameters before, {after / 1e6:.2f} M after"


def file_sha256(path: str | Path) -> str:
    """Hash of a file's content: tells checkpoints apart that have the same name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
