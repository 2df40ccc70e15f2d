"""Detection in an image: from proposals to boxes and masks with categories (BMVC 2016, section 4).

image -> trunk once (per scale and flip) -> RoIs in chunks -> mean of the softmaxes -> boxes decoded
and clipped -> per-class NMS, box voting -> each detection with its proposal's mask.

Letters: R RoIs, C classes without background, N candidates (an RoI for a class), D detections.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_iou, clip_boxes_to_image, nms

from datasets.images import Image
from datasets.resize import normalize, resize_sides, resized_sides
from datasets.rois import PAD_TO
from models.inference import optimize_for_inference
from models.multipathnet import MultiPathNet, compress_towers
from pipeline.checkpoint import file_sha256, save_checkpoint
from pipeline.config import DetectConfig, MultiPathNetStageConfig
from pipeline.inference.memory import INPUT_BYTES, free_memory, trunk_bytes
from pipeline.inference.proposals import Detections, Proposals, logits_of
from pipeline.inference.propose import override
from pipeline.networks import load_network
from pipeline.precision import choose_precision, to_bfloat16


@dataclass
class View:
    """One version of an image that the network has seen."""

    layers: dict[int, Tensor]  # the trunk's features by stride
    scale: Tensor  # (4,) from the original's pixels to this version's, xyxy
    last_x: float  # of this version, where the mirror puts what is at 0
    flip: bool  # mirrored left-right


class Detector:
    """Detects objects in whole images, given their proposals."""

    def __init__(
        self,
        model: MultiPathNet,
        categories: list[dict],
        *,
        device: torch.device,
        config: MultiPathNetStageConfig,
        options: DetectConfig,
        dtype: torch.dtype = torch.float32,
    ):
        """
        Args:
            categories: {"id", "name"} of each class, in the order of the network's.
            config: how the network takes images and boxes. With `inclusive_boxes`, only its boxes
                go from their first to their last pixel; outside of it they have edges.
            dtype: the network computes in it; with bfloat16 its layers are converted here. Scores
                and boxes are in full precision.
        """
        self.model = model.eval().to(device).to(memory_format=torch.channels_last)
        if dtype == torch.bfloat16:
            to_bfloat16(self.model)
        self.categories, self.device, self.dtype = categories, device, dtype
        self.config, self.options = config, options
        self.category_ids = np.array([category["id"] for category in categories], np.int64)
        self.category_names = {category["id"]: category["name"] for category in categories}
        # From a box's last corner in the network to its edge.
        self.margin = 1 if config.inclusive_boxes else 0
        self.margins = torch.tensor([0, 0, self.margin, self.margin], device=device)

    def __call__(
        self,
        image: Image,
        proposals: Proposals,
        *,
        report: Callable[[float], None] | None = None,
    ) -> Detections:
        """At most `max_detections` of an image (H, W, 3) uint8 RGB, from its best proposals.

        Args:
            report: is told how much is done, up to 1.
        """
        counts = [self.options.limit(*image.shape[:2])]
        [detections] = self.detect_by_count(image, proposals, counts, report=report)
        return detections

    @torch.inference_mode()
    def detect_by_count(
        self,
        image: Image,
        proposals: Proposals,
        num_proposals: Sequence[int],
        *,
        report: Callable[[float], None] | None = None,
    ) -> list[Detections]:
        """The detections from so many of the best proposals, for several numbers of them.

        The trunk and the RoIs of the largest number run once: what the network says of an RoI does
        not depend on the others, only the selection does (and what is fed back after it).
        """
        size = image.shape[:2]
        boxes = torch.tensor(proposals.boxes[: max(num_proposals)], device=self.device)
        # Run the trunk over every scale of the image, then classify each RoI in all of them.
        views = self._views(image) if len(boxes) else []
        probabilities, decoded = self._classify(views, boxes, size, report)
        results = []
        for count in num_proposals:
            # Select the detections from the first `count` RoIs.
            selected = select_boxes(probabilities[:count], decoded[:count], self.options)
            scores, labels, found, rows = selected
            for _ in range(self.options.box_refinement_iters):  # the boxes are fed back as RoIs
                selected = select_boxes(*self._classify(views, found, size), self.options)
                scores, labels, found, sources = selected
                rows = rows[sources]
            # Give each detection the mask of the proposal that it comes from.
            results.append(
                Detections(
                    proposals.image_id,
                    proposals.file_name,
                    height=size[0],
                    width=size[1],
                    logits=logits_of(scores.cpu().numpy()),
                    boxes=found.cpu().numpy(),
                    labels=self.category_ids[labels.cpu().numpy()],
                    rles=[proposals.rles[row] for row in rows.tolist()],
                )
            )
        return results

    def check_memory(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Makes sure that images of these heights and widths fit in the memory that is free.

        Raises:
            ValueError: the largest does not, by an estimate; the line names the setting.
        """
        kept, working = trunk_bytes(self.model.trunk, self.dtype)
        flips = 2 if self.options.flip else 1
        needed, size = 0.0, (0, 0)
        for height, width in set(sizes):
            views = [resized_sides(height, width, **sides) for sides in self._sides()]
            areas = [h * w for h, w in views]
            total = flips * sum(areas) * kept + max(areas) * (working + INPUT_BYTES)
            needed, size = max((needed, size), (total, views[areas.index(max(areas))]))
        free = free_memory(self.device)
        if free is not None and needed > free:
            sides = self.options.short_sides or (self.config.sampling.short_side,)
            raise ValueError(
                f"detect.short_sides (--short-sides) {list(sides)} needs about "
                f"{needed / 2**30:.3g} GB for an image of {size[1]} x {size[0]} px, and "
                f"{free / 2**30:.3g} GB are free; give smaller ones"
                + (", or do without --flip" if self.options.flip else "")
            )

    def _sides(self) -> list[dict[str, Any]]:
        """The arguments of `resize_sides` for each scale of an image."""
        sampling = self.config.sampling
        # The longer side may be as long as in training, and grows with a longer shorter one.
        return [
            {
                "short_side": side,
                "long_side": round(sampling.long_side * max(1, side / sampling.short_side)),
                "align_corners": self.config.align_corners,
            }
            for side in self.options.short_sides or (sampling.short_side,)
        ]

    def _views(self, image: Image) -> list[View]:
        views = []
        for sides in self._sides():
            scaled, scale = resize_sides(image, **sides)
            last_x = (image.shape[1] - self.margin) * scale[0]
            for flip in (False, True) if self.options.flip else (False,):
                pixels = (cv2.flip(scaled, 1) if flip else scaled).astype(np.float32) / 255
                pixels = normalize(pixels, self.config.pixels)
                planes = torch.from_numpy(pixels)[None].to(self.device)
                missing = [max(0, PAD_TO - side) for side in planes.shape[2:]]  # as in training
                planes = F.pad(planes, (0, missing[1], 0, missing[0]))
                planes = planes.contiguous(memory_format=torch.channels_last).to(self.dtype)
                layers = self.model.layers(planes)
                views.append(
                    View(layers, torch.tensor(scale * 2, device=self.device), last_x, flip)
                )
        return views

    def _classify(
        self,
        views: list[View],
        boxes: Tensor,
        size: tuple[int, int],
        report: Callable[[float], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Probabilities (R, C + 1) and boxes (R, C, 4) of RoIs (R, 4), the means over all views.

        Boxes are clipped to the image's size (height, width).
        """
        if len(boxes) == 0:
            classes = len(self.categories)
            return boxes.new_zeros(0, classes + 1), boxes.new_zeros(0, classes, 4)
        parts = []
        chunks = (boxes - self.margins).split(self.options.chunk)
        for count, chunk in enumerate(chunks, 1):
            seen = [self._classify_in(view, chunk) for view in views]
            parts.append([torch.stack(values).mean(0) for values in zip(*seen, strict=True)])
            if report is not None:
                report(count / len(chunks))
        probabilities, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
        last = size[0] - self.margin, size[1] - self.margin
        return probabilities, clip_boxes_to_image(decoded, last) + self.margins

    def _classify_in(self, view: View, boxes: Tensor) -> tuple[Tensor, Tensor]:
        rois = mirrored(boxes * view.scale, view)
        batch = torch.cat([rois.new_zeros(len(rois), 1), rois], dim=1)
        outputs = self.model.classify_rois(view.layers, batch)
        probabilities, decoded = self.model.decode(outputs, rois)
        return probabilities, mirrored(decoded, view) / view.scale


def mirrored(boxes: Tensor, view: View) -> Tensor:
    """Boxes (..., 4) of a view in the frame of the unmirrored one, or back."""
    if not view.flip:
        return boxes
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([view.last_x - x1, y0, view.last_x - x0, y1], dim=-1)


def select_boxes(
    probabilities: Tensor, boxes: Tensor, options: DetectConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy NMS within each class, the best over all classes, box voting.

    Boxes without an area (clipped ones that lay outside of the image) are no candidates. Equal
    scores are ordered by class, then by RoI. By voting, a detection's box becomes the mean,
    weighted by score, of its class's candidates that overlap it, those that NMS dropped included.

    Args:
        probabilities: (R, C + 1); column 0 is the background.
        boxes: (R, C, 4) each RoI's box for each class: decoded, clipped, xyxy in pixels.

    Returns:
        scores (D,), best first; labels (D,) int64, 0 for column 1; boxes (D, 4);
        roi_index (D,) int64: the row of the RoI, whose proposal's mask is the detection's.
    """
    # Candidates: every box of a class that scores above the threshold.
    class_scores = probabilities[:, 1:]
    areas = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(dim=-1)  # (R, C)
    is_candidate = (class_scores > options.score_threshold) & (areas > 0)
    labels, roi_index = is_candidate.T.nonzero(as_tuple=True)  # (N,) by class, then by RoI
    scores, candidates = class_scores[roi_index, labels], boxes[roi_index, labels]

    # NMS within each class, then the best of all classes.
    kept = _nms_by_class(candidates, scores, labels, options.nms)
    kept = kept[scores[kept].argsort(descending=True, stable=True)[: options.max_detections]]
    # Move boxes to the mean of the candidates that agree with them, on request.
    selected = candidates[kept]
    if options.box_voting_iou is not None:
        selected = _vote(kept, candidates, scores, labels, options.box_voting_iou)
    return scores[kept], labels[kept], selected, roi_index[kept]


def _nms_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, max_iou: float) -> Tensor:
    """Rows of the boxes that stay: by class, best first.

    Not torchvision's `batched_nms`: up to 1000 boxes it moves the classes apart by a multiple of
    the image's size, where float32 has steps of .01 pixels, and overlaps at the limit change
    sides; above that it does the same loop.
    """
    kept = [labels.new_empty(0)]
    for label in labels.unique().tolist():
        rows = (labels == label).nonzero().squeeze(1)
        rows = rows[scores[rows].argsort(descending=True, stable=True)]
        ranks = torch.arange(len(rows), 0, -1).to(boxes)  # scores are of another type than boxes
        kept.append(rows[nms(boxes[rows], ranks, max_iou)])
    return torch.cat(kept)


def _vote(
    kept: Tensor, candidates: Tensor, scores: Tensor, labels: Tensor, min_iou: float
) -> Tensor:
    """Weighted means of the candidates that overlap each of those kept, (D, 4)."""
    boxes = candidates[kept]
    voted = boxes.clone()
    for label in labels[kept].unique().tolist():
        rows, voters = labels[kept] == label, labels == label
        ious = box_iou(boxes[rows], candidates[voters])
        overlaps = (ious > min_iou) | (ious == 1)  # its own box votes, whatever the limit is
        # In float64: the mean of equal corners is that corner to the bit, within the image.
        weights = overlaps * scores[voters].double()
        means = weights @ candidates[voters].double() / weights.sum(dim=1, keepdim=True)
        voted[rows] = means.to(boxes.dtype)
    return voted


def load_detector(
    checkpoint: str | Path,
    device: torch.device,
    *,
    overrides: dict | None = None,
    precision: str | None = None,
) -> tuple[Detector, dict]:
    """A detector from a MultiPathNet checkpoint, and the settings that its detections depend on.

    Overrides are values for the config's `detect` section; `precision` is as in `choose_precision`.

    Raises:
        FileNotFoundError, ValueError: no checkpoint of a detector, or an override out of range.
    """
    model, config, content = load_network(checkpoint, stage="multipathnet")
    assert isinstance(model, MultiPathNet)
    options = override(config.detect, **(overrides or {}))
    names = content["categories"]
    c = config.multipathnet
    optimize_for_inference(model)
    dtype = choose_precision(precision, model.trunk, device, amp=c.optim.amp)
    detector = Detector(model, names, device=device, config=c, options=options, dtype=dtype)
    settings = asdict(options) | {"checkpoint_sha256": file_sha256(checkpoint)}
    del settings["chunk"]  # changes the memory only
    return detector, settings


def compress_checkpoint(checkpoint: str | Path, rank: int, output: Path) -> str:
    """Writes a detector's checkpoint with fc6 and fc7 truncated to a rank into a file.

    Returns a line on it.

    Raises:
        ValueError: a rank below 1, another checkpoint, or one without such layers; or a folder.
    """
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder; give a file, such as small.pt")
    if rank < 1:
        raise ValueError(f"--compress-fc must be at least 1, got {rank}")
    model, _, content = load_network(checkpoint, stage="multipathnet")
    assert isinstance(model, MultiPathNet)
    if content.get("compressed_fc"):
        raise ValueError(f"{checkpoint} is compressed already; take the one it was made from")
    before = sum(p.numel() for p in model.parameters())
    try:
        compress_towers(model, rank)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    after = sum(p.numel() for p in model.parameters())
    kept = {name: content[name] for name in ("stage", "config", "categories")}
    save_checkpoint(output, kept | {"model": model.state_dict(), "compressed_fc": rank})
    return f"{output}: {before / 1e6:.2f} M parameters before, {after / 1e6:.2f} M after"
