"""A trunk that classifies: its weights are those of the trunk with frozen batch norm."""

import pytest
import torch
from torch import nn

from models.classifier import Classifier, trunk_weights
from models.trunk import FrozenNorm, build_trunk


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "densenet121", "caffenet", "tiny"])
def test_every_family_of_trunks_classifies_and_gives_its_weights_back(name):
    with torch.device("meta"):
        classifier, trunk = Classifier(build_trunk(name), 5), build_trunk(name)
        assert classifier(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
    assert not any(isinstance(module, FrozenNorm) for module in classifier.modules())
    expected = trunk.state_dict()
    found = trunk_weights(classifier.state_dict())
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}
    counts = [
        sum(isinstance(module, kind) for module in network.modules())
        for network, kind in ((classifier, nn.BatchNorm2d), (trunk, FrozenNorm))
    ]
    assert counts[0] == counts[1]
