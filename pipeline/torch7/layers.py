"""Convolutions of a network of Lua Torch, with their padding and batch norm.

Padding may be a module before the convolution, and a batch norm may be live, frozen in two ways, or
folded into the convolution.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.trunk import TrunkConv2d
from pipeline.torch7.modules import RECTIFIERS, Module
from pipeline.torch7.objects import short

FIXED_NORMS = ("SpatialConstDiagonal", "ConstAffine")
NORMS = (*FIXED_NORMS, "SpatialBatchNormalization")
CONVOLUTIONS = ("SpatialConvolution", "SpatialConvolutionMM")
EPSILON = 1e-5  # of torchvision's batch norm


@dataclass
class Convolution:
    """A convolution, its padding, and the batch norm behind it.

    Attributes:
        padding: pixels on each side. mirrored: symmetric padding, of a module before the
            convolution, instead of zeros of its own.
    """

    module: Module
    padding: int
    mirrored: bool
    norm: Module | None = None

    def weight(self) -> Tensor:
        """(out, in, k, k); the MM kind has it as a matrix."""
        size = [self.module.number(name) for name in ("nInputPlane", "kH", "kW")]
        if self.module.kind != "SpatialConvolutionMM":
            return self.module.take("weight", dimensions=4)
        weight = self.module.take("weight", dimensions=2)
        if weight.shape[1] != math.prod(size):
            raise ValueError(
                f"{self.module.place}: {weight.shape[1]} inputs, not {math.prod(size)}"
            )
        return weight.view(-1, *size)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The norm as y = scale * conv + shift, without the convolution's bias.

        A norm that was folded into the convolution has left its shift there as the bias.
        """
        if self.norm is None:
            shift = self.module.take("bias", dimensions=1)
            return torch.ones_like(shift), shift
        scale, shift = norm_constants(self.norm)
        if self.module.has("bias"):
            bias = self.module.take("bias", dimensions=1)
            if not len(bias) == len(scale) == len(shift):
                raise ValueError(
                    f"{self.module.place}: a bias of {len(bias)} and a norm of another"
                )
            shift = shift + scale * bias
        return scale, shift

    def check(self, own: nn.Conv2d, *, mirrored: bool) -> list[str]:
        """In what its arithmetic differs from that of our convolution."""
        m = self.module
        found = {
            "kernel": (m.field("kH"), m.field("kW")),
            "stride": (m.field("dH"), m.field("dW")),
            "groups": m.field("groups", 1),
            "padding": (self.padding, "mirrored" if self.mirrored and self.padding else "zeros"),
        }
        padding = own.border if isinstance(own, TrunkConv2d) else own.padding[0]
        wanted = {
            "kernel": own.kernel_size,
            "stride": own.stride,
            "groups": own.groups,
            "padding": (padding, "mirrored" if mirrored and padding else "zeros"),
        }
        return [
            f"{m.place}: {name} {_plain(found[name])} instead of {_plain(wanted[name])}"
            for name in wanted
            if not _same(found[name], wanted[name])
        ]


def _same(found: Any, wanted: Any) -> bool:
    """Whether plain values are equal; a damaged file may have a tensor in the place of a number."""
    if isinstance(wanted, tuple):
        return all(map(_same, found, wanted))
    return isinstance(found, (int, float, str)) and found == wanted


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_plain, value))
    return str(value) if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"


def norm_constants(norm: Module) -> tuple[Tensor, Tensor]:
    """A batch norm in inference, y = a x + b, from either of its serialized forms or a live one.

    Frozen ones have been written as nn.SpatialConstDiagonal (1, C, 1, 1) and inn.ConstAffine (C,).
    """
    if norm.kind in FIXED_NORMS:
        return norm.take("a").flatten(), norm.take("b").flatten()
    weight, bias, mean, variance = live_norm(norm)
    scale = weight * (variance + EPSILON).rsqrt()
    return scale, bias - mean * scale


def live_norm(norm: Module) -> tuple[Tensor, ...]:
    """Weight, bias, running mean and variance of a batch norm, (C,) each.

    With torchvision's epsilon: what the file's own has more is in the variance.
    """
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = (norm.take(name, dimensions=1) for name in names)
    if not len(weight) == len(bias) == len(mean) == len(variance):
        raise ValueError(f"{norm.place}: parameters of different lengths")
    epsilon = norm.field("eps", EPSILON)
    if type(epsilon) not in (int, float) or not 0 <= epsilon < 1:
        raise ValueError(f"{norm.place}: eps is {short(epsilon)}")
    return weight, bias, mean, variance + (epsilon - EPSILON)


def convolutions(parts: list[Module], *, norms: bool) -> list[Convolution]:
    """The convolutions of a sequence in which nothing else computes but norms and ReLUs.

    Args:
        norms: whether each has a norm behind it, or a bias that one was folded into.

    Raises:
        ValueError: another module.
    """
    found, before = [], None
    for part in parts:
        if part.kind == "SpatialSymmetricPadding" and before is None:
            before = part
        elif part.kind in CONVOLUTIONS:
            found.append(_padded(part, before))
            before = None
        elif norms and part.kind in NORMS and found and found[-1].norm is None:
            found[-1].norm = part
        elif part.kind not in RECTIFIERS or before is not None:
            raise ValueError(f"{part.place}: a {part.kind} is not expected here")
    for convolution in found if norms else ():
        if convolution.norm is None and not convolution.module.has("bias"):
            raise ValueError(f"{convolution.module.place}: a batch norm is due behind it")
    return found


def _padded(convolution: Module, before: Module | None) -> Convolution:
    own = {convolution.number(name, 0) for name in ("padH", "padW")}
    mirror = {before.number(f"pad_{side}", 0) if before else 0 for side in "lrtb"}
    if len(own) > 1 or len(mirror) > 1 or (max(own) and max(mirror)):
        raise ValueError(f"{convolution.place}: padding that is not the same on all sides")
    return Convolution(convolution, max(own | mirror), mirrored=bool(max(mirror)))
