"""CaffeNet: Caffe's AlexNet, as Fast R-CNN has it (Girshick, ICCV 2015; model "S").

Krizhevsky's network (NIPS 2012) with pooling before the local response normalization. Its
convolutions and pools are padded so that a cell of conv5 lies at every 16th pixel; no layer is at
stride 2.
"""

from torch import Tensor, nn


class CaffeNet(nn.Module):
    """The layers, with the names of torchvision's VGG: fc6 is classifier[0], fc7 [3] and fc8 [6].

    Its parts are used, not the whole: only RoI pooling gives the 6 x 6 cells that fc6 expects.
    """

    def __init__(self, num_classes: int = 1000):
        super().__init__()
        self.features = nn.Sequential(
            *_conv(3, 96, 11, stride=4),
            *_pool_and_normalize(),
            *_conv(96, 256, 5, groups=2),
            *_pool_and_normalize(),
            *_conv(256, 384, 3),
            *_conv(384, 384, 3, groups=2),
            *_conv(384, 256, 3, groups=2),
            _pool(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096), nn.ReLU(), nn.Dropout(),
            nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(),
            nn.Linear(4096, num_classes),
        )  # fmt: skip


def _conv(
    channels: int, width: int, size: int, *, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, width, size, stride, size // 2, groups=groups), nn.ReLU(inplace=True)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, padding=1)


def _pool_and_normalize() -> tuple[nn.Module, nn.Module]:
    return _pool(), _ResponseNorm(5, alpha=1e-4, beta=0.75, k=1)


class _ResponseNorm(nn.LocalResponseNorm):
    """In full precision: a sum of squares, and on a CPU there is no other."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)
