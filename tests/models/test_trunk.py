"""Trunks: levels, symmetric padding, frozen batch norm, weights from files."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import trunk as trunk_module
from models.trunk import (
    STRIDES,
    TRUNKS,
    TrunkConv2d,
    build_trunk,
    fold_norms,
    load_backbone,
    symmetric_pad,
)

FOLDED_RESNET18 = Path("data/weights/resnet18_c4_bnfolded_imagenet.pth")
FAMILIES = ("resnet18", "resnet50", "vgg11", "densenet121", "tiny")


@given(pad=st.integers(0, 3), height=st.integers(3, 9), width=st.integers(3, 9))
@settings(max_examples=40, deadline=None)
def test_symmetric_pad_is_numpys(pad, height, width):
    x = torch.randn(2, 3, height, width)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="symmetric")
    assert np.array_equal(symmetric_pad(x, pad).numpy(), expected)


@pytest.mark.parametrize("name", TRUNKS)
def test_levels_have_their_strides_and_channels(name):
    trunk = build_trunk(name)
    features = trunk(torch.zeros(1, 3, 96, 128))
    assert [tuple(f.shape[1:]) for f in features] == [
        (channels, 96 // stride, 128 // stride)
        for channels, stride in zip(trunk.channels, trunk.strides, strict=True)
    ]
    assert trunk.strides == (STRIDES[1:] if name == "caffenet" else STRIDES)


def randomise_batch_norm(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.uniform_(-0.5, 0.5, generator=generator)
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


@pytest.mark.parametrize("name", FAMILIES[:-1])
def test_trunk_computes_torchvisions_network_with_another_padding(name, monkeypatch, tmp_path):
    """With zeros for the mirror, every level equals torchvision's own layers in eval mode."""
    network = torchvision.models.get_model(name, weights=None).eval()
    randomise_batch_norm(network)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    trunk = build_trunk(name, weights=tmp_path / "weights.pth").eval()
    monkeypatch.setattr(trunk_module, "symmetric_pad", lambda x, pad: F.pad(x, (pad,) * 4))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(trunk(x), torchvision_levels(network, name, x), strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())
            )


def torchvision_levels(network, name, x):
    if name.startswith("resnet"):
        stem = network.relu(network.bn1(network.conv1(x)))
        one = network.layer1(network.maxpool(stem))
        two = network.layer2(one)
        return [stem, one, two, network.layer3(two)]
    f = network.features
    if name.startswith("vgg"):
        outputs, pools = [], 0
        for layer in list(f)[:-1]:
            if isinstance(layer, nn.MaxPool2d):
                pools += 1
                if pools > 1:
                    outputs.append(x)
            x = layer(x)
        return [*outputs, x]
    stem = F.relu(f.norm0(f.conv0(x)))
    outputs, x = [stem], f.pool0(stem)
    for block, transition in (
        (f.denseblock1, f.transition1),
        (f.denseblock2, f.transition2),
        (f.denseblock3, f.transition3),
    ):
        x = F.relu(transition.norm(block(x)))
        outputs.append(x)
        x = transition.pool(transition.conv(x))
    return outputs


def test_frozen_norm_in_the_convolution_has_the_same_gradient():
    conv = TrunkConv2d(3, 5, 3, bias=False, frozen_norm=True)
    conv.scale.uniform_(0.5, 2)
    conv.shift.uniform_(-1, 1)
    x = torch.randn(2, 3, 8, 8)
    conv(x).square().sum().backward()
    folded = conv.weight.grad.clone()
    weight = conv.weight.detach().requires_grad_()
    y = F.conv2d(symmetric_pad(x, 1), weight)
    (conv.scale[:, None, None] * y + conv.shift[:, None, None]).square().sum().backward()
    torch.testing.assert_close(folded, weight.grad, rtol=1e-4, atol=1e-3)
    assert not conv.scale.requires_grad and not conv.shift.requires_grad


def test_batch_norm_is_constant_in_training_mode():
    trunk = build_trunk("resnet18")
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        before = trunk.eval()(x)[-1]
        for _ in range(3):
            trunk.train()(torch.randn(4, 3, 64, 64) * 7 + 3)
        assert torch.equal(trunk.train()(x)[-1], before)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())


def test_local_file_without_the_layers_that_are_cut_away():
    if not FOLDED_RESNET18.exists():
        pytest.skip(f"{FOLDED_RESNET18} is not here")
    trunk = build_trunk("resnet18", weights=FOLDED_RESNET18)
    state = torch.load(FOLDED_RESNET18, weights_only=True)
    assert torch.equal(trunk.levels[0].conv1.weight, state["conv1.weight"])
    torch.testing.assert_close(trunk.levels[0].conv1.scale, torch.ones(64))
    torch.testing.assert_close(trunk.levels[0].conv1.shift, state["bn1.bias"])


def test_weights_of_another_network_are_refused_with_a_readable_difference(tmp_path):
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), tmp_path / "r34.pth")
    with pytest.raises(
        ValueError, match=r"r34\.pth does not fit.*missing: layer1\.0\.conv3\.weight"
    ) as error:
        build_trunk("resnet50", weights=tmp_path / "r34.pth")
    assert "\n" not in str(error.value)
    state = torchvision.models.resnet18(weights=None).state_dict()
    state["layer2.0.conv1.weight"] = torch.zeros(128, 64, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "odd.pth")
    with pytest.raises(
        ValueError,
        match=r"1 other shapes: layer2\.0\.conv1\.weight is \(128, 64, 1, 1\) instead of",
    ):
        build_trunk("resnet18", weights=tmp_path / "odd.pth")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_files_that_are_no_weights(tmp_path, content):
    path = tmp_path / "file.pth"
    if content is None:
        torch.save([1, 2], path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="file.pth"):
        build_trunk("resnet18", weights=path)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="resnet50"):
        build_trunk("resnet51")
    with pytest.raises(ValueError, match="tiny trunk has no pretrained weights"):
        build_trunk("tiny", weights="imagenet")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_width_scales_all_layers_of_a_resnet(name, tmp_path):
    full, narrow = load_backbone(name), load_backbone(name, width=8)
    for key, value in full.state_dict().items():
        kept = {3, 7, 1, 1000} if key == "conv1.weight" or key.startswith("fc.") else {3, 1}
        sides = zip(value.shape, narrow.state_dict()[key].shape, strict=True)
        assert all(own == side // 8 or (own == side and side in kept) for side, own in sides), key
    torch.save(narrow.state_dict(), tmp_path / "narrow.pth")
    trunk = build_trunk(name, weights=tmp_path / "narrow.pth", width=8)
    assert trunk.channels == tuple(channels // 8 for channels in build_trunk(name).channels)
    assert torch.equal(trunk.levels[0].conv1.weight, narrow.conv1.weight)


@pytest.mark.parametrize(
    "name, weights", [("tiny", None), ("vgg11", None), ("resnet18", "imagenet")]
)
def test_other_trunks_have_no_width(name, weights):
    with pytest.raises(ValueError, match="width 8 is only for ResNets"):
        build_trunk(name, weights=weights, width=8)


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
    with pytest.raises(ValueError, match="trunk.weights to a local file"):
        load_backbone("resnet18", weights="imagenet")


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_folded_norms_change_nothing(name):
    torch.manual_seed(0)
    trunk = build_trunk(name).eval()
    for layer in trunk.modules():
        if isinstance(layer, TrunkConv2d) and layer.scale is not None:
            layer.scale.uniform_(0.5, 1.5)
            layer.shift.uniform_(-0.5, 0.5)
    image = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        before = trunk(image)
        after = fold_norms(trunk)(image)
    assert not any("scale" in key for key in trunk.state_dict())
    for own, each in zip(after, before, strict=True):
        torch.testing.assert_close(own, each, rtol=1e-4, atol=1e-4 * each.abs().max().item())
