"""The released DeepMask and SharpMask (model.t7) as checkpoints of this project.

Sizes are those of the file's parameters, not of its `config`, which is what the training was
started with. A Linear after a View is a convolution whose weight is a view of the Linear's, so
nothing is copied.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from models.deepmask import STRIDE
from models.trunk import TrunkConfig
from pipeline.config import Config, DeepMaskStageConfig, ProposeConfig, SharpMaskStageConfig
from pipeline.networks import make_deepmask, make_sharpmask
from pipeline.torch7.imagenet import read_resnet, title, trunk_key
from pipeline.torch7.modules import (
    CONVOLUTIONS,
    RELUS,
    Module,
    Used,
    Weights,
    convolutions,
    expect,
    steps,
    unpacked,
)

SKIPS = [8, 6, 5, 3]  # the trunk's modules whose outputs the horizontal nets take
# A refinement module: both nets, their sum, ReLU, twice the size.
STEP = ("ParallelTable", "CAddTable", RELUS, "SpatialUpSamplingNearest")


def convert_masks(value: dict, used: Used) -> tuple[str, dict]:
    """Words for a DeepMask or SharpMask, and its checkpoint with the config as it is.

    Raises:
        ValueError: another structure, or layers of other shapes or padding: all are listed.
    """
    file, weights = Module(unpacked(value), "", used), Weights()
    refines = file.typename == "SharpMask"
    prefix, mask_branch = ("deepmask.", "maskBranchDM") if refines else ("", "maskBranch")
    trunk, c = _read_deepmask(file, weights, prefix=prefix, mask_branch=mask_branch)
    config = Config(trunk=trunk, deepmask=c, propose=ProposeConfig(align_corners=True))
    if refines:
        sharpmask = _read_refinement(file, weights, cells=c.patch_size // STRIDE)
        config = replace(config, sharpmask=sharpmask)
    with torch.device("meta"):
        weights.check(make_sharpmask(config) if refines else make_deepmask(config))
    words = (
        f"{file.typename} on {title(trunk.name, trunk.width)}, patch {c.patch_size}, "
        f"mask {c.mask_size}, embedding {c.embedding}"
    )
    return words, {"stage": file.typename.lower(), "config": config, "model": weights.state}


def _read_deepmask(
    file: Module, weights: Weights, *, prefix: str, mask_branch: str
) -> tuple[TrunkConfig, DeepMaskStageConfig]:
    """Takes trunk, tail and heads; returns the settings that they show."""
    parts = file.child("trunk").modules
    stages = [i for i, part in enumerate(parts) if part.typename == "Sequential" and i > 0]
    if not stages or len(parts) < stages[-1] + 2:
        raise ValueError("trunk: expected stages of residual blocks, and layers after them")
    name, width, convs = read_resnet(parts[: stages[-1] + 1], stages=3)
    for key, conv in convs.items():
        weights.add_conv(f"{prefix}trunk.{trunk_key(key)}", conv, norm=True)

    crop, *_ = tail = parts[stages[-1] + 1 :]
    layers = steps(*(part for part in tail if part.typename != "SpatialZeroPadding"))
    reduce, _, embed = expect(layers, CONVOLUTIONS, RELUS, "Linear", where="trunk")
    cells = file.integer("fSz")
    weights.add_conv(f"{prefix}tail.0", *convolutions([reduce], "p?c", where=reduce.path))
    weights.add_linear(f"{prefix}tail.2", embed, window=cells)

    layers = steps(file.child(mask_branch))
    classes = ("Linear", "SpatialReSamplingEx")  # to the size of the loss, if that is another
    mask, *resize = expect(layers, *classes[: max(1, len(layers))], where=mask_branch)
    weights.add_linear(f"{prefix}mask_head", mask, window=1)
    outputs = weights.outputs(f"{prefix}mask_head")
    mask_size = math.isqrt(outputs)
    if mask_size**2 != outputs:
        raise ValueError(f"{mask.path}: {outputs} outputs are no square mask")

    score = file.child("scoreBranch")
    hidden, _, last = expect(steps(score), "Linear", RELUS, "Linear", where=score.path)
    weights.add_linear(f"{prefix}score_head.1", hidden, window=1)
    weights.add_linear(f"{prefix}score_head.4", last, window=1)
    dropouts = [part.fraction("p") for part in score.modules if part.typename == "Dropout"]
    return TrunkConfig(name=name, weights=None, width=width), DeepMaskStageConfig(
        patch_size=STRIDE * cells,
        context=2 * STRIDE * _crop(crop),
        mask_size=mask_size,
        target_size=resize[0].integer("oheight") if resize else mask_size,
        reduction=weights.outputs(f"{prefix}tail.0"),
        embedding=weights.outputs(f"{prefix}tail.2"),
        score_hidden=weights.outputs(f"{prefix}score_head.1"),
        dropout=max(dropouts, default=0.0),
    )


def _crop(module: Module) -> int:
    """Cells that are cut from each side of the trunk's map in training."""
    if module.typename != "SpatialZeroPadding":
        return 0
    left, *others = (module.plain(f"pad_{side}") for side in "lrtb")
    if type(left) is not int or left > 0 or others != [left] * 3:
        raise ValueError(f"{module.path}: expected a crop that is the same on all sides")
    return -left


def _read_refinement(file: Module, weights: Weights, *, cells: int) -> SharpMaskStageConfig:
    """Takes the encoder and the refinement modules; returns the settings that they show."""
    encode, _ = expect(file.child("netvs", 0).modules, "Linear", "View", where="netvs[0]")
    weights.add_linear("encode", encode)
    neths = file.field("neths")
    if file.field("skpos") != SKIPS or not isinstance(neths, list):
        raise ValueError(f"skpos and neths: expected {SKIPS} and at most as many nets")
    count = len(neths)
    for i in range(1, count + 1):
        _read_module(file, weights, i, is_last=i == count)
    widths: Any = [weights.outputs(f"refinements.{i}.horizontal.0") for i in range(count)]
    km = weights.outputs("encode") // cells**2
    return SharpMaskStageConfig(
        km=km,
        ks=weights.outputs("refinements.0.horizontal.2"),
        widths="constant" if weights.outputs("refinements.0.vertical.2") == km else "halving",
        merge="sum",
        num_modules=count,
        horizontal_widths=(*widths, *widths[-1:] * (4 - count)),
    )


def _read_module(file: Module, weights: Weights, i: int, *, is_last: bool) -> None:
    """Takes refinement module `i`, from 1; the last one predicts the mask, too."""
    module = file.child("refs", i)
    sides, *_ = expect(module.modules[:4], *STEP, where=module.path)
    final = steps(*module.modules[4:])
    nets = expect(sides.modules, "Sequential", "Sequential", where=sides.path)
    for net, side, field in zip(nets, ("horizontal", "vertical"), ("neths", "netvs"), strict=True):
        if net.value is not file.child(field, i).value:
            raise ValueError(f"{net.path}: expected {field}[{i}]")
        layers = [part for part in steps(net) if part.typename != "SpatialZeroPadding"]
        for j, conv in enumerate(convolutions(layers, "(p?cr?)*", where=net.path)):
            weights.add_conv(f"refinements.{i - 1}.{side}.{2 * j}", conv)
    if is_last != bool(final):
        raise ValueError(f"{module.path}: the last module, and only it, predicts the mask")
    if is_last:
        weights.add_conv("predict", *convolutions(final, "p?c", where=module.path))
