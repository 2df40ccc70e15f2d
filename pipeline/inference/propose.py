"""Dense proposal inference, from an image to proposals (ECCV 2016, section 3; released code).

image -> pyramid -> trunk, tail and horizontal nets once per scale -> cells of all scales ranked
together -> masks of the best cells only -> RLE in the image -> mask NMS, if asked for.

Letters: (h, w) cells of a scale, E embedding width, M mask size, P patch size, N proposals.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pycocotools.mask as coco_mask
import torch
import torch.nn.functional as F
from torch import Tensor

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
from models.deepmask import STRIDE, DeepMask
from models.sharpmask import DenseNetwork, SharpMask
from models.trunk import fold_norms
from pipeline import distributed
from pipeline.checkpoint import file_sha256
from pipeline.config import DetectConfig, MaskNetworkConfig, ProposeConfig
from pipeline.inference.paste import Pasted, paste
from pipeline.inference.proposals import Proposals
from pipeline.networks import load_network
from pipeline.precision import choose_precision, to_bfloat16
from pipeline.recipe import AUTO

Section = TypeVar("Section", ProposeConfig, DetectConfig)
MASK_CHUNK = 128  # masks decoded at once: bounds memory, whatever N is


@dataclass
class PyramidScale:
    """One scale of the pyramid after the network.

    Masks are placed by the scales in x and y that rounding the size to pixels really gave; with
    `align_corners`, by the exact scale.
    """

    scale_xy: tuple[float, float]
    embeddings: Tensor  # (E, h, w)
    score_logits: Tensor  # (h, w)
    horizontal: list[Tensor]  # (c, h', w') for each refinement module, at its stride


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
        """
        model = model.eval().to(device).to(memory_format=torch.channels_last)
        if dtype == torch.bfloat16:
            to_bfloat16(model)
        self.refinement = model if isinstance(model, SharpMask) else None
        self.deepmask = model.deepmask if isinstance(model, SharpMask) else model
        self.dense: Callable[[Tensor], tuple[Tensor, ...]]
        self.dense = DenseNetwork(self.deepmask, self.refinement).eval()
        self.device, self.dtype, self.options = device, dtype, ProposeConfig(**options)
        scales = log2_range(*(self.options.log2_scales or PUBLISHED_LOG2_SCALES))
        self.log2_scales = sorted({*scales, 1.0} if zoom else scales)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, *, image_id: int = 0, file_name: str = "") -> Proposals:
        """At most `num_proposals` of an image (H, W, 3) uint8 RGB, best first.

        Masks without a pixel in the image are left out.
        """
        height, width = image.shape[:2]
        # Run the network at every scale; the largest first, so that its freed memory serves all.
        pyramid = [self.run_scale(image, log2_scale) for log2_scale in reversed(self.log2_scales)]
        pyramid.reverse()
        # Keep the best cells of all scales.
        logits = [scale.score_logits for scale in pyramid]
        scores, cells = best_cells(logits, self.options.num_proposals)
        # Decode their masks and paste them into the image, as RLE.
        masks = self._masks(pyramid, cells, (height, width))
        # Drop the scores of masks that lie outside of the image.
        scores = scores.cpu().numpy()[masks.indices]
        proposals = Proposals(image_id, file_name, height, width, scores, masks.boxes, masks.rles)
        # Drop near duplicates, on request.
        return mask_nms(proposals, self.options.nms) if self.options.nms else proposals

    @torch.inference_mode()
    def run_scale(self, image: np.ndarray, log2_scale: float) -> PyramidScale:
        """Runs the part of the network that sees the image alone, at one scale."""
        pixels, scale_xy = self.scale(image, log2_scale)
        embeddings, scores, *horizontal = self.dense(pixels)
        return PyramidScale(scale_xy, embeddings[0], scores[0], [maps[0] for maps in horizontal])

    def scale(self, image: np.ndarray, log2_scale: float) -> tuple[Tensor, tuple[float, float]]:
        """The network's input (1, 3, H, W) at one scale, and the scales in x and y."""
        scale = 2.0**log2_scale
        if self.options.align_corners:
            scaled, scale_xy = resize_align_corners(image, scale), (scale, scale)
        else:
            scaled = resize_image(image, scale)
            scale_xy = (scaled.shape[1] / image.shape[1], scaled.shape[0] / image.shape[0])
        pixels = torch.from_numpy(scaled)
        if self.device.type == "cuda":  # copied while the scale before is still computed
            pixels = pixels.pin_memory().to(self.device, non_blocking=True)
        padded = pad_and_normalize(pixels, self.deepmask.patch_size // 2)
        return padded.to(self.dtype), scale_xy

    @torch.inference_mode()
    def decode(self, pyramid: list[PyramidScale], cells: Tensor) -> Tensor:
        """Mask logits (n, M, M) of cells, or (n, P, P) when refined.

        Args:
            cells: (n, 3) int64 of scale, row, column. All go through the network together, since
                one large batch costs less than many small ones. Those of one scale in a row are
                gathered together.
        """
        indices, counts = cells[:, 0].unique_consecutive(return_counts=True)
        scales = [pyramid[i] for i in indices.tolist()]
        groups = list(zip(scales, cells[:, 1:].split(counts.tolist()), strict=True))
        embeddings = _concatenate([scale.embeddings[:, c[:, 0], c[:, 1]].T for scale, c in groups])
        if self.refinement is None:
            return self.deepmask.decode_masks(embeddings)
        size = self.deepmask.cells
        windows = [
            _concatenate([gather_windows(s.horizontal[i], c, size << i, 1 << i) for s, c in groups])
            for i in range(len(self.refinement.refinements))
        ]
        return self.refinement.refine(embeddings, windows)

    def _masks(
        self, pyramid: list[PyramidScale], cells: Tensor, image_size: tuple[int, int]
    ) -> Pasted:
        """Pasted masks of cells (N, 3) of scale, row, column; indices are rows of `cells`."""
        scale, *row_column = cells.cpu().numpy().T
        places = place_patches(
            np.stack(row_column, axis=1),
            np.array([one.scale_xy for one in pyramid])[scale],
            self.deepmask.patch_size,
            align_corners=self.options.align_corners,
        )
        order = torch.sort(cells[:, 0], stable=True).indices  # to gather a scale's windows together
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


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # one part is not copied


def gather_windows(features: Tensor, cells: Tensor, size: int, step: int) -> Tensor:
    """Windows (n, c, size, size), channels last, of a map (c, h, w) with `step` positions per cell.

    The window of cell (i, j) begins at (i step, j step); cells are (n, 2) int64.
    """
    # Layers round sizes up, so 16 ceil(s / 16) may exceed the finer maps by part of a cell.
    missing = [
        max(0, last * step + size - side)
        for last, side in zip(cells.amax(0).tolist(), features.shape[1:], strict=True)
    ]
    if any(missing):
        features = F.pad(features[None], (0, missing[1], 0, missing[0]), mode="replicate")[0]
    windows = features.permute(1, 2, 0).unfold(0, size, step).unfold(1, size, step)  # a view
    windows = windows.permute(0, 1, 3, 4, 2)  # (rows, columns, size, size, c)
    return windows[cells[:, 0], cells[:, 1]].permute(0, 3, 1, 2)


def log2_range(low: float, high: float, step: float) -> list[float]:
    """low, low + step, ... up to high."""
    return [low + i * step for i in range(math.floor((high - low) / step + 1e-6) + 1)]


def best_cells(score_logits: list[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The highest-scoring cells of all scales together, given the scores (h, w) of each.

    Returns:
        Probabilities (N,), descending, and (N, 3) int64 of scale, row, column; equal scores stay in
        this order.
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


def place_patches(
    cells: np.ndarray, scale_xy: np.ndarray, patch_size: int, *, align_corners: bool = False
) -> np.ndarray:
    """Where the patches of cells (n, 2) lie in the image: (n, 4) left, top, width and height.

    The patch of a cell has its center at (16 column, 16 row) of the scaled image, whose scales in x
    and y are `scale_xy` (n, 2). With `align_corners`, places are whole pixels, as in the released
    code.
    """
    corner = (STRIDE * cells[:, ::-1] - patch_size / 2) / scale_xy
    size = patch_size / scale_xy
    if align_corners:
        corner, size = np.floor(corner), np.floor(size)
    return np.concatenate([corner, size], axis=1)


def mask_nms(proposals: Proposals, iou: float) -> Proposals:
    """Of two proposals whose masks have at least this IoU, in (0, 1], the second is dropped."""
    boxes = proposals.boxes.astype(np.float64)
    areas = np.array([coco_mask.area(proposals.rle(i)) for i in range(len(proposals))], np.float64)
    waiting = np.arange(len(proposals))
    kept = []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        # Masks overlap no more than their boxes, nor more than the area of the smaller one: only
        # for the masks that may reach the limit the true overlap is computed.
        sides = np.minimum(boxes[best, 2:], boxes[waiting, 2:])
        sides -= np.maximum(boxes[best, :2], boxes[waiting, :2])
        overlap = np.minimum(sides.clip(min=0).prod(axis=1), areas[waiting]).clip(max=areas[best])
        near = waiting[overlap >= iou * (areas[best] + areas[waiting] - overlap)]
        if len(near):
            ious = coco_mask.iou([proposals.rle(i) for i in near], [proposals.rle(best)], [0])
            waiting = np.setdiff1d(waiting, near[ious[:, 0] >= iou], assume_unique=True)
    return replace(
        proposals,
        scores=proposals.scores[kept],
        boxes=proposals.boxes[kept],
        rles=[proposals.rles[i] for i in kept],
    )


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
    log2_scales: LogScales | str | None = None,
    zoom: bool = False,
    refine: bool = True,
    nms: float | None = None,
    precision: str | None = None,
) -> tuple[Proposer, dict]:
    """A proposer, and the settings that its proposals depend on.

    Values that are None are those of the checkpoint's config; `log2_scales` "auto" are those for
    the objects that the network was trained on, whatever its config says. `zoom` adds the scale
    2^1; without `refine`, a SharpMask gives the coarse masks of its DeepMask. `precision` is as in
    `choose_precision`. Says which scales were chosen, and why.

    Raises:
        FileNotFoundError or ValueError: no file, another kind of file, or a value out of range.
    """
    model, config, metadata = load_network(
        checkpoint, stage=("deepmask", "sharpmask"), schema=MaskNetworkConfig
    )
    assert isinstance(model, DeepMask | SharpMask)
    asked = None if isinstance(log2_scales, str) else log2_scales
    changes = {"num_proposals": num_proposals, "log2_scales": asked, "nms": nms}
    options = asdict(override(config.propose, **changes))
    if options["log2_scales"] is None or log2_scales == AUTO:
        scales, why = auto_scales(metadata, config.deepmask.patch_size, source=str(checkpoint))
        options["log2_scales"] = scales
    else:
        why = "the checkpoint's config" if asked is None else "as asked for"
    distributed.say(f"proposals at {describe_scales(options['log2_scales'])}: {why}")
    if isinstance(model, SharpMask) and not refine:
        model = model.deepmask
    fold_norms(model)
    trunk = (model.deepmask if isinstance(model, SharpMask) else model).trunk
    dtype = choose_precision(precision, trunk, device, amp=options["amp"])
    proposer = Proposer(model, device=device, dtype=dtype, zoom=zoom, **options)
    settings = {
        "checkpoint_sha256": file_sha256(checkpoint),
        "refine": isinstance(model, SharpMask),
    }
    settings |= options | {"log2_scales": proposer.log2_scales}
    del settings["amp"]  # a store may be continued on another device
    return proposer, settings
