"""The three networks, each assembled in one expression."""

from pathlib import Path
from typing import Any

from models.backbone import RESNETS, WITH_LAST_STAGE, load_backbone
from models.deepmask import DeepMask
from models.multipathnet import MultiPathNet, ResidualHead
from models.sharpmask import SharpMask
from models.trunk import MOBILENET_STARTS, TrunkConfig, build_trunk, to_trunk_layers


def build_deepmask(trunk: TrunkConfig, **settings: Any) -> DeepMask:
    """DeepMask; `settings` are fields of `DeepMaskConfig`."""
    return DeepMask(build_trunk(**vars(trunk)), **settings)


def build_sharpmask(trunk: TrunkConfig, *, deepmask: dict[str, Any], **settings: Any) -> SharpMask:
    """SharpMask; `deepmask` are fields of `DeepMaskConfig`, `settings` of `SharpMaskConfig`."""
    return SharpMask(build_deepmask(trunk, **deepmask), **settings)


def build_multipathnet(trunk: TrunkConfig, *, num_classes: int, **settings: Any) -> MultiPathNet:
    """MultiPathNet; `settings` are fields of `MultiPathNetConfig`.

    fc6 and fc7 of every tower start as the ImageNet network's, if the trunk's weights have them and
    they fit.

    Raises:
        ValueError: head layer4 of a network without a last stage.
    """
    network = MultiPathNet(
        build_trunk(**vars(trunk)),
        num_classes=num_classes,
        layer4=_layer4(trunk) if settings.get("head") == "layer4" else None,
        **settings,
    )
    if trunk.weights and trunk.name.startswith(("vgg", "caffenet")):
        _copy_classifier(network, trunk.name, trunk.weights)
    return network


def _layer4(trunk: TrunkConfig) -> ResidualHead:
    """The released ResNet detector's head: the stage after the trunk, its batch norm frozen."""
    if trunk.name not in WITH_LAST_STAGE:
        raise ValueError(
            f"head layer4 is the last stage of a ResNet or MobileNetV2, and {trunk.name} is none; "
            "use head fc"
        )
    network: Any = load_backbone(
        trunk.name, weights=trunk.weights, whole=True, width=trunk.width, style=trunk.style
    )
    if trunk.name in RESNETS:
        stage, features = network.layer4, network.fc.in_features
    else:
        stage, features = network.features[MOBILENET_STARTS[-1] :], network.last_channel
    to_trunk_layers(stage, padding=trunk.padding)
    return ResidualHead(stage, features)


def _copy_classifier(network: MultiPathNet, name: str, weights: str | Path) -> None:
    backbone: Any = load_backbone(name, weights=weights, whole=True)
    fc6, _, _, fc7, *_ = backbone.classifier
    heads: list[Any] = [tower.head for tower in network.all_towers()]
    for head in heads:
        for layer, pretrained in ((head.fc6, fc6), (head.fc7, fc7)):
            if layer.weight.shape != pretrained.weight.shape:
                return  # a narrower or differently pooled head is trained from the start
            layer.load_state_dict(pretrained.state_dict())
