"""Dropout whose noise belongs to the sample, not to the process that happens to compute it."""

import torch
from torch import Tensor, nn

# splitmix64's constants as signed integers (Steele, Lea, Flood, OOPSLA 2014); int64 arithmetic
# wraps.
_GOLDEN = -0x61C8864680B583EB
_MIX1 = -0x40A7B892E31B1A47
_MIX2 = -0x6B2FB644ECCEEE15


class KeyedDropout(nn.Module):
    """Zeroes a channel's value with probability p, by a hash of (sample key, stream, channel).

    A run on two processes therefore drops what a run on one drops, and a resumed run what an
    uninterrupted one does.
    """

    def __init__(self, p: float, *, stream: int):
        """
        Args:
            p: probability to drop, in [0, 1).
            stream: tells this layer's noise from another's.
        """
        super().__init__()
        assert 0 <= p < 1, p
        self.p, self.stream = p, stream

    def forward(self, x: Tensor, *, keys: Tensor | None) -> Tensor:
        """(B, C) or (B, C, h, w) to the same shape.

        In training `keys` (B,) int64 is needed, in eval mode nothing is dropped.
        """
        if not self.training or self.p == 0:
            return x
        assert keys is not None, "dropout in training needs the samples' keys"
        kept = keyed_uniform(keys, x.shape[1], stream=self.stream) >= self.p  # (B, C)
        kept = kept.view(kept.shape + (1,) * (x.dim() - 2))
        return x * (kept.to(x.dtype) / (1 - self.p))


def keyed_uniform(keys: Tensor, count: int, *, stream: int) -> Tensor:
    """Uniform numbers in [0, 1) from a hash: keys (B,) int64 to (B, count) float32."""
    index = torch.arange(count, device=keys.device) + (stream << 32)
    z = _mix(_mix(keys)[:, None] + _GOLDEN * index)
    return ((z >> 40) & 0xFFFFFF).to(torch.float32) / (1 << 24)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX1  # the mask makes the shift unsigned
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX2
    return z ^ ((z >> 31) & ((1 << 33) - 1))
