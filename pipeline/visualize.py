"""Pictures of proposals: outlines and tints on the image."""

import cv2
import numpy as np
import pycocotools.mask as coco_mask

from datasets.files import write_atomically
from pipeline.proposals import Proposals

# Distinct hues, by steps of the golden ratio around the colour circle.
PALETTE = cv2.cvtColor(
    np.array([[(int(180 * (n * 0.618034 % 1)), 200, 255) for n in range(64)]], np.uint8),
    cv2.COLOR_HSV2RGB,
)[0]


def draw_proposals(image: np.ndarray, proposals: Proposals, count: int) -> np.ndarray:
    """The best `count` proposals drawn on a copy of the image, the best on top: (H, W, 3) uint8."""
    picture = image.copy()
    for n in reversed(range(min(count, len(proposals)))):
        mask = coco_mask.decode(proposals.rle(n))
        draw_mask(picture, mask, colour(n), label=f"{proposals.scores[n]:.2f}")
    return picture


def colour(n: int) -> tuple[int, int, int]:
    """The n-th of a row of colours that are easy to tell apart."""
    return tuple(PALETTE[n % len(PALETTE)].tolist())


def draw_mask(
    picture: np.ndarray,
    mask: np.ndarray,
    rgb: tuple[int, int, int],
    *,
    label: str = "",
    tint: float = 0.35,
) -> None:
    """Tints a mask (H, W) and draws its outline and a label at its top, in place."""
    inside = mask.astype(bool)
    picture[inside] = (picture[inside] * (1 - tint) + np.array(rgb) * tint).astype(np.uint8)
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, rgb, 2)
    if label and contours:
        x, y = max(contours, key=len)[:, 0].min(axis=0).tolist()
        put_label(picture, label, (x, max(y, 12)), rgb)


def put_label(
    picture: np.ndarray,
    text: str,
    origin: tuple[int, int],
    rgb: tuple[int, int, int],
    scale: float = 0.42,
) -> None:
    """Text on a dark ground, readable on any picture, in place.

    Args:
        origin: the left end of its baseline.
    """
    (width, height), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
    x, y = origin
    ground = picture[max(y - height - 2, 0) : y + base, max(x - 1, 0) : x + width + 1]
    ground[:] = ground // 4
    cv2.putText(picture, text, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, rgb, 1, cv2.LINE_AA)


def contact_sheet(tiles: list[np.ndarray], columns: int, gap: int = 4) -> np.ndarray:
    """Tiles (h, w, 3) uint8 of one size, in rows on white."""
    height, width = tiles[0].shape[:2]
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for n, tile in enumerate(tiles):
        y, x = gap + n // columns * (height + gap), gap + n % columns * (width + gap)
        sheet[y : y + height, x : x + width] = tile
    return sheet


def save_png(picture: np.ndarray, path) -> None:
    """Writes (H, W, 3) uint8 RGB as PNG."""
    ok, data = cv2.imencode(".png", picture[..., ::-1])
    assert ok
    write_atomically(path, data.tobytes())
