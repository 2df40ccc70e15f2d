"""MultiPathNet: a detector that classifies proposals from several regions, layers and thresholds.

Zagoruyko, Lerer, Lin, Pinheiro, Gross, Chintala, Dollar, *A MultiPath Network for Object
Detection*, BMVC 2016; the numbers are the paper's and the released code's. Each tower looks at one
foveal region around a proposal, in RoI-pooled features of one or more layers. All of them together
feed K classifiers, one for each IoU threshold of the integral loss. The box regressor has a
separate tower. Fast R-CNN (Girshick, ICCV 2015) is the same with one region, one layer and K = 1.

Letters: B images, R RoIs of all of them, C classes without background, K thresholds, s side of a
pooled block. Layers are called by their stride: 4, 8 and 16 are conv3, conv4 and conv5 of VGG-16.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.boxes import decode_boxes, encode_boxes, foveal_regions
from models.roi_pooling import roi_pool_caffe, roi_pool_lua
from models.settings import require, require_one_of
from models.trunk import Trunk

# Without normalization: factors by layer that make its activations as large as conv5's.
UNNORMALIZED_SCALE = {4: 1 / 200, 8: 1 / 30, 16: 1.0}
ROI_POOLS = {"caffe": roi_pool_caffe, "lua": roi_pool_lua}
HEADS = ("fc", "layer4")


class Region(NamedTuple):
    """The input of a tower: the proposal enlarged by `factor`, in the layers of `strides`."""

    factor: float
    strides: tuple[int, ...]


# BMVC 2016, figure 3.
CLASSIFIER_REGIONS = (
    Region(1.0, (4, 8, 16)), Region(1.5, (8, 16)), Region(2.0, (8, 16)), Region(4.0, (16,))
)  # fmt: skip
BOX_REGION = Region(1.5, (4, 8, 16))


@dataclass(frozen=True)
class MultiPathNetConfig:
    """The arrangement of a detector; Fast R-CNN is without foveal, skip and use_box_tower, K = 1.

    The defaults are the paper's.
    """

    # Of every tower: fc (fc6 and fc7) | layer4 (the last stage of a ResNet or MobileNetV2).
    head: str = "fc"
    foveal: bool = True  # four regions around a proposal, not one
    skip: bool = True  # conv3 and conv4 beside conv5
    use_box_tower: bool = True  # a separate tower for the box regressor
    iou_thresholds: tuple[float, ...] = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75)  # one classifier each
    normalize: bool = True  # pooled blocks to one L2 norm; else by fixed factors
    norm_scale: float = 1000.0  # that norm: for blocks of 512 x 7 x 7, numbers of about 6
    pooled_size: int = 7  # s
    roi_pool: str = "caffe"  # rounding of the bins: caffe (Fast R-CNN) | lua (released code)
    width: int = 512  # channels of a tower's block
    features: int = 4096  # of fc6 and fc7
    dropout: float = 0.5  # probability to drop, after fc6 and fc7

    def __post_init__(self) -> None:
        require_one_of(self, "head", HEADS)
        require_one_of(self, "roi_pool", ROI_POOLS)
        require(self, "greater than 0", lambda v: v > 0, "pooled_size", "width", "features")
        require(self, "at least 0", lambda v: v >= 0, "norm_scale")
        require(self, "from 0 to below 1", lambda v: 0 <= v < 1, "dropout")
        ious = self.iou_thresholds
        if not ious or not all(0 < v < 1 for v in ious) or list(ious) != sorted(set(ious)):
            raise ValueError(
                f"iou_thresholds must be ascending IoUs between 0 and 1, got {list(ious)}"
            )


class SkipPooling(nn.Module):
    """Joins the RoI-pooled blocks of a region's layers: scales them, reduces them to one block.

    BMVC 2016, section 3.1.
    """

    def __init__(self, channels: dict[int, int], width: int, *, norm_scale: float | None):
        """
        Args:
            channels: of the layers, by stride.
            width: channels of the block.
            norm_scale: the L2 norm of each layer's block; None for fixed factors.
        """
        super().__init__()
        self.strides, self.norm_scale, normalize = (*channels,), norm_scale, norm_scale is not None
        strides, inputs = self.strides, sum(channels.values())
        self.reduce = None
        if normalize or len(strides) > 1 or inputs != width:
            self.reduce = nn.Conv2d(inputs, width, 1)
            nn.init.kaiming_normal_(self.reduce.weight, nonlinearity="relu")
            nn.init.zeros_(self.reduce.get_parameter("bias"))
            if not normalize and channels[strides[-1]] == width:
                # As if there were the last layer alone: pretrained heads fit.
                nn.init.zeros_(self.reduce.weight)
                nn.init.eye_(self.reduce.weight.detach()[:, -width:, 0, 0])

    def forward(self, blocks: list[Tensor]) -> Tensor:
        """Pooled blocks (R, C_l, s, s), one for each stride, to (R, width, s, s)."""
        if self.reduce is None:
            return blocks[0] * self._factor(0, blocks[0])
        # Scaled after the convolution, where channels are fewer.
        weights = self.reduce.weight.split([block.shape[1] for block in blocks], dim=1)
        reduced = self.reduce.get_parameter("bias")[:, None, None]
        for i, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
            reduced = reduced + F.conv2d(block, weight) * self._factor(i, block)
        return reduced

    def _factor(self, i: int, block: Tensor) -> Tensor | float:
        """The factor of layer i: (R, 1, 1, 1), or the same for all RoIs."""
        if self.norm_scale is None:
            return UNNORMALIZED_SCALE[self.strides[i]]
        norm = torch.linalg.vector_norm(block, dim=(1, 2, 3), keepdim=True, dtype=torch.float32)
        return (self.norm_scale / norm.clamp(min=1e-12)).to(block.dtype)


class FullyConnectedHead(nn.Module):
    """fc6 and fc7 with dropout."""

    fc6: nn.Module
    fc7: nn.Module

    def __init__(self, width: int, pooled_size: int, features: int, *, dropout: float):
        super().__init__()
        self.fc6 = nn.Linear(width * pooled_size**2, features)
        self.fc7 = nn.Linear(features, features)
        self.dropout = nn.Dropout(dropout)
        self.out_features = features

    def forward(self, block: Tensor) -> Tensor:
        """(R, width, s, s) to (R, features)."""
        x = self.dropout(F.relu(self.fc6(block.flatten(1))))
        return self.dropout(F.relu(self.fc7(x)))


class ResidualHead(nn.Module):
    """The last stage of a ResNet or MobileNetV2 and average pooling."""

    def __init__(self, stage: nn.Module, features: int):
        super().__init__()
        self.stage, self.out_features = stage, features

    def forward(self, block: Tensor) -> Tensor:
        """(R, width, s, s) to (R, features)."""
        return self.stage(block).mean(dim=(2, 3))


class Tower(nn.Module):
    """Features of one region."""

    def __init__(self, region: Region, pooling: SkipPooling, head: nn.Module):
        super().__init__()
        self.region, self.pooling, self.head = region, pooling, head

    def forward(self, pooled: dict[tuple[float, int], Tensor]) -> Tensor:
        """The blocks of `MultiPathNet.pool_regions` to (R, features)."""
        blocks = [pooled[self.region.factor, stride] for stride in self.region.strides]
        return self.head(self.pooling(blocks))


class MultiPathNet(nn.Module):
    """Trunk, towers, K classifiers and the box regressor (BMVC 2016, figure 1)."""

    delta_mean: Tensor
    delta_std: Tensor

    def __init__(
        self, trunk: Trunk, *, num_classes: int, layer4: ResidualHead | None = None, **settings: Any
    ):
        """
        Args:
            num_classes: C.
            layer4: the head for `head="layer4"`; every tower gets a copy.
            settings: fields of `MultiPathNetConfig`.
        """
        super().__init__()
        c = MultiPathNetConfig(**settings)
        self.trunk, self.num_classes = trunk, num_classes
        self.num_thresholds = len(c.iou_thresholds)
        self.pooled_size, self.roi_pool = c.pooled_size, ROI_POOLS[c.roi_pool]
        channels = dict(zip(trunk.strides, trunk.channels, strict=True))
        width = c.width if layer4 is None else trunk.channels[-1]
        head = layer4 or FullyConnectedHead(width, c.pooled_size, c.features, dropout=c.dropout)

        def tower(region: Region) -> Tower:
            region = region if c.skip else Region(region.factor, (16,))
            inputs = {stride: channels[stride] for stride in region.strides}
            pooling = SkipPooling(inputs, width, norm_scale=c.norm_scale if c.normalize else None)
            return Tower(region, pooling, copy.deepcopy(head))

        regions = CLASSIFIER_REGIONS if c.foveal else CLASSIFIER_REGIONS[:1]
        self.towers = nn.ModuleList(tower(region) for region in regions)
        self.box_tower = tower(BOX_REGION) if c.use_box_tower else None
        features = head.out_features * len(regions)
        box_features = head.out_features if c.use_box_tower else features
        self.cls_score = nn.Linear(features, self.num_thresholds * (num_classes + 1))
        self.bbox_pred = nn.Linear(box_features, (num_classes + 1) * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)
        self.register_buffer("delta_mean", torch.zeros(4))
        self.register_buffer("delta_std", torch.ones(4))

    def forward(self, images: Tensor, rois: Tensor) -> dict[str, Tensor]:
        """`classify_rois` of normalized images (B, 3, H, W) and RoIs (R, 5) in their pixels."""
        return self.classify_rois(self.layers(images), rois)

    def layers(self, images: Tensor) -> dict[int, Tensor]:
        """Trunk features by stride; compute once per image and reuse."""
        return dict(zip(self.trunk.strides, self.trunk(images), strict=True))

    def classify_rois(self, layers: dict[int, Tensor], rois: Tensor) -> dict[str, Tensor]:
        """RoIs (R, 5) on `layers`: "class_logits" (R, K, C + 1) and "deltas" (R, C + 1, 4).

        Class 0 is the background; deltas are normalized by `delta_mean` and `delta_std`. Call it in
        chunks to bound memory.
        """
        pooled = self.pool_regions(layers, rois)
        features = torch.cat([tower(pooled) for tower in self.towers], dim=1)
        box_features = features if self.box_tower is None else self.box_tower(pooled)
        # In full precision, whatever the towers computed in.
        with torch.autocast(features.device.type, enabled=False):
            logits = self.cls_score(features.float())
            deltas = self.bbox_pred(box_features.float())
        classes = self.num_classes + 1
        return {
            "class_logits": logits.view(-1, self.num_thresholds, classes),
            "deltas": deltas.view(-1, classes, 4),
        }

    def all_towers(self) -> list[Tower]:
        """The classifier's towers and, if there is one, the box regressor's."""
        return [module for module in self.modules() if isinstance(module, Tower)]

    def pool_regions(
        self, layers: dict[int, Tensor], rois: Tensor
    ) -> dict[tuple[float, int], Tensor]:
        """Blocks (R, C_l, s, s) by region factor and stride.

        All regions of a layer are pooled in one call, so that its gradient is one map.
        """
        inputs = {
            (tower.region.factor, stride)
            for tower in self.all_towers()
            for stride in tower.region.strides
        }
        pooled: dict[tuple[float, int], Tensor] = {}
        for stride in sorted({stride for _, stride in inputs}):
            factors = sorted(factor for factor, s in inputs if s == stride)
            regions = torch.cat([foveal_regions(rois, factor) for factor in factors])
            blocks = self.roi_pool(layers[stride], regions, self.pooled_size, 1 / stride)
            blocks = blocks.to(layers[stride].dtype).unflatten(0, (len(factors), len(rois)))
            pooled |= {(f, stride): block for f, block in zip(factors, blocks, strict=True)}
        return pooled

    def set_delta_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Mean and deviation (4,) of the deltas, by which the regressor's are normalized."""
        self.delta_mean.copy_(mean)
        self.delta_std.copy_(std)

    def delta_targets(self, rois: Tensor, boxes: Tensor) -> Tensor:
        """The regressor's targets (R, 4) for RoIs (R, 4) whose objects have these boxes (R, 4)."""
        return (encode_boxes(rois, boxes) - self.delta_mean) / self.delta_std

    def decode(self, outputs: dict[str, Tensor], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (R, C + 1), the K classifiers' mean, and boxes (R, C, 4) of RoIs.

        Probabilities are float64: in float32, those of surely known objects would be 1 and equal.

        Args:
            outputs: of `classify_rois`. boxes: (R, 4) xyxy, the RoIs in any frame; so is the
                result.
        """
        probabilities = outputs["class_logits"].double().softmax(-1).mean(dim=1)
        deltas = outputs["deltas"][:, 1:].float() * self.delta_std + self.delta_mean
        return probabilities, decode_boxes(boxes, deltas)


def truncate_linear(layer: nn.Linear, rank: int) -> nn.Sequential:
    """The best approximation of a layer by two of the given rank, the first without bias.

    Truncated SVD (Girshick, ICCV 2015, section 3.1): W (u x v) becomes U_t (u x t) and S_t V_t^T
    (t x v), so u v multiplications for each RoI become t (u + v).
    """
    layers = low_rank(layer, rank)
    first, second = layers
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    rank = first.out_features
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    with torch.no_grad():
        first.weight.copy_(s[:rank, None] * v[:rank])
        second.weight.copy_(u[:, :rank])
        second.bias.copy_(layer.bias)
    return layers


def low_rank(layer: nn.Linear, rank: int) -> nn.Sequential:
    """Two random layers of the given rank, or of the layer's own if that is less."""
    rank = min(rank, *layer.weight.shape)
    first = nn.Linear(layer.in_features, rank, bias=False)
    return nn.Sequential(first, nn.Linear(rank, layer.out_features))


def compress_towers(
    model: MultiPathNet,
    rank: int,
    *,
    replace: Callable[[nn.Linear, int], nn.Module] = truncate_linear,
) -> None:
    """Replaces fc6 and fc7 of every tower in place, where that saves work.

    Where the weights are to be loaded, `low_rank` saves the decomposition.

    Raises:
        ValueError: the network has no such layers.
    """
    heads = [head for head in model.modules() if isinstance(head, FullyConnectedHead)]
    if not heads:
        raise ValueError("this network has no fully connected layers to compress (head layer4)")
    for head in heads:
        for name in ("fc6", "fc7"):
            layer = getattr(head, name)
            rows, columns = layer.weight.shape
            if rank * (rows + columns) < rows * columns:
                setattr(head, name, replace(layer, rank))
