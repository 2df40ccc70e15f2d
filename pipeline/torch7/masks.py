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
from pipeline.torch7.imagenet import read_resnet, title
from pipeline.torch7.modules import Module, Used, convert_layers, expect, steps, unpacked

SKIPS = [8, 6, 5, 3]  # the trunk's modules whose outputs the horizontal nets take
# The layers of a refinement module's two nets, by the field that lists the nets.
NETS = {
    "neths": "padding? conv relu padding? conv relu padding? conv",
    "netvs": "padding? conv relu padding? conv",
}


def convert_masks(value: dict, used: Used) -> tuple[str, dict]:
    """Words for a DeepMask or SharpMask, and its checkpoint with the config as it is.

    Raises:
        ValueError: another structure, or layers of other shapes or padding: all are listed.
    """
    file = Module(unpacked(value), "", used)
    refines = file.typename == "SharpMask"
    layers, trunk, c = _read_deepmask(file, "maskBranchDM" if refines else "maskBranch")
    config = Config(trunk=trunk, deepmask=c, propose=ProposeConfig(align_corners=True))
    if refines:
        more, sharpmask = _read_refinement(file, cells=c.patch_size // STRIDE)
        layers, config = layers + more, replace(config, sharpmask=sharpmask)
    with torch.device("meta"):
        network = make_sharpmask(config) if refines else make_deepmask(config)
    words = (
        f"{file.typename} on {title(trunk.name, trunk.width)}, patch {c.patch_size}, "
        f"mask {c.mask_size}, embedding {c.embedding}"
    )
    model = convert_layers(layers, network)
    return words, {"stage": file.typename.lower(), "config": config, "model": model}


def _read_deepmask(
    file: Module, mask_branch: str
) -> tuple[list[Module], TrunkConfig, DeepMaskStageConfig]:
    """The layers of trunk, tail and heads, and the settings that they show."""
    parts = file.child("trunk").modules
    stages = [i for i, part in enumerate(parts) if part.typename == "Sequential" and i > 0]
    if not stages or len(parts) < stages[-1] + 2:
        raise ValueError("trunk: expected stages of residual blocks, and layers after them")
    name, width, layers = read_resnet(parts[: stages[-1] + 1], stages=3)

    crop, *_ = tail = parts[stages[-1] + 1 :]
    tail = steps(*(part for part in tail if part.typename != "SpatialZeroPadding"))
    reduce, _, embed = expect(tail, "conv relu linear", where="trunk")
    # Resized to the size of the loss, if that is another.
    pattern = "linear SpatialReSamplingEx?"
    mask, *resize = expect(steps(file.child(mask_branch)), pattern, where=mask_branch)
    mask_size = math.isqrt(mask.outputs)
    if mask_size**2 != mask.outputs:
        raise ValueError(f"{mask.path}: {mask.outputs} outputs are no square mask")
    score = file.child("scoreBranch")
    hidden, _, last = expect(steps(score), "linear relu linear", where=score.path)
    dropouts = [part.number("p", below=1) for part in score.modules if part.typename == "Dropout"]
    settings = DeepMaskStageConfig(
        patch_size=STRIDE * file.number("fSz"),
        context=2 * STRIDE * _crop(crop),
        mask_size=mask_size,
        target_size=resize[0].number("oheight") if resize else mask_size,
        reduction=reduce.outputs,
        embedding=embed.outputs,
        score_hidden=hidden.outputs,
        dropout=float(max(dropouts, default=0)),
    )
    trunk = TrunkConfig(name=name, weights=None, width=width)
    return [*layers, reduce, embed, mask, hidden, last], trunk, settings


def _crop(module: Module) -> int:
    """Cells that are cut from each side of the trunk's map in training."""
    if module.typename != "SpatialZeroPadding":
        return 0
    left, *others = (module.plain(f"pad_{side}") for side in "lrtb")
    if type(left) is not int or left > 0 or others != [left] * 3:
        raise ValueError(f"{module.path}: expected a crop that is the same on all sides")
    return -left


def _read_refinement(file: Module, *, cells: int) -> tuple[list[Module], SharpMaskStageConfig]:
    """The layers of the encoder and the refinement modules, and the settings that they show."""
    encode, _ = layers = expect(file.child("netvs", 0).modules, "linear View", where="netvs[0]")
    neths: Any = file.value.fields.get("neths")
    if file.value.fields.get("skpos") != SKIPS or not isinstance(neths, list) or not neths:
        raise ValueError(f"skpos and neths: expected {SKIPS} and at most as many nets")
    count = len(neths)
    for i in range(1, count + 1):
        module = file.child("refs", i)
        # Both nets, their sum, ReLU, twice the size; the last one predicts the mask, too.
        pattern = "ParallelTable CAddTable relu SpatialUpSamplingNearest"
        sides, *_ = expect(module.modules[:4], pattern, where=module.path)
        nets = expect(sides.modules, "Sequential Sequential", where=sides.path)
        for net, (field, pattern) in zip(nets, NETS.items(), strict=True):
            if net.value is not file.child(field, i).value:
                raise ValueError(f"{net.path}: expected {field}[{i}]")
            inner = [part for part in steps(net) if part.typename != "SpatialZeroPadding"]
            layers = layers + expect(inner, pattern, where=net.path)
        predict = steps(*module.modules[4:])
        layers += expect(predict, "padding? conv" if i == count else "", where=module.path)
    convs = [part for part in layers if part.kind == "conv"]  # five for each module
    widths: Any = [conv.outputs for conv in convs[: 5 * count : 5]]
    km = encode.outputs // cells**2
    return layers, SharpMaskStageConfig(
        km=km,
        ks=convs[1].outputs,
        widths="constant" if convs[4].outputs == km else "halving",
        merge="sum",
        num_modules=count,
        horizontal_widths=(*widths, *widths[-1:] * (4 - count)),
    )
