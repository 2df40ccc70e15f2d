"""torch.hub entry points: the networks, assembled in the open.

    model = torch.hub.load("path/to/maskpath", "deepmask", source="local", checkpoint="best.pt")

One hub project with a top-level package `models` can be loaded in a process.
"""

dependencies = ["torch", "torchvision"]

from pathlib import Path  # noqa: E402

import torch  # noqa: E402

import models  # noqa: E402

if Path(models.__file__).resolve().parent != Path(__file__).resolve().parent / "models":
    raise ImportError(
        f"another package called models was imported first: {models.__file__}; "
        "load this project in a process of its own"
    )

from models.deepmask import DeepMask  # noqa: E402
from models.sharpmask import SharpMask  # noqa: E402
from models.trunk import STEM_WIDTH, build_trunk  # noqa: E402

SIZES = ("patch_size", "context", "mask_size", "reduction", "embedding", "score_hidden")
REFINEMENT = ("km", "ks", "widths", "merge", "num_modules", "horizontal_widths")


def deepmask(
    *,
    checkpoint: str | None = None,
    trunk: str = "resnet50",
    trunk_weights: str | None = None,
    **sizes: int,
) -> DeepMask:
    """DeepMask, from a checkpoint of tools/train_stage.py or with a new head.

    Args:
        checkpoint: its config gives trunk and sizes, and the other arguments are not used. Of a
            SharpMask checkpoint, the DeepMask that it is built on.
        trunk, trunk_weights: see `models.trunk.build_trunk`.
        sizes: patch_size, context, mask_size, ... of `models.deepmask.DeepMask`.
    """
    if checkpoint is None:
        return DeepMask(build_trunk(trunk, weights=trunk_weights), **sizes)
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if content["stage"] == "sharpmask":
        return sharpmask(checkpoint=checkpoint).deepmask
    model = _untrained_deepmask(content["config"])
    model.load_state_dict(content["model"])
    return model.eval()


def sharpmask(*, checkpoint: str) -> SharpMask:
    """SharpMask and the DeepMask that it is built on, from a checkpoint of tools/train_stage.py."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    config = content["config"]
    refinement = config["sharpmask"]
    options = {name: refinement[name] for name in REFINEMENT if name in refinement}
    model = SharpMask(_untrained_deepmask(config), **options)
    model.load_state_dict(content["model"])
    return model.eval()


def _untrained_deepmask(config: dict) -> DeepMask:
    sizes = {name: config["deepmask"][name] for name in SIZES}
    trunk = config["trunk"]  # the first checkpoints have no width
    return DeepMask(build_trunk(trunk["name"], width=trunk.get("width", STEM_WIDTH)), **sizes)
