"""Everything from an image to mask logits as one graph, for runtimes without PyTorch.

What `Proposer` does step by step on bands, with a sort on the host between, is here one module that
can be traced: pyramid, network at every scale, the best cells of all scales, their masks. It takes
an image as a whole; pasting masks into the image is left to whoever has its pixels.

Letters: (H, W) the image, N proposals, E embedding width, M side of a mask, (h, w) cells of a
scale, S scales.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datasets.resize import MEAN, STD
from models.deepmask import STRIDE
from models.sharpmask import DenseNetwork
from pipeline.inference.model_export.resizing import resize_with_border
from pipeline.inference.propose import Proposer


class Outputs(NamedTuple):
    """What the graph gives, best first.

    Attributes:
        scores: (N,) float32 in [0, 1].
        patches: (N, 4) float32 left, top, width and height of the patches in pixels of the image.
        mask_logits: (N, M, M) float32; the cells of a mask divide its patch evenly.
    """

    scores: Tensor
    patches: Tensor
    mask_logits: Tensor


class _Scale(NamedTuple):
    """One scale after the network; maps are flattened to rows of channels."""

    scores: Tensor  # (h w,)
    cells: Tensor  # (h w, 3) of scale, row, column
    embeddings: Tensor  # (h w, E)
    pixel: Tensor  # (1, 2) float64, width and height of a pixel of the scale in the image
    maps: list[Tensor]  # (h' w', c) for each refinement module
    sides: list[Tensor]  # (1, 2) of h', w'


class ProposalGraph(nn.Module):
    """An image (H, W, 3) uint8 RGB to `Outputs`, N at most `num_proposals`."""

    mean: Tensor
    std: Tensor

    def __init__(self, proposer: Proposer):
        """
        Args:
            proposer: on a CPU, in full precision; its network is copied.

        Raises:
            ValueError: it resizes as the released code does.
        """
        super().__init__()
        options = proposer.options
        if options.align_corners:
            raise ValueError("propose.align_corners, resizing as released, cannot be exported")
        dense = copy.deepcopy(DenseNetwork(proposer.deepmask, proposer.refinement))
        _round_pools_down(dense)
        self.dense, self.deepmask, self.refinement = dense, dense.deepmask, dense.refinement
        self.scales = [2.0**log2_scale for log2_scale in proposer.log2_scales]
        self.num_proposals = options.num_proposals
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The fields of `Outputs`, as a plain tuple: a file must not need our types."""
        scales = [self._run_scale(image, index) for index in range(len(self.scales))]
        ranked = torch.sort(torch.cat([scale.scores for scale in scales]), descending=True)
        # Not a slice, whose length a graph would take for a constant.
        best = torch.arange(torch.sym_min(self.num_proposals, ranked.values.shape[0]))
        chosen = ranked.indices[best]
        cells = torch.cat([scale.cells for scale in scales])[chosen]
        embeddings = torch.cat([scale.embeddings for scale in scales])[chosen]
        patches = self._place(cells, torch.cat([scale.pixel for scale in scales]))
        if self.refinement is None:
            masks = self.deepmask.decode_masks(embeddings)
        else:
            masks = self.refinement.refine(embeddings, self._windows(scales, cells))
        return ranked.values[best].sigmoid(), patches, masks

    def _run_scale(self, image: Tensor, index: int) -> _Scale:
        border = self.deepmask.patch_size // 2
        pixels, h, w = resize_with_border(image, self.scales[index], border)
        pixels = (pixels.permute(2, 0, 1) - self.mean) / self.std
        embeddings, scores, *maps = (each[0] for each in self.dense(pixels[None]))
        rows, columns = (torch.arange(side) for side in scores.shape)
        cells = [torch.full(scores.shape, index), rows[:, None], columns]
        height, width = image.shape[:2]
        return _Scale(
            scores.flatten(),
            torch.stack([each.expand(scores.shape).flatten() for each in cells], dim=1),
            embeddings.flatten(1).T,
            _row(width, height).double() / _row(w, h),
            [each.flatten(1).T for each in maps],
            [_row(*each.shape[1:]) for each in maps],
        )

    def _place(self, cells: Tensor, pixel: Tensor) -> Tensor:
        """Patches of cells (N, 3), as `place_patches` places them."""
        size, pixel = self.deepmask.patch_size, pixel[cells[:, 0]]
        corner = STRIDE * cells[:, [2, 1]] - size / 2
        return torch.cat([corner * pixel, size * pixel], dim=1).float()

    def _windows(self, scales: Sequence[_Scale], cells: Tensor) -> list[Tensor]:
        """The windows (N, c, s, s) of every module's maps, as `gather_windows` gathers them."""
        assert self.refinement is not None
        scale, row_column = cells[:, 0], cells[:, 1:]
        windows = []
        for i in range(len(self.refinement.refinements)):
            maps = torch.cat([each.maps[i] for each in scales])  # (positions of all scales, c)
            sides = torch.cat([each.sides[i] for each in scales])  # (S, 2)
            counts = sides[:, 0] * sides[:, 1]
            starts = (counts.cumsum(0) - counts)[scale]
            within = torch.arange(self.deepmask.cells << i)
            # Layers round sizes up: a window may reach beyond a finer map, whose edge continues.
            places = ((row_column << i)[:, :, None] + within).minimum(sides[scale][:, :, None] - 1)
            y, x = places.unbind(1)  # (N, s) each
            index = starts[:, None] + y * sides[scale, 1, None]
            windows.append(maps[index[:, :, None] + x[:, None]].permute(0, 3, 1, 2))
        return windows


def _round_pools_down(model: nn.Module) -> None:
    """Has pools that round sizes up, as in Caffe, round down after a row and column more; in place.

    Of a pool that rounds up, tracing asks whether its last window begins in the image, and gets no
    answer for a size it does not know.
    """
    for parent in list(model.modules()):
        for name, pool in list(parent.named_children()):
            if isinstance(pool, nn.MaxPool2d) and pool.ceil_mode:
                assert (pool.stride, pool.padding) == (2, 0)
                pool.ceil_mode = False
                beyond = nn.ConstantPad2d((0, 1, 0, 1), -math.inf)
                setattr(parent, name, nn.Sequential(beyond, pool))


def _row(*sides: int) -> Tensor:
    """(1, n) int64 of numbers that may be symbols."""
    return torch.cat([torch.full((1, 1), side) for side in sides], dim=1)
