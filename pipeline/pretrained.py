"""The weights in the box: small trained networks that come with the project.

They are checkpoints like any other, without what only their training needs. docs/model_card.md says
what they were trained on and what they are good for.
"""

from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import KEYS
from pipeline.config import ROOT, Config
from pipeline.recipe import config_from_dict, config_to_dict

DIRECTORY = ROOT / "models" / "pretrained"
PRETRAINED_STAGES = ("sharpmask", "multipathnet")
KEPT = (*KEYS, "categories", "object_sides", "compressed_fc")  # of a checkpoint


def pretrained_checkpoint(stage: str) -> Path:
    """The file of "sharpmask", which holds its DeepMask, or of "multipathnet".

    Raises:
        FileNotFoundError: it is not in this checkout.
    """
    path = DIRECTORY / f"{stage}.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; name a checkpoint of your own")
    return path


def pack_checkpoint(checkpoint: dict[str, Any], *, source: str) -> dict[str, Any]:
    """A checkpoint for inference in half the size: float16, and no state or paths of its training.

    Vectors stay in float32: they are few, and a variance may be too large for float16.
    """
    weights = {
        name: value.half() if value.dim() > 1 and value.dtype == torch.float32 else value
        for name, value in checkpoint["model"].items()
    }
    return without_training(checkpoint, source=source) | {"model": weights}


def without_training(checkpoint: dict[str, Any], *, source: str) -> dict[str, Any]:
    """A checkpoint without what only its training needs: optimizer, data, paths of its machine."""
    config = config_from_dict(checkpoint["config"], source=source)
    plain, default = config_to_dict(config), config_to_dict(Config())
    plain |= {"data": default["data"], "init": default["init"]}
    for section in (plain, plain["pretrain"], plain["multipathnet"]):
        section["trunk"] = section["trunk"] | {"weights": None}
    return {key: checkpoint[key] for key in KEPT if key in checkpoint} | {"config": plain}
