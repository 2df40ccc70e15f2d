"""MultiPathNet's forward written slowly, with loops, in float64; and RoIs to compare it on.

It takes a network's weights and nothing else: which regions and layers there are, how they are
pooled, scaled and ordered, is written here and by the caller.
"""

import copy
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.multipathnet import ResidualHead

CLASSES, WIDTH, POOLED, FEATURES = 3, 8, 3, 16
CHANNELS = {4: 24, 8: 64, 16: 128}  # of the tiny trunk
HEIGHT, IMAGE_WIDTH = 64, 96
ALL = (4, 8, 16)


def some_layers(num_images: int = 2) -> dict[int, Tensor]:
    """Feature maps with negative values, too, where the maximum over no cell would show."""
    generator = torch.Generator().manual_seed(2)
    return {
        stride: torch.randn(
            num_images, channels, HEIGHT // stride, IMAGE_WIDTH // stride, generator=generator
        )
        for stride, channels in CHANNELS.items()
    }


ROIS = torch.tensor(
    [
        [0, 3.25, 5.5, 40.75, 33.25],
        [1, 8, 24, 72, 56],  # corners at half a cell of conv5
        [0, -40, -24, 30, 20],  # partly outside, with half cells
        [1, 200, 150, 260, 190],  # outside: no region sees the image
        [1, 50, 10, 50.5, 10.25],  # smaller than a cell
        [0, 0, 0, IMAGE_WIDTH, HEIGHT],
    ]
)


def round_half_away(value: float) -> int:
    return int(math.copysign(math.floor(abs(value) + 0.5), value))


def caffe_bins(low: float, high: float, factor: float, stride: int, size: int) -> list[range]:
    """The rows (or columns) of a map that each bin of a RoI takes the maximum over.

    Caffe's RoI pooling: a side's ends are rounded to cells of the map, half away from zero, and
    both belong to the RoI; bins are rounded outwards, so they may overlap; what lies outside the
    map is left out.
    """
    center, half = (low + high) / 2, (high - low) / 2 * factor
    first, last = (round_half_away(v / stride) for v in (center - half, center + half))
    length = max(last - first + 1, 1)
    return [
        range(
            max(first + i * length // POOLED, 0),
            min(first + math.ceil((i + 1) * length / POOLED), size),
        )
        for i in range(POOLED)
    ]


def lua_bins(low: float, high: float, factor: float, stride: int, size: int) -> list[range]:
    """The same for the released code's RoI pooling: the last cell does not belong to the RoI.

    The others are divided at rounded edges, so that no cell belongs to two bins.
    """
    center, half = (low + high) / 2, (high - low) / 2 * factor
    first, last = (round_half_away(v / stride) for v in (center - half, center + half))
    length = max(last - first, 1)
    edges = [first + math.floor(i * length / POOLED + 0.5) for i in range(POOLED + 1)]
    return [range(max(low, 0), min(high, size)) for low, high in itertools.pairwise(edges)]


def slow_pool(layer: Tensor, rois: Tensor, factor: float, stride: int, bins=caffe_bins) -> Tensor:
    """(R, C, s, s) float64: the maximum over each bin, 0 for one without cells."""
    channels, height, width = layer.shape[1:]
    values = layer.tolist()
    pooled = torch.zeros(len(rois), channels, POOLED, POOLED, dtype=torch.float64)
    for r, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        rows = bins(y1, y2, factor, stride, height)
        columns = bins(x1, x2, factor, stride, width)
        for c in range(channels):
            channel = values[int(image)][c]
            for i, j in itertools.product(range(POOLED), repeat=2):
                inside = [channel[y][x] for y in rows[i] for x in columns[j]]
                pooled[r, c, i, j] = max(inside, default=0.0)
    return pooled


def pool_everything(bins) -> dict[tuple[float, int], Tensor]:
    """`ROIS` pooled from `some_layers`, by factor and stride."""
    inputs = {(factor, 16) for factor in (1.0, 1.5, 2.0, 4.0)}
    inputs |= {(1.0, 4), (1.0, 8), (1.5, 4), (1.5, 8), (2.0, 8)}
    layers = some_layers()
    return {(f, stride): slow_pool(layers[stride], ROIS, f, stride, bins) for f, stride in inputs}


def slow_scale(block: Tensor, stride: int, normalize: bool) -> Tensor:
    if not normalize:
        return block * {4: 1 / 200, 8: 1 / 30, 16: 1.0}[stride]
    scaled = torch.zeros_like(block)
    for r, one in enumerate(block):
        norm = math.sqrt(sum(v * v for v in one.flatten().tolist()))
        if norm > 0:  # a region outside the map stays 0
            scaled[r] = one * 1000 / norm
    return scaled


def slow_features(tower: nn.Module, blocks: list[Tensor]) -> Tensor:
    """1x1 convolution and head of a tower with float64 weights, as matrix products."""
    x = torch.cat(blocks, dim=1)
    if (reduce := tower.pooling.reduce) is not None:
        x = torch.einsum("oc,rcij->roij", reduce.weight[:, :, 0, 0], x)
        x = x + reduce.bias[:, None, None]
    if isinstance(tower.head, ResidualHead):
        conv = tower.head.stage[0]
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).clamp(min=0)
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    for layer in (tower.head.fc6, tower.head.fc7):
        x = (x.reshape(len(x), -1) @ layer.weight.T + layer.bias).clamp(min=0)
    return x


@torch.no_grad()
def slow_outputs(model, pooled, regions, box_region, *, normalize: bool) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()

    def features(tower: nn.Module, factor: float, strides: tuple[int, ...]) -> Tensor:
        blocks = [slow_scale(pooled[factor, stride], stride, normalize) for stride in strides]
        return slow_features(tower, blocks)

    assert len(model.towers) == len(regions)
    joined = [features(t, *region) for t, region in zip(model.towers, regions, strict=True)]
    joined = torch.cat(joined, dim=1)
    boxes = features(model.box_tower, *box_region) if box_region else joined
    logits = joined @ model.cls_score.weight.T + model.cls_score.bias
    deltas = boxes @ model.bbox_pred.weight.T + model.bbox_pred.bias
    size = CLASSES + 1
    heads = [logits[:, k * size : (k + 1) * size] for k in range(logits.shape[1] // size)]
    classes = [deltas[:, c * 4 : (c + 1) * 4] for c in range(size)]
    return {"class_logits": torch.stack(heads, 1), "deltas": torch.stack(classes, 1)}
