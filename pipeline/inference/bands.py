"""A network over bands of rows of an image: memory is set by the band, not by the image.

Tiles would have to overlap by the receptive field and compute the overlap twice: half as much again
for ResNet-50 and tiles of 1024 pixels. Bands of full width need no overlap. Every layer keeps the
last rows of its input, those that its next output rows depend on, and goes on from there when the
next band comes. So every row of every layer is computed once, from the same numbers as in the image
as a whole, borders included.

Maps have shape (1, C, rows, width), or (1, rows, width).
"""

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from models.trunk import SymmetricConv2d

ROWS = -2  # the dimension
WINDOWS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
# What looks at one position only.
POINTWISE = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, nn.LocalResponseNorm, FrozenBatchNorm2d)
FUNCTIONS = (torch.cat, F.relu, operator.getitem)
METHODS = ("float",)


class BandedNetwork:
    """A network of convolutions, pools, and functions of single positions, for inference.

    Attributes:
        peak_bytes: of all maps that were alive at once during the last band.
    """

    def __init__(self, network: nn.Module):
        """
        Raises:
            ValueError: a layer that is not known here.
        """
        self.nodes = list(_Tracer().trace(network).nodes)
        self.layers = {node: _layer(network, node) for node in self.nodes if "call" in node.op}
        self.last_use = {source: node for node in self.nodes for source in node.all_input_nodes}
        self.peak_bytes = 0
        self.present: Iterable | None = None  # the bands of the image that it is in

    def __call__(self, bands: Iterable[tuple[Tensor, bool]]) -> Iterator[list[Tensor | None]]:
        """The new rows of every output of the network after each band; None where there are none.

        Bands are (1, 3, rows, width), from the top, each with whether it is the last one. Layers
        keep rows from band to band, so those of one image must come before those of another.
        """
        self.present = bands
        for layer in self.layers.values():
            layer.reset()
        for band, is_last in bands:
            if self.present is not bands:
                raise RuntimeError("another image has begun within the bands of this one")
            yield self._advance(band, is_last)

    def _advance(self, band: Tensor, is_last: bool) -> list[Tensor | None]:
        values: dict[fx.Node, Tensor | None] = {}
        self.peak_bytes = 0
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = band
            elif node.op == "output":
                break
            else:
                values[node] = self.layers[node].advance(values, is_last)
            alive = sum(rows.nbytes for rows in values.values() if rows is not None)
            if node in self.layers:
                alive += self.layers[node].copied
            self.peak_bytes = max(self.peak_bytes, alive)
            for source in node.all_input_nodes:
                if self.last_use[source] is node:
                    del values[source]
        kept = [rows for layer in self.layers.values() for rows in layer.kept.values()]
        self.peak_bytes += sum(rows.nbytes for rows in kept)
        outputs: Any = node.args[0]
        return [values[output] for output in outputs]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, WINDOWS + POINTWISE)


def _layer(network: nn.Module, node: fx.Node) -> "_Layer":
    target: Any = node.target
    if node.op == "call_module":
        module = network.get_submodule(target)
        if isinstance(module, WINDOWS):
            return _Windows(node, module)
        if isinstance(module, POINTWISE):
            return _Pointwise(node, module)
    elif node.op == "call_method" and target in METHODS:
        return _Pointwise(node, getattr(Tensor, target))
    elif node.op == "call_function" and target in (operator.add, operator.iadd):
        return _Sum(node, target)
    elif node.op == "call_function" and target in FUNCTIONS:
        return _Pointwise(node, target)
    raise ValueError(f"a network with {node.format_node()} cannot be run in bands")


class _Layer:
    """A layer of the graph, with the rows of its inputs that it still needs."""

    copied = 0  # bytes of the rows that it ran on, if they were copies

    def __init__(self, node: fx.Node, function: Any):
        self.node, self.function = node, function
        self.reset()

    def reset(self) -> None:
        """Before the first band of an image."""
        self.kept: dict[fx.Node, Tensor] = {}

    def advance(self, values: dict[fx.Node, Tensor | None], is_last: bool) -> Tensor | None:
        """The new rows of its output, given those of its inputs."""
        raise NotImplementedError


class _Pointwise(_Layer):
    """A function of single positions: advances by as many rows as all of its inputs have."""

    def advance(self, values: dict[fx.Node, Tensor | None], is_last: bool) -> Tensor | None:
        parts = {
            source: [part for part in (self.kept.get(source), values[source]) if part is not None]
            for source in self.node.all_input_nodes
        }
        count = min(sum(part.shape[ROWS] for part in each) for each in parts.values())
        # Copies: views would keep the memory of all rows.
        self.kept = {
            source: _join(_cut(each, count, None)).clone()
            for source, each in parts.items()
            if sum(part.shape[ROWS] for part in each) > count
        }
        first = {source: _cut(each, 0, count) for source, each in parts.items()}
        return self._apply(first) if count else None

    def _apply(self, parts: dict[fx.Node, list[Tensor]]) -> Tensor:
        rows = {source: _join(each) for source, each in parts.items()}
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), rows.__getitem__)
        return self.function(*args, **kwargs)


class _Sum(_Pointwise):
    """The sum of two maps, of which one usually comes some rows later: added without joining."""

    def _apply(self, parts: dict[fx.Node, list[Tensor]]) -> Tensor:
        a, b = (parts[source] for source in self.node.all_input_nodes)
        in_place = self.function is operator.iadd and len(a) == 1
        total = a[0] if in_place else torch.cat(a, ROWS)
        start = 0
        for part in b:
            total.narrow(ROWS, start, part.shape[ROWS]).add_(part)
            start += part.shape[ROWS]
        return total


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, ROWS)


def _cut(parts: list[Tensor], start: int, stop: int | None) -> list[Tensor]:
    """The rows from start to stop (None: the end) of parts that follow on each other."""
    found = []
    for part in parts:
        length = part.shape[ROWS]
        first, end = max(0, start), length if stop is None else min(length, stop)
        if first < end:
            found.append(part.narrow(ROWS, first, end - first))
        start, stop = start - length, None if stop is None else stop - length
    return found


class _Windows(_Layer):
    """A convolution or pool: advances by the rows of which it has the whole window.

    The rows above and below the image are added here, the columns beside it in each call.
    """

    def __init__(self, node: fx.Node, layer: Any):
        super().__init__(node, layer)
        (self.source,) = node.all_input_nodes
        geometry = layer.kernel_size, layer.stride, layer.padding, getattr(layer, "dilation", 1)
        size, self.stride, padding, dilation = (_first(value) for value in geometry)
        self.padding, self.span = padding, (size - 1) * dilation + 1
        self.is_ceil = getattr(layer, "ceil_mode", False)
        self.mirrors = isinstance(layer, SymmetricConv2d)
        if isinstance(layer, nn.Conv2d) and layer.padding_mode == "replicate" and padding == 1:
            self.mirrors = True  # the mirror of one pixel is that pixel
        elif isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise ValueError(f"a {layer} cannot be run in bands")
        if isinstance(layer, nn.AvgPool2d) and (padding or self.is_ceil):
            raise ValueError(f"a {layer} that sees beyond the image cannot be run in bands")

    def reset(self) -> None:
        super().reset()
        self.has_begun = False
        self.skip = 0  # rows that come and lie between two windows, of a stride above the span

    def advance(self, values: dict[fx.Node, Tensor | None], is_last: bool) -> Tensor | None:
        rows, kept = values[self.source], self.kept.get(self.source)
        if rows is None and (kept is None or not is_last):
            return None
        if not self.has_begun:  # not before there are the rows that are mirrored
            rows, kept = _join([part for part in (kept, rows) if part is not None]), None
            self.has_begun = is_last or rows.shape[ROWS] >= self.padding
            if not self.has_begun:
                self.kept = {self.source: rows}
                return None
        canvas = self._canvas(kept, rows, is_last)
        if self.skip:
            dropped = min(self.skip, canvas.shape[ROWS])
            canvas, self.skip = canvas[..., dropped:, :], self.skip - dropped
        length, self.copied = canvas.shape[ROWS], 0 if canvas is rows else canvas.nbytes
        count = max(0, (length - self.span) // self.stride + 1)
        if self.is_ceil and is_last:  # one more window may begin in the image and end beyond it
            begun = 1 - (self.span - length) // self.stride
            if begun > count and count * self.stride < length - self.padding:
                missing = count * self.stride + self.span - length
                canvas, count = F.pad(canvas, (0, 0, 0, missing), value=-torch.inf), count + 1
        end = count * self.stride
        self.kept = {self.source: canvas[..., end:, :].clone()}
        self.skip += max(0, end - length)
        return self._run(canvas[..., : end - self.stride + self.span, :]) if count else None

    def _canvas(self, kept: Tensor | None, rows: Tensor | None, is_last: bool) -> Tensor:
        """The rows kept and the new ones, with what lies beyond the image: one copy of all."""
        above = 0 if kept is not None else self.padding
        below, side = self.padding if is_last else 0, self.padding if self.mirrors else 0
        before = above if kept is None else kept.shape[ROWS]
        if rows is not None and not (before or below or side):
            return rows
        some: Any = kept if rows is None else rows
        count, width = (0, some.shape[-1]) if rows is None else (rows.shape[ROWS], rows.shape[-1])
        shape = (1, some.shape[1], before + count + below, width + (2 * side if count else 0))
        canvas = torch.empty(
            shape, dtype=some.dtype, device=some.device, memory_format=torch.channels_last
        )
        if kept is not None:
            canvas[..., :before, :] = kept
        if rows is not None:
            middle = canvas[..., before : before + count, :]
            middle[..., side : side + width] = rows
            if side:
                middle[..., :side] = rows[..., :side].flip(-1)
                middle[..., -side:] = rows[..., -side:].flip(-1)
        if above:
            self._fill(canvas[..., :above, :], canvas[..., above : 2 * above, :])
        if below:
            self._fill(canvas[..., -below:, :], canvas[..., -2 * below : -below, :])
        return canvas

    def _fill(self, beyond: Tensor, edge: Tensor) -> None:
        """Rows above or below the image, given as many at its edge."""
        if self.mirrors:
            beyond.copy_(edge.flip(ROWS))
        else:
            beyond.fill_(-torch.inf if isinstance(self.function, nn.MaxPool2d) else 0.0)

    def _run(self, rows: Tensor) -> Tensor:
        layer, columns = self.function, (0, 0 if self.mirrors else self.padding)
        if isinstance(layer, nn.AvgPool2d):
            return F.avg_pool2d(rows, layer.kernel_size, layer.stride)
        if isinstance(layer, nn.MaxPool2d):
            return F.max_pool2d(
                rows, layer.kernel_size, layer.stride, columns, layer.dilation, self.is_ceil
            )
        return F.conv2d(
            rows, layer.weight, layer.bias, layer.stride, columns, layer.dilation, layer.groups
        )


def _first(value: int | tuple[int, ...]) -> int:
    """Of rows and columns: the rows."""
    return value[0] if isinstance(value, tuple) else value
