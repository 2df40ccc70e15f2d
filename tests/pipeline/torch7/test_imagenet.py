"""ImageNet networks: they become weights with torchvision's names that compute the same.

There is no file of the Caffe networks here: theirs are trees with what is known of them.
"""

import pytest
import torch
from torch import nn

from models.backbone import load_backbone
from models.trunk import build_trunk
from pipeline.torch7.convert import convert_file, find_converter
from pipeline.torch7.imagenet import convert_caffe_network, convert_resnet
from pipeline.torch7.masks import convert_masks
from pipeline.torch7.modules import unused_parameters
from pipeline.torch7.reader import LuaFunction, read_torch7
from tests.pipeline.torch7.lua_networks import (
    CAFFE_NETWORKS,
    assert_near,
    lua,
    lua_resnet,
    module,
)
from tests.real_data import TORCH7, needs

DATA = TORCH7 / "deepmask_sharpmask"
needs_originals = needs(DATA)


@needs_originals
def test_live_batch_norm_is_what_the_original_froze():
    """The ImageNet network that the reference DeepMask is made from, without its epsilon."""
    words, state = convert_resnet(read_torch7(DATA / "resnet-50_narrow.t7"), set())
    assert words == "ImageNet ResNet-50 of width 4"
    deepmask = convert_masks(read_torch7(DATA / "deepmask.t7"), set())[1]["model"]
    network = load_backbone("resnet50", width=4)
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    for name, live in network.named_modules():
        if isinstance(live, nn.BatchNorm2d) and not name.startswith("layer4"):
            scale = live.weight * live.running_var.rsqrt()
            shift = live.bias - live.running_mean * scale
            for key, expected in ((f"{name}.weight", scale), (f"{name}.bias", shift)):
                found = next(deepmask[k] for k in deepmask if k[:5] == "trunk" and k.endswith(key))
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@needs_originals
def test_resnet_is_weights_of_a_trunk(tmp_path):
    lines = convert_file(DATA / "resnet-50_narrow.t7", tmp_path / "resnet.pth")
    assert "267 parameters used, each once; 0 not used" in lines
    trunk = build_trunk("resnet50", weights=tmp_path / "resnet.pth", width=4)
    assert trunk.channels == (4, 16, 32, 64)
    state = torch.load(tmp_path / "resnet.pth", weights_only=True)
    assert torch.equal(trunk.levels[3].layer3[5].conv3.weight, state["layer3.5.conv3.weight"])
    whole = load_backbone("resnet50", weights=tmp_path / "resnet.pth", whole=True, width=4)
    assert torch.equal(whole.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101"])
def test_other_resnets_in_either_form_of_batch_norm(name, frozen):
    torch.manual_seed(0)
    network = load_backbone(name, width=2).eval()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.2, 0.5)
        norm.running_var.uniform_(0.5, 2)
        for values in (norm.bias.data, norm.running_mean):
            values.uniform_(-0.1, 0.1)
    value, used = lua_resnet(network, frozen=frozen), set()
    assert find_converter(value) is convert_resnet
    words, state = convert_resnet(value, used)
    assert words.startswith(f"ImageNet {name.replace('resnet', 'ResNet-')} ")
    assert not unused_parameters(value, used)
    other = load_backbone(name, width=2).eval()
    other.load_state_dict(state, strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(other(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CAFFE_NETWORKS)
def test_networks_of_caffe_become_weights_of_a_trunk(name, tmp_path):
    make, width, side = CAFFE_NETWORKS[name]
    torch.manual_seed(0)
    features = nn.Sequential(*make())
    top = []
    for inputs in (width * side**2, 4096):  # fc6 and fc7 of zeros that take no memory
        weight, bias = torch.zeros(1).expand(4096, inputs), torch.zeros(4096)
        top += [module("nn.Linear", weight=weight, bias=bias), lua(nn.ReLU())]
    value = {"features": {"unpack": LuaFunction(9), "model": lua(features)}}
    value["top"] = {"model": module("nn.Sequential", *top)}
    assert find_converter(value) is convert_caffe_network
    used = set()
    words, state = convert_caffe_network(value, used)
    assert not unused_parameters(value, used)
    assert f"name={name}" in words and "ceil_pooling=true" in words
    assert state["classifier.0.weight"].shape == (4096, width * side**2)
    torch.save({k: v for k, v in state.items() if "features" in k}, tmp_path / "weights.pth")
    settings = {"padding": "zero", "ceil_pooling": True}
    trunk = build_trunk(name, weights=tmp_path / "weights.pth", **settings)
    x = torch.randn(1, 3, 45, 70)
    with torch.inference_mode():
        assert_near(trunk(x)[-1], features(x))
