"""What a machine could do: its peak in matrix products, and the floor of a call.

The floor is the time of a call's convolutions and matrix products alone: same shapes, each in the
memory format that suits it best, nothing between them.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from models.deepmask import convolve_rows

aten = torch.ops.aten
MATRIX_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)
PEAK_SIZES = (1024, 2048)  # sides of the square products that the peak is taken from
SHORTEST = 0.01  # seconds that one timing lasts at least


class Products(TorchDispatchMode):
    """Notes the convolutions and matrix products that run within it, by what they are called with.

    Attributes:
        calls: how often each was called: operator, shapes of the operands, other arguments.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.convolution.default:
            x, weight, bias, stride, padding, _, _, _, groups = args
            other = (bias is not None, tuple(stride), tuple(padding), groups)
            self.calls["convolution", (tuple(x.shape), tuple(weight.shape)), other] += 1
        elif func in MATRIX_PRODUCTS:
            shapes = tuple(tuple(each.shape) for each in args[-2:])
            self.calls["product", shapes, ()] += 1
        return func(*args, **(kwargs or {}))


def count_work(call: Callable[[], object]) -> tuple[Counter, float]:
    """Convolutions and matrix products of a call, and the FLOPs that PyTorch counts in it."""
    with Products() as products, FlopCounterMode(display=False) as flops:
        call()
    return products.calls, float(flops.get_total_flops())


@torch.inference_mode()
def time_calls(calls: Iterable[tuple]) -> dict[tuple, float]:
    """Seconds of each call of `count_work` alone, in its best memory format."""
    return {call: min(map(_seconds, _variants(call))) for call in calls}


def floor_seconds(calls: Counter, seconds: Mapping[tuple, float]) -> float:
    """Seconds of all calls, one after the other."""
    return sum(number * seconds[call] for call, number in calls.items())


def _variants(call: tuple) -> list[Callable[[], Tensor]]:
    kind, shapes, other = call
    first, second = (torch.rand(shape) - 0.5 for shape in shapes)
    if kind == "product":
        return _products(first, second)
    has_bias, stride, padding, groups = other
    bias = torch.rand(len(second)) if has_bias else None
    operands = [
        tuple(each.contiguous(memory_format=layout) for each in (first, second))
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    return [
        lambda x=x, weight=weight: F.conv2d(x, weight, bias, stride, padding, groups=groups)
        for x, weight in operands
    ]


def _seconds(call: Callable[[], object]) -> float:
    """Of one call, repeated until the clock can tell; the first of all warms up."""
    call()
    number, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SHORTEST:
        call()
        number += 1
    return passed / number


def _products(first: Tensor, second: Tensor) -> list[Callable[[], Tensor]]:
    """A product by the library of matrix products and, of matrices, by that of convolutions.

    Which one is faster depends on the processor, by up to a factor of two.
    """
    ways: list[Callable[[], Tensor]] = [lambda: first @ second]
    if first.ndim == 2:
        weight = second.T.contiguous()
        ways.append(lambda: convolve_rows(first, weight, None))
    return ways


@torch.inference_mode()
def gemm_peak() -> float:
    """FLOP/s of square matrix products: the best size, by the better library."""
    best = 0.0
    for side in PEAK_SIZES:
        ways = _products(torch.rand(side, side), torch.rand(side, side))
        seconds = min(statistics.median(_seconds(way) for _ in range(3)) for way in ways)
        best = max(best, 2 * side**3 / seconds)
    return best
