"""Truncated SVD of fully connected layers: faster heads, a little less exact.

Girshick, *Fast R-CNN*, ICCV 2015, section 3.1: W (u x v) becomes U_t (u x t) and S_t V_t^T (t x v),
so u v multiplications for each RoI become t (u + v).
"""

import torch
from torch import nn

from models.multipathnet import MultiPathNet


def truncate_linear(layer: nn.Linear, rank: int) -> nn.Sequential:
    """The best approximation of a layer by two of the given rank, the first without bias."""
    rank = min(rank, *layer.weight.shape)
    first = nn.Linear(layer.in_features, rank, bias=False)
    second = nn.Linear(rank, layer.out_features)
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    with torch.no_grad():
        first.weight.copy_(s[:rank, None] * v[:rank])
        second.weight.copy_(u[:, :rank])
        second.bias.copy_(layer.bias)
    return nn.Sequential(first, second)


def compress_towers(model: MultiPathNet, rank: int) -> None:
    """Replaces fc6 and fc7 of every tower in place, where that saves work.

    Raises:
        ValueError: the network has no such layers.
    """
    towers = [*model.towers, *([model.box_tower] if model.box_tower is not None else [])]
    heads = [tower.head for tower in towers if hasattr(tower.head, "fc6")]
    if not heads:
        raise ValueError("this network has no fully connected layers to compress (head layer4)")
    for head in heads:
        for name in ("fc6", "fc7"):
            layer = getattr(head, name)
            rows, columns = layer.weight.shape
            if rank * (rows + columns) < rows * columns:
                setattr(head, name, truncate_linear(layer, rank))
