"""ImageNet networks in Torch7 files: ResNets of fb.resnet.torch, VGG and CaffeNet from Caffe.

The detectors and DeepMask's trunk are made of the same parts, which are read here, too.
"""

from typing import Any

import torch
from torch import nn

from datasets.resize import PixelConfig
from models.backbone import load_backbone
from pipeline.torch7.modules import Module, Used, convert_layers, expect, steps, unpacked

# Convolutions in a block and blocks in each stage, by torchvision's name.
RESNETS = {
    "resnet18": (2, (2, 2, 2, 2)),
    "resnet34": (2, (3, 4, 6, 3)),
    "resnet50": (3, (3, 4, 6, 3)),
    "resnet101": (3, (3, 4, 23, 3)),
    "resnet152": (3, (3, 8, 36, 3)),
}
# Convolutions between pools, by torchvision's name; CaffeNet has response norms, too.
PLAIN = {"vgg11": (1, 1, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "caffenet": (1, 1, 3)}
TITLES = {"vgg11": "VGG-11", "vgg16": "VGG-16", "caffenet": "CaffeNet"}
# "RossTransformer" of the released code subtracts this from 0 to 255, with no deviation; here for
# RGB in [0, 1].
CAFFE_PIXELS = PixelConfig(
    mean=(122.7717 / 255, 115.9465 / 255, 102.9801 / 255), std=(1 / 255,) * 3, bgr=True
)


def convert_resnet(value: Any, used: Used) -> tuple[str, dict]:
    """Words for an ImageNet ResNet, and its state dict with torchvision's names.

    Raises:
        ValueError: another structure, or layers of other shapes or padding: all are listed.
    """
    *trunk, pool, view, classifier = Module(unpacked(value), "", used).modules
    expect([pool, view, classifier], "SpatialAveragePooling View linear", where="the end")
    name, width, layers = read_resnet(trunk, stages=4)
    with torch.device("meta"):
        network: Any = load_backbone(name, width=width)
        network.fc = nn.Linear(network.fc.in_features, classifier.outputs)
    return f"ImageNet {title(name, width)}", convert_layers([*layers, classifier], network)


def title(name: str, width: int) -> str:
    """A network's name for reports: "ResNet-50", with its width when that is not the usual one."""
    words = TITLES.get(name) or name.replace("resnet", "ResNet-")
    return words if width == 64 else f"{words} of width {width}"


def read_resnet(parts: list[Module], *, stages: int) -> tuple[str, int, list[Module]]:
    """The name, stem width and layers of a ResNet's first stages.

    `parts`: convolution, norm, ReLU and max-pool, then a Sequential of blocks for each stage.
    """
    stem = expect(steps(*parts[:-stages]), "padding? conv norm? relu pool", where="the stem")
    layers, depths = list(stem), []
    for stage in parts[-stages:]:
        for block in stage.modules:
            both, *_ = expect(block.modules, "ConcatTable CAddTable relu", where=block.path)
            main, shortcut = expect(both.modules, "Sequential (Sequential|Identity)", both.path)
            pattern = "(padding? conv norm? relu)* padding? conv norm?"
            inner = expect(steps(main), pattern, where=main.path)
            depths.append(sum(part.kind == "conv" for part in inner))
            layers += inner + expect(steps(shortcut), "(padding? conv norm?)?", shortcut.path)
    counts = tuple(len(stage.modules) for stage in parts[-stages:])
    for name, (depth, blocks) in RESNETS.items():
        if blocks[:stages] == counts and set(depths) == {depth}:
            return name, next(part.outputs for part in stem if part.kind == "conv"), layers
    raise ValueError(
        f"{parts[-stages].path}: stages of {', '.join(map(str, counts))} blocks of {depths[0]} "
        f"convolutions are of no known ResNet ({', '.join(RESNETS)})"
    )


def convert_caffe_network(value: dict, used: Used) -> tuple[str, dict]:
    """Words for a VGG or CaffeNet, and its state dict. See `convert_resnet`."""
    features = steps(Module(unpacked(value["features"]), "features", used))
    top = steps(Module(unpacked(value["top"]), "top", used))
    name, ceil_pooling = plain_network(features)
    expect(top, "linear relu linear relu linear?", where="top")  # fc8 may have been left out
    with torch.device("meta"):
        network: Any = load_backbone(name)
    if features[-1].kind != "pool":  # RoI pooling replaces the pool after the last convolution
        network.features = network.features[:-1]
    if top[-1].kind != "linear":
        network.classifier = network.classifier[:-1]
    for layer in network.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = ceil_pooling
    mean, std = (
        f"[{', '.join(f'{v:.6f}' for v in values)}]"
        for values in (CAFFE_PIXELS.mean, CAFFE_PIXELS.std)
    )
    return (
        f"ImageNet {TITLES[name]} of Caffe; to train on it: multipathnet.trunk name={name} "
        f"weights=FILE padding=zero ceil_pooling={str(ceil_pooling).lower()}, "
        f"multipathnet.pixels mean={mean} std={std} bgr=true"
    ), convert_layers([*features, *top], network)


def plain_network(features: list[Module]) -> tuple[str, bool]:
    """Which network without residual blocks this is, and whether its pools round sizes up."""
    expect(features, "(conv relu pool? lrn?)+", where="features")
    kinds = [part.kind for part in features]
    letters = "".join({"pool": "|", "conv": "c"}.get(kind, "") for kind in kinds)
    found = tuple(map(len, letters.strip("|").split("|"))), "lrn" in kinds
    for name, counts in PLAIN.items():
        if found == (counts, name == "caffenet"):
            return name, any(part.rounds_up for part in features)
    raise ValueError(
        f"features: {', '.join(map(str, found[0]))} convolutions between pools are of no known "
        f"network ({', '.join(TITLES.values())})"
    )
