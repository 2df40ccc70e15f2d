"""What makes inference fast changes no proposal: against the same steps written plainly."""

import math

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F

from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline.inference.propose import Proposer, pad_and_normalize, resize_image

CELLS, COUNT = 4, 60  # cells of a patch, proposals
OCTAVES = [-1.0, -0.5, 0.0, 0.5]


@pytest.fixture(scope="module")
def networks() -> dict[str, DeepMask | SharpMask]:
    torch.manual_seed(0)
    sizes = {"mask_size": 14, "reduction": 8, "embedding": 16, "score_hidden": 8}
    deepmask = DeepMask(build_trunk("tiny"), patch_size=16 * CELLS, **sizes).eval()
    sharpmask = SharpMask(deepmask).eval()
    with torch.no_grad():  # steep edges, as trained masks have: few pixels on the very threshold
        deepmask.mask_head.weight *= 100
        sharpmask.predict.weight *= 100
    return {"DeepMask": deepmask, "SharpMask": sharpmask}


def refine_plainly(model: SharpMask, embedding: torch.Tensor, windows: list) -> torch.Tensor:
    """The vertical path as the paper draws it: (1, E) to (P, P) logits."""
    mask = model.encode(embedding).view(1, model.km, CELLS, CELLS)
    for module, window in zip(model.refinements, windows, strict=True):
        mask = F.relu(window + module.vertical(mask))
        mask = F.interpolate(mask, scale_factor=2.0, mode="nearest")
    return model.predict(mask)[0, 0]


def cut(features: torch.Tensor, row: int, column: int, size: int) -> torch.Tensor:
    """A window of a map (1, c, h, w); beyond it the edge repeats."""
    rows = torch.arange(row, row + size).clamp(max=features.shape[2] - 1)
    columns = torch.arange(column, column + size).clamp(max=features.shape[3] - 1)
    return features[:, :, rows][:, :, :, columns]


def paste_plainly(logits: torch.Tensor, corner, sides, image_size) -> np.ndarray:
    """On a canvas of the whole image: (H, W) uint8."""
    (left, top), (width, height) = corner, sides
    y = (torch.arange(image_size[0], dtype=torch.float64) + 0.5 - top) / height * 2 - 1
    x = (torch.arange(image_size[1], dtype=torch.float64) + 0.5 - left) / width * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    pixels = F.grid_sample(
        logits[None, None].double(), grid, padding_mode="border", align_corners=False
    )[0, 0]
    within = ((y >= -1) & (y < 1))[:, None] & ((x >= -1) & (x < 1))
    return ((pixels > math.log(0.2 / 0.8)) & within).numpy().astype(np.uint8)


def propose_plainly(model: DeepMask | SharpMask, image: np.ndarray) -> list[tuple]:
    """Score, level, row, column and mask of the best cells that have a pixel."""
    deepmask = getattr(model, "deepmask", model)
    cells, levels = [], []
    for number, octave in enumerate(OCTAVES):
        scaled = resize_image(image, 2.0**octave)
        features = deepmask.trunk(pad_and_normalize(torch.from_numpy(scaled), 8 * CELLS))
        levels.append(
            (features, scaled.shape[1] / image.shape[1], scaled.shape[0] / image.shape[0])
        )
        scores = deepmask.score(deepmask.embed(features[-1]))[0]
        for (row, column), score in np.ndenumerate(scores.numpy()):
            cells.append((float(score), number, row, column))
    found = []
    for score, number, row, column in sorted(cells, key=lambda cell: -cell[0])[:COUNT]:
        features, fx, fy = levels[number]
        embedding = deepmask.embed(cut(features[-1], row, column, CELLS)).flatten(1)
        logits = deepmask.decode_masks(embedding)[0]
        if isinstance(model, SharpMask):
            maps = model.horizontal_maps(features)
            windows = [cut(each, row << i, column << i, CELLS << i) for i, each in enumerate(maps)]
            logits = refine_plainly(model, embedding, windows)
        half = 8 * CELLS
        corner = ((16 * column - half) / fx, (16 * row - half) / fy)
        mask = paste_plainly(logits, corner, (2 * half / fx, 2 * half / fy), image.shape[:2])
        if mask.any():
            found.append((1 / (1 + math.exp(-score)), mask))
    return found


@pytest.mark.parametrize("name", ["DeepMask", "SharpMask"])
@torch.inference_mode()
def test_fast_proposals_are_the_plain_ones(networks, name):
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    model = networks[name]
    expected = propose_plainly(model, image)
    found = Proposer(model, device=torch.device("cpu"), num_proposals=COUNT, octaves=OCTAVES)(image)
    assert len(found) == len(expected) > COUNT // 2
    np.testing.assert_allclose(found.scores, [score for score, _ in expected], atol=1e-5)
    for n, (_, mask) in enumerate(expected):
        theirs = coco_mask.encode(np.asfortranarray(mask))
        assert coco_mask.iou([found.rle(n)], [theirs], [0])[0, 0] >= 0.999
