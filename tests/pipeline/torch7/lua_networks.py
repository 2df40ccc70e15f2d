"""Networks as the trees that `read_torch7` gives, and their arithmetic by a walk over the tree."""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import roi_pool

from models.roi_pooling import roi_pool_lua
from pipeline.torch7.reader import LuaFunction, Torch7Object, walk


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """The largest difference, relative to the largest value, is small."""
    assert ours.shape == theirs.shape
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= tolerance, f"{error:.1e}"


def module(name: str, *modules: Torch7Object, **fields: object) -> Torch7Object:
    return Torch7Object(name, fields | ({"modules": list(modules)} if modules else {}))


def sequence(*modules: Torch7Object) -> Torch7Object:
    return module("nn.Sequential", *modules)


def relu() -> Torch7Object:
    return module("cudnn.ReLU", inplace=True)


def conv(weight: Tensor, bias: Tensor | None = None, *, stride=1, padding=0, groups=1):
    out, inputs, height, width = weight.shape
    sizes = dict(kW=width, kH=height, dW=stride, dH=stride, padW=padding, padH=padding)
    sizes |= dict(nInputPlane=inputs * groups, nOutputPlane=out, groups=groups)
    fields = {} if bias is None else {"bias": bias}
    return module("cudnn.SpatialConvolution", weight=weight, **fields, **sizes)


def change(value: object, edits: dict[str, dict]) -> None:
    """Sets fields of the modules at paths, in place; a function gives the new value for the old."""
    modules = dict(walk(value))
    for path, fields in edits.items():
        for name, new in fields.items():
            old = modules[path].fields
            old[name] = new(old[name]) if callable(new) else new


def lua_resnet(network: torchvision.models.ResNet, *, frozen: bool) -> Torch7Object:
    """A network of torchvision as fb.resnet.torch saves it."""

    def conv_norm(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> list[Torch7Object]:
        fields = {k: v.detach() for k, v in norm.state_dict().items() if v.dim()}
        after = module("nn.SpatialBatchNormalization", eps=1e-5, **fields)
        if frozen:
            scale = fields["weight"] / (fields["running_var"] + 1e-5).sqrt()
            shift = fields["bias"] - fields["running_mean"] * scale
            after = module("inn.ConstAffine", a=scale, b=shift)
        weight, stride, padding = layer.weight.detach(), layer.stride[0], layer.padding[0]
        return [conv(weight, stride=stride, padding=padding), after]

    def block(layer: nn.Module) -> Torch7Object:
        main: list[Torch7Object] = []
        for i in range(1, 4):
            if hasattr(layer, f"conv{i}"):
                main += [relu()] if i > 1 else []
                main += conv_norm(getattr(layer, f"conv{i}"), getattr(layer, f"bn{i}"))
        down = layer.downsample
        shortcut = sequence(*conv_norm(*down)) if down else module("nn.Identity")
        table = module("nn.ConcatTable", sequence(*main), shortcut)
        return sequence(table, module("nn.CAddTable"), relu())

    stages = [getattr(network, f"layer{i}") for i in range(1, 5)]
    fc = {k: v.detach() for k, v in network.fc.state_dict().items()}
    return sequence(
        *conv_norm(network.conv1, network.bn1),
        relu(),
        module("nn.SpatialMaxPooling", kH=3, kW=3, dH=2, dW=2, padH=1, padW=1),
        *(sequence(*map(block, stage)) for stage in stages),
        *(module("cudnn.SpatialAveragePooling"), module("nn.View"), module("nn.Linear", **fc)),
    )


class RandomLayers:
    """Layers of Caffe's networks with random parameters, as the release has them."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def conv(self, inputs: int, width: int, size: int, stride: int = 1, groups: int = 1):
        fan_in = inputs // groups * size**2
        weight = self.random(width, inputs // groups, size, size, scale=(2 / fan_in) ** 0.5)
        bias = self.random(width, scale=0.1)
        return conv(weight, bias, stride=stride, padding=size // 2, groups=groups)

    def linear(self, inputs: int, width: int) -> Torch7Object:
        weight = self.random(width, inputs, scale=(2 / inputs) ** 0.5)
        return module("nn.Linear", weight=weight, bias=self.random(width, scale=0.1))


def max_pool(size: int, padding: int) -> Torch7Object:
    sides = {"kW": size, "kH": size, "dW": 2, "dH": 2, "padW": padding, "padH": padding}
    return module("cudnn.SpatialMaxPooling", ceil_mode=True, **sides)


def response_norm() -> Torch7Object:
    return module("inn.SpatialCrossResponseNormalization", size=5, alpha=0.0001, beta=0.75, k=1)


def vgg16_features(random: RandomLayers) -> Torch7Object:
    layers, inputs = [], 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers += [max_pool(2, 0)] if block else []
        for _ in range(depth):
            layers += [random.conv(inputs, width, 3), relu()]
            inputs = width
    return sequence(*layers)


def caffenet_features(random: RandomLayers) -> Torch7Object:
    return sequence(
        random.conv(3, 96, 11, stride=4), relu(), max_pool(3, 1), response_norm(),
        random.conv(96, 256, 5, groups=2), relu(), max_pool(3, 1), response_norm(),
        random.conv(256, 384, 3), relu(),
        random.conv(384, 384, 3, groups=2), relu(),
        random.conv(384, 256, 3, groups=2), relu(),
    )  # fmt: skip


HIDDEN, CLASSES = 8, 20
CAFFE_NETWORKS = {"vgg16": (vgg16_features, 512, 7), "caffenet": (caffenet_features, 256, 6)}


def fast_rcnn(name: str, *, features: Torch7Object | None = None) -> dict:
    """Fast R-CNN as {unpack, model}, its fc6 and fc7 narrow."""
    random = RandomLayers(len(name))
    make, width, side = CAFFE_NETWORKS[name]
    drop = module("nn.Dropout", p=0.5, v2=True)
    top = [random.linear(width * side**2, HIDDEN), relu(), drop, random.linear(HIDDEN, HIDDEN)]
    outputs = random.linear(HIDDEN, CLASSES + 1), random.linear(HIDDEN, 4 * (CLASSES + 1))
    features = sequence(features or make(random))
    network = sequence(
        module("nn.ParallelTable", features, module("nn.Identity")),
        module("inn.ROIPooling", W=side, H=side, spatial_scale=0.0625),
        module("nn.View", numElements=-1),
        sequence(*top, relu(), drop),
        module("nn.ConcatTable", *outputs),
    )
    return {"unpack": LuaFunction(100), "model": network}


def run(item: Torch7Object, x):
    """The network's own arithmetic, module by module."""
    f, name = item.fields, item.typename.split(".")[1]
    if name == "Sequential":
        for inner in f["modules"]:
            x = run(inner, x)
    elif name == "ParallelTable":
        x = [run(inner, part) for inner, part in zip(f["modules"], x, strict=True)]
    elif name == "ConcatTable":
        x = [run(inner, x) for inner in f["modules"]]
    elif name == "SpatialConvolution":
        parts = x.chunk(f["groups"], 1)
        weights, biases = f["weight"].chunk(f["groups"]), f["bias"].chunk(f["groups"])
        each = zip(parts, weights, biases, strict=True)
        x = torch.cat([F.conv2d(p, w, b, f["dH"], f["padH"]) for p, w, b in each], 1)
    elif name == "SpatialMaxPooling":
        x = F.max_pool2d(x, f["kH"], f["dH"], f["padH"], ceil_mode=f["ceil_mode"])
    elif name == "SpatialCrossResponseNormalization":
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2)).unfold(1, f["size"], 1).sum(-1)
        x = x / (f["k"] + f["alpha"] / f["size"] * squares) ** f["beta"]
    elif name == "ReLU":
        x = x.clamp(min=0)
    elif name == "ROIPooling":
        pool = roi_pool_lua if f.get("v2") else roi_pool
        x = pool(x[0], x[1] - 1, f["H"], f["spatial_scale"])
    elif name == "View":
        x = x.flatten(1)
    elif name == "Linear":
        x = x @ f["weight"].T + f["bias"]
    else:
        assert name in ("Identity", "Dropout"), name
    return x
