"""Trunks: the shared convolutional layers, as levels at strides 2, 4, 8 and 16.

A trunk is an ImageNet network of torchvision cut at stride 16, with two changes that the methods
ask for (Pinheiro et al., ECCV 2016, and the released code): every convolution pads with a symmetric
mirror of its input, and batch norm is frozen. A frozen batch norm is two numbers a channel, so it
lives in the convolution before it (`weight`, `scale`, `shift`) and costs no pass over the
activations, in training as in inference.

Shapes: N images, (H, W) their size; level i gives (N, channels[i], ~H / 2^(i+1), ~W / 2^(i+1)).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from models.caffenet import CaffeNet, caffenet_levels

STRIDES = (2, 4, 8, 16)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
VGGS = ("vgg11", "vgg16")
TRUNKS = (*RESNETS, *VGGS, "densenet121", "caffenet", "tiny")
# What a convolution sees beyond the border: the mirror, or zeros as ImageNet networks do.
PADDINGS = ("symmetric", "zero")
STEM_WIDTH = 64  # channels of a ResNet's first convolution, by which the others are counted
# torchvision's modules of a ResNet by level; what lies behind them is cut away.
RESNET_LEVELS = (("conv1", "relu"), ("maxpool", "layer1"), ("layer2",), ("layer3",))
# A convolution and the batch norm that follows it directly, by their names in one parent module.
CONV_NORM_PAIRS = (
    ("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"),  # ResNet: stem and blocks
    ("0", "1"),                                            # ResNet: shortcut
    ("conv0", "norm0"), ("conv1", "norm2"),                # DenseNet: stem and layers
)  # fmt: skip


@dataclass(frozen=True)
class TrunkConfig:
    """A trunk; see `build_trunk`."""

    name: str = "resnet50"  # one of TRUNKS
    weights: str | None = "imagenet"  # "imagenet", the path of a local state dict, or null
    width: int = STEM_WIDTH  # of a ResNet's first convolution; the others are in proportion
    frozen_levels: int = 0  # how many of the four levels are not trained
    padding: str = "symmetric"  # symmetric | zero (detectors of the released code)
    ceil_pooling: bool = False  # pools round sizes up, as Caffe's do

    def __post_init__(self) -> None:
        for name, choices in (("name", TRUNKS), ("padding", PADDINGS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        if self.width < 1:
            raise ValueError(f"width must be greater than 0, got {self.width}")
        if not 0 <= self.frozen_levels <= len(STRIDES):
            raise ValueError(
                f"frozen_levels must be from 0 to {len(STRIDES)}, got {self.frozen_levels}"
            )


def symmetric_pad(x: Tensor, pad: int) -> Tensor:
    """Pads all four sides by `pad` pixels with a mirror that repeats the edge: cba|abc..xyz|zyx.

    Args:
        x: (N, C, H, W) with H and W at least `pad`.

    Returns:
        (N, C, H + 2 pad, W + 2 pad).
    """
    if pad == 0:
        return x
    if pad == 1:  # the mirror of one pixel is that pixel
        return F.pad(x, (1, 1, 1, 1), mode="replicate")
    x = torch.cat([x[..., :pad].flip(-1), x, x[..., -pad:].flip(-1)], dim=-1)
    return torch.cat([x[..., :pad, :].flip(-2), x, x[..., -pad:, :].flip(-2)], dim=-2)


class TrunkConv2d(nn.Conv2d):
    """A convolution with symmetric padding that can carry the frozen batch norm behind it.

    With a frozen batch norm, y = scale * conv(x) + shift, computed as one convolution by
    weight * scale. The gradient reaches `weight` as if the two were separate, so the training
    recipe is unchanged.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        bias: bool = True,
        frozen_norm: bool = False,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, groups=groups, bias=bias
        )
        # nn.Conv2d's own padding stays 0: the mirror is written in forward.
        self.border = kernel_size // 2 if padding is None else padding
        self.zero_padding = False  # `to_trunk_layers` sets it
        self.register_buffer("scale", torch.ones(out_channels) if frozen_norm else None)
        self.register_buffer("shift", torch.zeros(out_channels) if frozen_norm else None)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm in them."""
        if self.scale is None:
            return self.weight, self.bias
        weight = self.weight * self.scale[:, None, None, None]
        return weight, self.shift if self.bias is None else self.bias * self.scale + self.shift

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, ceil(H / stride), ceil(W / stride)) for odd kernels."""
        weight, bias = self.folded()
        pad, stride = self.border, self.stride
        if not self.zero_padding:
            x, pad = symmetric_pad(x, pad), 0
        if self.kernel_size == (1, 1) and self.in_channels < STEM_WIDTH:
            # The same cells. The weight gradient of oneDNN's strided 1x1 convolution of 8 channels,
            # channels last, writes outside its memory (torch 2.14.1); the usual widths are fine.
            x, stride = x[..., :: stride[0], :: stride[1]], 1
        return F.conv2d(x, weight, bias, stride, pad, groups=self.groups)


@torch.no_grad()
def fold_norms(module: nn.Module) -> nn.Module:
    """Multiplies frozen batch norms into the weights, once for all calls; in place.

    For inference: the state dict has other keys from then on.

    Returns:
        The module.
    """
    for layer in module.modules():
        if isinstance(layer, TrunkConv2d) and layer.scale is not None:
            layer.weight, layer.bias = map(nn.Parameter, layer.folded())
            layer.scale = layer.shift = None
    return module


class Trunk(nn.Module):
    """Levels of layers, each halving the resolution of the one before.

    Attributes:
        name: one of `TRUNKS`.
        strides: of the levels: 2, 4, 8 and 16, but CaffeNet has none at stride 2.
        channels: number of channels of each level's output.
    """

    def __init__(self, name: str, levels: list[nn.Module]):
        super().__init__()
        self.name = name
        self.strides = STRIDES[-len(levels) :]
        self.levels = nn.ModuleList(levels)
        self.channels = tuple(_output_channels(self.levels))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of every level.

        Args:
            images: (N, 3, H, W), normalized.

        Returns:
            A tensor for each of `strides`: the skip features and, last, the stride-16 map.
        """
        features = []
        for level in self.levels:
            images = level(images)
            features.append(images)
        return features


def _output_channels(levels: nn.ModuleList) -> list[int]:
    with torch.no_grad():
        x, channels = torch.zeros(1, 3, 32, 32), []
        for level in levels:
            x = level(x)
            channels.append(x.shape[1])
    return channels


def build_trunk(name: str, *, weights: str | Path | None = None, **settings: Any) -> Trunk:
    """A trunk by name.

    Args:
        name: one of `TRUNKS`.
        weights: "imagenet" for torchvision's weights (downloaded once by torchvision), the path of
            a state dict with torchvision's key names, or None for random weights.
        settings: the other fields of `TrunkConfig`; which levels are trained is for the caller.

    Raises:
        ValueError: a setting that cannot be, or weights of another network (the keys and shapes
            that differ are listed).
    """
    c = TrunkConfig(name=name, **settings)
    if name == "tiny":
        if weights is not None:
            raise ValueError(
                f"the tiny trunk has no pretrained weights, got {weights!r}; set it to null"
            )
        _refuse_width(name, c.width)
        levels = tiny_levels()
    else:
        network = load_backbone(name, weights=weights, width=c.width)
        levels = _CUTS[name.rstrip("0123456789")](network)
    for level in levels:
        to_trunk_layers(level, padding=c.padding)
        for layer in level.modules():
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode |= c.ceil_pooling
    return Trunk(name, levels)


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    whole: bool = False,
    width: int = STEM_WIDTH,
) -> nn.Module:
    """Torchvision's whole network, with the layers that a trunk uses loaded from `weights`.

    See `build_trunk`.

    Args:
        whole: load the layers behind the trunk, too, as far as `weights` has them all.
    """
    if name not in TRUNKS or name == "tiny":
        raise ValueError(f"unknown trunk {name!r}; choose one of {', '.join(TRUNKS)}")
    if name not in RESNETS or weights == "imagenet":
        _refuse_width(name, width)
    if weights == "imagenet":
        if name == "caffenet":
            raise ValueError("torchvision has no CaffeNet; give the path of a converted file")
        return _download_imagenet(name)
    if name == "caffenet":
        network = CaffeNet()
    else:
        network = torchvision.models.get_model(name, weights=None)
    if width != STEM_WIDTH:
        _set_width(network, width)
    if weights is not None:
        state, used = read_state_dict(weights), _used_keys(network, name)
        behind = set(network.state_dict()) - used
        behind = {key for key in behind if not key.startswith(("fc.", "classifier.6."))}
        if whole and any(key in state for key in behind):
            used |= behind
        _load_checked(network, state, used=used, source=str(weights))
    return network


def _refuse_width(name: str, width: int) -> None:
    if width != STEM_WIDTH:
        raise ValueError(
            f"trunk width {width} is only for ResNets with weights from elsewhere than ImageNet; "
            f"use {STEM_WIDTH} for this {name}"
        )


def _set_width(network: nn.Module, width: int) -> None:
    """Makes all layers of a ResNet narrower or wider by one factor, in place; new random weights.

    torchvision's own arguments widen the inner convolutions of its blocks only.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, _conv_of_width(child, width))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(child.num_features * width // STEM_WIDTH))
    classes = network.fc.out_features
    network.fc = nn.Linear(network.fc.in_features * width // STEM_WIDTH, classes)


def _conv_of_width(conv: nn.Conv2d, width: int) -> nn.Conv2d:
    inputs = 3 if conv.in_channels == 3 else conv.in_channels * width // STEM_WIDTH
    new = nn.Conv2d(
        inputs,
        conv.out_channels * width // STEM_WIDTH,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        bias=False,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
    return new


def _download_imagenet(name: str) -> nn.Module:
    try:
        return torchvision.models.get_model(name, weights="IMAGENET1K_V1")
    except (OSError, RuntimeError) as error:  # no network, or a file that came damaged
        raise ValueError(
            f"cannot download ImageNet weights for {name} ({error}); "
            "set trunk.weights to a local file instead"
        ) from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A file's state dict: tensors by name; a `model` or `state_dict` wrapper around it is opened.

    Raises:
        ValueError: the file holds no state dict, or cannot be read as one.
        FileNotFoundError: there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights file {path} does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is no checkpoint
        raise ValueError(
            f"{path} is not a PyTorch weights file ({type(error).__name__})"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (tensors by name)")
    return dict(state)


def upgrade_trunk_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a trunk, or of a network with trunks in it, under the names of today."""
    return state


def describe_mismatch(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, optional: set = frozenset()
) -> str:
    """What differs between two state dicts, in words; empty when `found` fits `expected`.

    Args:
        optional: keys of `found` that may be there without being expected.
    """
    missing = [k for k in expected if k not in found]
    unexpected = [k for k in found if k not in expected and k not in optional]
    shapes = [
        f"{k} is {tuple(found[k].shape)} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in found and found[k].shape != v.shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("other shapes", shapes)]
    return "; ".join(f"{len(keys)} {what}: {_first(keys)}" for what, keys in parts if keys)


def _first(items: list[str], limit: int = 4) -> str:
    return ", ".join(items[:limit]) + (
        f", ... ({len(items) - limit} more)" if len(items) > limit else ""
    )


def _load_checked(
    network: nn.Module, state: dict[str, Tensor], *, used: set[str], source: str
) -> None:
    own = network.state_dict()
    # num_batches_tracked is a counter of live batch norm; frozen batch norm has no use for it.
    expected = {k: own[k] for k in own if k in used and not k.endswith("num_batches_tracked")}
    difference = describe_mismatch(expected, state, optional=set(own))
    if difference:
        raise ValueError(f"{source} does not fit this trunk: {difference}")
    network.load_state_dict({k: state[k] for k in expected}, strict=False)


def _used_keys(network: nn.Module, name: str) -> set[str]:
    """The keys of the layers up to stride 16; the rest of the network is cut away."""
    if name in RESNETS:
        cut = ("layer4.", "fc.")
    elif name in (*VGGS, "caffenet"):
        cut = ("classifier.",)
    else:
        cut = (
            "classifier.",
            "features.denseblock4.",
            "features.norm5.",
            "features.transition3.conv.",
        )
    return {key for key in network.state_dict() if not key.startswith(cut)}


def to_trunk_layers(module: nn.Module, *, padding: str = "symmetric") -> nn.Module:
    """Replaces convolutions by `TrunkConv2d` and batch norm by constants, in place.

    Args:
        padding: one of `PADDINGS`.

    Returns:
        The module.
    """
    assert padding in PADDINGS, padding
    for parent in list(module.modules()):
        for conv_name, norm_name in CONV_NORM_PAIRS:
            conv, norm = getattr(parent, conv_name, None), getattr(parent, norm_name, None)
            if type(conv) is nn.Conv2d and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, _trunk_conv(conv, norm))
                setattr(parent, norm_name, nn.Identity())
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d:
                setattr(parent, name, _trunk_conv(child, None))
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, _frozen(child))
            elif isinstance(child, nn.ReLU):
                child.inplace = True  # nothing reads a convolution's output but its ReLU
    for layer in module.modules():
        if isinstance(layer, TrunkConv2d):
            layer.zero_padding = padding == "zero"
    return module


def _trunk_conv(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> TrunkConv2d:
    new = TrunkConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        stride=conv.stride[0],
        padding=conv.padding[0],
        groups=conv.groups,
        bias=conv.bias is not None,
        frozen_norm=norm is not None,
    )
    new.weight = conv.weight
    new.bias = conv.bias
    if norm is not None:
        scale, shift = _scale_and_shift(norm)
        new.scale.copy_(scale)
        new.shift.copy_(shift)
    return new


def _scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    frozen = torchvision.ops.FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen


def _resnet_levels(network: nn.Module) -> list[nn.Module]:
    # The stem's batch norm moves into its convolution before the network is taken apart.
    network.conv1, network.bn1 = _trunk_conv(network.conv1, network.bn1), nn.Identity()
    return [_sequential(network, names) for names in RESNET_LEVELS]


def _vgg_levels(network: nn.Module) -> list[nn.Module]:
    """conv1 and conv2, then a level each for conv3, conv4 and conv5.

    Every pool opens the block behind it.
    """
    # Without the last pool, so that the map stays at stride 16.
    layers = list(network.features)[:-1]
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    starts = [0, *pools[1:], len(layers)]
    return [nn.Sequential(*layers[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def _densenet_levels(network: nn.Module) -> list[nn.Module]:
    """The stem, then a level for each dense block.

    A dense block leaves raw sums; the norm and ReLU of the transition behind it make them features.
    """
    f = network.features
    f.conv0, f.norm0 = _trunk_conv(f.conv0, f.norm0), nn.Identity()
    levels = [nn.Sequential(f.conv0, f.relu0)]
    entrance = [f.pool0]
    for block, transition in (
        (f.denseblock1, f.transition1),
        (f.denseblock2, f.transition2),
        (f.denseblock3, f.transition3),
    ):
        levels.append(nn.Sequential(*entrance, block, transition.norm, transition.relu))
        entrance = [transition.conv, transition.pool]
    return levels


def _sequential(network: nn.Module, names: tuple[str, ...]) -> nn.Sequential:
    level = nn.Sequential()
    for name in names:
        level.add_module(name, getattr(network, name))
    return level


_CUTS = {
    "resnet": _resnet_levels,
    "vgg": _vgg_levels,
    "densenet": _densenet_levels,
    "caffenet": caffenet_levels,
}


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), then ReLU.

    Starts as the identity, so that it trains without batch norm.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = TrunkConv2d(channels, channels, 3)
        self.conv2 = TrunkConv2d(channels, channels, 3)
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


def tiny_levels(
    widths: tuple[int, ...] = (12, 24, 64, 128), blocks: tuple[int, ...] = (0, 0, 1, 1)
) -> list[nn.Module]:
    """Levels of a small residual network for two CPU cores: no batch norm, trained from scratch."""
    levels, channels = [], 3
    for width, depth in zip(widths, blocks, strict=True):
        entrance = TrunkConv2d(channels, width, 3, stride=2)
        nn.init.kaiming_normal_(entrance.weight, nonlinearity="relu")
        nn.init.zeros_(entrance.bias)
        levels.append(
            nn.Sequential(
                entrance, nn.ReLU(inplace=True), *(ResidualBlock(width) for _ in range(depth))
            )
        )
        channels = width
    return levels
