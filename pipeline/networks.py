"""The networks of a config."""

from pathlib import Path

import torch

from models.deepmask import DeepMask
from models.multipathnet import (
    FullyConnectedHead,
    MultiPathNet,
    ResidualHead,
    box_tower,
    foveal_towers,
)
from models.sharpmask import SharpMask
from models.trunk import RESNETS, STRIDES, Trunk, build_trunk, load_backbone, to_trunk_layers
from pipeline.checkpoint import load_weights
from pipeline.config import DEEPMASK_SIZES, Config, TrunkConfig, find_path


def build_deepmask(config: Config, *, pretrained: bool = True) -> DeepMask:
    """The DeepMask of a config.

    Args:
        pretrained: False leaves the trunk random, for weights that come from a checkpoint.
    """
    weights = _find_weights(config.trunk.weights, key="trunk.weights") if pretrained else None
    c = config.deepmask
    sizes = {name: getattr(c, name) for name in DEEPMASK_SIZES}
    trunk = _build_trunk(config.trunk, weights)
    if trunk.strides != STRIDES:
        raise ValueError(f"trunk.name {trunk.name} is of detectors only")
    return DeepMask(trunk, dropout=c.dropout, **sizes)


def build_sharpmask(config: Config) -> SharpMask:
    """The SharpMask of a config, its weights random: they come from checkpoints or training."""
    c = config.sharpmask
    return SharpMask(
        build_deepmask(config, pretrained=False),
        km=c.km,
        ks=c.ks,
        widths=c.widths,
        merge=c.merge,
        num_modules=c.num_modules,
        horizontal_widths=c.horizontal_widths,
    )


def build_multipathnet(
    config: Config, *, num_classes: int, pretrained: bool = True
) -> MultiPathNet:
    """The detector of a config.

    Args:
        num_classes: without background.
        pretrained: False leaves all random, for weights that come from a checkpoint.

    Raises:
        ValueError: a head that the trunk does not have.
    """
    c = config.multipathnet
    weights = c.trunk.weights if pretrained and c.trunk.weights != "deepmask" else None
    weights = _find_weights(weights, key="multipathnet.trunk.weights")
    trunk = _build_trunk(c.trunk, weights)
    regions = foveal_towers(foveal=c.foveal, skip=c.skip)
    if c.head == "layer4":
        head, width = _layer4_head(c.trunk, weights), trunk.channels[-1]
    else:
        head = FullyConnectedHead(c.width, c.pooled_size, c.features, dropout=c.dropout, stream=0)
        width = c.width
        if weights is not None:
            _copy_vgg_layers(head, c.trunk.name, weights)
    return MultiPathNet(
        trunk,
        head,
        num_classes=num_classes,
        num_thresholds=len(c.thresholds),
        regions=regions,
        box_region=box_tower(skip=c.skip) if c.box_tower else None,
        pooled_size=c.pooled_size,
        width=width,
        normalize=c.normalize,
        scale=c.scale,
        roi_bins=c.roi_bins,
    )


def _build_trunk(c: TrunkConfig, weights: str | Path | None) -> Trunk:
    return build_trunk(
        c.name, weights=weights, width=c.width, padding=c.padding, ceil_pooling=c.ceil_pooling
    )


def _layer4_head(c: TrunkConfig, weights: str | Path | None) -> ResidualHead:
    """The released ResNet detector's: the stage behind the trunk, its batch norm frozen."""
    if c.name not in RESNETS:
        raise ValueError(
            f"multipathnet.head layer4 is the last stage of a ResNet, and {c.name} is none; "
            "use head fc"
        )
    network = load_backbone(c.name, weights=weights, whole=True, width=c.width)
    layer4 = to_trunk_layers(network.layer4, padding=c.padding)
    return ResidualHead(layer4, network.fc.in_features)


def _copy_vgg_layers(head: FullyConnectedHead, name: str, weights: str | Path) -> None:
    """fc6 and fc7 of an ImageNet VGG or CaffeNet, where they fit."""
    if not name.startswith(("vgg", "caffenet")):
        return
    classifier = load_backbone(name, weights=weights, whole=True).classifier
    for own, theirs in ((head.fc6, classifier[0]), (head.fc7, classifier[3])):
        if own.weight.shape != theirs.weight.shape:
            return  # a narrower or differently pooled head is trained from the start
        own.load_state_dict(theirs.state_dict())


def _find_weights(weights: str | None, *, key: str) -> str | Path | None:
    return weights if weights in (None, "imagenet") else find_path(weights, key=key)


def load_trunk(trunk: Trunk, state: dict[str, torch.Tensor], *, source: str) -> None:
    """Copies the trunk of a DeepMask or SharpMask checkpoint's weights into a trunk.

    Raises:
        ValueError: it is another trunk.
    """
    parts = {
        key.removeprefix("deepmask.").removeprefix("trunk."): value
        for key, value in state.items()
        if key.removeprefix("deepmask.").startswith("trunk.")
    }
    load_weights(trunk, parts, source=f"the trunk of {source}")
