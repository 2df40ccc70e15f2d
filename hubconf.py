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

from models.build import build_deepmask  # noqa: E402
from models.deepmask import DeepMask  # noqa: E402
from models.multipathnet import MultiPathNet  # noqa: E402
from models.sharpmask import SharpMask  # noqa: E402
from models.trunk import TrunkConfig  # noqa: E402
from pipeline.networks import load_network  # noqa: E402
from pipeline.pretrained import pretrained_checkpoint  # noqa: E402


def deepmask(
    *,
    checkpoint: str | None = None,
    pretrained: bool = False,
    trunk: str = "resnet50",
    trunk_weights: str | None = None,
    **sizes: Any,
) -> DeepMask:
    """DeepMask, from a checkpoint of tools/train_stage.py or with a new head.

    Args:
        checkpoint: its config gives trunk and sizes, and the other arguments are not used. Of a
            SharpMask checkpoint, the DeepMask that it is built on.
        pretrained: the one of the weights in the box (docs/model_card.md).
        trunk: one of `models.trunk.TRUNKS`.
        trunk_weights: see `models.trunk.build_trunk`.
        sizes: fields of `models.deepmask.DeepMaskConfig`.
    """
    if checkpoint is None and not pretrained:
        return build_deepmask(TrunkConfig(name=trunk, weights=trunk_weights), **sizes)
    path = _checkpoint("sharpmask", checkpoint, pretrained)
    model, _, _ = load_network(path, stage=("deepmask", "sharpmask"))
    return model.deepmask if isinstance(model, SharpMask) else model


def sharpmask(*, checkpoint: str | None = None, pretrained: bool = False) -> SharpMask:
    """SharpMask and the DeepMask that it is built on: from a checkpoint, or as in the box."""
    return load_network(_checkpoint("sharpmask", checkpoint, pretrained), stage="sharpmask")[0]


def multipathnet(*, checkpoint: str | None = None, pretrained: bool = False) -> MultiPathNet:
    """MultiPathNet: from a checkpoint of tools/train_stage.py, or the one in the box."""
    path = _checkpoint("multipathnet", checkpoint, pretrained)
    return load_network(path, stage="multipathnet")[0]


def _checkpoint(stage: str, checkpoint: str | None, pretrained: bool) -> str | Path:
    if (checkpoint is None) == (not pretrained):
        raise ValueError("give either checkpoint or pretrained=True")
    return checkpoint or pretrained_checkpoint(stage)
