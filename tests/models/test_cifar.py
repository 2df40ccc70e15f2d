"""CIFAR's networks: their layers and parameters are the paper's, their shortcuts carry all."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.cifar import DEPTHS, cifar_levels, shortcut
from models.classifier import Classifier
from models.trunk import build_trunk

MILLIONS = {20: 0.27, 32: 0.46, 44: 0.66, 56: 0.85, 110: 1.7}  # CVPR 2016, table 6


def classifier(name: str) -> Classifier:
    with torch.device("meta"):
        return Classifier(build_trunk(name), 10)


@pytest.mark.parametrize("depth", DEPTHS)
def test_layers_and_parameters_are_the_papers(depth):
    model = classifier(f"cifar_resnet{depth}")
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth and isinstance(layers[-1], nn.Linear)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[depth], rel=0.02)
    assert model.trunk.strides == (1, 2, 4) and model.trunk.channels == (16, 32, 64)


@pytest.mark.parametrize("name", ["cifar_plain20", "cifar_resnet20_v2"])
def test_the_other_kinds_have_the_same_parameters(name):
    shapes = [
        sorted(tuple(p.shape) for p in classifier(each).parameters())
        for each in (name, "cifar_resnet20")
    ]
    assert shapes[0] == shapes[1]


@torch.no_grad()
def test_what_the_shortcuts_of_v2_carry_is_changed_by_nothing():
    levels = cifar_levels("cifar_resnet20_v2")
    for level in levels:
        for name, layer in level.named_modules():
            if name.endswith("conv2"):
                layer.weight.zero_()  # the branches add nothing
    stem, second = levels[0][:3], levels[1]
    x = stem(torch.randn(2, 3, 32, 32))
    assert torch.equal(levels[0][3:](x), x)
    expected = F.pad(x[..., ::2, ::2], (0, 0, 0, 0, 0, 16))
    assert torch.equal(second(x), expected) and torch.equal(shortcut(x, 32, 2), expected)


@torch.no_grad()
def test_a_plain_block_is_a_residual_one_less_its_input():
    residual, plain = (cifar_levels(f"cifar_{name}20")[0].block1 for name in ("resnet", "plain"))
    plain.load_state_dict(residual.state_dict())
    nn.init.constant_(residual.bn2.bias, 9.0)  # so that no ReLU cuts anything
    nn.init.constant_(plain.bn2.bias, 9.0)
    x = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(residual(x) - plain(x), x)
