"""Dense proposal inference, from an image to proposals (ECCV 2016, section 3; released code).

image -> pyramid -> trunk, tail and horizontal nets once per scale, by bands of rows where the image
is large -> cells of all scales ranked together -> masks of the best cells only -> RLE in the image
-> mask NMS, if asked for.

Letters: (h, w) cells of a scale, E embedding width, M mask size, P patch size, N proposals.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from datasets.images import Image
from datasets.large_images import WindowedImage
from datasets.object_sizes import (
    PUBLISHED_LOG2_SCALES,
    LogScales,
    ObjectSides,
    choose_log2_scales,
    describe_scales,
    explain_scales,
)
from datasets.patch_sampler import canonical_side
from datasets.resize import pad_and_normalize, resize_align_corners, resize_image
from datasets.scaled_rows import ArrayRows, ScaledRows, scale_rows
from models.deepmask import STRIDE, DeepMask
from models.inference import optimize_for_inference
from models.sharpmask import DenseNetwork, SharpMask
from pipeline import distributed
from pipeline.checkpoint import file_sha256
from pipeline.config import DetectConfig, MaskNetworkConfig, ProposeConfig
from pipeline.inference.bands import BandedNetwork
from pipeline.inference.cells import (
    FoundMasks,
    PyramidScale,
    best_cells,
    gather_windows,
    join_cells,
    place_patches,
)
from pipeline.inference.memory import memory_limit, return_freed_blocks
from pipeline.inference.nms import mask_nms, soft_mask_nms
from pipeline.inference.paste import Pasted, paste
from pipeline.inference.proposals import Proposals
from pipeline.networks import load_network
from pipeline.precision import SIDE, choose_precision, to_bfloat16
from pipeline.recipe import AUTO

Section = TypeVar("Section", ProposeConfig, DetectConfig)
MASK_CHUNK = 128  # masks decoded at once: bounds memory, whatever N is
WHOLE = 2  # bands: a scale of so many pixels runs as a whole, which is some per cent faster
LARGE = 2**24  # bytes of an enlarged image, which is then made row by row
KEPT = 0.35  # of the memory for maps: of those that masks are decoded from, before they are


class Proposer:
    """Proposes object masks for whole images with a trained DeepMask or SharpMask."""

    def __init__(
        self,
        model: DeepMask | SharpMask,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        zoom: bool = False,
        **options: Any,
    ):
        """
        Args:
            dtype: the network computes in it; with bfloat16 its layers are converted here. Scores,
                and masks from their logits on, are in full precision.
            zoom: add the scale 2^1.
            options: fields of `ProposeConfig`. With `align_corners`, as in the released code,
                corner pixels of a scaled image lie on corner pixels, nothing is averaged, and masks
                lie on whole pixels. Without, pixels have an area, smaller images average it, and
                masks lie where their cells are.

        Attributes:
            log2_scales: of the pyramid, ascending.
            dense: the network on whole images (`DenseNetwork`), or another backend for it.
            memory: bytes for maps of the network.
        """
        model = model.eval().to(device).to(memory_format=torch.channels_last)
        if dtype == torch.bfloat16:
            to_bfloat16(model)
        self.deepmask, self.refinement = _parts(model)
        self.dense: Callable[[Tensor], tuple[Tensor, ...]]
        self.dense = DenseNetwork(self.deepmask, self.refinement).eval()
        self.device, self.dtype, self.options = device, dtype, ProposeConfig(**options)
        self.memory = memory_limit(device, self.options.memory)
        scales = log2_range(*(self.options.log2_scales or PUBLISHED_LOG2_SCALES))
        self.log2_scales = sorted({*scales, 1.0} if zoom else scales)

    @torch.inference_mode()
    def __call__(self, image: Image, *, image_id: int = 0, file_name: str = "") -> Proposals:
        """At most `num_proposals` of an image (H, W, 3) uint8 RGB, best first.

        Masks without a pixel in the image are left out.
        """
        size = (image.shape[0], image.shape[1])
        limit = self.options.limit(*size)
        confident = torch.zeros((), dtype=torch.int64, device=self.device)
        best, bands = FoundMasks.none(), list[PyramidScale]()
        # Run the network at every scale; the largest first, so that its freed memory serves all.
        for index in reversed(range(len(self.log2_scales))):
            for band in self.run_bands(image, self.log2_scales[index]):
                band.index = index
                bands.append(band)
                confident += (band.score_logits > 0).sum()
                if sum(each.nbytes for each in bands) > self.memory * KEPT:
                    best, bands = self._find_best(best, bands, limit, size), []
        # Rank the cells of all scales together; the best give masks.
        best = self._find_best(best, bands, limit, size)
        num_cut_off = max(0, int(confident) - limit)
        return self._finish(best, (image_id, file_name, *size), num_cut_off)

    @torch.inference_mode()
    def rank(self, bands: list[PyramidScale], image_size: tuple[int, int], limit: int) -> Proposals:
        """As the proposer itself, from the bands of all scales of an image (height, width)."""
        best = self._find_best(FoundMasks.none(), bands, limit, image_size)
        confident = sum(int((band.score_logits > 0).sum()) for band in bands)
        return self._finish(best, (0, "", *image_size), max(0, confident - limit))

    def _finish(
        self, best: FoundMasks, image: tuple[int, str, int, int], num_cut_off: int
    ) -> Proposals:
        """The masks that lie in the image, given its id, name, height and width."""
        inside = np.array([bool(rle) for rle in best.rles], bool)
        proposals = Proposals(
            *image,
            logits=best.logits[inside],
            boxes=best.boxes[inside],
            rles=[rle for rle in best.rles if rle],
            num_cut_off=num_cut_off,
        )
        # Near duplicates are dropped, or come later, on request.
        if self.options.nms is None:
            return proposals
        suppress = soft_mask_nms if self.options.soft_nms else mask_nms
        return suppress(proposals, self.options.nms)

    def _find_best(
        self, best: FoundMasks, bands: list[PyramidScale], limit: int, image_size: tuple[int, int]
    ) -> FoundMasks:
        """The best of those that were found before and of the cells of some more bands."""
        if not bands:
            return best
        bands = sorted(bands, key=lambda band: (band.index, band.first_row))  # decides between ties
        logits, cells = best_cells([band.score_logits for band in bands], limit)
        starts = np.array([(band.index, band.first_row, 0) for band in bands])
        band, *row_column = cells.cpu().numpy().T
        places = starts[band] + np.stack([np.zeros_like(band), *row_column], axis=1)
        every = FoundMasks.join(best, FoundMasks.waiting(logits.cpu().numpy(), places))
        order = every.order()[:limit]
        # Decode the new masks and paste them into the image, as RLE.
        new = np.flatnonzero(np.isin(np.arange(len(best.logits), len(every.logits)), order))
        if not len(new):
            return every.take(order)
        masks = self.paste_cells(bands, cells[torch.from_numpy(new).to(cells.device)], image_size)
        rows = len(best.logits) + new[masks.indices]
        every.boxes[rows] = masks.boxes
        for row, rle in zip(rows.tolist(), masks.rles, strict=True):
            every.rles[row] = rle
        return every.take(order)

    @torch.inference_mode()
    def run_scale(self, image: Image, log2_scale: float) -> PyramidScale:
        """Runs the part of the network that sees the image alone, at one scale."""
        pixels, scale_xy = self.scale(image, log2_scale)
        return PyramidScale.of(self.dense(pixels), scale_xy)

    @torch.inference_mode()
    def run_bands(self, image: Image, log2_scale: float) -> Iterator[PyramidScale]:
        """The same, in bands of rows if the scale as a whole would take too much memory."""
        scaled, scale_xy = self._resize(image, log2_scale)
        height, width = (side + self.deepmask.patch_size for side in scaled.shape[:2])
        if height * width <= WHOLE * self.band_pixels:
            yield PyramidScale.of(self.dense(self._to_input(scaled, 0, height)), scale_xy)
            return
        rows = max(1, self.band_pixels // (width * STRIDE)) * STRIDE
        starts = range(0, height, rows)
        bands = (
            (self._to_input(scaled, start, min(start + rows, height)), start == starts[-1])
            for start in starts
        )
        for first_row, maps in join_cells(self.banded(bands), self.deepmask.cells):
            yield PyramidScale.of(maps, scale_xy, first_row=first_row)
        return_freed_blocks()  # the next scale has other sizes

    @cached_property
    def banded(self) -> BandedNetwork:
        """The network by bands of rows."""
        assert isinstance(self.dense, DenseNetwork)
        return BandedNetwork(self.dense)

    @property
    def band_pixels(self) -> int:
        """How many pixels of its input the network can see at once, by the limit of memory."""
        # Another backend takes whole images.
        return self._band_pixels if isinstance(self.dense, DenseNetwork) else sys.maxsize

    @cached_property
    def _band_pixels(self) -> int:
        side = self.deepmask.patch_size + 4 * STRIDE
        blank = torch.zeros(side, side, 3, dtype=torch.uint8, device=self.device)
        pixels = pad_and_normalize(blank, 0).to(self.dtype)
        for _ in self.banded([(pixels, True)]):
            pass
        return int(self.memory * (1 - KEPT) * side**2 / self.banded.peak_bytes)

    def scale(self, image: Image, log2_scale: float) -> tuple[Tensor, tuple[float, float]]:
        """The network's input (1, 3, H, W) at one scale, and the scales in x and y."""
        scaled, scale_xy = self._resize(image, log2_scale)
        return self._to_input(scaled, 0, scaled.shape[0] + self.deepmask.patch_size), scale_xy

    def _resize(
        self, image: Image, log2_scale: float
    ) -> tuple[np.ndarray | ScaledRows, tuple[float, float]]:
        """The image at one scale (h, w, 3), and the scales in x and y."""
        scale, corners = 2.0**log2_scale, self.options.align_corners
        scaled: np.ndarray | ScaledRows
        if isinstance(image, WindowedImage):
            scaled = image.scaled(scale, align_corners=corners)
        elif scale > 1 and not corners and image.size * scale**2 > LARGE:
            scaled = scale_rows(ArrayRows(image), scale)  # the same, but not all at once
        else:
            scaled = (resize_align_corners if corners else resize_image)(image, scale)
        if corners:
            return scaled, (scale, scale)
        return scaled, (scaled.shape[1] / image.shape[1], scaled.shape[0] / image.shape[0])

    def _to_input(self, scaled: np.ndarray | ScaledRows, start: int, stop: int) -> Tensor:
        """Rows of the network's input, counted from the top of the gray border."""
        border = self.deepmask.patch_size // 2
        first, end = max(0, start - border), max(0, min(scaled.shape[0], stop - border))
        pixels = torch.from_numpy(scaled[first:end])
        if self.device.type == "cuda":  # copied while the scale before is still computed
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        above = min(max(0, border - start), stop - start)
        below = stop - start - above - len(pixels)
        return pad_and_normalize(pixels, border, above, below).to(self.dtype)

    @torch.inference_mode()
    def decode(self, pyramid: Sequence[PyramidScale], cells: Tensor) -> Tensor:
        """Mask logits (n, M, M) of cells; when refined, M is `SharpMask.refine`'s S.

        Args:
            cells: (n, 3) int64 of map, row, column. All go through the network together, since one
                large batch costs less than many small ones. Those of one map in a row are gathered
                together.
        """
        indices, counts = cells[:, 0].unique_consecutive(return_counts=True)
        bands = [pyramid[i] for i in indices.tolist()]
        groups = list(zip(bands, cells[:, 1:].split(counts.tolist()), strict=True))
        embeddings = _concatenate([band.embeddings[:, c[:, 0], c[:, 1]].T for band, c in groups])
        if self.refinement is None:
            return self.deepmask.decode_masks(embeddings)
        size = self.deepmask.cells
        windows = [
            _concatenate([gather_windows(b.horizontal[i], c, size << i, 1 << i) for b, c in groups])
            for i in range(len(self.refinement.refinements))
        ]
        return self.refinement.refine(embeddings, windows)

    @torch.inference_mode()
    def paste_cells(
        self, pyramid: Sequence[PyramidScale], cells: Tensor, image_size: tuple[int, int]
    ) -> Pasted:
        """Pasted masks of cells (N, 3) of map, row, column; indices are rows of `cells`."""
        index, *row_column = cells.cpu().numpy().T
        first_rows = np.array([band.first_row for band in pyramid])[index]
        places = place_patches(
            np.stack([row_column[0] + first_rows, row_column[1]], axis=1),
            np.array([band.scale_xy for band in pyramid])[index],
            self.deepmask.patch_size,
            align_corners=self.options.align_corners,
        )
        order = torch.sort(cells[:, 0], stable=True).indices  # to gather a map's windows together
        found, boxes, rles = [], [], []
        for indices in order.split(MASK_CHUNK):
            rows = indices.cpu().numpy()
            part = paste(
                self.decode(pyramid, cells[indices]).float(),
                places[rows],
                image_size=image_size,
                threshold=self.options.mask_threshold,
                align_corners=self.options.align_corners,
            )
            found.append(rows[part.indices])
            boxes.append(part.boxes)
            rles += part.rles
        # Back to the order of the cells.
        rows, back = np.concatenate(found), np.concatenate(found).argsort()
        return Pasted(rows[back], np.concatenate(boxes)[back], [rles[i] for i in back])


def _parts(model: DeepMask | SharpMask) -> tuple[DeepMask, SharpMask | None]:
    """A network's DeepMask and its refinement, if it has one."""
    return (model.deepmask, model) if isinstance(model, SharpMask) else (model, None)


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # one part is not copied


def log2_range(low: float, high: float, step: float) -> list[float]:
    """low, low + step, ... up to high."""
    return [low + i * step for i in range(math.floor((high - low) / step + 1e-6) + 1)]


def override(section: Section, **values: Any) -> Section:
    """A section of a config with the values of the command line that are not None.

    A ValueError names the option.
    """
    try:
        return replace(section, **{k: v for k, v in values.items() if v is not None})
    except ValueError as error:  # it starts with the name
        name, problem = str(error).removeprefix("log2_").split(" ", 1)
        raise ValueError(f"--{name.replace('_', '-')} {problem}") from None


def auto_scales(metadata: dict, patch_size: int, *, source: str) -> tuple[LogScales, str]:
    """The scales for the objects that a checkpoint was trained on, and why they are these."""
    if "object_sides" not in metadata:
        reason = "published, as the checkpoint does not say how large its objects are"
        return PUBLISHED_LOG2_SCALES, reason
    sides = ObjectSides.from_plain(metadata["object_sides"], source=source)
    canonical = canonical_side(patch_size)
    return choose_log2_scales(sides, canonical), explain_scales(sides, canonical)


def load_proposer(
    checkpoint: str | Path,
    device: torch.device,
    *,
    num_proposals: int | None = None,
    per_megapixel: float | None = None,
    log2_scales: LogScales | str | None = None,
    zoom: bool = False,
    refine: bool = True,
    nms: float | None = None,
    soft_nms: bool | None = None,
    memory: float | None = None,
    precision: str | None = None,
) -> tuple[Proposer, dict]:
    """A proposer, and the settings that its proposals depend on.

    Values that are None are those of the checkpoint's config; `log2_scales` "auto" are those for
    the objects that the network was trained on, whatever its config says. `zoom` adds the scale
    2^1; without `refine`, a SharpMask gives the coarse masks of its DeepMask. `nms` alone drops
    near duplicates. `precision` is as in `choose_precision`. Says which scales were chosen and why.

    Raises:
        FileNotFoundError or ValueError: no file, another kind of file, or a value out of range.
    """
    model, config, metadata = load_network(
        checkpoint, stage=("deepmask", "sharpmask"), schema=MaskNetworkConfig
    )
    assert isinstance(model, DeepMask | SharpMask)
    asked = None if isinstance(log2_scales, str) else log2_scales
    changes = {
        "num_proposals": num_proposals,
        "per_megapixel": per_megapixel,
        "log2_scales": asked,
        "nms": nms,
        "soft_nms": False if soft_nms is None and nms is not None else soft_nms,
        "memory": memory,
    }
    options = asdict(override(config.propose, **changes))
    if options["log2_scales"] is None or log2_scales == AUTO:
        scales, why = auto_scales(metadata, config.deepmask.patch_size, source=str(checkpoint))
        options["log2_scales"] = scales
    else:
        why = "the checkpoint's config" if asked is None else "as asked for"
    distributed.say(f"proposals at {describe_scales(options['log2_scales'])}: {why}")
    if isinstance(model, SharpMask) and not refine:
        model = model.deepmask
    optimize_for_inference(model)
    dense = DenseNetwork(*_parts(model)).eval()
    side = max(SIDE, 2 * dense.deepmask.patch_size)
    dtype = choose_precision(precision, dense, device, amp=options["amp"], side=side)
    proposer = Proposer(model, device=device, dtype=dtype, zoom=zoom, **options)
    settings = {
        "checkpoint_sha256": file_sha256(checkpoint),
        "refine": isinstance(model, SharpMask),
    }
    settings |= options | {"log2_scales": proposer.log2_scales}
    for name in ("amp", "memory"):  # a store may be continued on another device
        del settings[name]
    return proposer, settings
