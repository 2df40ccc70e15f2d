"""torch.hub entry points: the networks, new ones or from checkpoints.

    model = torch.hub.load("path/to/maskpath", "sharpmask", source="local", checkpoint="best.pt")

One hub project with a top-level package `models` can be loaded in a process.
"""

dependencies = [
    "torch",
    "torchvision",
    "numpy",
    "cv2",
    "pycocotools",
    "omegaconf",
    "msgspec",
    "tqdm",
]

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import models  # noqa: E402

if Path(models.__file__).resolve().parent != Path(__file__).resolve().parent / "models":
    raise ImportError(
        f"another package called models was imported first: {models.__file__}; "
        "load this project in a process of its own"
    )

from models.deepmask import DeepMask  # noqa: E402
from models.multipathnet import MultiPathNet  # noqa: E402
from models.sharpmask import SharpMask  # noqa: E402
from models.trunk import build_trunk  # noqa: E402
from pipeline.networks import load_network  # noqa: E402


def deepmask(
    *,
    checkpoint: str | None = None,
    trunk: str = "resnet50",
    trunk_weights: str | None = None,
    **sizes: Any,
) -> DeepMask:
    """DeepMask, from a checkpoint of tools/train_stage.py or with a new head.

    Args:
        checkpoint: its config gives trunk and sizes, and the other arguments are not used. Of a
            SharpMask checkpoint, the DeepMask that it is built on.
        trunk: one of `models.trunk.TRUNKS`.
        trunk_weights: see `models.trunk.build_trunk`.
        sizes: fields of `models.deepmask.DeepMaskConfig`.
    """
    if checkpoint is None:
        return DeepMask(build_trunk(trunk, weights=trunk_weights), **sizes)
    model, _, _ = load_network(checkpoint, stage=("deepmask", "sharpmask"))
    return model.deepmask if isinstance(model, SharpMask) else model


def sharpmask(*, checkpoint: str) -> SharpMask:
    """SharpMask and the DeepMask that it is built on, from a checkpoint of tools/train_stage.py."""
    return load_network(checkpoint, stage="sharpmask")[0]


def multipathnet(*, checkpoint: str) -> MultiPathNet:
    """MultiPathNet, from a checkpoint of tools/train_stage.py."""
    return load_network(checkpoint, stage="multipathnet")[0]
