"""Trunks: the shared convolutional layers, as levels at strides 2, 4, 8 and 16.

A trunk is an ImageNet network of torchvision cut at stride 16, with two changes from the papers and
the released code (Pinheiro et al., ECCV 2016): convolutions pad with a mirror of their input, and
batch norm is frozen.

Shapes: N images, (H, W) their size; level i gives (N, channels[i], ~H / 2^(i+1), ~W / 2^(i+1)).
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from models.backbone import BACKBONES, RESNETS, STEM_WIDTH, STYLES, TORCHVISION, load_backbone
from models.cifar import CIFAR_NETWORKS, CIFAR_STRIDES, cifar_levels
from models.settings import require, require_one_of
from models.tiny import tiny_levels

STRIDES = (2, 4, 8, 16)
TRUNKS = (*BACKBONES, "tiny")  # CIFAR_NETWORKS only classify
PADDINGS = ("symmetric", "zero")  # a mirror of the input, or zeros as ImageNet networks have
# torchvision's modules of a ResNet by level; the last stage and the classifier are cut away.
RESNET_LEVELS = (("conv1", "bn1", "relu"), ("maxpool", "layer1"), ("layer2",), ("layer3",))
MOBILENET_STARTS = (0, 2, 4, 7, 14)  # torchvision's blocks of MobileNetV2 by level; the rest is cut
# The names of a convolution and of the batch norm after it.
NORM_NAMES = (
    (re.compile(r"(denselayer\d+\.)conv1$"), r"\1norm2"),
    (re.compile(r"\bconv0$"), "norm0"),  # DenseNet's stem
    (re.compile(r"\bconv(\d)$"), r"bn\1"),  # ResNet's stem and blocks
    (re.compile(r"\b0$"), "1"),  # ResNet's shortcut; within a trunk DenseNet's and MobileNet's stem
    (re.compile(r"\bconv\.1$"), "conv.2"),  # a MobileNet block's last, without and with expansion
    (re.compile(r"\bconv\.2$"), "conv.3"),
)


@dataclass(frozen=True)
class TrunkConfig:
    """A trunk; see `build_trunk`."""

    # resnet18 | 34 | 50 | 101 | 152, vgg11 | 16, densenet121, mobilenet_v2, caffenet, tiny; in
    # pretraining also one of CIFAR_NETWORKS.
    name: str = "resnet50"
    # "imagenet", the path of a local state dict or of a run of --stage pretrain, or null.
    weights: str | None = "imagenet"
    # Of a ResNet: torchvision | caffe, as released with the paper: a block's first convolution has
    # the stride, and the pool rounds sizes up and is not padded. Caffe's weights, which are for BGR
    # from 0 to 255 less the mean, are converted to the pixels of all other trunks when read.
    style: str = "torchvision"
    width: int = STEM_WIDTH  # of a ResNet's first convolution; the others are in proportion
    frozen_levels: int = 0  # how many of the four levels are not trained
    padding: str = "symmetric"  # symmetric | zero (detectors of the released code)
    ceil_pooling: bool = False  # pools round sizes up, as Caffe's do

    def __post_init__(self) -> None:
        require_one_of(self, "name", (*TRUNKS, *CIFAR_NETWORKS))
        require_one_of(self, "padding", PADDINGS)
        require_one_of(self, "style", STYLES)
        require(self, "greater than 0", lambda v: v > 0, "width")
        require(self, "from 0 to 4", lambda v: 0 <= v <= len(STRIDES), "frozen_levels")
        if self.width != STEM_WIDTH and self.name not in RESNETS:
            raise ValueError(f"width {self.width} is only for ResNets; use 64 for {self.name}")
        if self.style != TORCHVISION and self.name not in RESNETS:
            raise ValueError(f"style {self.style} is only for ResNets, and {self.name} is none")


class Trunk(nn.Module):
    """Levels of layers, each halving the resolution of the one before.

    Attributes:
        name: one of `TRUNKS` or `CIFAR_NETWORKS`.
        strides: of the levels: 2, 4, 8 and 16, but CaffeNet has none at stride 2, and CIFAR's
            networks have 1, 2 and 4.
        channels: number of channels of each level's output.
    """

    def __init__(self, name: str, levels: nn.ModuleList):
        super().__init__()
        self.name, self.levels = name, levels
        self.strides = CIFAR_STRIDES if name in CIFAR_NETWORKS else STRIDES[-len(levels) :]
        with torch.no_grad():
            self.channels = tuple(level.shape[1] for level in self(torch.zeros(1, 3, 32, 32)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of normalized images (N, 3, H, W), for each of `strides`."""
        features = []
        for level in self.levels:
            images = level(images)
            features.append(images)
        return features


def build_trunk(name: str, *, weights: str | Path | None = None, **settings: Any) -> Trunk:
    """A trunk by name.

    Args:
        name: one of `TRUNKS` or `CIFAR_NETWORKS`.
        weights: "imagenet" for torchvision's weights (downloaded once by torchvision), the path of
            a state dict with torchvision's key names, or None for random weights.
        settings: the other fields of `TrunkConfig`; `frozen_levels` is left to the caller.

    Raises:
        ValueError: a setting that cannot be, or weights of another network.
    """
    c = TrunkConfig(name=name, **settings)
    if name == "tiny" or name in CIFAR_NETWORKS:
        if weights is not None:
            raise ValueError(
                f"the {name} trunk has no weights of its own, got {weights!r}; set it to null, or "
                "to a run of --stage pretrain"
            )
        levels = tiny_levels() if name == "tiny" else cifar_levels(name)
    else:
        network = load_backbone(name, weights=weights, width=c.width, style=c.style)
        levels = _cut(name, network)
    layers = nn.ModuleList(levels)
    to_trunk_layers(layers, padding=c.padding, ceil_pooling=c.ceil_pooling)
    return Trunk(name, layers)


def _cut(name: str, network: Any) -> list[nn.Module]:
    """The levels of a whole network."""
    if name in RESNETS:
        return [
            nn.Sequential(OrderedDict((part, getattr(network, part)) for part in parts))
            for parts in RESNET_LEVELS
        ]
    f = network.features
    if name == "mobilenet_v2":
        return [f[start:end] for start, end in pairwise(MOBILENET_STARTS)]
    if name == "densenet121":
        # A dense block leaves raw sums; the norm and ReLU of the next transition complete it.
        t1, t2, t3 = f.transition1, f.transition2, f.transition3
        return [
            nn.Sequential(f.conv0, f.norm0, f.relu0),
            nn.Sequential(f.pool0, f.denseblock1, t1.norm, t1.relu),
            nn.Sequential(t1.conv, t1.pool, f.denseblock2, t2.norm, t2.relu),
            nn.Sequential(t2.conv, t2.pool, f.denseblock3, t3.norm, t3.relu),
        ]
    layers = list(f)[:-1]  # without the last pool, so that the map stays at stride 16
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    if name.startswith("vgg"):
        del pools[0]  # conv1 and conv2 are one level
    return [nn.Sequential(*layers[a:b]) for a, b in pairwise([0, *pools, len(layers)])]


# --- padding --------------------------------------------------------------------------------------


def symmetric_pad(x: Tensor, pad: int) -> Tensor:
    """(N, C, H, W) with `pad` > 0 more pixels on each side, the edge repeated: cba|abc..xyz|zyx."""
    if pad == 1:
        return F.pad(x, (1, 1, 1, 1), mode="replicate")  # in one copy
    x = torch.cat([x[..., :pad].flip(-1), x, x[..., -pad:].flip(-1)], dim=-1)
    return torch.cat([x[..., :pad, :].flip(-2), x, x[..., -pad:, :].flip(-2)], dim=-2)


class SymmetricConv2d(nn.Conv2d):
    """A convolution that pads with a mirror of more than one pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H', W') as nn.Conv2d."""
        x = symmetric_pad(x, int(self.padding[0]))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)


def to_trunk_layers(
    module: nn.Module, *, padding: str = "symmetric", ceil_pooling: bool = False
) -> None:
    """Freezes batch norm, sets the padding of convolutions and the rounding of pools; in place."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                frozen = FrozenNorm(layer.num_features, layer.eps)
                frozen.load_state_dict(layer.state_dict())
                setattr(parent, name, frozen)
            elif isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = ceil_pooling or layer.ceil_mode
            elif isinstance(layer, nn.Conv2d) and padding == "symmetric":
                if layer.padding == (1, 1):
                    layer.padding_mode = "replicate"  # the mirror of one pixel is that pixel
                elif layer.padding != (0, 0):
                    layer.__class__ = SymmetricConv2d  # the same weights


# --- frozen batch norm ----------------------------------------------------------------------------


class FrozenNorm(FrozenBatchNorm2d):
    """Batch norm whose numbers are constants, in the type of its input.

    Under autocast torchvision's gives float32, which doubles the memory that training needs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape and type."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (values.to(x.dtype)[:, None, None] for values in (scale, shift))
        return torch.addcmul(shift, x, scale)


def norm_name(conv_name: str) -> str:
    """The name that the batch norm after a convolution has, if there is one: conv2 -> bn2."""
    for pattern, norm in NORM_NAMES:
        name, found = pattern.subn(norm, conv_name)
        if found:
            return name
    return f"{conv_name}.norm"


def frozen_norm_state(scale: Tensor, shift: Tensor) -> dict[str, Tensor]:
    """The state dict of the frozen batch norm that computes scale * x + shift, (C,) each."""
    eps = FrozenNorm(1).eps
    return {
        "weight": scale,
        "bias": shift,
        "running_mean": torch.zeros_like(scale),
        "running_var": torch.full_like(scale, 1 - eps),
    }


def upgrade_trunk_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of earlier checkpoints, whose convolutions have their norm's `scale` and `shift`."""
    upgraded = dict(state)
    for key in state:
        conv, _, kind = key.rpartition(".")
        if kind == "scale" and f"{conv}.shift" in state:
            norm = frozen_norm_state(upgraded.pop(key), upgraded.pop(f"{conv}.shift"))
            upgraded |= {f"{norm_name(conv)}.{name}": value for name, value in norm.items()}
    return upgraded
