"""A trunk that classifies: pretraining, before it serves another network.

N: images; C: channels of the trunk's last level.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from models.trunk import FrozenNorm, Trunk

TRUNK = "trunk."  # of the keys of a classifier's weights
COUNTER = ".num_batches_tracked"  # of live batch norm; the frozen has none


class Classifier(nn.Module):
    """A trunk up to stride 16, global average pooling and a linear layer.

    ImageNet networks go on to stride 32. Those layers would be cut away after pretraining, and
    hold most of the weights; without them the classes are learned by the layers that stay, and
    small crops do, too.
    """

    def __init__(self, trunk: Trunk, num_classes: int):
        """The trunk's batch norm becomes live, in place."""
        super().__init__()
        self.trunk = trunk
        unfreeze_norms(trunk)
        self.fc = nn.Linear(trunk.channels[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of normalized images (N, 3, H, W)."""
        return self.fc(self.trunk(images)[-1].mean(dim=(2, 3)))


def unfreeze_norms(module: nn.Module) -> None:
    """Replaces frozen batch norm by live batch norm of the same numbers, in place."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, FrozenNorm):
                live = nn.BatchNorm2d(len(layer.weight), layer.eps)
                live.load_state_dict(layer.state_dict(), strict=False)
                setattr(parent, name, live)


def trunk_weights(classifier: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a trunk with frozen batch norm, from those of a classifier."""
    return {
        key.removeprefix(TRUNK): value
        for key, value in classifier.items()
        if key.startswith(TRUNK) and not key.endswith(COUNTER)
    }
