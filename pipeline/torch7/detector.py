"""The released detectors, out of Torch7 files, as checkpoints of this project.

A detector is features -> RoI pooling -> head -> K class linears and one of boxes (Fast R-CNN,
Girshick, ICCV 2015; integral loss, BMVC 2016), with VGG, CaffeNet or a ResNet inside. How images
and boxes come to it the file does not say: that is the released code's, see `_config`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.multipathnet import MultiPathNet
from models.trunk import TrunkConfig, describe_mismatch
from pipeline.config import (
    Config,
    DetectConfig,
    MultiPathNetConfig,
    PixelConfig,
    RoiSamplingConfig,
)
from pipeline.networks import build_multipathnet
from pipeline.recipe import config_to_dict
from pipeline.torch7 import caffe
from pipeline.torch7.category_names import known_categories
from pipeline.torch7.imagenet import (
    Layers,
    is_stage,
    read_resnet,
    refuse,
    trunk_key,
    words,
)
from pipeline.torch7.modules import RECTIFIERS, Module, Taken, expect, kind, submodules

# "ImagenetTransformer" of the released code (models/model_utils.lua).
RESNET_PIXELS = PixelConfig(
    mean=(0.48462227599918, 0.45624044862054, 0.40588363755159),
    std=(0.22889466674951, 0.22446679341259, 0.22495548344775),
)
THRESHOLDS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]  # IoU, of the integral loss's heads in their order

State = dict[str, Tensor]


@dataclass
class Parts:
    """A detector's modules.

    Attributes:
        features, head: before and behind `pooling`, the RoI pooling. classes: K linears.
        boxes: one linear. norm: of the box deltas, if there is one.
    """

    features: list[Module]
    pooling: Module
    head: list[Module]
    classes: list[Module]
    boxes: Module
    norm: Module | None

    @property
    def residual(self) -> bool:
        """Whether it is a ResNet."""
        return any(is_stage(part.value) for part in self.features)


def is_detector(value: Any) -> bool:
    """Whether this is a Sequential, as it is or as {unpack, model}, that pools RoIs."""
    network = caffe.unpacked(value)
    return kind(network) == "Sequential" and "ROIPooling" in map(kind, submodules(network))


def convert_detector(value: Any, taken: Taken) -> tuple[str, dict]:
    """Words for a detector, and its checkpoint.

    Raises:
        ValueError: another structure, or layers that do not fit: all are listed.
    """
    place = "model" if isinstance(value, dict) else ""
    parts = _parts(Module(caffe.unpacked(value), place, taken))
    config = _config(parts)
    outputs = _output_state(parts)
    classes = len(outputs["regress.bias"]) // 4 - 1
    read = _residual_state if parts.residual else _plain_state
    state, problems = read(parts, config, classes)
    own = _own(config, classes).state_dict()
    refuse(describe_mismatch(own, state | outputs), problems)
    content = {
        "format": 1,
        "stage": "multipathnet",
        "config": config_to_dict(config),
        "model": state | outputs,
        "categories": known_categories(classes),
    }
    return _words(config, classes), content


def _own(config: Config, classes: int) -> MultiPathNet:
    """Our network, without memory for its weights."""
    with torch.device("meta"):
        return build_multipathnet(config, num_classes=classes, pretrained=False)


def _parts(network: Module) -> Parts:
    modules = network.modules
    at = [part.kind for part in modules].index("ROIPooling")
    (inputs,) = expect(modules[:at], "ParallelTable", where="what is before the RoI pooling")
    if len(inputs.modules) != 2:
        raise ValueError(f"{inputs.place}: features and Identity are due")
    tables = [n for n, part in enumerate(modules) if n > at and part.kind == "ConcatTable"]
    if not tables:
        raise ValueError("a ConcatTable of class and box linears is due behind the RoI pooling")
    outputs = modules[tables[0]]
    if len(outputs.modules) != 2:
        raise ValueError(f"{outputs.place}: classes and boxes are due")
    classes, boxes = outputs.modules
    heads = classes.modules if classes.kind == "ConcatTable" else [classes]
    expect([*heads, boxes], *["Linear"] * (len(heads) + 1), where=outputs.place)
    return Parts(
        features=caffe.flat(inputs.modules[0]),
        pooling=modules[at],
        head=[step for part in modules[at + 1 : tables[0]] for step in caffe.flat(part)],
        classes=heads,
        boxes=boxes,
        norm=_delta_norm(modules[tables[0] + 1 :], heads=len(heads)),
    )


def _delta_norm(ends: list[Module], *, heads: int) -> Module | None:
    """What turns the box linear's output into deltas.

    Raises:
        ValueError: the end of the network is not the mean of the heads' probabilities.
    """
    norm, switches = None, 0
    for part in ends:
        if part.kind == "ParallelTable" and len(part.modules) == 2:
            _, norm = expect(
                part.modules, ("Identity", "SoftMax"), ("BBoxNorm", "Identity"), where=part.place
            )
        elif part.kind == "ModeSwitch":
            switches += 1
        elif part.kind != "SoftMax":
            raise ValueError(f"{part.place}: a {part.kind} is not expected here")
    if heads > 1 and switches != 1:
        raise ValueError(f"{heads} class linears, and no ModeSwitch that takes their mean")
    return norm if norm is not None and norm.kind == "BBoxNorm" else None


def _config(parts: Parts) -> Config:
    """What the file says of the network, and the released code of what is around it.

    Images: 800 pixels and 400 proposals for COCO, 600 and 2000 for VOC (scripts/eval_*.sh).
    """
    size = {int(parts.pooling.field(name, 0)) for name in ("H", "W")}
    if len(size) != 1 or parts.pooling.field("spatial_scale") != 1 / 16:
        raise ValueError(f"{parts.pooling.place}: square pooling at stride 16 is due")
    count = len(parts.classes)
    if count > len(THRESHOLDS):
        raise ValueError(f"{count} class linears, and at most {len(THRESHOLDS)} are known")
    residual = parts.residual
    network = MultiPathNetConfig(
        trunk=TrunkConfig(weights=None, padding="zero"),
        head="layer4" if residual else "fc",
        foveal=False,
        skip=False,
        box_tower=False,
        thresholds=THRESHOLDS[:count],
        draw_threshold=count > 1,
        normalize=False,
        pooled_size=size.pop(),
        # Files from before version 2 of the pooling have no such field.
        roi_bins="rounded" if parts.pooling.field("v2") else "overlapping",
        resampling="corners",
        inclusive_boxes=True,
        pixels=RESNET_PIXELS if residual else caffe.PIXELS,
        sampling=RoiSamplingConfig(short_side=800 if residual else 600, long_side=1000),
    )
    detect = DetectConfig(num_proposals=400 if residual else 2000)
    return Config(multipathnet=network, detect=detect)


def _residual_state(parts: Parts, config: Config, classes: int) -> tuple[State, list[str]]:
    """Trunk and layer4 of a ResNet, and what is wrong with them; fills in the config's trunk."""
    *layer4, pool = expect(
        parts.head, "Sequential", ("SpatialAveragePooling",), where="behind the RoI pooling"
    )
    c = config.multipathnet
    name, width, layers = read_resnet([*parts.features, *layer4], stages=4)
    c.trunk.name, c.trunk.width, c.trunk.frozen_levels = name, width, 2
    problems = []
    side = -(-c.pooled_size // 2)  # layer4 has stride 2
    if (pool.field("kH"), pool.field("kW")) != (side, side):
        problems.append(f"{pool.place}: an average over {side} x {side} cells is due")
    keys = {number: _key(number) for number in layers}
    modules = dict(_own(config, classes).named_modules())
    problems += [
        problem
        for number, layer in layers.items()
        if keys[number] in modules
        for problem in layer.check(modules[keys[number]], mirrored=False)
    ]
    return _layer_state(layers, keys), problems


def _key(name: str) -> str:
    """A convolution's name in our detector."""
    top, _, rest = name.partition(".")
    return f"towers.0.head.stage.{rest}" if top == "layer4" else f"trunk.{trunk_key(name)}"


def _layer_state(layers: Layers, keys: dict[str, str]) -> State:
    state = {}
    for name, layer in layers.items():
        state[f"{keys[name]}.weight"] = layer.weight()
        scale, shift = layer.scale_and_shift()
        state[f"{keys[name]}.scale"], state[f"{keys[name]}.shift"] = scale, shift
    return state


def _plain_state(parts: Parts, config: Config, classes: int) -> tuple[State, list[str]]:
    """Trunk, fc6 and fc7 of a VGG or CaffeNet, see `_residual_state`."""
    c = config.multipathnet
    c.trunk.name, c.trunk.ceil_pooling = (
        caffe.plain_name(parts.features),
        caffe.rounds_up(parts.features),
    )
    c.trunk.frozen_levels = 1  # conv1 and conv2 of VGG, conv1 of CaffeNet (ICCV 2015, section 4.5)
    six, _, seven, _ = expect(
        parts.head, "Linear", RECTIFIERS, "Linear", RECTIFIERS, where="behind the RoI pooling"
    )
    state = caffe.linear_state(six, "towers.0.head.fc6")
    state |= caffe.linear_state(seven, "towers.0.head.fc7")
    c.features = len(state["towers.0.head.fc7.bias"])
    # As many channels as the trunk has: no convolution between pooling and fc6.
    c.width = int(state["towers.0.head.fc6.weight"].shape[1]) // c.pooled_size**2
    trunk, problems = caffe.plain_state(
        parts.features, _own(config, classes).trunk, prefix="trunk."
    )
    return state | trunk, problems


def _output_state(parts: Parts) -> State:
    weights, biases = zip(*((h.take("weight"), h.take("bias")) for h in parts.classes), strict=True)
    state = caffe.linear_state(parts.boxes, "regress")
    state["classify.weight"], state["classify.bias"] = torch.cat(weights), torch.cat(biases)
    state["delta_mean"], state["delta_std"] = torch.zeros(4), torch.ones(4)
    if parts.norm is not None:
        state["delta_mean"] = parts.norm.take("mean").flatten()
        state["delta_std"] = parts.norm.take("std").flatten()
    return state


def _words(config: Config, classes: int) -> str:
    c = config.multipathnet
    title = caffe.TITLES.get(c.trunk.name) or words(c.trunk.name, c.trunk.width)
    method = "Fast R-CNN" if len(c.thresholds) == 1 else f"Integral loss of {len(c.thresholds)}"
    return f"{method} on {title}, {classes} classes, RoIs {c.pooled_size} x {c.pooled_size}"
