"""Networks of torch as the trees that `read_torch7` gives for those of Lua."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import roi_pool

from pipeline.torch7.reader import LuaFunction, Torch7Object, walk


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference, relative to the largest value, is small."""
    assert ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= tolerance, f"{error:.1e}"


def image_of(folder: Path) -> np.ndarray:
    """(H, W, 3) float32 from 0 to 255: the original's was scaled and is not of whole numbers."""
    return np.ascontiguousarray((np.load(folder / "image.npy") * 255).transpose(1, 2, 0))


def module(name: str, *modules: Torch7Object, **fields: object) -> Torch7Object:
    return Torch7Object(name, fields | ({"modules": list(modules)} if modules else {}))


def change(value: object, edits: dict[str, dict]) -> None:
    """Sets fields of the modules at paths, in place; a function gives the new value for the old."""
    modules = dict(walk(value))
    for path, fields in edits.items():
        for name, new in fields.items():
            old = modules[path].fields
            old[name] = new(old[name]) if callable(new) else new


class ResponseNorm(nn.Module):
    """CaffeNet's, by the formula."""

    settings = dict(size=5, alpha=0.0001, beta=0.75, k=1)

    def forward(self, x: Tensor) -> Tensor:
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2)).unfold(1, 5, 1).sum(-1)
        return x / (1 + 0.0001 / 5 * squares) ** 0.75


def lua(layer: nn.Module | None) -> Torch7Object:
    """A layer as Lua saves it; None for one that does nothing."""
    fields: dict = (
        {name: value.detach() for name, value in layer.state_dict().items()} if layer else {}
    )
    if isinstance(layer, nn.Sequential):
        return module("nn.Sequential", *map(lua, layer))
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
        for field, setting in (("k", "kernel_size"), ("d", "stride"), ("pad", "padding")):
            size = getattr(layer, setting)
            size = size if isinstance(size, tuple) else (size, size)
            fields |= {f"{field}H": size[0], f"{field}W": size[1]}
    if isinstance(layer, nn.MaxPool2d):
        return module("cudnn.SpatialMaxPooling", ceil_mode=layer.ceil_mode, **fields)
    if isinstance(layer, nn.Conv2d):
        return module("cudnn.SpatialConvolution", groups=layer.groups, **fields)
    if isinstance(layer, nn.BatchNorm2d):
        del fields["num_batches_tracked"]
        return module("nn.SpatialBatchNormalization", eps=1e-5, **fields)
    if isinstance(layer, ResponseNorm):
        return module("inn.SpatialCrossResponseNormalization", **layer.settings)
    names = {nn.Linear: "nn.Linear", nn.ReLU: "cudnn.ReLU", nn.Dropout: "nn.Dropout"}
    return module(names.get(type(layer), "nn.Identity"), **fields)


def lua_resnet(network: torchvision.models.ResNet, *, frozen: bool) -> Torch7Object:
    """A network of torchvision as fb.resnet.torch saves it."""

    def conv_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> list[Torch7Object]:
        before, after = lua(conv), lua(norm)
        f = after.fields
        if frozen:
            scale = f["weight"] / (f["running_var"] + 1e-5).sqrt()
            after = module("inn.ConstAffine", a=scale, b=f["bias"] - f["running_mean"] * scale)
        else:  # a bias, and another epsilon, that change nothing
            before.fields["bias"] = torch.full_like(f["bias"], 0.25)
            f |= {"running_mean": f["running_mean"] + 0.25, "eps": 1e-3}
            f["running_var"] = f["running_var"] - (1e-3 - 1e-5)
        return [before, after]

    def block(layer: nn.Module) -> Torch7Object:
        main: list[Torch7Object] = []
        for i in range(1, 4):
            if hasattr(layer, f"conv{i}"):
                main += [lua(nn.ReLU())] if i > 1 else []
                main += conv_norm(getattr(layer, f"conv{i}"), getattr(layer, f"bn{i}"))
        down = layer.downsample
        shortcut = module("nn.Sequential", *conv_norm(*down)) if down else lua(None)
        table = module("nn.ConcatTable", module("nn.Sequential", *main), shortcut)
        return module("nn.Sequential", table, module("nn.CAddTable"), lua(nn.ReLU()))

    stages = [getattr(network, f"layer{i}") for i in range(1, 5)]
    end = module("cudnn.SpatialAveragePooling"), module("nn.View"), lua(network.fc)
    return module(
        "nn.Sequential",
        *conv_norm(network.conv1, network.bn1),
        *(lua(nn.ReLU()), lua(network.maxpool)),
        *(module("nn.Sequential", *map(block, stage)) for stage in stages),
        *end,
    )


def vgg16_features() -> list[nn.Module]:
    layers, inputs = [], 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers += [nn.MaxPool2d(2, ceil_mode=True)] if block else []
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
    return layers


def caffenet_features() -> list[nn.Module]:
    def pool() -> tuple[nn.Module, nn.Module]:
        return nn.MaxPool2d(3, 2, 1, ceil_mode=True), ResponseNorm()

    return [
        nn.Conv2d(3, 96, 11, 4, padding=5), nn.ReLU(), *pool(),
        nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), *pool(),
        nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(),
    ]  # fmt: skip


HIDDEN, CLASSES = 8, 20
CAFFE_NETWORKS = {"vgg16": (vgg16_features, 512, 7), "caffenet": (caffenet_features, 256, 6)}


class FastRCNN(nn.Module):
    """Fast R-CNN on one of Caffe's networks, with random parameters; fc6 and fc7 are narrow."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(len(name))
        make, width, self.side = CAFFE_NETWORKS[name]
        self.features = nn.Sequential(*make())
        fc6, fc7 = nn.Linear(width * self.side**2, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.top = nn.Sequential(fc6, nn.ReLU(), nn.Dropout(), fc7, nn.ReLU(), nn.Dropout())
        outputs = nn.Linear(HIDDEN, CLASSES + 1), nn.Linear(HIDDEN, 4 * (CLASSES + 1))
        self.outputs = nn.ModuleList(outputs)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
            else:
                nn.init.normal_(parameter, std=0.1)
        self.eval()

    def forward(self, image: Tensor, rois: Tensor) -> list[Tensor]:
        """Class logits and deltas of RoIs whose corners count from 1."""
        pooled = roi_pool(self.features(image), rois - 1, self.side, 0.0625)
        return [output(self.top(pooled.flatten(1))) for output in self.outputs]

    def lua(self) -> dict:
        """As {unpack, model}."""
        features = module("nn.Sequential", lua(self.features))
        network = module(
            "nn.Sequential",
            module("nn.ParallelTable", features, lua(None)),
            module("inn.ROIPooling", W=self.side, H=self.side, spatial_scale=0.0625),
            module("nn.View", numElements=-1),
            lua(self.top),
            module("nn.ConcatTable", *map(lua, self.outputs)),
        )
        return {"unpack": LuaFunction(100), "model": network}
