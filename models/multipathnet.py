"""MultiPathNet: a detector that classifies proposals from several regions, layers and thresholds.

Zagoruyko, Lerer, Lin, Pinheiro, Gross, Chintala, Dollar, *A MultiPath Network for Object
Detection*, BMVC 2016; the numbers are the paper's and the released code's. Around each proposal lie
foveal regions; each has a tower of its own, fed by RoI-pooled features of one or more layers; the
towers together feed K classifiers, one for each IoU threshold of the integral loss, and a tower of
its own the box regressor. Fast R-CNN (Girshick, ICCV 2015) is the same with one region, one layer
and K = 1.

Letters: B images, R RoIs of all of them, C classes without background, K thresholds; s the side of
a pooled block. Layers are called by their stride: 4, 8 and 16 are conv3, conv4 and conv5 of VGG-16.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.boxes import decode_boxes, foveal_regions
from models.dropout import KeyedDropout
from models.roi_pooling import roi_pool_overlapping, roi_pool_rounded
from models.trunk import Trunk

# Without normalization: what makes the finer layers' activations as large as conv5's.
UNNORMALIZED_SCALE = {4: 1 / 200, 8: 1 / 30, 16: 1.0}
NORMALIZED_SCALE = 1000.0
# How RoI pooling rounds its bins: Fast R-CNN's, or the released code's (models/roi_pooling.py).
ROI_BINS = ("overlapping", "rounded")


@dataclass(frozen=True)
class Region:
    """What a tower looks at: the proposal enlarged by `factor`, in the layers of `strides`."""

    factor: float
    strides: tuple[int, ...]


def foveal_towers(*, foveal: bool = True, skip: bool = True) -> tuple[Region, ...]:
    """The classifier's regions (BMVC 2016, figure 3); each part can be left out alone.

    Args:
        foveal: 1x, 1.5x, 2x and 4x; otherwise 1x only.
        skip: finer layers where the paper has them; otherwise conv5 only.
    """
    regions = (
        Region(1.0, (4, 8, 16)), Region(1.5, (8, 16)), Region(2.0, (8, 16)), Region(4.0, (16,))
    )  # fmt: skip
    regions = regions if foveal else regions[:1]
    return regions if skip else tuple(Region(region.factor, (16,)) for region in regions)


def box_tower(*, skip: bool = True) -> Region:
    """The box regressor's region."""
    return Region(1.5, (4, 8, 16) if skip else (16,))


class Pooling(nn.Module):
    """RoI max-pooled features of a region's layers, brought to one scale and mixed to one block."""

    def __init__(
        self,
        channels: dict[int, int],
        strides: tuple[int, ...],
        width: int,
        *,
        normalize: bool,
        scale: float = NORMALIZED_SCALE,
    ):
        """
        Args:
            channels: of the layers, by stride.
            width: channels of the block.
            normalize: each layer's block to L2 norm 1, then x `scale`; otherwise fixed factors.
        """
        super().__init__()
        self.strides, self.normalize, self.scale = strides, normalize, scale
        total = sum(channels[stride] for stride in strides)
        self.mix = None
        if normalize or len(strides) > 1 or total != width:
            self.mix = nn.Conv2d(total, width, 1)
            nn.init.kaiming_normal_(self.mix.weight, nonlinearity="relu")
            nn.init.zeros_(self.mix.bias)
            if not normalize and channels[strides[-1]] == width:
                self._start_as_last_layer()

    @torch.no_grad()
    def _start_as_last_layer(self) -> None:
        width = self.mix.out_channels
        self.mix.weight.zero_()
        self.mix.weight[:, -width:, 0, 0] = torch.eye(width)

    def forward(self, blocks: list[Tensor]) -> Tensor:
        """Pooled blocks (R, C_l, s, s), one for each stride, to (R, width, s, s)."""
        if self.mix is None:
            return blocks[0] * self._factor(0, blocks[0])
        # One number for each RoI and layer: cheaper on the few channels behind the convolution.
        weights = self.mix.weight.split([block.shape[1] for block in blocks], dim=1)
        mixed = self.mix.bias[:, None, None]
        for number, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
            mixed = mixed + F.conv2d(block, weight) * self._factor(number, block)
        return mixed

    def _factor(self, number: int, block: Tensor) -> Tensor | float:
        """What a layer's block is multiplied by: (R, 1, 1, 1), or the same for all."""
        if not self.normalize:
            return UNNORMALIZED_SCALE[self.strides[number]]
        norm = torch.linalg.vector_norm(block, dim=(1, 2, 3), keepdim=True, dtype=torch.float32)
        return (self.scale / norm.clamp(min=1e-12)).to(block.dtype)


class FullyConnectedHead(nn.Module):
    """fc6 and fc7 with dropout: (R, width, s, s) to (R, features)."""

    def __init__(self, width: int, pooled: int, features: int, *, dropout: float, stream: int):
        """
        Args:
            pooled: s. stream: tells the dropout of one tower from another's.
        """
        super().__init__()
        self.fc6 = nn.Linear(width * pooled**2, features)
        self.fc7 = nn.Linear(features, features)
        self.drop6 = KeyedDropout(dropout, stream=stream)
        self.drop7 = KeyedDropout(dropout, stream=stream + 1)
        self.out_features = features

    def forward(self, block: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """keys: (R,) int64, see `KeyedDropout`."""
        x = F.relu(self.fc6(block.flatten(1)))
        x = F.relu(self.fc7(self.drop6(x, keys=keys)))
        return self.drop7(x, keys=keys)


class ResidualHead(nn.Module):
    """A residual network's last stage and average pooling: (R, width, s, s) to (R, features)."""

    def __init__(self, stage: nn.Module, features: int):
        super().__init__()
        self.stage, self.out_features = stage, features

    def forward(self, block: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """keys: not used, there is no dropout."""
        return self.stage(block).mean(dim=(2, 3))


class Tower(nn.Module):
    """Pooled features of a region through a head of its own."""

    def __init__(self, region: Region, pooling: Pooling, head: nn.Module):
        super().__init__()
        self.region, self.pooling, self.head = region, pooling, head


class MultiPathNet(nn.Module):
    """Trunk, towers, K classifiers and the box regressor."""

    def __init__(
        self,
        trunk: Trunk,
        head: nn.Module,
        *,
        num_classes: int,
        num_thresholds: int = 6,
        regions: tuple[Region, ...],
        box_region: Region | None,
        pooled_size: int = 7,
        width: int = 512,
        normalize: bool = True,
        scale: float = NORMALIZED_SCALE,
        roi_bins: str = "overlapping",
    ):
        """
        Args:
            head: takes (R, width, s, s) blocks; every tower gets a copy of its own.
            num_classes: C.
            num_thresholds: K.
            regions: of the classifier's towers.
            box_region: of the box regressor's tower; None: it takes the classifier's features.
            pooled_size: s.
            width: channels of a tower's block.
            normalize, scale: see `Pooling`.
            roi_bins: one of `ROI_BINS`.
        """
        super().__init__()
        assert roi_bins in ROI_BINS, roi_bins
        self.trunk, self.num_classes, self.num_thresholds = trunk, num_classes, num_thresholds
        self.pooled_size, self.roi_bins = pooled_size, roi_bins
        channels = dict(zip(trunk.strides, trunk.channels, strict=True))

        def tower(region: Region, number: int) -> Tower:
            own = copy.deepcopy(head)
            for layer in own.modules():
                if isinstance(layer, KeyedDropout):
                    layer.stream += 2 * number
            pooling = Pooling(channels, region.strides, width, normalize=normalize, scale=scale)
            return Tower(region, pooling, own)

        self.towers = nn.ModuleList(tower(region, n) for n, region in enumerate(regions))
        self.box_tower = tower(box_region, len(regions)) if box_region else None
        features = head.out_features * len(regions)
        self.classify = nn.Linear(features, num_thresholds * (num_classes + 1))
        self.regress = nn.Linear(
            head.out_features if box_region else features, (num_classes + 1) * 4
        )
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.normal_(self.regress.weight, std=0.001)
        nn.init.zeros_(self.classify.bias)
        nn.init.zeros_(self.regress.bias)
        self.register_buffer("delta_mean", torch.zeros(4))
        self.register_buffer("delta_std", torch.ones(4))

    def forward(
        self, images: Tensor, rois: Tensor, *, keys: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits and normalized deltas of RoIs, see `classify_rois`.

        Args:
            images: (B, 3, H, W), normalized. rois: (R, 5), in pixels of these images.
        """
        return self.classify_rois(self.layers(images), rois, keys=keys)

    def layers(self, images: Tensor) -> dict[int, Tensor]:
        """The trunk's features by stride, of which there is no need to compute any twice."""
        return dict(zip(self.trunk.strides, self.trunk(images), strict=True))

    def classify_rois(
        self, layers: dict[int, Tensor], rois: Tensor, *, keys: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Heads on features that are there: what is run in chunks of RoIs.

        Args:
            layers: from `layers`. keys: (R,) int64 for the dropout in training.

        Returns:
            "class_logits" (R, K, C + 1), class 0 the background; "deltas" (R, C + 1, 4),
            normalized by `delta_mean` and `delta_std`.
        """
        pooled = self.pool_regions(layers, rois)

        def run(tower: Tower) -> Tensor:
            blocks = [pooled[tower.region.factor, stride] for stride in tower.region.strides]
            return tower.head(tower.pooling(blocks), keys=keys)

        features = torch.cat([run(tower) for tower in self.towers], dim=1)
        boxes = run(self.box_tower) if self.box_tower is not None else features
        return {
            "class_logits": self.classify(features).view(
                -1, self.num_thresholds, self.num_classes + 1
            ),
            "deltas": self.regress(boxes).view(-1, self.num_classes + 1, 4),
        }

    def pool_regions(
        self, layers: dict[int, Tensor], rois: Tensor
    ) -> dict[tuple[float, int], Tensor]:
        """Blocks (R, C_l, s, s) by region factor and stride, each computed once.

        All regions of a layer are pooled at once, so that its gradient is one map, not a sum of
        maps.
        """
        towers = [*self.towers, *([self.box_tower] if self.box_tower is not None else [])]
        looks = {(t.region.factor, stride) for t in towers for stride in t.region.strides}
        pooled = {}
        for stride in sorted({stride for _, stride in looks}):
            factors = sorted(factor for factor, own in looks if own == stride)
            regions = torch.cat([foveal_regions(rois, factor) for factor in factors])
            blocks = self.pool(layers[stride], regions, 1 / stride)
            each = blocks.unflatten(0, (len(factors), len(rois)))
            pooled |= {(f, stride): block for f, block in zip(factors, each, strict=True)}
        return pooled

    def pool(self, layer: Tensor, rois: Tensor, scale: float) -> Tensor:
        """Blocks (R, C_l, s, s) of a layer."""
        if self.roi_bins == "rounded":
            return roi_pool_rounded(layer, rois, self.pooled_size, scale)
        return roi_pool_overlapping(layer, rois, self.pooled_size, scale)

    def normalize_deltas(self, targets: Tensor) -> Tensor:
        """Regression targets (R, 4) as the regressor is trained on them."""
        return (targets - self.delta_mean) / self.delta_std

    def decode(self, outputs: dict[str, Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and boxes of RoIs.

        Args:
            outputs: of `classify_rois`. boxes: (R, 4) xyxy, in any frame.

        Returns:
            (R, C + 1), the mean of the K classifiers' probabilities, and (R, C, 4), in that frame.
        """
        probabilities = outputs["class_logits"].float().softmax(-1).mean(dim=1)
        deltas = outputs["deltas"][:, 1:].float() * self.delta_std + self.delta_mean
        return probabilities, decode_boxes(boxes, deltas)
