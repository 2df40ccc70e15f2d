"""MultiPathNet against a slow forward written with loops, and Fast R-CNN as a configuration of it.

The reference takes a network's weights and nothing else: which regions and layers there are, how
they are pooled, scaled and ordered, is written here.
"""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models.dropout import KeyedDropout
from torch import Tensor, nn
from torchvision.ops import roi_pool

from datasets.roi_sampler import box_targets
from models import multipathnet
from models.multipathnet import (
    FullyConnectedHead,
    MultiPathNet,
    Region,
    ResidualHead,
    box_tower,
    foveal_towers,
)
from models.trunk import build_trunk

CLASSES, WIDTH, POOLED, FEATURES = 3, 8, 3, 16
CHANNELS = {4: 24, 8: 64, 16: 128}  # of the tiny trunk
HEIGHT, IMAGE_WIDTH = 64, 96
ALL = (4, 8, 16)
PAPER = [(1.0, ALL), (1.5, (8, 16)), (2.0, (8, 16)), (4.0, (16,))]  # BMVC 2016, figure 3
ONE_LAYER = [(1.0, (16,)), (1.5, (16,)), (2.0, (16,)), (4.0, (16,))]
# (what is switched off, regions of the classifier, region of the box regressor)
PARTS = {
    "all": ({}, PAPER, (1.5, ALL)),
    "no foveal": ({"regions": foveal_towers(foveal=False)}, PAPER[:1], (1.5, ALL)),
    "no skip": (
        {"regions": foveal_towers(skip=False), "box_region": box_tower(skip=False)},
        ONE_LAYER,
        (1.5, (16,)),
    ),
    "no box tower": ({"box_region": None}, PAPER, None),
    "no integral": ({"num_thresholds": 1}, PAPER, (1.5, ALL)),
    "not normalized": ({"normalize": False}, PAPER, (1.5, ALL)),
}
FAST_RCNN = {
    "regions": foveal_towers(foveal=False, skip=False),
    "box_region": None,
    "num_thresholds": 1,
    "normalize": False,
    "width": CHANNELS[16],
}


def fully_connected(width: int = WIDTH) -> FullyConnectedHead:
    return FullyConnectedHead(width, POOLED, FEATURES, dropout=0.5, stream=10)


def residual(width: int = WIDTH) -> ResidualHead:
    stage = nn.Sequential(nn.Conv2d(width, FEATURES, 3, stride=2, padding=1), nn.ReLU())
    return ResidualHead(stage, FEATURES)


HEADS = {"fully connected": fully_connected, "residual": residual}


def build(head=fully_connected, **changes) -> MultiPathNet:
    """The paper's network with all parts on a tiny trunk, in eval mode."""
    torch.manual_seed(0)
    options = {"regions": foveal_towers(), "box_region": box_tower(), "width": WIDTH} | changes
    return MultiPathNet(
        build_trunk("tiny"),
        head(options["width"]),
        num_classes=CLASSES,
        pooled_size=POOLED,
        **options,
    ).eval()


def randomise(model: MultiPathNet) -> MultiPathNet:
    """Large values in every weight and bias behind the trunk, so that none can be left out."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not name.startswith("trunk."):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def some_layers(num_images: int = 2) -> dict[int, Tensor]:
    """Feature maps with negative values, too, where the maximum over no cell would show."""
    generator = torch.Generator().manual_seed(2)
    return {
        stride: torch.randn(
            num_images, channels, HEIGHT // stride, IMAGE_WIDTH // stride, generator=generator
        )
        for stride, channels in CHANNELS.items()
    }


ROIS = torch.tensor(
    [
        [0, 3.25, 5.5, 40.75, 33.25],
        [1, 8, 24, 72, 56],  # corners at half a cell of conv5
        [0, -40, -24, 30, 20],  # partly outside, with half cells
        [1, 200, 150, 260, 190],  # outside: no region sees the image
        [1, 50, 10, 50.5, 10.25],  # smaller than a cell
        [0, 0, 0, IMAGE_WIDTH, HEIGHT],
    ]
)


def random_rois(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(count, 4, generator=generator) * torch.tensor([60.0, 40, 36, 24])
    corners[:, 2:] += corners[:, :2]
    images = torch.arange(count).remainder(2).float()[:, None]
    return torch.cat([images, corners], dim=1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To a share of the largest value."""
    expected = expected.to(actual.dtype)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


# --- the slow reference ---------------------------------------------------------------------------


def cells(low: float, high: float, factor: float, stride: int, size: int) -> list[range]:
    """The rows (or columns) of a map that each cell of a RoI takes the maximum over.

    Caffe's RoI pooling: a side's ends are rounded to cells of the map, half away from zero, and
    both belong to the RoI; cells are rounded outwards, so they may overlap; what lies outside the
    map is left out.
    """
    center, half = (low + high) / 2, (high - low) / 2 * factor
    ends = ((center - half) / stride, (center + half) / stride)
    first, last = (int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in ends)
    length = max(last - first + 1, 1)
    return [
        range(
            max(first + i * length // POOLED, 0),
            min(first + math.ceil((i + 1) * length / POOLED), size),
        )
        for i in range(POOLED)
    ]


def rounded_cells(low: float, high: float, factor: float, stride: int, size: int) -> list[range]:
    """The same for the released code's RoI pooling: its last cell of the map is not the RoI's.

    What is left is parted at rounded edges, so that no cell of the map belongs to two.
    """
    center, half = (low + high) / 2, (high - low) / 2 * factor
    ends = ((center - half) / stride, (center + half) / stride)
    first, last = (int(math.copysign(math.floor(abs(v) + 0.5), v)) for v in ends)
    length = max(last - first, 1)
    edges = [first + math.floor(i * length / POOLED + 0.5) for i in range(POOLED + 1)]
    edges = [min(max(edge, 0), size) for edge in edges]
    return [range(*pair) for pair in itertools.pairwise(edges)]


def slow_pool(layer: Tensor, rois: Tensor, factor: float, stride: int, cells=cells) -> Tensor:
    """(R, C, s, s) float64: the maximum over each cell, 0 where the map has none of it."""
    channels, height, width = layer.shape[1:]
    values = layer.tolist()
    pooled = torch.zeros(len(rois), channels, POOLED, POOLED, dtype=torch.float64)
    for r, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        rows = cells(y1, y2, factor, stride, height)
        columns = cells(x1, x2, factor, stride, width)
        for c in range(channels):
            channel = values[int(image)][c]
            for i, j in itertools.product(range(POOLED), repeat=2):
                inside = [channel[y][x] for y in rows[i] for x in columns[j]]
                pooled[r, c, i, j] = max(inside, default=0.0)
    return pooled


def pool_everything(cells) -> dict[tuple[float, int], Tensor]:
    """`ROIS` pooled from `some_layers`, by factor and stride."""
    looks = {(factor, 16) for factor in (1.0, 1.5, 2.0, 4.0)}
    looks |= {(1.0, 4), (1.0, 8), (1.5, 4), (1.5, 8), (2.0, 8)}
    layers = some_layers()
    return {(f, stride): slow_pool(layers[stride], ROIS, f, stride, cells) for f, stride in looks}


@pytest.fixture(scope="module")
def pooled() -> dict[tuple[float, int], Tensor]:
    return pool_everything(cells)


def slow_scale(block: Tensor, stride: int, normalize: bool) -> Tensor:
    if not normalize:
        return block * {4: 1 / 200, 8: 1 / 30, 16: 1.0}[stride]
    scaled = torch.zeros_like(block)
    for r, one in enumerate(block):
        norm = math.sqrt(sum(v * v for v in one.flatten().tolist()))
        if norm > 0:  # a region outside the map stays 0
            scaled[r] = one * 1000 / norm
    return scaled


def slow_features(tower: nn.Module, blocks: list[Tensor]) -> Tensor:
    """1x1 convolution and head of a tower with float64 weights, as matrix products."""
    x = torch.cat(blocks, dim=1)
    if tower.pooling.mix is not None:
        mix = tower.pooling.mix
        x = torch.einsum("oc,rcij->roij", mix.weight[:, :, 0, 0], x) + mix.bias[:, None, None]
    if isinstance(tower.head, ResidualHead):
        conv = tower.head.stage[0]
        x = F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1).clamp(min=0)
        return x.sum((2, 3)) / (x.shape[2] * x.shape[3])
    for layer in (tower.head.fc6, tower.head.fc7):
        x = (x.reshape(len(x), -1) @ layer.weight.T + layer.bias).clamp(min=0)
    return x


@torch.no_grad()
def slow_outputs(model, pooled, regions, box_region, *, normalize: bool) -> dict[str, Tensor]:
    model = copy.deepcopy(model).double()

    def features(tower: nn.Module, factor: float, strides: tuple[int, ...]) -> Tensor:
        blocks = [slow_scale(pooled[factor, stride], stride, normalize) for stride in strides]
        return slow_features(tower, blocks)

    assert len(model.towers) == len(regions)
    joined = [features(t, *region) for t, region in zip(model.towers, regions, strict=True)]
    joined = torch.cat(joined, dim=1)
    boxes = features(model.box_tower, *box_region) if box_region else joined
    logits = joined @ model.classify.weight.T + model.classify.bias
    deltas = boxes @ model.regress.weight.T + model.regress.bias
    size = CLASSES + 1
    heads = [logits[:, k * size : (k + 1) * size] for k in range(logits.shape[1] // size)]
    classes = [deltas[:, c * 4 : (c + 1) * 4] for c in range(size)]
    return {"class_logits": torch.stack(heads, 1), "deltas": torch.stack(classes, 1)}


# --- the network is the reference -----------------------------------------------------------------


def test_towers_of_the_paper_and_without_a_part():
    def plain(regions: tuple[Region, ...]) -> list[tuple]:
        return [(region.factor, region.strides) for region in regions]

    assert plain(foveal_towers()) == PAPER
    assert plain(foveal_towers(foveal=False)) == PAPER[:1]
    assert plain(foveal_towers(skip=False)) == ONE_LAYER
    assert plain(foveal_towers(foveal=False, skip=False)) == ONE_LAYER[:1]
    assert plain((box_tower(), box_tower(skip=False))) == [(1.5, ALL), (1.5, (16,))]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_outputs_are_the_slow_references_with_each_part_switched_off(part, head, pooled):
    changes, regions, box_region = PARTS[part]
    model = randomise(build(HEADS[head], **changes))
    outputs = model.classify_rois(some_layers(), ROIS)
    expected = slow_outputs(
        model, pooled, regions, box_region, normalize=changes.get("normalize", True)
    )
    thresholds = 1 if part == "no integral" else 6
    assert outputs["class_logits"].shape == (len(ROIS), thresholds, CLASSES + 1)
    assert outputs["deltas"].shape == (len(ROIS), CLASSES + 1, 4)
    for name in ("class_logits", "deltas"):
        assert_close(outputs[name], expected[name])


@torch.no_grad()
def test_outputs_with_the_released_codes_bins(pooled):
    model = randomise(build(roi_bins="rounded"))
    outputs = model.classify_rois(some_layers(), ROIS)
    expected = slow_outputs(
        model, pool_everything(rounded_cells), PAPER, (1.5, ALL), normalize=True
    )
    other = slow_outputs(model, pooled, PAPER, (1.5, ALL), normalize=True)
    for name in ("class_logits", "deltas"):
        assert_close(outputs[name], expected[name])
        largest = expected[name].abs().max()
        assert (other[name] - expected[name]).abs().max() > 0.01 * largest  # the bins matter


@given(st.lists(st.tuples(*[st.integers(-160, 480)] * 4), min_size=1, max_size=2))
@settings(max_examples=25, deadline=None)
def test_towers_are_fed_the_maximum_over_each_cell(corners):
    """Corners at quarters of a pixel, half cells among them, on the map and outside."""
    rois = torch.tensor(
        [[0, min(a, c) / 4, min(b, d) / 4, max(a, c) / 4, max(b, d) / 4] for a, b, c, d in corners]
    )
    model, layers, fed = build(), some_layers(1), []
    model.towers[0].pooling.register_forward_pre_hook(lambda _, inputs: fed.extend(inputs[0]))
    with torch.no_grad():
        model.classify_rois(layers, rois)
    for block, stride in zip(fed, ALL, strict=True):
        assert torch.equal(block.double(), slow_pool(layers[stride], rois, 1.0, stride))


def test_each_layer_has_norm_1000_whatever_its_scale():
    total, fed = sum(CHANNELS.values()), []
    model = build(width=total)
    pooling = model.box_tower.pooling
    pooling.mix.weight.data = torch.eye(total)[:, :, None, None]  # so that all can be seen
    pooling.register_forward_hook(lambda _, inputs, output: fed.append(output))
    layers = some_layers()
    for scales in ((1, 1, 1), (200, 30, 1)):
        scaled = {stride: s * layers[stride] for stride, s in zip(ALL, scales, strict=True)}
        model.classify_rois(scaled, ROIS)
    assert_close(fed[1], fed[0])
    norms = [block.flatten(1).norm(dim=1) for block in fed[0].split(list(CHANNELS.values()), 1)]
    expected = torch.full((len(ROIS),), 1000.0)
    expected[3] = 0  # outside the map: zeros, not NaN
    for norm in norms:
        torch.testing.assert_close(norm, expected)


@torch.no_grad()
def test_without_normalization_a_tower_starts_as_conv5s_alone():
    """As Fast R-CNN, whose fc6 is copied; what the finer layers add is learnt from 0."""
    model = build(normalize=False, width=CHANNELS[16])
    blocks = {stride: torch.randn(2, c, POOLED, POOLED) for stride, c in CHANNELS.items()}
    for tower in (*model.towers, model.box_tower):
        started = tower.pooling([blocks[stride] for stride in tower.region.strides])
        torch.testing.assert_close(started, blocks[16])
    assert model.towers[3].pooling.mix is None  # conv5 only, of the right width


# --- Fast R-CNN -----------------------------------------------------------------------------------


class FastRCNN(nn.Module):
    """Girshick, ICCV 2015, figure 1."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.fc6 = nn.Linear(CHANNELS[16] * POOLED**2, FEATURES)
        self.fc7 = nn.Linear(FEATURES, FEATURES)
        self.cls_score = nn.Linear(FEATURES, CLASSES + 1)
        self.bbox_pred = nn.Linear(FEATURES, 4 * (CLASSES + 1))

    def forward(self, images: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        conv5 = self.trunk(images)[-1]
        x = roi_pool(conv5, rois, output_size=POOLED, spatial_scale=1 / 16).flatten(1)
        x = F.relu(self.fc7(F.relu(self.fc6(x))))
        return self.cls_score(x), self.bbox_pred(x)


OUR_NAMES = {
    "fc6": "towers.0.head.fc6",
    "fc7": "towers.0.head.fc7",
    "cls_score": "classify",
    "bbox_pred": "regress",
}


@torch.no_grad()
def test_fast_rcnn_is_a_configuration_without_extra_parameters():
    model = randomise(build(**FAST_RCNN))
    reference = FastRCNN(model.trunk)
    theirs, ours = dict(reference.named_parameters()), dict(model.named_parameters())
    for name in theirs:
        layer, _, kind = name.rpartition(".")
        theirs[name].copy_(ours.pop(f"{OUR_NAMES.get(layer, layer)}.{kind}"))
    assert not ours
    images, rois = torch.randn(2, 3, HEIGHT, IMAGE_WIDTH), random_rois(12)
    outputs, (scores, deltas) = model(images, rois), reference(images, rois)
    assert outputs["class_logits"].shape == (12, 1, CLASSES + 1)
    assert_close(outputs["class_logits"].flatten(1), scores)
    assert_close(outputs["deltas"].flatten(1), deltas)


# --- chunks, sharing, dropout ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("roi_bins", multipathnet.ROI_BINS)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_chunks_of_rois_give_the_outputs_of_the_whole(head, roi_bins, training):
    model = randomise(build(HEADS[head], roi_bins=roi_bins)).train(training)
    images, rois, keys = torch.randn(2, 3, HEIGHT, IMAGE_WIDTH), random_rois(23), torch.arange(23)
    whole, layers = model(images, rois, keys=keys), model.layers(images)
    assert set(layers) == {2, 4, 8, 16}
    for size in (1, 4, 7, 22, 23, 50):
        chunks = [
            model.classify_rois(layers, part, keys=part_keys)
            for part, part_keys in zip(rois.split(size), keys.split(size), strict=True)
        ]
        for name in ("class_logits", "deltas"):
            assert_close(torch.cat([chunk[name] for chunk in chunks]), whole[name])


@pytest.mark.parametrize("head", HEADS)
def test_no_rois_give_no_outputs(head):
    model = build(HEADS[head])
    outputs = model.classify_rois(some_layers(), torch.zeros(0, 5))
    assert outputs["class_logits"].shape == (0, 6, CLASSES + 1)
    assert outputs["deltas"].shape == (0, CLASSES + 1, 4)
    probabilities, boxes = model.decode(outputs, torch.zeros(0, 4))
    assert probabilities.shape == (0, CLASSES + 1) and boxes.shape == (0, CLASSES, 4)


def test_towers_share_pooling_but_no_weights(monkeypatch):
    looks = []

    def counted(layer: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
        looks.extend((layer.shape[1], width.item()) for width in rois[:, 3] - rois[:, 1])
        return roi_pool(layer, rois, size, scale)

    monkeypatch.setattr(multipathnet, "roi_pool_overlapping", counted)
    model = build()
    model.classify_rois(some_layers(), ROIS[1:2])  # 64 pixels wide
    # The box tower pools conv3 only: conv4 and conv5 at 1.5x are the second tower's.
    assert sorted(looks) == [
        (24, 64), (24, 96), (64, 64), (64, 96), (64, 128), (128, 64), (128, 96), (128, 128),
        (128, 256),
    ]  # fmt: skip
    same = build(regions=(Region(1.0, (16,)),) * 2, box_region=Region(1.0, (16,)))
    looks.clear()
    same.classify_rois(some_layers(), ROIS)
    assert len(looks) == len(ROIS)
    towers = [*same.towers, same.box_tower]
    own = [{p.data_ptr() for p in tower.parameters()} for tower in towers]
    assert [len(pointers) for pointers in own] == [6, 6, 6]  # mix, fc6 and fc7
    assert len(set.union(*own)) == 18
    start = [tower.head.fc6.weight for tower in towers]  # of the head that was given, as ImageNet's
    assert torch.equal(start[0], start[1]) and torch.equal(start[0], start[2])


def tower_features(model: MultiPathNet, keys: Tensor | None) -> list[Tensor]:
    """Every tower's fc7, of the same RoIs of the same map."""
    features: list[Tensor] = []
    towers = [*model.towers, model.box_tower]
    hooks = [t.head.register_forward_hook(lambda _, a, out: features.append(out)) for t in towers]
    with torch.no_grad():
        model.classify_rois(some_layers(), random_rois(4), keys=keys)
    for hook in hooks:
        hook.remove()
    return features


def test_dropout_differs_between_towers_and_depends_on_the_keys_alone():
    """Towers of the same region and weights: only dropout can tell them apart."""
    one = Region(1.0, (16,))
    model = build(regions=(one,) * 3, box_region=one, normalize=False, width=CHANNELS[16])
    plain = tower_features(model, None)
    assert len(plain) == 4 and all(torch.equal(plain[0], features) for features in plain)
    keys = torch.tensor([4, 1 << 40, 17, 5])
    model.train()
    dropped = tower_features(model, keys)
    for a, b in itertools.combinations(dropped, 2):
        assert not torch.equal(a, b)
    torch.manual_seed(99)  # the process's generator has no part in it
    assert all(map(torch.equal, dropped, tower_features(model, keys)))
    assert not any(map(torch.equal, dropped, tower_features(model, keys + 1)))
    with pytest.raises(AssertionError, match="keys"):
        tower_features(model, None)


def test_every_dropout_has_a_stream_of_its_own():
    model = build()
    streams = [m.stream for m in model.modules() if isinstance(m, KeyedDropout)]
    assert len(streams) == 10 and len(set(streams)) == 10


# --- outputs to detections, initial weights -------------------------------------------------------


def test_probabilities_are_the_mean_of_the_softmaxes_and_boxes_lose_the_background():
    model = build()
    torch.manual_seed(0)
    logits, deltas = 3 * torch.randn(5, 6, CLASSES + 1), 0.2 * torch.randn(5, CLASSES + 1, 4)
    model.delta_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.05]))
    model.delta_std.copy_(torch.tensor([0.5, 0.4, 0.3, 0.2]))
    rois = random_rois(5)[:, 1:]
    outputs = {"class_logits": logits, "deltas": deltas}
    probabilities, boxes = model.decode(outputs, rois)
    assert probabilities.shape == (5, CLASSES + 1) and boxes.shape == (5, CLASSES, 4)
    mean, std = model.delta_mean.tolist(), model.delta_std.tolist()
    for r, (x1, y1, x2, y2) in enumerate(rois.tolist()):
        for c in range(CLASSES + 1):
            shares = [
                math.exp(head[c]) / sum(math.exp(z) for z in head) for head in logits[r].tolist()
            ]
            assert math.isclose(probabilities[r, c].item(), sum(shares) / 6, rel_tol=1e-4)
        for c in range(CLASSES):
            values = zip(deltas[r, c + 1].tolist(), std, mean, strict=True)
            dx, dy, dw, dh = (d * s + m for d, s, m in values)
            x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
            w, h = (x2 - x1) * math.exp(dw), (y2 - y1) * math.exp(dh)
            expected = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            torch.testing.assert_close(boxes[r, c], expected, rtol=1e-4, atol=1e-3)


def test_a_perfect_regressor_decodes_to_the_objects():
    """Targets of training, normalized by the measured mean and std, come back as boxes."""
    model = build()
    model.delta_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.05]))
    model.delta_std.copy_(torch.tensor([0.1, 0.1, 0.2, 0.2]))
    rois, objects = random_rois(10)[:5, 1:], random_rois(10)[5:, 1:]
    targets = model.normalize_deltas(torch.from_numpy(box_targets(rois.numpy(), objects.numpy())))
    outputs = {
        "class_logits": torch.zeros(5, 6, CLASSES + 1),
        "deltas": targets[:, None].expand(-1, CLASSES + 1, -1),
    }
    _, boxes = model.decode(outputs, rois)
    for c in range(CLASSES):
        torch.testing.assert_close(boxes[:, c], objects, rtol=1e-4, atol=1e-3)


def test_the_measured_mean_and_std_are_saved_with_the_weights():
    model, other = build(), build()
    model.delta_mean.fill_(0.3)
    model.delta_std.fill_(0.1)
    other.load_state_dict(model.state_dict())
    assert other.delta_mean.tolist() == model.delta_mean.tolist()
    assert other.delta_std.tolist() == model.delta_std.tolist()


def test_initial_weights():
    torch.manual_seed(0)
    model = MultiPathNet(
        build_trunk("tiny"),
        fully_connected(),
        num_classes=80,
        regions=foveal_towers(),
        box_region=box_tower(),
        pooled_size=POOLED,
        width=WIDTH,
    )
    assert model.classify.weight.shape == (6 * 81, 4 * FEATURES)
    assert model.regress.weight.shape == (81 * 4, FEATURES)
    for layer, std in ((model.classify, 0.01), (model.regress, 0.001)):
        assert math.isclose(layer.weight.std().item(), std, rel_tol=0.05)
        assert abs(layer.weight.mean().item()) < 0.05 * std
        assert not layer.bias.any()
