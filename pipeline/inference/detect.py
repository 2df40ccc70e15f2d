"""Detection in an image: from proposals to boxes and masks with categories (BMVC 2016, section 4).

image -> trunk once (per scale and flip) -> RoIs in chunks -> mean of the softmaxes -> boxes decoded
and clipped -> per-class NMS, box voting -> each detection with its proposal's mask.

Letters: R RoIs, C classes without background, N detections.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.ops import clip_boxes_to_image

from datasets.resize import IMAGENET, PixelConfig, normalize, resize_sides
from models.multipathnet import MultiPathNet, compress_towers
from pipeline.checkpoint import file_sha256, load_checkpoint, save_checkpoint
from pipeline.config import DetectConfig
from pipeline.inference.box_selection import Selection, select_boxes
from pipeline.inference.detections import Detections
from pipeline.inference.proposals import Proposals
from pipeline.networks import load_network


@dataclass
class View:
    """One version of an image that the network has seen.

    Attributes:
        layers: the trunk's features by stride.
        factors: (4,) from the original's pixels to this version's, xyxy.
        last_x: of this version, where the mirror puts what is at 0. flip: mirrored left-right.
    """

    layers: dict[int, Tensor]
    factors: Tensor
    last_x: float
    flip: bool


class Detector:
    """Detects objects in whole images, given their proposals."""

    def __init__(
        self,
        model: MultiPathNet,
        categories: list[dict],
        *,
        device: torch.device,
        short_sides: Sequence[int],
        long_side: int,
        options: DetectConfig,
        pixels: PixelConfig = IMAGENET,
        align_corners: bool = False,
        inclusive_boxes: bool = False,
    ):
        """
        Args:
            categories: {"id", "name"} of each class, in the order of the network's.
            short_sides: of the resized image in pixels, one for each scale.
            long_side: at most, at the first scale; in proportion at the others.
            align_corners: see `resize_sides`.
            inclusive_boxes: the network's boxes have their first and last pixel for corners
                (released code), not their edges; those that come and go have edges.
        """
        self.model = model.eval().to(device, memory_format=torch.channels_last)
        self.categories, self.device, self.options = categories, device, options
        self.category_ids = np.array([category["id"] for category in categories], np.int64)
        self.short_sides, self.long_side = short_sides, long_side
        self.pixels, self.align_corners = pixels, align_corners
        # From a box's last corner in the network to its edge.
        self.margin = 1 if inclusive_boxes else 0
        self.margins = torch.tensor([0, 0, self.margin, self.margin], device=device)

    def __call__(self, image: np.ndarray, proposals: Proposals) -> Detections:
        """The detections of an image, at most `max_detections`.

        Args:
            image: (H, W, 3) uint8 RGB. proposals: of this image; the best `num_proposals` are used.
        """
        [detections] = self.detect_by_count(image, proposals, [self.options.num_proposals])
        return detections

    @torch.inference_mode()
    def detect_by_count(
        self, image: np.ndarray, proposals: Proposals, counts: Sequence[int]
    ) -> list[Detections]:
        """The detections from the best proposals only, for several numbers of them.

        The trunk and the RoIs of the largest number are run once: what the network says of a RoI
        does not depend on the others, only the selection does (and what is fed back after it).

        Args:
            image, proposals: as in a call. counts: how many proposals to use.
        """
        size = image.shape[:2]
        boxes = torch.tensor(proposals.boxes[: max(counts)], device=self.device)
        views = self._views(image) if len(boxes) else []
        probabilities, decoded = self._classify(views, boxes, size)
        selections = (
            self._localize(views, self._select(probabilities[:count], decoded[:count]), size)
            for count in counts
        )
        return [
            Detections(
                proposals.image_id,
                proposals.file_name,
                *size,
                scores=scores.cpu().numpy(),
                boxes=found.cpu().numpy(),
                labels=self.category_ids[labels.cpu().numpy()],
                counts=[proposals.counts[row] for row in rows.tolist()],
            )
            for scores, labels, found, rows in selections
        ]

    def _select(self, probabilities: Tensor, boxes: Tensor) -> Selection:
        return select_boxes(
            probabilities,
            boxes,
            score_threshold=self.options.score_threshold,
            nms_iou=self.options.nms,
            max_detections=self.options.max_detections,
            vote_iou=self.options.box_voting_iou,
        )

    def _localize(
        self, views: list[View], selection: Selection, size: tuple[int, int]
    ) -> Selection:
        """Feeds the selected boxes back as RoIs, as often as the options say."""
        for _ in range(self.options.box_refinement_iters):
            *_, boxes, sources = selection
            scores, labels, found, rows = self._select(*self._classify(views, boxes, size))
            selection = scores, labels, found, sources[rows]
        return selection

    def _views(self, image: np.ndarray) -> list[View]:
        views = []
        for side in self.short_sides:
            limit = round(self.long_side * side / self.short_sides[0])
            scaled, factors = resize_sides(
                image, short_side=side, long_side=limit, align_corners=self.align_corners
            )
            for flip in (False, True) if self.options.flip else (False,):
                pixels = cv2.flip(scaled, 1) if flip else scaled
                views.append(self._view(pixels, factors, image.shape[1], flip))
        return views

    def _view(
        self, pixels: np.ndarray, factors: tuple[float, float], width: int, flip: bool
    ) -> View:
        normal = normalize(pixels.astype(np.float32) / 255, self.pixels)
        planes = torch.from_numpy(normal)[None].to(self.device)
        layers = self.model.layers(planes.contiguous(memory_format=torch.channels_last))
        last_x = (width - self.margin) * factors[0]
        return View(layers, torch.tensor(factors * 2, device=self.device), last_x, flip)

    def _classify(
        self, views: list[View], boxes: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Probabilities (R, C + 1) and boxes (R, C, 4), the means over all views, in chunks.

        Args:
            boxes: (R, 4). size: height and width of the image, to which boxes are clipped.
        """
        if len(boxes) == 0:
            classes = len(self.categories)
            return boxes.new_zeros(0, classes + 1), boxes.new_zeros(0, classes, 4)
        chunks = (boxes - self.margins).split(self.options.chunk)
        parts = [self._classify_chunk(views, chunk) for chunk in chunks]
        probabilities, decoded = (torch.cat(part) for part in zip(*parts, strict=True))
        last = size[0] - self.margin, size[1] - self.margin
        return probabilities, clip_boxes_to_image(decoded, last) + self.margins

    def _classify_chunk(self, views: list[View], boxes: Tensor) -> tuple[Tensor, Tensor]:
        seen = [self._classify_in(view, boxes) for view in views]
        return (
            torch.stack([probabilities for probabilities, _ in seen]).mean(0),
            torch.stack([decoded for _, decoded in seen]).mean(0),
        )

    def _classify_in(self, view: View, boxes: Tensor) -> tuple[Tensor, Tensor]:
        rois = mirrored(boxes * view.factors, view)
        batch = torch.cat([rois.new_zeros(len(rois), 1), rois], dim=1)
        outputs = self.model.classify_rois(view.layers, batch)
        probabilities, decoded = self.model.decode(outputs, rois)
        return probabilities, mirrored(decoded, view) / view.factors


def mirrored(boxes: Tensor, view: View) -> Tensor:
    """Boxes (..., 4) of a view in the frame of the unmirrored one, or back."""
    if not view.flip:
        return boxes
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([view.last_x - x1, y0, view.last_x - x0, y1], dim=-1)


def load_detector(
    checkpoint: str | Path, device: torch.device, *, overrides: dict | None = None
) -> tuple[Detector, dict]:
    """A detector from a MultiPathNet checkpoint, and the settings that its detections depend on.

    Args:
        overrides: values for the config's `detect` section.

    Raises:
        FileNotFoundError or ValueError: no file, another kind of file, another stage, weights that
            do not fit; an override that cannot be.
    """
    model, config, content = load_network(checkpoint, stage="multipathnet")
    try:
        options = replace(config.detect, **(overrides or {}))
    except ValueError as error:  # it starts with the name
        name, problem = str(error).split(" ", 1)
        raise ValueError(f"--{name.replace('_', '-')} {problem}") from None
    c = config.multipathnet
    detector = Detector(
        model,
        content["categories"],
        device=device,
        short_sides=options.short_sides or (c.sampling.short_side,),
        long_side=c.sampling.long_side,
        options=options,
        pixels=c.pixels,
        align_corners=c.align_corners,
        inclusive_boxes=c.inclusive_boxes,
    )
    settings = asdict(options) | {"checkpoint_sha256": file_sha256(checkpoint)}
    del settings["chunk"]  # changes the memory only
    return detector, settings


def compress_checkpoint(checkpoint: str | Path, rank: int, output: Path) -> str:
    """Writes a detector's checkpoint again, its fc6 and fc7 truncated to a rank.

    Returns:
        A line that says what it has become.

    Raises:
        ValueError: a rank below 1, another checkpoint, or one without such layers.
    """
    if rank < 1:
        raise ValueError(f"--compress-fc must be at least 1, got {rank}")
    content = load_checkpoint(checkpoint, stage="multipathnet")
    if content.get("compressed_fc"):
        raise ValueError(f"{checkpoint} is compressed already; take the one it was made from")
    detector, _ = load_detector(checkpoint, torch.device("cpu"))
    before = sum(p.numel() for p in detector.model.parameters())
    try:
        compress_towers(detector.model, rank)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    after = sum(p.numel() for p in detector.model.parameters())
    kept = {name: content[name] for name in ("stage", "config", "categories")}
    path = output / f"rank{rank}.pt"
    save_checkpoint(path, kept | {"model": detector.model.state_dict(), "compressed_fc": rank})
    return f"{path}: {before / 1e6:.2f} M parameters before, {after / 1e6:.2f} M after"
