"""Dense proposal inference: image to proposals (ECCV 2016, section 3; spec of the released code).

image -> pyramid -> trunk and tail once per scale -> scores of all cells of all scales ranked
together -> masks of the best cells only -> RLE in the image.

Letters: (h, w) cells of a scale, E embedding width, M mask size, N proposals.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from datasets.images import ImageError, read_image
from datasets.transforms import GREY, MEAN, STD
from models.deepmask import STRIDE, DeepMask
from pipeline.paste import Placement, paste
from pipeline.proposals import Proposals

MASK_CHUNK = 128  # masks decoded at once: bounds memory, whatever N is


@dataclass
class Level:
    """One scale of the pyramid after the network.

    Attributes:
        factors: (x, y) resize factors that the rounding of the size really gave.
        embeddings: (E, h, w). score_logits: (h, w).
    """

    factors: tuple[float, float]
    embeddings: Tensor
    score_logits: Tensor


class Proposer:
    """Proposes object masks for whole images with a trained DeepMask."""

    def __init__(
        self,
        model: DeepMask,
        *,
        device: torch.device,
        num_proposals: int = 1000,
        scales: tuple[float, float, float] = (-2.5, 0.5, 0.5),
        mask_threshold: float = 0.2,
    ):
        """
        Args:
            scales: smallest, largest and step of the pyramid, in octaves.
            mask_threshold: probability from which on a pixel belongs to a mask.
        """
        self.model = model.eval().to(device, memory_format=torch.channels_last)
        self.device, self.num_proposals, self.mask_threshold = device, num_proposals, mask_threshold
        self.octaves = octave_range(*scales)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray, *, image_id: int = 0, file_name: str = "") -> Proposals:
        """The best proposals of an image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            At most `num_proposals`, best first; masks without a pixel in the image are left out.
        """
        levels = [self._run_level(image, octave) for octave in self.octaves]
        scores, chosen = best_cells([level.score_logits for level in levels], self.num_proposals)
        pasted = list(self._masks(levels, chosen, image.shape[:2]))
        kept = [n for n, mask in enumerate(pasted) if mask is not None]
        boxes = np.array([pasted[n][1] for n in kept], np.float32).reshape(-1, 4)
        counts = [pasted[n][0]["counts"] for n in kept]
        height, width = image.shape[:2]
        return Proposals(
            image_id, file_name, height, width, scores.cpu().numpy()[kept], boxes, counts
        )

    def _run_level(self, image: np.ndarray, octave: float) -> Level:
        scaled = resize_image(image, 2.0**octave)
        factors = (scaled.shape[1] / image.shape[1], scaled.shape[0] / image.shape[0])
        pixels = pad_and_normalise(
            torch.from_numpy(scaled).to(self.device), self.model.patch_size // 2
        )
        embeddings = self.model.embed(self.model.trunk(pixels)[-1])
        return Level(factors, embeddings[0], self.model.score(embeddings)[0])

    def _masks(
        self, levels: list[Level], chosen: Tensor, image_size: tuple[int, int]
    ) -> Iterator[tuple | None]:
        """Pasted masks of the chosen cells, in their order.

        Args:
            chosen: (N, 3) of level, row, column.
        """
        for cells in chosen.split(MASK_CHUNK):
            embeddings = torch.stack(
                [levels[n].embeddings[:, i, j] for n, i, j in cells.tolist()]
            )  # (n, E)
            logits = self.model.decode_masks(embeddings).float().cpu().numpy()  # (n, M, M)
            for mask, (n, i, j) in zip(logits, cells.tolist(), strict=True):
                place = place_patch(i, j, levels[n].factors, self.model.patch_size)
                yield paste(mask, place, image_size=image_size, threshold=self.mask_threshold)


def octave_range(low: float, high: float, step: float) -> list[float]:
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


def resize_image(image: np.ndarray, factor: float) -> np.ndarray:
    """(H, W, 3) uint8 resized by a factor, averaging areas when it shrinks; at least one pixel."""
    size = tuple(max(1, round(side * factor)) for side in (image.shape[1], image.shape[0]))
    if size == (image.shape[1], image.shape[0]):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)


def pad_and_normalise(pixels: Tensor, border: int) -> Tensor:
    """(H, W, 3) uint8 to (1, 3, H + 2 border, W + 2 border) float32.

    Normalised, grey all around, channels last.
    """
    mean = torch.tensor(MEAN, device=pixels.device)
    std = torch.tensor(STD, device=pixels.device)
    height, width = pixels.shape[:2]
    canvas = (
        ((float(GREY) - mean) / std).expand(height + 2 * border, width + 2 * border, 3).contiguous()
    )
    canvas[border : border + height, border : border + width] = (pixels.float() / 255 - mean) / std
    return canvas.permute(2, 0, 1)[None]


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


def place_patch(row: int, column: int, factors: tuple[float, float], patch_size: int) -> Placement:
    """Where the patch of a cell lies in the original image.

    Its centre is (16 column, 16 row) of the scaled image.
    """
    fx, fy = factors
    return Placement(
        (STRIDE * column - patch_size / 2) / fx,
        (STRIDE * row - patch_size / 2) / fy,
        patch_size / fx,
        patch_size / fy,
    )


@dataclass(frozen=True)
class ImageFile:
    """An image to propose for: its id, its name in results, and where it is."""

    image_id: int
    file_name: str
    path: Path


def read_ahead(files: list[ImageFile]) -> Iterator[tuple[ImageFile, np.ndarray | ImageError]]:
    """Images in order, the next one read while the present one is worked on.

    An unreadable one gives its error.
    """

    def read(file: ImageFile) -> np.ndarray | ImageError:
        try:
            return read_image(file.path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(1) as reader:
        following = None
        for n, file in enumerate(files):
            image = following.result() if following else read(file)
            following = reader.submit(read, files[n + 1]) if n + 1 < len(files) else None
            yield file, image
