"""MultiPathNet against a slow forward, and Fast R-CNN as a configuration of it.

The reference takes a network's weights and nothing else: which regions and layers there are, how
they are scaled and ordered, is written here. RoI pooling itself is tested in test_roi_pooling.py.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import roi_pool

from models import multipathnet
from models.backbone import has_last_stage
from models.boxes import decode_boxes
from models.build import build_multipathnet
from models.multipathnet import (
    HEADS,
    FullyConnectedHead,
    MultiPathNet,
    ResidualHead,
    compress_towers,
    truncate_linear,
)
from models.roi_pooling import roi_pool_lua
from models.trunk import TrunkConfig, build_trunk

CLASSES, WIDTH, POOLED, FEATURES = 3, 8, 3, 16
CHANNELS = {4: 24, 8: 64, 16: 128}  # of the tiny trunk
HEIGHT, IMAGE_WIDTH = 64, 96
ALL = (4, 8, 16)
PAPER = [(1.0, ALL), (1.5, (8, 16)), (2.0, (8, 16)), (4.0, (16,))]  # BMVC 2016, figure 3
ONE_LAYER = [(1.0, (16,)), (1.5, (16,)), (2.0, (16,)), (4.0, (16,))]
FAST_RCNN = {  # Girshick, ICCV 2015, figure 1
    "foveal": False,
    "skip": False,
    "use_box_tower": False,
    "iou_thresholds": (0.5,),
    "normalize": False,
    "width": CHANNELS[16],
}
# Settings, regions of the classifier, region of the box regressor.
PARTS = {
    "all": ({}, PAPER, (1.5, ALL)),
    "no foveal": ({"foveal": False}, PAPER[:1], (1.5, ALL)),
    "no skip": ({"skip": False}, ONE_LAYER, (1.5, (16,))),
    "no box tower": ({"use_box_tower": False}, PAPER, None),
    "no integral": ({"iou_thresholds": (0.5,)}, PAPER, (1.5, ALL)),
    "not normalized": ({"normalize": False}, PAPER, (1.5, ALL)),
    "Fast R-CNN": (FAST_RCNN, [(1.0, (16,))], None),
}


def residual() -> ResidualHead:
    stage = nn.Sequential(nn.Conv2d(CHANNELS[16], FEATURES, 3, stride=2, padding=1), nn.ReLU())
    return ResidualHead(stage, FEATURES)


def build(head: str = "fc", *, num_classes: int = CLASSES, **settings) -> MultiPathNet:
    """The paper's network with all parts on a tiny trunk, in eval mode."""
    torch.manual_seed(0)
    sizes = {"pooled_size": POOLED, "width": WIDTH, "features": FEATURES}
    return MultiPathNet(
        build_trunk("tiny"),
        num_classes=num_classes,
        layer4=residual() if head == "layer4" else None,
        **(sizes | settings),
    ).eval()


def randomize(model: MultiPathNet) -> MultiPathNet:
    """Large values in every weight and bias after the trunk, so that none can be left out."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not name.startswith("trunk."):
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def random_rois(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    corners = torch.rand(count, 4, generator=generator) * torch.tensor([60.0, 40, 36, 24])
    corners[:, 2:] += corners[:, :2]
    images = torch.arange(count).remainder(2).float()[:, None]
    return torch.cat([images, corners], dim=1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To a fraction of the largest value."""
    expected = expected.to(actual.dtype)
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)


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


def pool_everything(pool) -> dict[tuple[float, int], Tensor]:
    """`ROIS` pooled from `some_layers`, by factor and stride, in float64."""
    inputs = {(factor, 16) for factor in (1.0, 1.5, 2.0, 4.0)}
    inputs |= {(1.0, 4), (1.0, 8), (1.5, 4), (1.5, 8), (2.0, 8)}
    pooled, layers = {}, some_layers()
    for factor, stride in inputs:
        rois = ROIS.clone()
        for low, high in ((1, 3), (2, 4)):
            center, half = (ROIS[:, low] + ROIS[:, high]) / 2, (ROIS[:, high] - ROIS[:, low]) / 2
            rois[:, low], rois[:, high] = center - factor * half, center + factor * half
        pooled[factor, stride] = pool(layers[stride], rois, POOLED, 1 / stride).double()
    return pooled


def slow_scale(block: Tensor, stride: int, normalize: bool) -> Tensor:
    if not normalize:
        return block * {4: 1 / 200, 8: 1 / 30, 16: 1.0}[stride]
    norm = block.square().sum((1, 2, 3), keepdim=True).sqrt()
    return torch.where(norm > 0, block * 1000 / norm, 0.0)  # a region outside the map stays 0


def slow_features(tower: nn.Module, blocks: list[Tensor]) -> Tensor:
    """1x1 convolution and head of a tower with float64 weights, as matrix products."""
    x = torch.cat(blocks, dim=1)
    if (reduce := tower.pooling.reduce) is not None:
        x = torch.einsum("oc,rcij->roij", reduce.weight[:, :, 0, 0], x)
        x = x + reduce.bias[:, None, None]
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
    logits = joined @ model.cls_score.weight.T + model.cls_score.bias
    deltas = boxes @ model.bbox_pred.weight.T + model.bbox_pred.bias
    return {
        "class_logits": logits.unflatten(1, (-1, CLASSES + 1)),  # all classes of a threshold first
        "deltas": deltas.unflatten(1, (CLASSES + 1, 4)),
    }


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("part", PARTS)
@torch.no_grad()
def test_outputs_are_the_slow_references_with_each_part_switched_off(part, head):
    changes, regions, box = PARTS[part]
    model = randomize(build(head, **changes))
    outputs = model.classify_rois(some_layers(), ROIS)
    pooled = pool_everything(roi_pool)
    expected = slow_outputs(model, pooled, regions, box, normalize=changes.get("normalize", True))
    thresholds = len(changes.get("iou_thresholds", range(6)))
    assert outputs["class_logits"].shape == (len(ROIS), thresholds, CLASSES + 1)
    assert outputs["deltas"].shape == (len(ROIS), CLASSES + 1, 4)
    for name in ("class_logits", "deltas"):
        assert_close(outputs[name], expected[name])


def test_fast_rcnn_has_no_other_parameters():
    names = {name for name, _ in build(**FAST_RCNN).named_parameters() if name[:6] != "trunk."}
    layers = ("towers.0.head.fc6", "towers.0.head.fc7", "cls_score", "bbox_pred")
    assert names == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


@torch.no_grad()
def test_outputs_with_the_released_codes_bins():
    model = randomize(build(roi_pool="lua"))
    outputs = model.classify_rois(some_layers(), ROIS)
    expected, other = (
        slow_outputs(model, pool_everything(pool), PAPER, (1.5, ALL), normalize=True)
        for pool in (roi_pool_lua, roi_pool)
    )
    for name in ("class_logits", "deltas"):
        assert_close(outputs[name], expected[name])
        largest = expected[name].abs().max()
        assert (other[name] - expected[name]).abs().max() > 0.01 * largest  # the bins matter


@torch.no_grad()
def test_without_normalization_a_tower_starts_as_conv5s_alone():
    """As Fast R-CNN, whose fc6 is copied; the finer layers' weights start at 0."""
    model = build(normalize=False, width=CHANNELS[16])
    blocks = {stride: torch.randn(2, c, POOLED, POOLED) for stride, c in CHANNELS.items()}
    for tower in model.all_towers():
        started = tower.pooling([blocks[stride] for stride in tower.region.strides])
        torch.testing.assert_close(started, blocks[16])
    assert model.towers[3].pooling.reduce is None  # conv5 only, of the right width


@pytest.mark.parametrize("pool", multipathnet.ROI_POOLS)
@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_chunks_of_rois_give_the_outputs_of_the_whole(head, pool):
    model = randomize(build(head, roi_pool=pool))
    images, rois = torch.randn(2, 3, HEIGHT, IMAGE_WIDTH), random_rois(23)
    whole, layers = model(images, rois), model.layers(images)
    assert set(layers) == {2, 4, 8, 16}
    for size in (1, 4, 7, 22, 23, 50):
        chunks = [model.classify_rois(layers, part) for part in rois.split(size)]
        for name in ("class_logits", "deltas"):
            assert_close(torch.cat([chunk[name] for chunk in chunks]), whole[name])


@pytest.mark.parametrize("head", HEADS)
def test_no_rois_give_no_outputs(head):
    model = build(head)
    outputs = model.classify_rois(some_layers(), torch.zeros(0, 5))
    assert outputs["class_logits"].shape == (0, 6, CLASSES + 1)
    assert outputs["deltas"].shape == (0, CLASSES + 1, 4)
    probabilities, boxes = model.decode(outputs, torch.zeros(0, 4))
    assert probabilities.shape == (0, CLASSES + 1) and boxes.shape == (0, CLASSES, 4)


def test_towers_share_pooling_but_no_weights(monkeypatch):
    pooled = []

    def counted(layer: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
        pooled.extend((layer.shape[1], width.item()) for width in rois[:, 3] - rois[:, 1])
        return roi_pool(layer, rois, size, scale)

    monkeypatch.setitem(multipathnet.ROI_POOLS, "caffe", counted)
    model = build(normalize=False, width=CHANNELS[16])
    model.classify_rois(some_layers(), ROIS[1:2])  # 64 pixels wide
    # The box tower pools conv3 only: conv4 and conv5 at 1.5x are the second tower's.
    assert sorted(pooled) == [
        (24, 64), (24, 96), (64, 64), (64, 96), (64, 128), (128, 64), (128, 96), (128, 128),
        (128, 256),
    ]  # fmt: skip
    towers = model.all_towers()
    weights = [{p.data_ptr() for p in tower.parameters()} for tower in towers]
    assert [len(pointers) for pointers in weights] == [6, 6, 6, 4, 6]  # fc6 and fc7, reduce
    assert len(set.union(*weights)) == 28
    first, *others = (tower.head.fc6.weight for tower in towers)  # copies of one head
    assert all(torch.equal(first, other) for other in others)


def test_heads_drop_features_in_training_only():
    head = FullyConnectedHead(WIDTH, POOLED, 1000, dropout=0.25)
    nn.init.zeros_(head.fc7.weight)
    nn.init.ones_(head.fc7.bias)
    block = torch.randn(2, WIDTH, POOLED, POOLED)
    assert (head.eval()(block) == 1).all()
    dropped = (head.train()(block) == 0).float().mean()
    assert 0.2 < dropped < 0.3


@torch.no_grad()
def test_truncated_layers_are_the_best_of_their_rank():
    layer = nn.Linear(12, 9)
    values = torch.linalg.svdvals(layer.weight)
    for rank in (2, 9, 50):
        first, second = truncate_linear(layer, rank)
        error = torch.linalg.matrix_norm(second.weight @ first.weight - layer.weight)
        torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-4, atol=1e-5)
        assert first.bias is None and torch.equal(second.bias, layer.bias)


def test_compression_replaces_layers_where_that_saves_work():
    model = build(features=64)
    compress_towers(model, 32)  # fc6 is 72 x 64, more than 32 (72 + 64); fc7 64 x 64, not more
    for tower in model.all_towers():
        assert isinstance(tower.head.fc6, nn.Sequential) and isinstance(tower.head.fc7, nn.Linear)
    with pytest.raises(ValueError, match="no fully connected layers"):
        compress_towers(build("layer4"), 4)


def test_probabilities_are_the_mean_of_the_softmaxes_and_boxes_lose_the_background():
    model = build()
    torch.manual_seed(0)
    logits, deltas = 3 * torch.randn(5, 6, CLASSES + 1), 0.2 * torch.randn(5, CLASSES + 1, 4)
    mean, std = [0.1, -0.2, 0.3, 0.05], [0.5, 0.4, 0.3, 0.2]
    model.set_delta_statistics(torch.tensor(mean), torch.tensor(std))
    rois = random_rois(5)[:, 1:]
    probabilities, boxes = model.decode({"class_logits": logits, "deltas": deltas}, rois)
    assert probabilities.shape == (5, CLASSES + 1) and boxes.shape == (5, CLASSES, 4)
    for r in range(5):
        for c in range(CLASSES + 1):
            each = [math.exp(z[c]) / sum(map(math.exp, z)) for z in logits[r].tolist()]
            assert math.isclose(probabilities[r, c].item(), sum(each) / 6, rel_tol=1e-4)
    moved = decode_boxes(rois, deltas[:, 1:] * torch.tensor(std) + torch.tensor(mean))
    torch.testing.assert_close(boxes, moved)


def test_a_perfect_regressor_decodes_to_the_objects_also_after_loading():
    """Targets of training, normalized by the measured mean and std, come back as boxes."""
    model, loaded = build(), build()
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.05]), torch.tensor([0.1, 0.1, 0.2, 0.2])
    model.set_delta_statistics(mean, std)
    loaded.load_state_dict(model.state_dict())
    rois, objects = random_rois(10)[:, 1:].split(5)
    targets = model.delta_targets(rois, objects)
    outputs = {
        "class_logits": torch.zeros(5, 6, CLASSES + 1),
        "deltas": targets[:, None].expand(-1, CLASSES + 1, -1),
    }
    _, boxes = loaded.decode(outputs, rois)
    expected = objects[:, None].expand(-1, CLASSES, -1)
    torch.testing.assert_close(boxes, expected, rtol=1e-4, atol=1e-3)


def test_initial_weights():
    model = build(num_classes=80)
    assert model.cls_score.weight.shape == (6 * 81, 4 * FEATURES)
    assert model.bbox_pred.weight.shape == (81 * 4, FEATURES)
    for layer, std in ((model.cls_score, 0.01), (model.bbox_pred, 0.001)):
        assert math.isclose(layer.weight.std().item(), std, rel_tol=0.05)
        assert abs(layer.weight.mean().item()) < 0.05 * std
        assert not layer.bias.any()


@torch.no_grad()
def test_the_last_stage_of_mobilenet_is_a_head(tmp_path):
    """With its weights, and where the whole network has that stage."""
    network = torchvision.models.mobilenet_v2(weights=None).eval()
    torch.save(network.state_dict(), tmp_path / "mobilenet.pth")
    config = TrunkConfig(
        name="mobilenet_v2", weights=str(tmp_path / "mobilenet.pth"), padding="zero"
    )
    settings = {"head": "layer4", "foveal": False, "use_box_tower": False}
    model = build_multipathnet(config, num_classes=CLASSES, **settings).eval()
    block = torch.randn(2, 96, 7, 7)
    expected = network.features[14:](block).mean((2, 3))
    assert expected.shape[1] == network.last_channel == model.cls_score.in_features
    torch.testing.assert_close(model.towers[0].head(block), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_weights_may_end_before_the_last_stage(name, tmp_path):
    """As those of a trunk do: a head layer4 is then random, which training says."""
    whole = torchvision.models.get_model(name, weights=None).state_dict()
    last = ("layer4.", "fc.", "features.18.", "features.17.", "features.16.", "features.15.")
    cut = {
        k: v for k, v in whole.items() if not k.startswith((*last, "features.14.", "classifier"))
    }
    for weights, has_it in ((whole, True), (cut, False)):
        torch.save(weights, tmp_path / "weights.pth")
        assert has_last_stage(name, tmp_path / "weights.pth") == has_it
