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
from models.trunk import TrunkConfig
from pipeline.config import Config, DetectConfig, MultiPathNetStageConfig
from pipeline.networks import make_multipathnet
from pipeline.torch7.imagenet import CAFFE_PIXELS, plain_network, read_resnet, title
from pipeline.torch7.modules import (
    Module,
    State,
    Used,
    convert_layers,
    expect,
    is_stage,
    steps,
    unpacked,
)
from pipeline.torch7.reader import Torch7Object

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
    modules = network.modules
    pattern = "ParallelTable ROIPooling any* ConcatTable any*"
    inputs, pooling, *_ = expect(modules, pattern, where=network.path or "the network")
    end = [part.kind for part in modules].index("ConcatTable")
    outputs, head = modules[end], steps(*modules[2:end])
    features = steps(expect(inputs.modules, "any Identity", where=inputs.path)[0])
    count, linears, state = _read_outputs(outputs, modules[end + 1 :])
    residual = any(is_stage(part.value) for part in features)
    size = pooling.number("H")
    if not size or size != pooling.number("W") or pooling.plain("spatial_scale") != 1 / 16:
        raise ValueError(f"{pooling.path}: expected square pooling at stride 16")
    layers, settings = (_read_residual if residual else _read_plain)(features, head, size)
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
        pixels=RESNET_PIXELS if residual else CAFFE_PIXELS,
        sampling=RoiSamplingConfig(
            draw_threshold=count > 1, short_side=800 if residual else 600, long_side=1000
        ),
        **settings,
    )
    whole = Config(
        multipathnet=config, detect=DetectConfig(num_proposals=400 if residual else 2000)
    )
    num_classes = linears[-1].outputs // 4 - 1
    if num_classes < 1:
        raise ValueError(f"{outputs.path}: expected 4 outputs for background and each class")
    with torch.device("meta"):
        ours = make_multipathnet(whole, num_classes=num_classes)
    return (
        f"{f'Integral loss of {count}' if count > 1 else 'Fast R-CNN'} on "
        f"{title(config.trunk.name, config.trunk.width)}, {num_classes} classes, "
        f"RoIs {size} x {size}"
    ), {
        "stage": "multipathnet",
        "config": whole,
        "model": convert_layers([*layers, *linears], ours, **state),
        "categories": known_categories(num_classes),
    }


def known_categories(count: int) -> list[dict]:
    """{"id", "name"} of each of COCO's 80 or VOC's 20 categories; of others a number."""
    for names in (COCO, VOC):
        found = [(i, name) for i, name in enumerate(names) if i > 0 and name != "N/A"]
        if len(found) == count:
            return [{"id": i, "name": name} for i, name in found]
    return [{"id": i, "name": f"class {i}"} for i in range(1, count + 1)]


def _read_outputs(outputs: Module, ends: list[Module]) -> tuple[int, list[Module], State]:
    """The number of heads, one linear for all of them and one of boxes, and the deltas' norm."""
    classes, boxes = expect(outputs.modules, "(ConcatTable|linear) linear", where=outputs.path)
    heads = classes.modules if classes.typename == "ConcatTable" else [classes]
    expect(heads, "linear+", where=classes.path)
    if len(heads) > len(THRESHOLDS):
        raise ValueError(f"{len(heads)} class linears, and at most {len(THRESHOLDS)} are known")
    try:
        fields = {k: torch.cat([head.take(k) for head in heads]) for k in ("weight", "bias")}
    except RuntimeError:
        raise ValueError(f"{classes.path}: class linears of different inputs") from None
    state = {"delta_mean": torch.zeros(4), "delta_std": torch.ones(4)}
    switches = 0
    for part in ends:
        if part.typename == "ParallelTable":
            pattern = "(Identity|SoftMax) (BBoxNorm|Identity)"
            _, norm = expect(part.modules, pattern, where=part.path)
            if norm.typename == "BBoxNorm":
                state = {f"delta_{name}": norm.take(name).flatten() for name in ("mean", "std")}
        elif part.typename == "ModeSwitch":
            switches += 1
        elif part.typename != "SoftMax":
            raise ValueError(f"{part.path}: unexpected {part.typename}")
    if len(heads) > 1 and switches != 1:
        raise ValueError(f"{len(heads)} class linears, and no ModeSwitch that takes their mean")
    whole = Module(Torch7Object("nn.Linear", fields), classes.path, set())  # its parts are taken
    return len(heads), [whole, boxes], state


def _read_residual(
    features: list[Module], head: list[Module], pooled_size: int
) -> tuple[list[Module], dict[str, Any]]:
    """The layers of a ResNet's trunk and layer4, and the settings that they show."""
    pattern = "Sequential SpatialAveragePooling"
    layer4, pool = expect(head, pattern, where="after the RoI pooling")
    name, width, layers = read_resnet([*features, layer4], stages=4)
    side = -(-pooled_size // 2)  # layer4 has stride 2
    if (pool.plain("kH"), pool.plain("kW")) != (side, side):
        raise ValueError(f"{pool.path}: expected an average over {side} x {side} cells")
    trunk = TrunkConfig(name=name, weights=None, width=width, frozen_levels=2, padding="zero")
    return layers, {"trunk": trunk}


def _read_plain(
    features: list[Module], head: list[Module], pooled_size: int
) -> tuple[list[Module], dict[str, Any]]:
    """The layers of a VGG or CaffeNet up to fc7, and the settings that they show."""
    name, ceil_pooling = plain_network(features)
    trunk = TrunkConfig(
        name=name,
        weights=None,
        frozen_levels=1,  # conv1 and conv2 of VGG, conv1 of CaffeNet (ICCV 2015, section 4.5)
        padding="zero",
        ceil_pooling=ceil_pooling,
    )
    fc6, _, fc7, _ = expect(head, "linear relu linear relu", where="after the RoI pooling")
    return [*features, fc6, fc7], {
        "trunk": trunk,
        "features": fc7.outputs,
        # As many channels as the trunk has: no convolution between pooling and fc6.
        "width": fc6.parameter("weight")[0].numel() // pooled_size**2,
    }
