"""The networks of a config, and trained ones from checkpoints."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backbone import CAFFE, has_last_stage
from models.build import build_deepmask, build_multipathnet, build_sharpmask
from models.classifier import Classifier, trunk_weights
from models.deepmask import DeepMask, DeepMaskConfig
from models.multipathnet import MultiPathNet, MultiPathNetConfig, compress_towers, low_rank
from models.sharpmask import SharpMask, SharpMaskConfig
from models.trunk import Trunk, TrunkConfig, build_trunk
from pipeline import distributed
from pipeline.checkpoint import (
    check_weights,
    find_checkpoint,
    load_checkpoint,
    load_weights,
    read_checkpoint,
)
from pipeline.config import PRETRAIN, Config, MaskNetworkConfig
from pipeline.recipe import config_from_dict, find_path, settings_of

# Settings of a network that weights of other values fit as well.
FREE = ("weights", "frozen_levels", "dropout")
# The same of a trunk alone: as with ImageNet weights, it may pad and pool otherwise.
FREE_OF_TRUNK = (*FREE, "padding", "ceil_pooling")


def make_classifier(config: Config, *, num_classes: int, pretrained: bool = False) -> Classifier:
    """The classifier of a config; all is random unless its trunk is to be `pretrained`."""
    settings, weights = _trunk(config.pretrain.trunk, pretrained, key="pretrain.trunk.weights")
    trunk = build_trunk(**vars(settings))
    _fill(trunk, weights)
    return Classifier(trunk, num_classes)


def make_deepmask(config: Config | MaskNetworkConfig, *, pretrained: bool = False) -> DeepMask:
    """The DeepMask of a config; its trunk is random unless it is to be `pretrained`."""
    trunk, weights = _trunk(config.trunk, pretrained, key="trunk.weights")
    model = build_deepmask(trunk, **settings_of(DeepMaskConfig, config.deepmask))
    _fill(model.trunk, weights)
    return model


def make_sharpmask(config: Config | MaskNetworkConfig) -> SharpMask:
    """The SharpMask of a config, its weights random: they come from checkpoints or training."""
    return build_sharpmask(
        replace(config.trunk, weights=None),
        deepmask=settings_of(DeepMaskConfig, config.deepmask),
        **settings_of(SharpMaskConfig, config.sharpmask),
    )


def make_multipathnet(
    config: Config, *, num_classes: int, pretrained: bool = False
) -> MultiPathNet:
    """The detector of a config; all is random unless it is to be `pretrained`.

    Raises:
        ValueError or FileNotFoundError: weights that do not fit the settings, or no such file.
    """
    c = config.multipathnet
    if pretrained and c.trunk.weights and c.trunk.style == CAFFE and c.pixels.bgr:
        raise ValueError(
            "multipathnet.pixels.bgr must be false with trunk.style caffe, whose weights are "
            "converted to RGB when they are read"
        )
    trunk, weights = _trunk(c.trunk, pretrained, key="multipathnet.trunk.weights")
    settings = settings_of(MultiPathNetConfig, c)
    model = build_multipathnet(trunk, num_classes=num_classes, **settings)
    _fill(model.trunk, weights)
    if (
        pretrained
        and c.head == "layer4"
        and c.trunk.weights not in (None, "imagenet")
        and (trunk.weights is None or not has_last_stage(trunk.name, trunk.weights))
    ):
        distributed.say(
            f"head layer4 starts from random weights: {c.trunk.weights} ends before that stage"
        )
    return model


def _trunk(
    trunk: TrunkConfig, pretrained: bool, *, key: str
) -> tuple[TrunkConfig, dict[str, Tensor] | None]:
    """A trunk's settings with the path of its weights resolved.

    Weights of `--stage pretrain` come beside settings without any.

    Raises:
        ValueError or FileNotFoundError: no such file, or one of another trunk.
    """
    weights = trunk.weights if pretrained and trunk.weights != "deepmask" else None
    if weights is None or weights == "imagenet":
        return replace(trunk, weights=weights), None
    path = str(find_checkpoint(find_path(weights, key=key)))
    content = read_checkpoint(Path(path))
    if not isinstance(content, Mapping) or content.get("stage") != PRETRAIN:
        return replace(trunk, weights=path), None  # of an ImageNet network
    checkpoint = load_checkpoint(path)
    theirs = config_from_dict(checkpoint["config"], source=path).pretrain.trunk
    differences = [
        f"{name} {getattr(theirs, name)} instead of {value}"
        for name, value in vars(trunk).items()
        if name not in FREE_OF_TRUNK and getattr(theirs, name) != value
    ]
    if differences:
        raise ValueError(f"{key}: {path} is of another trunk: {', '.join(differences)}")
    return replace(trunk, weights=None), trunk_weights(checkpoint["model"])


def _fill(trunk: Trunk, weights: dict[str, Tensor] | None) -> None:
    if weights is not None:
        load_weights(trunk, weights, source="the pretrained trunk")


def load_network(
    path: str | Path, *, stage: str | tuple[str, ...] | None = None, schema: type = Config
) -> tuple[Any, Any, dict[str, Any]]:
    """The trained network of a checkpoint, its config, and what else the checkpoint says.

    For masks alone, the schema of the config may be `MaskNetworkConfig`.

    Raises:
        ValueError or FileNotFoundError: see `load_checkpoint`, or weights that do not fit.
    """
    checkpoint = load_checkpoint(path, stage=stage)
    config = config_from_dict(checkpoint["config"], source=str(path), schema=schema)
    with torch.device("meta"):
        empty = make_network(checkpoint, config, source=str(path))
    check_weights(empty, checkpoint["model"], source=str(path))
    model = make_network(checkpoint, config, source=str(path))
    load_weights(model, checkpoint.pop("model"), source=str(path))
    return model.eval(), config, checkpoint


def make_network(checkpoint: dict[str, Any], config: Any, *, source: str) -> nn.Module:
    """The network, with random weights, that a checkpoint's weights are of."""
    if checkpoint["stage"] == "deepmask":
        return make_deepmask(config)
    if checkpoint["stage"] == "sharpmask":
        return make_sharpmask(config)
    if "categories" not in checkpoint:
        raise ValueError(f"{source} does not say which categories it detects; train it again")
    num_classes = len(checkpoint["categories"])
    if checkpoint["stage"] == PRETRAIN:
        return make_classifier(config, num_classes=num_classes)
    model = make_multipathnet(config, num_classes=num_classes)
    if rank := checkpoint.get("compressed_fc"):
        compress_towers(model, rank, replace=low_rank)
    return model


def network_settings(stage: str, config: Config) -> dict[str, Any]:
    """What shapes the weights of a stage, or what the network computes with them, by dotted key."""
    settings: dict[str, Any] = {}

    def add(prefix: str, schema: type, section: Any) -> None:
        values = settings_of(schema, section)
        settings.update({f"{prefix}.{k}": v for k, v in values.items() if k not in FREE})

    if stage == PRETRAIN:
        add("pretrain.trunk", TrunkConfig, config.pretrain.trunk)
        return settings
    if stage == "multipathnet":
        c = config.multipathnet
        add("multipathnet.trunk", TrunkConfig, c.trunk)
        add("multipathnet", MultiPathNetConfig, c)
        for name in ("align_corners", "inclusive_boxes", "pixels"):
            settings[f"multipathnet.{name}"] = getattr(c, name)
        return settings
    add("trunk", TrunkConfig, config.trunk)
    add("deepmask", DeepMaskConfig, config.deepmask)
    if stage == "sharpmask":
        add("sharpmask", SharpMaskConfig, config.sharpmask)
    return settings


def check_same_network(
    checkpoint: dict[str, Any], config: Config, stage: str, *, source: str
) -> None:
    """Raises a ValueError that names the settings in which a checkpoint's network is another.

    Not all of them show in the shapes of weights: a trunk may pad otherwise.
    """
    own = network_settings(stage, config)
    theirs = network_settings(stage, config_from_dict(checkpoint["config"], source=source))
    differences = [f"{k} {theirs[k]} instead of {v}" for k, v in own.items() if theirs[k] != v]
    if differences:
        raise ValueError(
            f"{source} is a {checkpoint['stage']} of another network: {', '.join(differences)}"
        )
