"""The released detectors, out of Torch7 files, as checkpoints of this project.

A detector is features -> RoI pooling -> head -> K class linears and one of boxes (Fast R-CNN,
Girshick, ICCV 2015; integral loss, BMVC 2016), with VGG, CaffeNet or a ResNet inside. The file does
not say how images and boxes come to it: that is the released code's, see `convert_detector`.
"""

from typing import Any

import torch
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

from datasets.resize import PixelConfig
from datasets.roi_sampler import RoiSamplingConfig
from models.multipathnet import MultiPathNetConfig
from models.trunk import TrunkConfig, build_trunk
from pipeline.config import Config, DetectConfig, MultiPathNetStageConfig
from pipeline.networks import make_multipathnet
from pipeline.torch7 import imagenet
from pipeline.torch7.modules import (
    RELUS,
    Module,
    Used,
    Weights,
    expect,
    is_stage,
    steps,
    unpacked,
)

# "ImagenetTransformer" of the released code (models/model_utils.lua).
RESNET_PIXELS = PixelConfig(
    mean=(0.48462227599918, 0.45624044862054, 0.40588363755159),
    std=(0.22889466674951, 0.22446679341259, 0.22495548344775),
)
THRESHOLDS = MultiPathNetConfig.iou_thresholds  # of the integral loss's heads in their order
# COCO's and PASCAL VOC's categories by id, in the order that detectors have them; others are "N/A".
COCO = FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"]
VOC = FCN_ResNet50_Weights.DEFAULT.meta["categories"]


def convert_detector(value: Any, used: Used) -> tuple[str, dict]:
    """Words for a detector, and its checkpoint with the config as it is.

    Images: 800 pixels and 400 proposals for COCO, 600 and 2000 for VOC (scripts/eval_*.sh).

    Raises:
        ValueError: another structure, or layers that do not fit: all are listed.
    """
    network = Module(unpacked(value), "model" if isinstance(value, dict) else "", used)
    features, pooling, head, outputs, ends = _split(network)
    weights, residual = Weights(), any(is_stage(part.value) for part in features)
    size = pooling.integer("H")
    if not size or size != pooling.integer("W") or pooling.plain("spatial_scale") != 1 / 16:
        raise ValueError(f"{pooling.path}: expected square pooling at stride 16")
    count = _read_outputs(outputs, ends, weights)
    read = _read_residual if residual else _read_plain
    config = MultiPathNetStageConfig(
        head="layer4" if residual else "fc",
        foveal=False,
        skip=False,
        use_box_tower=False,
        iou_thresholds=THRESHOLDS[:count],
        normalize=False,
        pooled_size=size,
        # Files from before version 2 of the pooling have no such field.
        roi_pool="lua" if pooling.plain("v2") else "caffe",
        align_corners=True,
        inclusive_boxes=True,
        pixels=RESNET_PIXELS if residual else imagenet.CAFFE_PIXELS,
        sampling=RoiSamplingConfig(
            draw_threshold=count > 1, short_side=800 if residual else 600, long_side=1000
        ),
        **read(features, head, weights, size),
    )
    whole = Config(
        multipathnet=config, detect=DetectConfig(num_proposals=400 if residual else 2000)
    )
    num_classes = weights.outputs("bbox_pred") // 4 - 1
    if num_classes < 1:
        raise ValueError(f"{outputs.path}: expected 4 outputs for background and each class")
    with torch.device("meta"):
        weights.check(make_multipathnet(whole, num_classes=num_classes))
    description = (
        f"{f'Integral loss of {count}' if count > 1 else 'Fast R-CNN'} on "
        f"{imagenet.title(config.trunk.name, config.trunk.width)}, {num_classes} classes, "
        f"RoIs {size} x {size}"
    )
    return description, {
        "stage": "multipathnet",
        "config": whole,
        "model": weights.state,
        "categories": known_categories(num_classes),
    }


def known_categories(count: int) -> list[dict]:
    """{"id", "name"} of each of COCO's 80 or VOC's 20 categories; of others a number."""
    for names in (COCO, VOC):
        found = [(i, name) for i, name in enumerate(names) if i > 0 and name != "N/A"]
        if len(found) == count:
            return [{"id": i, "name": name} for i, name in found]
    return [{"id": i, "name": f"class {i}"} for i in range(1, count + 1)]


def _split(network: Module) -> tuple[list[Module], Module, list[Module], Module, list[Module]]:
    """Layers before the RoI pooling, it, layers after it, the table of outputs, and the end."""
    modules = network.modules
    names = [part.typename for part in modules]
    at = names.index("ROIPooling")
    (inputs,) = expect(modules[:at], "ParallelTable", where="before the RoI pooling")
    if len(inputs.modules) != 2:
        raise ValueError(f"{inputs.path}: expected features and Identity")
    if "ConcatTable" not in names[at:]:
        raise ValueError("expected a ConcatTable of class and box linears after the RoI pooling")
    end = names.index("ConcatTable", at)
    head = steps(*modules[at + 1 : end])
    return steps(inputs.modules[0]), modules[at], head, modules[end], modules[end + 1 :]


def _read_outputs(outputs: Module, ends: list[Module], weights: Weights) -> int:
    """Takes the class and box linears and the norm of the deltas; returns the number of heads.

    Raises:
        ValueError: the end of the network is not the mean of the heads' probabilities.
    """
    if len(outputs.modules) != 2:
        raise ValueError(f"{outputs.path}: expected classes and boxes")
    classes, boxes = outputs.modules
    heads = classes.modules if classes.typename == "ConcatTable" else [classes]
    expect([*heads, boxes], *["Linear"] * (len(heads) + 1), where=outputs.path)
    if len(heads) > len(THRESHOLDS):
        raise ValueError(f"{len(heads)} class linears, and at most {len(THRESHOLDS)} are known")
    taken = [(head.take("weight", dimensions=2), head.take("bias")) for head in heads]
    try:
        weight, bias = (torch.cat(each) for each in zip(*taken, strict=True))
    except RuntimeError:
        raise ValueError(f"{heads[0].path}: class linears of different inputs") from None
    weights.state |= {"cls_score.weight": weight, "cls_score.bias": bias}
    weights.add_linear("bbox_pred", boxes)
    weights.state |= {"delta_mean": torch.zeros(4), "delta_std": torch.ones(4)}
    switches = 0
    for part in ends:
        if part.typename == "ParallelTable" and len(part.modules) == 2:
            choices = ("Identity", "SoftMax"), ("BBoxNorm", "Identity")
            _, norm = expect(part.modules, *choices, where=part.path)
            if norm.typename == "BBoxNorm":
                weights.state["delta_mean"] = norm.take("mean").flatten()
                weights.state["delta_std"] = norm.take("std").flatten()
        elif part.typename == "ModeSwitch":
            switches += 1
        elif part.typename != "SoftMax":
            raise ValueError(f"{part.path}: unexpected {part.typename}")
    if len(heads) > 1 and switches != 1:
        raise ValueError(f"{len(heads)} class linears, and no ModeSwitch that takes their mean")
    return len(heads)


def _read_residual(
    features: list[Module], head: list[Module], weights: Weights, pooled_size: int
) -> dict[str, Any]:
    """Takes a ResNet's trunk and layer4; returns the settings that they show."""
    layer4, pool = expect(
        head, "Sequential", "SpatialAveragePooling", where="after the RoI pooling"
    )
    name, width, convs = imagenet.read_resnet([*features, layer4], stages=4)
    for key, conv in convs.items():
        top, _, rest = key.partition(".")
        is_head = top == "layer4"
        ours = f"towers.0.head.stage.{rest}" if is_head else f"trunk.{imagenet.trunk_key(key)}"
        weights.add_conv(ours, conv, norm=True)
    side = -(-pooled_size // 2)  # layer4 has stride 2
    if (pool.plain("kH"), pool.plain("kW")) != (side, side):
        weights.problems.append(f"{pool.path}: expected an average over {side} x {side} cells")
    trunk = TrunkConfig(name=name, weights=None, width=width, frozen_levels=2, padding="zero")
    return {"trunk": trunk}


def _read_plain(
    features: list[Module], head: list[Module], weights: Weights, pooled_size: int
) -> dict[str, Any]:
    """Takes trunk, fc6 and fc7 of a VGG or CaffeNet; returns the settings that they show."""
    trunk = TrunkConfig(
        name=imagenet.plain_network(features),
        weights=None,
        frozen_levels=1,  # conv1 and conv2 of VGG, conv1 of CaffeNet (ICCV 2015, section 4.5)
        padding="zero",
        ceil_pooling=imagenet.rounds_up(features),
    )
    with torch.device("meta"):
        ours = build_trunk(**vars(trunk))
    imagenet.add_plain_layers(weights, features, ours, prefix="trunk.")
    classes = "Linear", RELUS, "Linear", RELUS
    fc6, _, fc7, _ = expect(head, *classes, where="after the RoI pooling")
    weights.add_linear("towers.0.head.fc6", fc6)
    weights.add_linear("towers.0.head.fc7", fc7)
    return {
        "trunk": trunk,
        "features": weights.outputs("towers.0.head.fc7"),
        # As many channels as the trunk has: no convolution between pooling and fc6.
        "width": weights.state["towers.0.head.fc6.weight"].shape[1] // pooled_size**2,
    }
