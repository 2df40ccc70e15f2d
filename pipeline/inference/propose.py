"""Dense proposal inference: image to proposals (ECCV 2016, section 3; spec of the released code).

image -> pyramid -> trunk, tail and horizontal nets once per scale -> scores of all cells of all
scales ranked together -> masks of the best cells only -> RLE in the image.

Letters: (h, w) cells of a scale, E embedding width, M mask size, F cells of a patch, N proposals.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from datasets.resize import pad_and_normalize, resize_align_corners, resize_image
from models.deepmask import STRIDE, DeepMask
from models.sharpmask import DenseNetwork, SharpMask
from models.trunk import fold_norms
from pipeline.checkpoint import file_sha256
from pipeline.inference.mask_nms import suppress_duplicates
from pipeline.inference.paste import NOTHING, Pasted, Placement, paste
from pipeline.inference.proposals import Proposals
from pipeline.networks import load_network

MASK_CHUNK = 128  # masks decoded at once: bounds memory, whatever N is


@dataclass
class Level:
    """One scale of the pyramid after the network.

    Attributes:
        factors: (x, y) resize factors that masks are placed by: those that the rounding of the size
            really gave, or as resampling "corners" has it the scale's own.
        embeddings: (E, h, w). score_logits: (h, w).
        horizontal: of each refinement module (c, h', w') at its stride; empty without refinement.
    """

    factors: tuple[float, float]
    embeddings: Tensor
    score_logits: Tensor
    horizontal: list[Tensor]


class Proposer:
    """Proposes object masks for whole images with a trained DeepMask or SharpMask."""

    def __init__(
        self,
        model: DeepMask | SharpMask,
        *,
        device: torch.device,
        num_proposals: int = 1000,
        log2_scales: list[float] | None = None,
        mask_threshold: float = 0.2,
        nms: float | None = None,
        align_corners: bool = False,
        amp: bool = True,
    ):
        """
        Args:
            log2_scales: log2 of the pyramid's factors; None for -2.5 to .5 in steps of .5.
            mask_threshold: probability from which on a pixel belongs to a mask.
            nms: see `suppress_duplicates`; None keeps all.
            align_corners: how the image is resized to the scales, and masks to the image. False:
                pixels have an area, of which a smaller one's is the average, and masks lie where
                their cells are. True, as the released code: corner pixels lie on corner pixels,
                with no average, and masks lie on whole pixels.
            amp: bfloat16 autocast, on CUDA only; scores stay in full precision.

        Attributes:
            dense: the network on whole images (`DenseNetwork`), or another backend for it.
        """
        model = model.eval().to(device, memory_format=torch.channels_last)
        self.refinement = model if isinstance(model, SharpMask) else None
        self.deepmask = model.deepmask if isinstance(model, SharpMask) else model
        self.dense = DenseNetwork(self.deepmask, self.refinement).eval()
        self.device, self.num_proposals = device, num_proposals
        self._place = place_patches_on_pixels if align_corners else place_patches
        self.log2_scales = log2_range(-2.5, 0.5, 0.5) if log2_scales is None else log2_scales
        self.mask_threshold, self.nms, self.align_corners = mask_threshold, nms, align_corners
        self.amp = amp

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, *, image_id: int = 0, file_name: str = "") -> Proposals:
        """The best proposals of an image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            At most `num_proposals`, best first; masks without a pixel in the image are left out.
        """
        # The largest first: what it needs and frees then suffices for the others.
        levels = [self.run_level(image, log2_scale) for log2_scale in reversed(self.log2_scales)][
            ::-1
        ]
        scores, chosen = best_cells([level.score_logits for level in levels], self.num_proposals)
        height, width = image.shape[:2]
        masks = self._masks(levels, chosen, (height, width))
        scores = scores.cpu().numpy()[masks.numbers]
        proposals = Proposals(image_id, file_name, height, width, scores, masks.boxes, masks.counts)
        return proposals if self.nms is None else suppress_duplicates(proposals, self.nms)

    @torch.inference_mode()
    def run_level(self, image: np.ndarray, log2_scale: float) -> Level:
        """What depends on the image alone, at one scale."""
        pixels, factors = self.scale(image, log2_scale)
        with self._autocast():
            embeddings, scores, *horizontal = self.dense(pixels)
        return Level(factors, embeddings[0], scores[0], [each[0] for each in horizontal])

    def scale(self, image: np.ndarray, log2_scale: float) -> tuple[Tensor, tuple[float, float]]:
        """The network's input (1, 3, H, W) at one scale of the pyramid, and the level's factors."""
        if self.align_corners:
            scaled, factors = resize_align_corners(image, 2.0**log2_scale), (2.0**log2_scale,) * 2
        else:
            scaled = resize_image(image, 2.0**log2_scale)
            factors = (scaled.shape[1] / image.shape[1], scaled.shape[0] / image.shape[0])
        pixels = torch.from_numpy(scaled)
        if self.device.type == "cuda":  # copied while the scale before is still computed
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        return pad_and_normalize(pixels, self.deepmask.patch_size // 2), factors

    @torch.inference_mode()
    def decode(self, levels: list[Level], chosen: Tensor) -> Tensor:
        """Mask logits of chosen cells, refined if there is a refinement.

        Args:
            chosen: (n, 3) int64 level, row, column. Cells of all levels go through the network
                together: batches of one size cost less than many small ones.

        Returns:
            (n, M, M), or (n, P, P) when refined.
        """
        present = chosen[:, 0].unique().tolist()
        ranks = [torch.nonzero(chosen[:, 0] == number).flatten() for number in present]
        order = torch.cat(ranks).argsort()
        own = [(levels[n], chosen[rank, 1:]) for n, rank in zip(present, ranks, strict=True)]
        embeddings = join([level.embeddings[:, c[:, 0], c[:, 1]].T for level, c in own], order)
        if self.refinement is None:
            with self._autocast():
                return self.deepmask.decode_masks(embeddings)
        windows = []
        for i in range(len(self.refinement.refinements)):
            size, step = self.deepmask.cells << i, 1 << i
            parts = [
                gather_windows(level.horizontal[i], c, size=size, step=step) for level, c in own
            ]
            windows.append(join(parts, order))
        with self._autocast():
            return self.refinement.refine(embeddings, windows)

    def _autocast(self) -> torch.autocast:
        on = self.amp and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def _masks(self, levels: list[Level], chosen: Tensor, image_size: tuple[int, int]) -> Pasted:
        """Pasted masks of the chosen cells; numbers are those of `chosen`.

        Args:
            chosen: (N, 3) of level, row, column.
        """
        factors = np.array([level.factors for level in levels])
        order = torch.sort(chosen[:, 0], stable=True).indices  # windows of one level are one copy
        chosen, order = chosen[order], order.cpu().numpy()
        parts = [NOTHING]
        for first in range(0, len(chosen), MASK_CHUNK):
            part = chosen[first : first + MASK_CHUNK]
            number, *cells = part.cpu().numpy().T
            places = self._place(np.stack(cells, axis=1), factors[number], self.deepmask.patch_size)
            pasted = paste(
                self.decode(levels, part).float(),
                places,
                image_size=image_size,
                threshold=self.mask_threshold,
            )
            parts.append(replace(pasted, numbers=order[first + pasted.numbers]))
        numbers = np.concatenate([part.numbers for part in parts])
        counts = [counts for part in parts for counts in part.counts]
        order = numbers.argsort()
        boxes = np.concatenate([part.boxes for part in parts])
        return Pasted(numbers[order], boxes[order], [counts[n] for n in order])


def join(parts: list[Tensor], order: Tensor) -> Tensor:
    """Rows of several tensors in an order of their own, copied only as often as needed."""
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined if bool((order[1:] > order[:-1]).all()) else joined[order]


def gather_windows(features: Tensor, cells: Tensor, *, size: int, step: int) -> Tensor:
    """The windows of cells in a map of their own or a finer stride.

    Args:
        features: (c, h, w).
        cells: (n, 2) int64 rows and columns at stride 16.
        size: side of a window. step: positions of the map in a cell.

    Returns:
        (n, c, size, size), channels last; the window of cell (i, j) begins at (i step, j step).
    """
    # Layers round sizes up, so 16 ceil(s / 16) may exceed the finer maps by part of a cell.
    short = [
        max(0, int(last) * step + size - side)
        for last, side in zip(cells.amax(0), features.shape[1:], strict=True)
    ]
    if any(short):
        features = nnf.pad(features[None], (0, short[1], 0, short[0]), mode="replicate")[0]
    windows = features.permute(1, 2, 0).unfold(0, size, step).unfold(1, size, step)  # a view
    windows = windows.permute(0, 1, 3, 4, 2)  # (rows, columns, size, size, c)
    return windows[cells[:, 0], cells[:, 1]].permute(0, 3, 1, 2)


def log2_range(low: float, high: float, step: float) -> list[float]:
    """low, low + step, ... up to high.

    Raises:
        ValueError: a range that is empty or endless.
    """
    if not (math.isfinite(low) and math.isfinite(high) and 0 < step < math.inf and low <= high):
        raise ValueError(
            "scales must be MIN MAX STEP with MIN <= MAX and STEP > 0, "
            f"got {low:g} {high:g} {step:g}"
        )
    return [low + n * step for n in range(math.floor((high - low) / step + 1e-6) + 1)]


def best_cells(score_logits: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The highest-scoring cells of all scales together.

    Args:
        score_logits: for each scale (h, w).

    Returns:
        Probabilities (N,), descending, and (N, 3) int64 of scale, row, column; equal scores stay in
        order.
    """
    flat = torch.cat([scores.flatten() for scores in score_logits]).float()
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    sizes = torch.tensor([scores.numel() for scores in score_logits], device=flat.device)
    widths = torch.tensor([scores.shape[1] for scores in score_logits], device=flat.device)
    ends = sizes.cumsum(0)
    scale = torch.searchsorted(ends, order, right=True)
    within = order - (ends - sizes)[scale]
    cells = torch.stack([scale, within // widths[scale], within % widths[scale]], dim=1)
    return flat[order].sigmoid(), cells


def place_patches(cells: np.ndarray, factors: np.ndarray, patch_size: int) -> Placement:
    """Where the patches of cells lie in the original image.

    The center of each is (16 column, 16 row) of the scaled image.

    Args:
        cells: (n, 2) int64 rows and columns. factors: (n, 2) x and y of each one's scale.
    """
    corner = (STRIDE * cells[:, ::-1] - patch_size / 2) / factors
    size = patch_size / factors
    return Placement(corner[:, 0], corner[:, 1], size[:, 0], size[:, 1])


def place_patches_on_pixels(cells: np.ndarray, factors: np.ndarray, patch_size: int) -> Placement:
    """As `place_patches`, on whole pixels as the released code places masks (see `Placement`)."""
    place = place_patches(cells, factors, patch_size)
    return Placement(
        *map(np.floor, (place.left, place.top, place.width, place.height)), corners=True
    )


def load_proposer(
    checkpoint: str | Path,
    device: torch.device,
    *,
    num_proposals: int | None = None,
    log2_scales: tuple[float, float, float] | None = None,
    zoom: bool = False,
    refine: bool = True,
    nms: float | None = None,
) -> tuple[Proposer, dict]:
    """A proposer, and the settings that its proposals depend on.

    Args:
        num_proposals, log2_scales, nms: None for the values of the checkpoint's config.
        zoom: adds the scale 2^1.
        refine: False gives the coarse masks of the DeepMask that a SharpMask is built on.
    """
    model, config, _ = load_network(checkpoint, stage=("deepmask", "sharpmask"))
    count = config.propose.num_proposals if num_proposals is None else num_proposals
    if count < 1:
        raise ValueError(f"--num-proposals must be at least 1, got {count}")
    low_high_step = config.propose.log2_scales if log2_scales is None else log2_scales
    pyramid = sorted({*log2_range(*low_high_step), *([1.0] if zoom else [])})
    nms = config.propose.nms if nms is None else nms
    if nms is not None and not 0 < nms <= 1:
        raise ValueError(f"--nms must be above 0 and at most 1, got {nms:g}")
    if isinstance(model, SharpMask) and not refine:
        model = model.deepmask
    options = {
        "num_proposals": count,
        "log2_scales": pyramid,
        "mask_threshold": config.propose.mask_threshold,
        "nms": nms,
        "align_corners": config.propose.align_corners,
    }
    refined = isinstance(model, SharpMask)
    settings = {"checkpoint_sha256": file_sha256(checkpoint), "refine": refined, **options}
    fold_norms(model)
    return Proposer(model, device=device, amp=config.propose.amp, **options), settings
