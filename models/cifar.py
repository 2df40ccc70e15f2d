"""CIFAR's residual networks, and the same networks without shortcuts.

They have 6n + 2 layers: a convolution, three stages of n blocks of two convolutions (16, 32 and 64
channels at strides 1, 2 and 4), and the classifier. Shortcuts have no parameters: they skip pixels
and pad channels with zeros (option A). Convolutions are initialized as in He et al., ICCV 2015.

v1: He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2; the plain
networks are there, too. v2: He et al., "Identity mappings in deep residual networks", ECCV 2016:
norm and ReLU come before each convolution, so that nothing scales what the shortcuts carry.
"""

import re

import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (20, 32, 44, 56, 110)  # layers
CIFAR_NETWORKS = tuple(
    f"cifar_{kind.format(depth)}"
    for kind in ("resnet{}", "resnet{}_v2", "plain{}")
    for depth in DEPTHS
)
CIFAR_STRIDES = (1, 2, 4)  # of the levels
WIDTH = 16  # channels of the first level; each level has twice as many as the one before


def cifar_levels(name: str) -> list[nn.Module]:
    """The three stages of one of `CIFAR_NETWORKS`, the first with the convolution before it.

    The levels of v2 are sums that no norm has seen yet; the last one is complete.
    """
    assert name in CIFAR_NETWORKS, name
    blocks = (int(re.sub(r"_v2|\D", "", name)) - 2) // 6  # of a level
    levels: list[nn.Module] = []
    channels = WIDTH
    for stride in CIFAR_STRIDES:
        level = nn.Sequential()
        if not levels:
            level.add_module("conv1", _conv(3, channels))
            level.add_module("bn1", nn.BatchNorm2d(channels))
            level.add_module("relu", nn.ReLU(inplace=True))
        for i in range(blocks):
            width, step = WIDTH * stride, 2 if levels and i == 0 else 1
            level.add_module(f"block{i + 1}", _block(name, channels, width, step))
            channels = width
        levels.append(level)
    if name.endswith("_v2"):
        # The norm and ReLU after the first convolution come before both branches of the first
        # block, and those after the last sum before the classifier.
        levels[0].get_submodule("block1").norm1 = nn.Identity()
        level.add_module("norm", nn.BatchNorm2d(channels))
        level.add_module("relu", nn.ReLU(inplace=True))
    return levels


def _block(name: str, channels: int, width: int, stride: int) -> nn.Module:
    if name.endswith("_v2"):
        return PreActivationBlock(channels, width, stride)
    return Block(channels, width, stride, has_shortcut="resnet" in name)


def _conv(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return conv


def shortcut(x: Tensor, width: int, stride: int) -> Tensor:
    """(N, C, H, W) to (N, width, ~H / stride, ~W / stride): pixels skipped, zeros for channels."""
    x = x[..., ::stride, ::stride]
    return F.pad(x, (0, 0, 0, 0, 0, width - x.shape[1])) if width > x.shape[1] else x


class Block(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))); a plain block has no x in the sum."""

    def __init__(self, channels: int, width: int, stride: int, *, has_shortcut: bool):
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width), nn.BatchNorm2d(width)
        self.width, self.stride, self.has_shortcut = width, stride, has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, ~H / stride, ~W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + shortcut(x, self.width, self.stride) if self.has_shortcut else y)


class PreActivationBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x))))))."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.norm1: nn.Module = nn.BatchNorm2d(channels)
        self.conv1 = _conv(channels, width, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width)
        self.width, self.stride = width, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, width, ~H / stride, ~W / stride)."""
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return shortcut(x, self.width, self.stride) + y
