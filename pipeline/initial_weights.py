"""Stages that start from the weights of a checkpoint: fine-tuning, and SharpMask on a DeepMask.

Weights mean the same only in the same network, and not all of it shows in their shapes: a trunk may
pad otherwise, RoIs be pooled otherwise. So the settings that a checkpoint carries are compared,
too.
"""

import functools
from pathlib import Path
from typing import Any

from models.deepmask import DeepMask
from pipeline import distributed
from pipeline.checkpoint import load_checkpoint, load_weights
from pipeline.config import (
    DEEPMASK_SIZES,
    Config,
    config_from_dict,
    config_to_dict,
    find_path,
)
from pipeline.training.engine import Stage

TRUNK_SETTINGS = ("name", "width", "padding", "ceil_pooling")
DEEPMASK_SETTINGS = (
    *(f"trunk.{name}" for name in TRUNK_SETTINGS),
    *(f"deepmask.{name}" for name in DEEPMASK_SIZES),
)
# What changes the shapes of a stage's weights, or what the network computes with them.
NETWORK_SETTINGS = {
    "deepmask": DEEPMASK_SETTINGS,
    "sharpmask": (
        *DEEPMASK_SETTINGS,
        *(f"sharpmask.{name}" for name in (
            "km", "ks", "widths", "merge", "num_modules", "horizontal_widths"
        )),
    ),
    "multipathnet": (
        *(f"multipathnet.trunk.{name}" for name in TRUNK_SETTINGS),
        *(f"multipathnet.{name}" for name in (
            "head", "foveal", "skip", "box_tower", "thresholds", "normalize", "scale",
            "pooled_size", "roi_bins", "resampling", "inclusive_boxes", "pixels", "width",
            "features",
        )),
    ),
}  # fmt: skip
# Of a detector: what belongs to its categories, with the mean and deviation of its box targets.
CATEGORY_WEIGHTS = ("classify.", "regress.", "delta_")


def read_initial_weights(stage: str, config: Config) -> dict[str, Any] | None:
    """The checkpoint of `init.weights`; None if there is no such setting.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, or one of another stage or network: what differs is listed.
    """
    if config.init.weights is None:
        return None
    if stage == "sharpmask" and config.init.deepmask:
        raise ValueError(
            "init.weights and init.deepmask are both set, and a SharpMask checkpoint holds its "
            "DeepMask; leave one of them away"
        )
    path = find_path(config.init.weights, key="init.weights")
    content = load_checkpoint(path, stage=stage)
    check_same_network(content, config, NETWORK_SETTINGS[stage], source=str(path))
    return content


def start_from(stage: Stage, content: dict[str, Any], *, source: str) -> None:
    """Fills a stage's network from a checkpoint.

    The classifier and box regressor of a detector stay as they are, random, if it is for other
    categories than the dataset's.

    Args:
        content: of `read_initial_weights`. source: its path.

    Raises:
        ValueError: weights that do not fit, all of them listed.
    """
    state, lines = content["model"], [f"weights from {source}"]
    own, theirs = (_category_names(each) for each in (stage.facts, content))
    if own != theirs:
        kept = stage.model.state_dict()
        state = {k: v for k, v in state.items() if not k.startswith(CATEGORY_WEIGHTS)}
        state |= {k: v for k, v in kept.items() if k.startswith(CATEGORY_WEIGHTS)}
        lines.append(
            f"its {len(theirs)} categories are not the dataset's {len(own)}, so classifier and "
            "box regressor start anew"
        )
    load_weights(stage.model, state, source=source)
    if distributed.is_main():
        print("\n".join(lines), flush=True)


def _category_names(content: dict[str, Any]) -> list[str]:
    return [category["name"] for category in content.get("categories", ())]


def load_initial_deepmask(model: DeepMask, config: Config, path: Path) -> None:
    """Fills the DeepMask that a SharpMask is built on.

    Raises:
        ValueError: the checkpoint is of another stage, trunk or size; says which.
    """
    content = load_checkpoint(path, stage="deepmask")
    check_same_network(content, config, DEEPMASK_SETTINGS, source=str(path))
    load_weights(model, content["model"], source=str(path))
    if distributed.is_main():
        print(f"DeepMask from {path}", flush=True)


def check_same_network(
    content: dict[str, Any], config: Config, settings: tuple[str, ...], *, source: str
) -> None:
    """Compares a checkpoint's settings with a config.

    Args:
        settings: dotted keys.

    Raises:
        ValueError: they differ; each that does is named with both values.
    """
    own = config_to_dict(config)
    theirs = config_to_dict(config_from_dict(content["config"], source=source))
    differences = []
    for key in settings:
        was, now = (functools.reduce(dict.get, key.split("."), c) for c in (theirs, own))
        if was != now:
            differences.append(f"{key} {was} instead of {now}")
    if differences:
        raise ValueError(
            f"{source} is a {content['stage']} of another network: {', '.join(differences)}"
        )
