"""The three networks, each assembled in one expression: training, inference, hub and converter."""

from pathlib import Path
from typing import Any

from models.deepmask import DeepMask
from models.multipathnet import MultiPathNet, ResidualHead
from models.sharpmask import SharpMask
from models.trunk import RESNETS, TrunkConfig, build_trunk, load_backbone, to_trunk_layers


def build_deepmask(trunk: TrunkConfig, **settings: Any) -> DeepMask:
    """DeepMask; `settings` are fields of `DeepMaskConfig`."""
    return DeepMask(build_trunk(**vars(trunk)), **settings)


def build_sharpmask(trunk: TrunkConfig, *, deepmask: dict[str, Any], **settings: Any) -> SharpMask:
    """SharpMask on a DeepMask of the settings `deepmask`; `settings`: of `SharpMaskConfig`."""
    return SharpMask(build_deepmask(trunk, **deepmask), **settings)


def build_multipathnet(trunk: TrunkConfig, *, num_classes: int, **settings: Any) -> MultiPathNet:
    """MultiPathNet; `settings` are fields of `MultiPathNetConfig`.

    fc6 and fc7 of every tower start as the ImageNet network's, where the trunk's weights have them
    and they fit.

    Raises:
        ValueError: head layer4 without a ResNet.
    """
    layer4 = _layer4(trunk) if settings.get("head") == "layer4" else None
    network = MultiPathNet(
        build_trunk(**vars(trunk)), num_classes=num_classes, layer4=layer4, **settings
    )
    if layer4 is None and trunk.weights and trunk.name.startswith(("vgg", "caffenet")):
        _copy_classifier(network, trunk.name, trunk.weights)
    return network


def _layer4(trunk: TrunkConfig) -> ResidualHead:
    """The released ResNet detector's head: the stage after the trunk, its batch norm frozen."""
    if trunk.name not in RESNETS:
        raise ValueError(
            f"head layer4 is the last stage of a ResNet, and {trunk.name} is none; use head fc"
        )
    network = load_backbone(trunk.name, weights=trunk.weights, whole=True, width=trunk.width)
    to_trunk_layers(network.layer4, padding=trunk.padding)
    return ResidualHead(network.layer4, network.fc.in_features)


def _copy_classifier(network: MultiPathNet, name: str, weights: str | Path) -> None:
    classifier = load_backbone(name, weights=weights, whole=True).classifier
    box_tower = [network.box_tower] if network.box_tower is not None else []
    for tower in (*network.towers, *box_tower):
        for own, pretrained in ((tower.head.fc6, classifier[0]), (tower.head.fc7, classifier[3])):
            if own.weight.shape != pretrained.weight.shape:
                return  # a narrower or differently pooled head is trained from the start
            own.load_state_dict(pretrained.state_dict())
