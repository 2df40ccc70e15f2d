"""VGG and CaffeNet in Torch7 files: networks of Caffe, converted to Lua Torch by its users.

They are sequences of convolutions, ReLUs, pools and normalizations, and so are ours: each layer has
its number in both.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.trunk import TrunkConv2d, describe_mismatch, load_backbone
from pipeline.config import PixelConfig
from pipeline.torch7.imagenet import is_stage, refuse
from pipeline.torch7.layers import CONVOLUTIONS, convolutions
from pipeline.torch7.modules import CONTAINERS, RECTIFIERS, Module, Taken, expect, kind, steps

POOLS = ("SpatialMaxPooling",)
# What may stand for our layers in a file.
COUNTERPARTS = {
    TrunkConv2d: CONVOLUTIONS,
    nn.Conv2d: CONVOLUTIONS,
    nn.ReLU: RECTIFIERS,
    nn.MaxPool2d: POOLS,
    nn.LocalResponseNorm: ("SpatialCrossMapLRN", "SpatialCrossResponseNormalization"),
}
VGG_LAYOUTS = {(1, 1, 2, 2, 2): "vgg11", (2, 2, 3, 3, 3): "vgg16"}  # convolutions between pools
TITLES = {"vgg11": "VGG-11", "vgg16": "VGG-16", "caffenet": "CaffeNet"}
# The released code's "RossTransformer" takes 0 to 255 less this, and no deviation: for RGB in
# [0, 1].
PIXELS = PixelConfig(
    mean=(122.7717 / 255, 115.9465 / 255, 102.9801 / 255), std=(1 / 255,) * 3, bgr=True
)

State = dict[str, Tensor]


def unpacked(value: Any) -> Any:
    """The network of {unpack, model}, whose function `unpack` would add gradients to it."""
    return value.get("model") if isinstance(value, dict) else value


def is_caffe_network(value: Any) -> bool:
    """Whether this is {features, top} of an ImageNet network."""
    return isinstance(value, dict) and all(
        kind(unpacked(value.get(name))) == "Sequential" for name in ("features", "top")
    )


def convert_caffe_network(value: dict, taken: Taken) -> tuple[str, dict]:
    """Words for an ImageNet network, and its state dict with torchvision's names.

    Raises:
        ValueError: another structure, or layers that do not fit: all are listed.
    """
    features = flat(Module(unpacked(value["features"]), "features", taken))
    top = flat(Module(unpacked(value["top"]), "top", taken))
    name = plain_name(features)
    with torch.device("meta"):
        own = load_backbone(name)
    for layer in own.features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = rounds_up(features)
    # RoI pooling takes the place of the pool behind the last convolution.
    layers = own.features if features[-1].kind in POOLS else own.features[:-1]
    state, problems = plain_state(features, layers, prefix="features.")
    kinds = ("Linear", RECTIFIERS, "Linear", RECTIFIERS, "Linear")  # fc8 may have been left out
    expect(top, *kinds[: max(4, len(top))], where="top")
    for linear, number in zip(top[::2], (0, 3, 6), strict=False):
        state |= linear_state(linear, f"classifier.{number}")
    expected = {k: v for k, v in own.state_dict().items() if k in state or "classifier.6" not in k}
    refuse(describe_mismatch(expected, state), problems)
    return f"ImageNet {TITLES[name]} of Caffe; {_settings(name, features)}", state


def _settings(name: str, features: list[Module]) -> str:
    """What a config has to say for these weights to be what they were."""
    mean, std = (f"[{', '.join(f'{v:.6f}' for v in each)}]" for each in (PIXELS.mean, PIXELS.std))
    return (
        f"to train on it: multipathnet.trunk name={name} weights=FILE padding=zero "
        f"ceil_pooling={str(rounds_up(features)).lower()}, "
        f"multipathnet.pixels mean={mean} std={std} bgr=true"
    )


def flat(module: Module) -> list[Module]:
    """What a network does, one after the other; the stages of a ResNet stay whole."""
    if module.kind == "DataParallelTable":  # the same network on each device
        return flat(module.modules[0])
    if module.kind in CONTAINERS and not is_stage(module.value):
        return [part for inner in module.modules for part in flat(inner)]
    return [module] if is_stage(module.value) else steps(module)


def plain_name(features: list[Module]) -> str:
    """Which network this is, in `models.trunk.TRUNKS`.

    Raises:
        ValueError: none of them.
    """
    kinds = [part.kind for part in features]
    if any(k in COUNTERPARTS[nn.LocalResponseNorm] for k in kinds):
        return "caffenet"
    blocks = " ".join("|" if k in POOLS else "c" for k in kinds if k in (*POOLS, *CONVOLUTIONS))
    counts = tuple(block.count("c") for block in blocks.strip(" |").split("|"))
    if counts not in VGG_LAYOUTS:
        raise ValueError(
            f"features: {', '.join(map(str, counts))} convolutions between pools are of no "
            f"network known here ({', '.join(TITLES.values())})"
        )
    return VGG_LAYOUTS[counts]


def rounds_up(features: list[Module]) -> bool:
    """Whether the pools round sizes up, as Caffe's; all of them are taken to do the same."""
    return any(_rounds_up(part) for part in features if part.kind in POOLS)


def _rounds_up(pool: Module) -> bool:
    # imagine-nn's are Caffe's; of the others old files have no such field.
    return pool.value.typename.startswith("inn.") or bool(pool.field("ceil_mode"))


def plain_state(parts: list[Module], own: nn.Module, *, prefix: str) -> tuple[State, list[str]]:
    """Convolutions by our names, and in what the arithmetic of any layer differs from ours.

    Raises:
        ValueError: another sequence of layers.
    """
    layers = [(n, layer) for n, layer in own.named_modules() if type(layer) in COUNTERPARTS]
    expect(parts, *(COUNTERPARTS[type(layer)] for _, layer in layers), where=prefix.strip("."))
    state, problems = {}, []
    for part, (name, layer) in zip(parts, layers, strict=True):
        if isinstance(layer, nn.Conv2d):
            (convolution,) = convolutions([part], norms=False)
            state[f"{prefix}{name}.weight"] = convolution.weight()
            state[f"{prefix}{name}.bias"] = part.take("bias")
            problems += convolution.check(layer, mirrored=False)
        elif isinstance(layer, nn.MaxPool2d):
            problems += _check_pool(part, layer)
        elif isinstance(layer, nn.LocalResponseNorm):
            problems += _compare(part, layer, ("size", "alpha", "beta", "k"))
    return state, problems


def _check_pool(pool: Module, own: nn.MaxPool2d) -> list[str]:
    found = [int(pool.field(name, 0)) for name in ("kH", "kW", "dH", "dW", "padH", "padW")]
    wanted = [own.kernel_size] * 2 + [own.stride] * 2 + [own.padding] * 2
    if (found, _rounds_up(pool)) == (wanted, own.ceil_mode):
        return []
    return [
        f"{pool.place}: kernel, stride, padding {found}, rounding {_direction(_rounds_up(pool))} "
        f"instead of {wanted}, {_direction(own.ceil_mode)}"
    ]


def _direction(up: bool) -> str:
    return "up" if up else "down"


def _compare(part: Module, own: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [
        f"{part.place}: {name} {part.field(name)} instead of {getattr(own, name)}"
        for name in names
        if part.field(name) != getattr(own, name)
    ]


def linear_state(linear: Module, name: str) -> State:
    """Weight and bias of a linear layer by our name."""
    return {f"{name}.weight": linear.take("weight"), f"{name}.bias": linear.take("bias")}
