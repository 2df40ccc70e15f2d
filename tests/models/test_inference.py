"""Networks made faster compute what they did."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual

from models.inference import BitReLU, BitReLU6, optimize_for_inference, use_bit_relus
from models.trunk import FrozenNorm, build_trunk
from tests.models.test_trunk import assert_close, randomize_norms


@pytest.mark.parametrize(
    "name, options",
    [
        ("resnet18", {}),
        ("resnet18", {"width": 8, "padding": "zero"}),
        ("densenet121", {}),
        ("mobilenet_v2", {}),
    ],
)
@torch.no_grad()
def test_it_changes_nothing(name, options):
    trunk = build_trunk(name, **options).eval()
    randomize_norms(trunk)
    norms = sum(isinstance(layer, FrozenNorm) for layer in trunk.modules())
    image = torch.randn(1, 3, 64, 80)
    before = trunk(image)
    after = optimize_for_inference(trunk)(image)
    left = sum(isinstance(layer, FrozenNorm) for layer in trunk.modules())
    # A dense layer has a norm before its first convolution and one after; so have transitions.
    assert (norms, left) == {"resnet18": (15, 0), "densenet121": (88, 45), "mobilenet_v2": (39, 0)}[
        name
    ]
    for actual, expected in zip(after, before, strict=True):
        assert_close(actual, expected)


def test_wide_maps_of_mobilenet_are_not_padded():
    trunk = optimize_for_inference(build_trunk("mobilenet_v2"))
    blocks = [b for b in trunk.modules() if isinstance(b, InvertedResidual) and len(b.conv) == 4]
    assert len(blocks) == 12
    for block in blocks:
        narrow, wide = block.conv[0][0], block.conv[1][0]
        assert narrow.padding == (1, 1) and wide.padding == (0, 0)
        assert wide.padding_mode == "zeros"


FLOATS = st.floats(width=16) | st.sampled_from([0.0, -0.0, 6.0, 6.03125, 1e38, -1e38])


@given(st.lists(FLOATS.filter(lambda value: value == value), min_size=1))
def test_relus_by_bits_are_pytorchs(values):
    x = torch.tensor(values).bfloat16()
    for layer, expected in ((BitReLU(), F.relu(x)), (BitReLU6(), F.relu6(x))):
        assert torch.equal(layer(x), expected)
        in_place = type(layer)(inplace=True)
        for some, wanted in ((x.clone(), expected), (x.clone()[::2], expected[::2])):
            assert torch.equal(in_place(some), wanted) and torch.equal(some, wanted)
    assert torch.equal(BitReLU6()(x.float()), F.relu6(x.float()))


def test_relus_are_replaced_once():
    shared = nn.ReLU()
    network = nn.Sequential(shared, nn.ReLU6(inplace=True), nn.Sequential(shared, nn.ELU()))
    use_bit_relus(network)
    use_bit_relus(network)
    kinds = [type(layer) for layer in network.modules() if not isinstance(layer, nn.Sequential)]
    assert kinds == [BitReLU, BitReLU6, nn.ELU] and network[1].inplace
