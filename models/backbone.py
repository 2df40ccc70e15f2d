"""The ImageNet networks that trunks are cut from, and files of their weights."""

import warnings
import zipfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from models.caffenet import CaffeNet

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WITH_LAST_STAGE = (*RESNETS, "mobilenet_v2")  # a stage after stride 16, for detectors
BACKBONES = (*RESNETS, "vgg11", "vgg16", "densenet121", "mobilenet_v2", "caffenet")
STYLES = TORCHVISION, CAFFE = ("torchvision", "caffe")  # of ResNets, see `to_caffe_style`
CAFFE_MEAN = (103.06, 115.90, 123.15)  # of BGR from 0 to 255
STEM_WIDTH = 64  # channels of a ResNet's first convolution
# The layers that a trunk does not use, by their keys in the state dict.
CUT_AWAY = {
    "resnet": ("layer4.", "fc."),
    "vgg": ("classifier.",),
    "caffenet": ("classifier.",),
    "mobilenet_v": ("classifier.", *(f"features.{i}." for i in range(14, 19))),
    "densenet": (
        "classifier.", "features.denseblock4.", "features.norm5.", "features.transition3.conv.",
    ),
}  # fmt: skip
MAX_UNPACKED = 2  # times its size that a file's content may take
# Last layers: their classes may be another data set's.
CLASSIFIERS = ("fc.", "classifier.6.", "classifier.1.")


def load_backbone(
    name: str,
    *,
    weights: str | Path | None = None,
    whole: bool = False,
    width: int = STEM_WIDTH,
    style: str = TORCHVISION,
) -> nn.Module:
    """A whole network, with the layers that a trunk uses loaded; see `models.trunk.build_trunk`.

    Args:
        style: of a ResNet, one of `STYLES`.
        whole: load the layers after the trunk, too, if `weights` has them.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown trunk {name!r}; choose one of {', '.join(BACKBONES)}")
    if weights == "imagenet":
        if style == CAFFE:
            raise ValueError(
                "torchvision's ImageNet weights are not of style caffe; give a file of weights, or "
                "set trunk.style to torchvision"
            )
        return _download_imagenet(name, width)
    build = CaffeNet if name == "caffenet" else torchvision.models.get_model_builder(name)
    network = build()
    if width != STEM_WIDTH:
        _set_width(network, width)
    if weights is not None:
        _load_checked(network, name, weights, whole=whole)
    if style == CAFFE:
        _to_caffe_style(network)
        if weights is not None:
            _fold_caffe_pixels(network)
    return network


def _to_caffe_style(network: Any) -> None:
    """Gives a ResNet of torchvision the strides and the pool of He et al.'s, in place."""
    network.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    for block in network.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
            if block.conv1.stride != (1, 1) and network.conv1.out_channels < STEM_WIDTH:
                block.conv1.__class__ = NarrowShortcut


@torch.no_grad()
def _fold_caffe_pixels(network: Any) -> None:
    """Makes a first convolution for Caffe's pixels one for torchvision's, in place.

    255 (x std + mean) less Caffe's mean is linear in x: the factor goes into the weights, the rest,
    about half a gray level, into the mean of the batch norm. Where zeros pad the image, that rest
    is missing.
    """
    conv, norm = network.conv1, network.bn1
    pixels = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms()
    mean, std = torch.tensor(pixels.mean), torch.tensor(pixels.std)
    weight = conv.weight.flip(1)  # from BGR to RGB
    rest = 255 * mean - torch.tensor(CAFFE_MEAN).flip(0)
    norm.running_mean -= weight.sum((2, 3)) @ rest
    conv.weight.copy_(weight * 255 * std[:, None, None])


def _download_imagenet(name: str, width: int) -> nn.Module:
    if name == "caffenet":
        raise ValueError("torchvision has no CaffeNet; give the path of a converted file")
    if width != STEM_WIDTH:
        raise ValueError(
            f"ImageNet weights of {name} have trunk.width {STEM_WIDTH}, got {width}; "
            "set trunk.weights to a local file or null instead"
        )
    try:
        return torchvision.models.get_model(name, weights="IMAGENET1K_V1")
    except (OSError, RuntimeError) as error:  # no network, or a file that came damaged
        raise ValueError(
            f"cannot download ImageNet weights for {name} ({error}); "
            "set trunk.weights to a local file instead"
        ) from error


class NarrowShortcut(nn.Conv2d):
    """A strided 1x1 convolution of few channels that picks its pixels beforehand.

    oneDNN's has a weight gradient that writes outside its memory, for 8 channels in channels-last
    order (torch 2.14.1); the usual widths are fine.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, ceil(H / stride), ceil(W / stride))."""
        return F.conv2d(x[..., :: self.stride[0], :: self.stride[1]], self.weight, self.bias)


def _set_width(network: Any, width: int) -> None:
    """Makes all layers of a ResNet narrower or wider by one factor, in place; new random weights.

    torchvision's arguments widen the inner convolutions of its blocks only.
    """

    def scaled(channels: int) -> int:
        return channels if channels == 3 else channels * width // STEM_WIDTH

    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(scaled(layer.num_features)))
            elif isinstance(layer, nn.Conv2d):
                shortcut = layer.kernel_size == (1, 1) and layer.stride != (1, 1)
                conv = (NarrowShortcut if shortcut and width < STEM_WIDTH else nn.Conv2d)(
                    scaled(layer.in_channels), scaled(layer.out_channels), layer.kernel_size[0],
                    layer.stride[0], int(layer.padding[0]), bias=False,
                )  # fmt: skip
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                setattr(parent, name, conv)
    network.fc = nn.Linear(scaled(network.fc.in_features), network.fc.out_features)


def _load_checked(network: nn.Module, name: str, weights: str | Path, *, whole: bool) -> None:
    """Copies a file's weights into the layers of a network that a trunk uses."""
    known, state = network.state_dict(), read_state_dict(weights)
    cut = {key for key in known if key.startswith(CUT_AWAY[name.rstrip("0123456789")])}
    after = {key for key in cut if not key.startswith(CLASSIFIERS)}
    if whole and not after.isdisjoint(state):
        cut -= after
    # num_batches_tracked is a counter of live batch norm; frozen batch norm has no use for it.
    expected = {
        key: value
        for key, value in known.items()
        if key not in cut and not key.endswith("num_batches_tracked")
    }
    difference = describe_mismatch(expected, state, optional=known)
    if difference:
        raise ValueError(f"{weights} does not fit this trunk: {difference}")
    network.load_state_dict({key: state[key] for key in expected}, strict=False)


def has_last_stage(name: str, weights: str | Path) -> bool:
    """Whether a file of weights has those of the stage after the trunk."""
    stage = CUT_AWAY[name.rstrip("0123456789")]
    keys = (key for key in read_state_dict(weights) if not key.startswith(CLASSIFIERS))
    return any(key.startswith(stage) for key in keys)


def load_file(path: str | Path) -> Any:
    """The content of a PyTorch file, its tensors on the CPU.

    Raises:
        ValueError or FileNotFoundError: there is no such file, or it is of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist")
    _refuse_compressed(path)
    try:
        with warnings.catch_warnings():  # of the pickle protocol of what it then refuses
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is no checkpoint: no PyTorch file, or one with other objects than tensors and "
            "plain values, which could run code (UnpicklingError)"
        ) from error
    except Exception as error:  # torch.load raises many kinds for a file that is no checkpoint
        raise ValueError(f"{path} is not a PyTorch file ({type(error).__name__})") from error
    _refuse_claims(path, content)
    return content


def _refuse_compressed(path: str | Path) -> None:
    """A few megabytes can unpack to more than there is memory; `torch.save` packs nothing."""
    if zipfile.is_zipfile(path):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
            unpacked = sum(entry.file_size for entry in file.infolist())
            if unpacked > MAX_UNPACKED * Path(path).stat().st_size:
                raise ValueError(f"{path} is compressed: {unpacked:,} bytes in memory")


def _refuse_claims(path: str | Path, content: Any) -> None:
    """PyTorch 2.6 believes a storage that claims to be larger than the file; 2.14 does not."""
    pending, size = [content], Path(path).stat().st_size
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() > size:
            raise ValueError(f"{path} is damaged: a tensor claims more bytes than the file has")
        if isinstance(value, Mapping):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A file's tensors by name; a `model` or `state_dict` wrapper around them is opened.

    Raises:
        ValueError or FileNotFoundError: there is no such file, or it holds no state dict.
    """
    state = load_file(path)
    for wrapper in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (tensors by name)")
    return dict(state)


def describe_mismatch(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, optional: Collection[str] = ()
) -> str:
    """The differences between two state dicts, in words; empty when `found` fits `expected`.

    `optional` are keys that need not be expected.
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
    more = f", ... ({len(items) - limit} more)" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
