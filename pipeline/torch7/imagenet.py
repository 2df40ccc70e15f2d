"""ImageNet networks in Torch7 files: ResNets of fb.resnet.torch, VGG and CaffeNet from Caffe.

The detectors and DeepMask's trunk are made of the same parts, which are read here, too.
"""

from typing import Any

import torch
from torch import nn

from datasets.resize import PixelConfig
from models.backbone import load_backbone
from models.trunk import RESNET_LEVELS
from pipeline.torch7.modules import (
    CONVOLUTIONS,
    RELUS,
    Convolution,
    Module,
    Used,
    Weights,
    convolutions,
    expect,
    steps,
    unpacked,
)

# Convolutions in a block and blocks in each stage, by torchvision's name.
RESNETS = {
    "resnet18": (2, (2, 2, 2, 2)),
    "resnet34": (2, (3, 4, 6, 3)),
    "resnet50": (3, (3, 4, 6, 3)),
    "resnet101": (3, (3, 4, 23, 3)),
    "resnet152": (3, (3, 8, 36, 3)),
}
VGGS = {(1, 1, 2, 2, 2): "vgg11", (2, 2, 3, 3, 3): "vgg16"}  # convolutions between pools
TITLES = {"vgg11": "VGG-11", "vgg16": "VGG-16", "caffenet": "CaffeNet"}
POOLS = ("SpatialMaxPooling",)
RESPONSE_NORMS = ("SpatialCrossMapLRN", "SpatialCrossResponseNormalization")
# The Lua classes of our layers.
COUNTERPARTS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: CONVOLUTIONS,
    nn.ReLU: RELUS,
    nn.MaxPool2d: POOLS,
    nn.LocalResponseNorm: RESPONSE_NORMS,
}
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
    expect([pool, view, classifier], "SpatialAveragePooling", "View", "Linear", where="the end")
    name, width, convs = read_resnet(trunk, stages=4)
    weights = Weights()
    for key, conv in convs.items():
        weights.add_conv(key, conv, norm=True)
    weights.add_linear("fc", classifier)
    with torch.device("meta"):
        network: Any = load_backbone(name, width=width)
    expected = network.state_dict()
    expected = {k: v for k, v in expected.items() if not k.endswith("num_batches_tracked")}
    bias = weights.state["fc.bias"]  # any number of classes
    expected |= {"fc.bias": bias, "fc.weight": bias.new_empty(len(bias), network.fc.in_features)}
    weights.check(network, expected=expected)
    return f"ImageNet {title(name, width)}", weights.state


def title(name: str, width: int) -> str:
    """A network's name for reports: "ResNet-50", with its width when that is not the usual one."""
    words = TITLES.get(name) or name.replace("resnet", "ResNet-")
    return words if width == 64 else f"{words} of width {width}"


def read_resnet(parts: list[Module], *, stages: int) -> tuple[str, int, dict[str, Convolution]]:
    """The name, stem width and convolutions, by torchvision's names, of a ResNet's first stages.

    Args:
        parts: convolution, norm, ReLU and max-pool, then a Sequential of blocks for each stage.

    Raises:
        ValueError: another structure.
    """
    stem = steps(*parts[:-stages])
    (pool,) = expect(stem[-1:], POOLS, where="the stem")
    if _pool_sizes(pool) != [3, 3, 2, 2, 1, 1] or pool.plain("ceil_mode"):
        raise ValueError(f"{pool.path}: expected a max-pool of 3x3, stride 2 and padding 1")
    (conv1,) = convolutions(stem[:-1], "p?cn?r", where=f"before {pool.path}")
    convs, counts = {"conv1": conv1}, []
    for i, stage in enumerate(parts[-stages:], 1):
        counts.append(len(stage.modules))
        for j, block in enumerate(stage.modules):
            both, *_ = expect(block.modules, "ConcatTable", "CAddTable", RELUS, where=block.path)
            branches = "Sequential", ("Sequential", "Identity")
            main, shortcut = expect(both.modules, *branches, where=both.path)
            inner = convolutions(steps(main), "(p?cn?r)*p?cn?", where=main.path)
            convs |= {f"layer{i}.{j}.conv{k}": conv for k, conv in enumerate(inner, 1)}
            for conv in convolutions(steps(shortcut), "(p?cn?)?", where=shortcut.path):
                convs[f"layer{i}.{j}.downsample.0"] = conv
    depth = sum(name.startswith("layer1.0.conv") for name in convs)
    for name, (convs_in_block, blocks) in RESNETS.items():
        if (convs_in_block, list(blocks[:stages])) == (depth, counts):
            return name, conv1.module.integer("nOutputPlane"), convs
    raise ValueError(
        f"{parts[-stages].path}: stages of {', '.join(map(str, counts))} blocks of {depth} "
        f"convolutions are of no known ResNet ({', '.join(RESNETS)})"
    )


def _pool_sizes(pool: Module) -> list[Any]:
    return [pool.plain(name, 0) for name in ("kH", "kW", "dH", "dW", "padH", "padW")]


def trunk_key(name: str) -> str:
    """A ResNet's layer in `models.trunk.Trunk`, by torchvision's name."""
    top = name.partition(".")[0]
    return f"levels.{next(i for i, names in enumerate(RESNET_LEVELS) if top in names)}.{name}"


def convert_caffe_network(value: dict, used: Used) -> tuple[str, dict]:
    """Words for a VGG or CaffeNet, and its state dict. See `convert_resnet`."""
    features = steps(Module(unpacked(value["features"]), "features", used))
    top = steps(Module(unpacked(value["top"]), "top", used))
    name, ceil_pooling = plain_network(features), rounds_up(features)
    with torch.device("meta"):
        network: Any = load_backbone(name)
    for layer in network.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = ceil_pooling
    # RoI pooling replaces the pool after the last convolution.
    layers = network.features if features[-1].typename in POOLS else network.features[:-1]
    weights = Weights()
    add_plain_layers(weights, features, layers, prefix="features.")
    classes = ("Linear", RELUS, "Linear", RELUS, "Linear")  # fc8 may have been left out
    expect(top, *classes[: max(4, len(top))], where="top")
    for linear, i in zip(top[::2], (0, 3, 6), strict=False):
        weights.add_linear(f"classifier.{i}", linear)
    expected = network.state_dict()
    expected = {k: v for k, v in expected.items() if k in weights.state or "classifier.6" not in k}
    weights.check(network, expected=expected)
    mean, std = (
        f"[{', '.join(f'{v:.6f}' for v in values)}]"
        for values in (CAFFE_PIXELS.mean, CAFFE_PIXELS.std)
    )
    return (
        f"ImageNet {TITLES[name]} of Caffe; to train on it: multipathnet.trunk name={name} "
        f"weights=FILE padding=zero ceil_pooling={str(ceil_pooling).lower()}, "
        f"multipathnet.pixels mean={mean} std={std} bgr=true"
    ), weights.state


def plain_network(features: list[Module]) -> str:
    """Which network without residual blocks this is.

    Raises:
        ValueError: none that is known.
    """
    names = [part.typename for part in features]
    if not set(names).isdisjoint(RESPONSE_NORMS):
        return "caffenet"
    letters = "".join("|" if n in POOLS else "c" if n in CONVOLUTIONS else "" for n in names)
    counts = tuple(map(len, letters.strip("|").split("|")))
    if counts not in VGGS:
        raise ValueError(
            f"features: {', '.join(map(str, counts))} convolutions between pools are of no known "
            f"network ({', '.join(TITLES.values())})"
        )
    return VGGS[counts]


def rounds_up(features: list[Module]) -> bool:
    """Whether the pools round sizes up, as Caffe's; all of them are taken to do the same."""
    return any(_rounds_up(part) for part in features if part.typename in POOLS)


def _rounds_up(pool: Module) -> bool:
    # imagine-nn's are Caffe's; of the others old files have no such field.
    return pool.value.typename.startswith("inn.") or bool(pool.plain("ceil_mode"))


def add_plain_layers(
    weights: Weights, parts: list[Module], ours: nn.Module, *, prefix: str
) -> None:
    """Takes the convolutions of a sequence of layers, and compares the other layers with ours.

    Raises:
        ValueError: another sequence.
    """
    layers = [(n, layer) for n, layer in ours.named_modules() if type(layer) in COUNTERPARTS]
    expect(parts, *(COUNTERPARTS[type(layer)] for _, layer in layers), where=prefix.strip("."))
    for part, (name, layer) in zip(parts, layers, strict=True):
        if isinstance(layer, nn.Conv2d):
            weights.add_conv(prefix + name, *convolutions([part], "c", where=part.path))
        elif isinstance(layer, nn.MaxPool2d):
            sizes = [layer.kernel_size] * 2 + [layer.stride] * 2 + [layer.padding] * 2
            weights.problems += part.differences(
                {
                    "kernel, stride and padding": (_pool_sizes(part), sizes),
                    "ceil_mode": (_rounds_up(part), layer.ceil_mode),
                }
            )
        elif isinstance(layer, nn.LocalResponseNorm):
            names = ("size", "alpha", "beta", "k")
            settings = {name: (part.plain(name), getattr(layer, name)) for name in names}
            weights.problems += part.differences(settings)
