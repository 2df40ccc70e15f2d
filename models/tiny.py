"""The tiny trunk: a small residual network for two CPU cores, trained from scratch.

It has no batch norm.
"""

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (12, 24, 64, 128)  # channels at strides 2, 4, 8 and 16
BLOCKS = (0, 0, 1, 1)  # residual blocks at each stride


def tiny_levels() -> list[nn.Module]:
    """A strided convolution for each level, and residual blocks on the coarse ones."""
    levels: list[nn.Module] = []
    for inputs, width, depth in zip((3, *WIDTHS), WIDTHS, BLOCKS, strict=False):
        entrance = nn.Conv2d(inputs, width, 3, stride=2, padding=1)
        nn.init.kaiming_normal_(entrance.weight, nonlinearity="relu")
        nn.init.zeros_(entrance.get_parameter("bias"))
        blocks = [ResidualBlock(width) for _ in range(depth)]
        levels.append(nn.Sequential(entrance, nn.ReLU(inplace=True), *blocks))
    return levels


class ResidualBlock(nn.Module):
    """relu(x + conv(relu(conv(x)))).

    Starts as the identity, so that it trains without batch norm.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))
