"""Dense inference equals the same steps written plainly and patches on their own; NMS on masks."""

import copy
import math

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.resize import pad_and_normalize, resize_image
from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline.inference.cells import best_cells, gather_windows, place_patches
from pipeline.inference.nms import mask_nms, soft_mask_nms
from pipeline.inference.paste import paste
from pipeline.inference.propose import Proposer, log2_range

CPU = torch.device("cpu")
LOG2_SCALES = [-1.0, -0.5, 0.0, 0.5]
SIZES = {"mask_size": 14, "reduction": 8, "embedding": 16, "score_hidden": 8}
SURROUNDINGS = {"tiny": 5, "vgg11": 6, "resnet18": 12}  # cells that a trunk sees


def build(trunk: str = "tiny", patch_size: int = 64, **refinement: int) -> SharpMask:
    torch.manual_seed(0)
    deepmask = DeepMask(build_trunk(trunk), patch_size=patch_size, **SIZES)
    return SharpMask(deepmask, **refinement).eval()


@pytest.fixture(scope="module")
def model() -> SharpMask:
    return build()


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (150, 203, 3), dtype=np.uint8)


def in_scale(index: int, cells: torch.Tensor) -> torch.Tensor:
    """Rows and columns (n, 2) with the index of their scale before them."""
    return F.pad(cells, (1, 0), value=index)


# What makes inference fast changes no proposal.


def cut(features: torch.Tensor, row: int, column: int, size: int) -> torch.Tensor:
    """A window of a map (1, c, h, w); beyond it the edge repeats."""
    rows = torch.arange(row, row + size).clamp(max=features.shape[2] - 1)
    columns = torch.arange(column, column + size).clamp(max=features.shape[3] - 1)
    return features[:, :, rows][:, :, :, columns]


def refine_plainly(model: SharpMask, embedding: torch.Tensor, windows: list) -> torch.Tensor:
    """The vertical path as the paper draws it: (1, E) to (S, S) logits."""
    cells = model.deepmask.cells
    mask = model.encode(embedding).view(1, -1, cells, cells)
    for module, window in zip(model.refinements, windows, strict=True):
        mask = F.relu(window + module.vertical(mask))
        mask = F.interpolate(mask, scale_factor=2.0, mode="nearest")
    return model.predict(mask)[0, 0]


def propose_plainly(model: DeepMask | SharpMask, image: np.ndarray, count: int) -> list[tuple]:
    """Score and RLE of the best cells that have a pixel, one cell after the other."""
    deepmask = getattr(model, "deepmask", model)
    half, size = deepmask.patch_size // 2, deepmask.cells
    scored, pyramid = [], []
    for index, log2_scale in enumerate(LOG2_SCALES):
        scaled = resize_image(image, 2.0**log2_scale)
        features = deepmask.trunk(pad_and_normalize(torch.from_numpy(scaled), half))
        pyramid.append((features, np.divide(scaled.shape[1::-1], image.shape[1::-1])))
        for row in range(features[-1].shape[2] - size + 1):
            for column in range(features[-1].shape[3] - size + 1):
                window = cut(features[-1], row, column, size)
                score = deepmask.score(deepmask.embed(window), window).item()
                scored.append((score, index, row, column))
    found = []
    for score, index, row, column in sorted(scored, key=lambda cell: -cell[0])[:count]:
        features, scale_xy = pyramid[index]
        embedding = deepmask.embed(cut(features[-1], row, column, size)).flatten(1)
        logits = deepmask.decode_masks(embedding)[0]
        if isinstance(model, SharpMask):
            maps = model.horizontal_maps(features)
            windows = [cut(m, row << i, column << i, size << i) for i, m in enumerate(maps)]
            logits = refine_plainly(model, embedding, windows)
        sides = [*(np.array([16 * column, 16 * row]) - half) / scale_xy, *2 * half / scale_xy]
        place = np.array([sides])
        pasted = paste(logits[None], place, image_size=image.shape[:2], threshold=0.2)
        found += [(1 / (1 + math.exp(-score)), rle) for rle in pasted.rles]
    return found


@pytest.mark.parametrize("num_modules", [0, 2, 4])
@torch.inference_mode()
def test_fast_proposals_are_the_plain_ones(num_modules):
    image = np.random.default_rng(0).integers(0, 256, (90, 130, 3), dtype=np.uint8)
    model, count = build(num_modules=num_modules or 4), 60
    # Steep edges, as trained masks have: few pixels on the very threshold.
    model.predict.weight *= 100
    model.deepmask.mask_head.weight *= 100
    model = model if num_modules else model.deepmask
    expected = propose_plainly(model, image, count)
    found = Proposer(model, device=CPU, num_proposals=count, log2_scales=(-1.0, 0.5, 0.5))(image)
    assert len(found) == len(expected) > count // 2
    np.testing.assert_allclose(found.scores, [score for score, _ in expected], atol=1e-5)
    for i, (_, counts) in enumerate(expected):
        theirs = found.rle(i) | {"counts": counts}
        assert coco_mask.iou([found.rle(i)], [theirs], [0])[0, 0] >= 0.999


@pytest.mark.parametrize("trunk", SURROUNDINGS)
@torch.inference_mode()
def test_dense_refinement_equals_refining_each_patch_on_its_own(trunk):
    """Every patch cut out with all the surroundings that its features depend on."""
    model, cells = build(trunk, 32), 2
    border = 16 * (SURROUNDINGS[trunk] + 3)  # the horizontal nets see three cells more
    size = 2 * border + 32
    image = np.random.default_rng(1).integers(0, 256, (size + 32, size + 32, 3), dtype=np.uint8)
    proposer = Proposer(model, device=CPU)
    first = border // 16 + 1  # the cell whose patch begins `border` px into the padded image + 1
    chosen = torch.tensor([[first, first], [first + 2, first + 1]])
    together = proposer.decode([proposer.run_scale(image, 0.0)], in_scale(0, chosen))
    padded = pad_and_normalize(torch.from_numpy(image), 16)
    for (row, column), mask in zip(chosen.tolist(), together, strict=True):
        top, left = 16 * row - border, 16 * column - border
        features = model.deepmask.trunk(
            padded[..., top : top + size, left : left + size].contiguous()
        )
        embedding = model.deepmask.embed(model.deepmask.crop_center(features[-1]))
        windows = [
            each[..., s : s + (cells << i), s : s + (cells << i)]
            for i, each in enumerate(model.horizontal_maps(features))
            for s in [border // 16 << i]
        ]
        alone = model.refine(embedding.flatten(1), windows)[0]
        assert alone.std() > 1e-3
        torch.testing.assert_close(mask, alone, rtol=1e-4, atol=1e-4)


# Steps.


def test_log2_range():
    assert log2_range(-2.5, 0.5, 0.5) == [-2.5, -2, -1.5, -1, -0.5, 0, 0.5]
    assert log2_range(-2.5, 1, 0.5)[-1] == 1 and log2_range(0, 0, 1) == [0]
    assert len(log2_range(-1, 1, 0.1)) == 21


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(1, 90),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_best_cells_equals_sorting_a_list(sizes, count, ties):
    torch.manual_seed(len(sizes) * 100 + count)
    maps = [torch.randn(h, w) for h, w in sizes]
    maps = [m.round() if ties else m for m in maps]
    rows = [(-v, n, *cell) for n, m in enumerate(maps) for cell, v in np.ndenumerate(m.numpy())]
    expected = sorted(rows)[:count]  # equal scores: the earlier scale, then row, then column
    logits, cells = best_cells(maps, count)
    assert cells.tolist() == [list(row[1:]) for row in expected]
    assert torch.equal(logits, torch.tensor([-row[0] for row in expected]))


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 1, 2, 3]))
@settings(max_examples=60, deadline=None)
def test_windows_lie_at_their_cells(height, width, power):
    """A map of pixel numbers: window (i, j) starts at (i, j) x step; beyond the map it repeats."""
    step, cells = 1 << power, 2
    numbers = torch.arange(height * width, dtype=torch.float32).view(1, height, width)
    rows, columns = (max(1, -(-side // step) - cells + 1) for side in (height, width))
    chosen = torch.tensor([[rows - 1, columns - 1], [0, 0], [rows // 2, columns // 2]])
    windows = gather_windows(numbers, chosen, size=cells * step, step=step)
    for (i, j), window in zip(chosen.tolist(), windows, strict=True):
        assert torch.equal(window, cut(numbers[None], i * step, j * step, cells * step)[0])


def test_a_patch_lies_around_its_cell():
    cells, scale_xy = np.array([[0, 0], [2, 5]]), np.array([[1, 1], [0.5, 0.3]])
    places = place_patches(cells, scale_xy, 160)
    assert places[0].tolist() == [-80, -80, 160, 160]
    assert places[1].tolist() == [(16 * 5 - 80) / 0.5, (16 * 2 - 80) / 0.3, 320, 160 / 0.3]
    whole = place_patches(cells, scale_xy, 160, align_corners=True)
    assert whole.tolist() == [[-80, -80, 160, 160], [0, math.floor(-48 / 0.3), 320, 533]]


def test_masks_stay_where_the_object_is():
    """A network that marks red pixels: proposals outline the red square, not a shifted one."""

    class RedTrunk(torch.nn.Module):
        name, channels, strides = "red", (1, 1, 1, 3), (2, 4, 8, 16)

        def __init__(self):
            super().__init__()
            self.pool = torch.nn.AvgPool2d(16)

        def forward(self, x):
            return [self.pool(x)]

    sizes = {"patch_size": 96, "context": 0, "mask_size": 6, "reduction": 3, "embedding": 36}
    red = DeepMask(RedTrunk(), **sizes, score_hidden=1)
    with torch.no_grad():
        for parameter in red.parameters():
            parameter.zero_()
        red.tail[0].weight[0, :2, 0, 0] = torch.tensor([4.0, -4.0])  # red, not green
        for cell in range(36):
            red.tail[2].weight[cell, 0, cell // 6, cell % 6] = 1
            red.mask_head.weight[cell, cell] = 1
        red.mask_head.bias.fill_(-8)
    picture = np.full((192, 240, 3), 110, np.uint8)
    picture[48:128, 64:160] = (255, 0, 0)
    truth = np.zeros((192, 240), np.uint8, order="F")
    truth[48:128, 64:160] = 1
    options = {"num_proposals": 10_000, "log2_scales": (-1.0, 0.0, 0.5), "mask_threshold": 0.5}
    proposals = Proposer(red, device=CPU, **options)(picture)
    rles = [proposals.rle(i) for i in range(len(proposals))]
    ious = coco_mask.iou(rles, [coco_mask.encode(truth)], [0])[:, 0]
    assert ious.max() > 0.9
    best = proposals.boxes[ious.argmax()]
    assert np.abs(best - [64, 48, 160, 128]).max() <= 4  # a quarter of a 16-pixel cell


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 200, 3), (150, 7, 3)])
def test_images_smaller_than_a_patch(model, shape):
    proposals = Proposer(model, device=CPU, num_proposals=20)(np.full(shape, 200, np.uint8))
    assert len(proposals) <= 20
    for i in range(len(proposals)):
        assert coco_mask.decode(proposals.rle(i)).shape == shape[:2]


# After the masks.


def test_nms_in_the_proposer(model, image):
    every = Proposer(model, device=CPU, num_proposals=200)(image)
    few = Proposer(model, device=CPU, num_proposals=200, nms=0.5)(image)
    assert 0 < len(few) < len(every)
    assert few.rles == mask_nms(every, 0.5).rles
    soft = Proposer(model, device=CPU, num_proposals=200, nms=0.5, soft_nms=True)(image)
    assert len(few) < len(soft) <= len(every)
    assert soft.rles == soft_mask_nms(every, 0.5).rles


def test_more_of_a_larger_image_and_how_many_the_limit_left_out(model, image):
    """In 0.03 megapixels, 1000 for each are 30: more than 20, fewer than 40."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.deepmask.score_head[-1].bias += 0.15  # so that about half of the cells are above .5
    every = Proposer(model, device=CPU, num_proposals=10_000)(image)
    assert every.num_cut_off == 0 < (every.logits > 0).sum()
    for num_proposals, limit in ((20, 30), (40, 40)):
        proposer = Proposer(model, device=CPU, num_proposals=num_proposals, per_megapixel=1000)
        found = proposer(image)
        assert proposer.options.limit(*image.shape[:2]) == limit
        assert found.rles == every.rles[: len(found)] and limit - 5 < len(found) <= limit
        assert found.num_cut_off == pytest.approx((every.logits[limit:] > 0).sum(), abs=5)
