"""Trunks: levels, padding, frozen batch norm, weights from files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from datasets.resize import MEAN, STD
from models.backbone import load_backbone
from models.trunk import (
    STRIDES,
    TRUNKS,
    FrozenNorm,
    build_trunk,
    to_trunk_layers,
)
from tests.real_data import WEIGHTS, skip_without

FOLDED_RESNET18 = WEIGHTS / "resnet18_c4_bnfolded_imagenet.pth"
RESNET_LEVELS = ["relu", "layer1", "layer2", "layer3"]
LEVELS = {  # the layers of torchvision's networks that end a level
    "resnet18": RESNET_LEVELS,
    "resnet50": RESNET_LEVELS,
    "vgg11": [f"features.{i}" for i in (4, 9, 14, 19)],
    "densenet121": ["features.relu0", *(f"features.transition{i}.relu" for i in (1, 2, 3))],
    "mobilenet_v2": [f"features.{i}" for i in (1, 3, 6, 13)],
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    largest = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * largest)


def randomize_norms(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for norm in network.modules():
        if isinstance(norm, (nn.BatchNorm2d, FrozenNorm)):
            for values, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5)):
                values.data.uniform_(low, low + 1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)


# --- levels and padding ---------------------------------------------------------------------------


@pytest.mark.parametrize("size, padding, groups", [(3, 1, 1), (7, 3, 1), (5, 2, 2), (1, 0, 1)])
def test_convolutions_see_the_mirror_of_their_input(size, padding, groups):
    conv = nn.Conv2d(4, 6, size, stride=2, padding=padding, groups=groups)
    x = torch.randn(2, 4, 9, 10)
    sides = ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2)
    padded = torch.from_numpy(np.pad(x.numpy(), sides, mode="symmetric"))
    expected = F.conv2d(padded, conv.weight, conv.bias, stride=2, groups=groups)
    layers = nn.Sequential(conv)
    to_trunk_layers(layers)
    torch.testing.assert_close(layers(x), expected)


@pytest.mark.parametrize("name", TRUNKS)
def test_levels_have_their_strides_and_channels(name):
    trunk = build_trunk(name)
    features = trunk(torch.zeros(1, 3, 96, 128))
    assert [tuple(f.shape[1:]) for f in features] == [
        (channels, 96 // stride, 128 // stride)
        for channels, stride in zip(trunk.channels, trunk.strides, strict=True)
    ]
    assert trunk.strides == (STRIDES[1:] if name == "caffenet" else STRIDES)


@pytest.mark.parametrize("ceil", [False, True])
def test_pools_round_sizes_up_as_caffes(ceil):
    sizes = [
        f.shape[-1] for f in build_trunk("vgg11", ceil_pooling=ceil)(torch.zeros(1, 3, 32, 70))
    ]
    assert sizes == ([35, 18, 9, 5] if ceil else [35, 17, 8, 4])


@pytest.mark.parametrize("name", LEVELS)
@torch.no_grad()
def test_trunk_computes_torchvisions_network_with_another_padding(name, tmp_path):
    """With zeros for the mirror, every level equals torchvision's own layers in eval mode."""
    network = torchvision.models.get_model(name, weights=None).eval()
    randomize_norms(network)
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("classifier.")}
    torch.save(state, tmp_path / "weights.pth")
    zero = build_trunk(name, weights=tmp_path / "weights.pth", padding="zero").eval()
    mirror = build_trunk(name, weights=tmp_path / "weights.pth").eval()
    x = torch.randn(1, 3, 64, 96)
    theirs = create_feature_extractor(network, LEVELS[name])(x).values()
    for ours, mirrored, expected in zip(zero(x), mirror(x), theirs, strict=True):
        assert_close(ours, expected)
        assert (mirrored - expected).abs().max() > 0.01 * expected.abs().max()


@torch.no_grad()
def test_a_resnet_of_caffes_style_takes_the_usual_pixels(tmp_path):
    """It equals He et al.'s network of BGR from 0 to 255 less the mean, written out here."""
    network = torchvision.models.resnet50(weights=None).eval()
    randomize_norms(network)
    torch.save(network.state_dict(), tmp_path / "caffe.pth")
    trunk = build_trunk("resnet50", weights=tmp_path / "caffe.pth", style="caffe").eval()
    network.maxpool = nn.MaxPool2d(3, 2, padding=0, ceil_mode=True)
    for layer in (network.layer2, network.layer3):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    to_trunk_layers(network)  # the mirror: it hides no difference of pixels
    rgb = torch.randint(0, 256, (1, 3, 70, 96)).float()
    bgr = rgb.flip(1) - torch.tensor([103.06, 115.90, 123.15])[:, None, None]
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    levels = create_feature_extractor(network, RESNET_LEVELS)(bgr).values()
    for ours, theirs in zip(trunk((rgb / 255 - mean) / std), levels, strict=True):
        assert_close(ours, theirs)


# --- frozen batch norm ----------------------------------------------------------------------------


def test_batch_norm_is_constant_in_training_mode():
    trunk = build_trunk("resnet18")
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = trunk.eval()(x)[-1]
        for _ in range(3):
            trunk.train()(torch.randn(4, 3, 64, 64) * 7 + 3)
        assert torch.equal(trunk.train()(x)[-1], before)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())


def test_frozen_norm_is_live_batch_norm_in_eval_mode_with_its_gradient():
    live = nn.BatchNorm2d(5).eval()
    randomize_norms(live)
    frozen = FrozenNorm(5)
    frozen.load_state_dict(live.state_dict())
    slopes = []
    for norm in (live, frozen):
        x = torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = norm(x)
        y.square().sum().backward()
        slopes.append((y.detach(), x.grad))
    torch.testing.assert_close(slopes[1], slopes[0])
    assert not list(frozen.parameters())
    assert frozen(x.bfloat16()).dtype == torch.bfloat16


# --- weights --------------------------------------------------------------------------------------


def test_local_file_without_the_layers_that_are_cut_away():
    skip_without(FOLDED_RESNET18)
    stem = build_trunk("resnet18", weights=FOLDED_RESNET18).levels[0]
    state = torch.load(FOLDED_RESNET18, weights_only=True)
    assert torch.equal(stem.conv1.weight, state["conv1.weight"])
    assert torch.equal(stem.bn1.bias, state["bn1.bias"])


def test_weights_of_another_network_are_refused_with_a_readable_difference(tmp_path):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "r34.pth")
    words = r"r34\.pth does not fit.*missing: layer1\.0\.conv3\.weight"
    with pytest.raises(ValueError, match=words) as error:
        build_trunk("resnet50", weights=tmp_path / "r34.pth")
    assert "\n" not in str(error.value)
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer2.0.conv1.weight"] = torch.zeros(128, 64, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    words = r"1 other shapes: layer2\.0\.conv1\.weight is \(128, 64, 1, 1\) instead of"
    with pytest.raises(ValueError, match=words):
        build_trunk("resnet18", weights=tmp_path / "odd.pth")


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    for name, words in (("empty", "is not a PyTorch file"), ("list", "holds no state dict")):
        with pytest.raises(ValueError, match=rf"{name}\.pth {words}"):
            build_trunk("resnet18", weights=tmp_path / f"{name}.pth")


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet51", {}, "resnet50"),
        ("tiny", {"weights": "imagenet"}, "tiny trunk has no weights of its own"),
        ("caffenet", {"weights": "imagenet"}, "torchvision has no CaffeNet"),
        ("tiny", {"width": 8}, "width 8 is only for ResNets"),
        ("vgg11", {"width": 8}, "width 8 is only for ResNets"),
        ("resnet18", {"width": 8, "weights": "imagenet"}, r"trunk\.width 64, got 8"),
        ("resnet50", {"style": "caffe", "weights": "imagenet"}, r"not of style caffe"),
        ("vgg11", {"style": "caffe"}, "style caffe is only for ResNets"),
    ],
)
def test_impossible_trunks_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_trunk(name, **options)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_width_scales_all_layers_of_a_resnet(name, tmp_path):
    full, narrow = load_backbone(name), load_backbone(name, width=8)
    for key, value in full.state_dict().items():
        kept = {3, 7, 1, 1000} if key == "conv1.weight" or key.startswith("fc.") else {3, 1}
        sides = zip(value.shape, narrow.state_dict()[key].shape, strict=True)
        assert all(b == a // 8 or (b == a and a in kept) for a, b in sides), key
    torch.save(narrow.state_dict(), tmp_path / "narrow.pth")
    trunk = build_trunk(name, weights=tmp_path / "narrow.pth", width=8)
    assert trunk.channels == tuple(channels // 8 for channels in build_trunk(name).channels)
    assert torch.equal(trunk.levels[0].conv1.weight, narrow.conv1.weight)


def test_narrow_shortcuts_are_plain_convolutions():
    """They pick their pixels beforehand: oneDNN's gradient for 8 channels is not safe."""
    shortcut = load_backbone("resnet18", width=8).layer2[0].downsample[0]
    plain = nn.Conv2d(8, 16, 1, stride=2, bias=False)
    plain.load_state_dict(shortcut.state_dict())
    x = torch.randn(2, 8, 7, 6)
    assert type(shortcut) is not nn.Conv2d
    torch.testing.assert_close(shortcut(x), plain(x))


def test_imagenet_weights_come_from_torchvision(monkeypatch):
    asked = []
    network = torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name, weights: asked.append((name, weights)) or network,
    )
    assert load_backbone("resnet18", weights="imagenet") is network
    assert asked == [("resnet18", "IMAGENET1K_V1")]


def test_failed_download_says_what_to_do(monkeypatch):
    def refuse(name, weights):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", refuse)
    with pytest.raises(ValueError, match=r"trunk\.weights to a local file"):
        load_backbone("resnet18", weights="imagenet")
