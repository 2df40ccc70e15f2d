"""The released DeepMask and SharpMask (model.t7) as checkpoints of this project.

Sizes come from the shapes of the file's parameters, not from its `config`, which is what the
training was started with. A Linear behind a View is a convolution whose weight is a view of the
Linear's, so nothing is copied but what batch norm needs.
"""

import math

import torch
from torch import Tensor

from models.deepmask import STRIDE, DeepMask
from models.trunk import describe_mismatch
from pipeline.config import Config, DeepMaskConfig, ProposeConfig, SharpMaskConfig, TrunkConfig
from pipeline.networks import build_deepmask, build_sharpmask
from pipeline.recipe import config_to_dict
from pipeline.torch7.imagenet import (
    Layers,
    problems,
    read_resnet,
    refuse,
    trunk_key,
    trunk_state,
    words,
)
from pipeline.torch7.layers import CONVOLUTIONS, Convolution, convolutions
from pipeline.torch7.modules import RECTIFIERS, Module, expect, kind, steps
from pipeline.torch7.objects import short

SKIPS = [8, 6, 5, 3]  # the trunk's modules whose outputs the horizontal nets take
# What a refinement module does: both nets, their sum, ReLU, twice the size.
STEP = ("ParallelTable", "CAddTable", RECTIFIERS, "SpatialUpSamplingNearest")

State = dict[str, Tensor]


def is_deepmask(value: object) -> bool:
    """Whether this is what DeepMask's training saves: {model = nn.DeepMask, config}."""
    return isinstance(value, dict) and kind(value.get("model")) == "DeepMask"


def is_sharpmask(value: object) -> bool:
    """Whether this is what SharpMask's training saves: {model = nn.SharpMask, config}."""
    return isinstance(value, dict) and kind(value.get("model")) == "SharpMask"


def convert_deepmask(file: Module) -> tuple[str, dict]:
    """Words for a DeepMask, and its checkpoint.

    Raises:
        ValueError: another structure, or layers of other shapes or padding: all are listed.
    """
    config = Config(propose=ProposeConfig(resampling="corners"))
    state, layers = _deepmask(file, config, mask_branch="maskBranch")
    with torch.device("meta"):
        own = build_deepmask(config, pretrained=False)
    refuse(describe_mismatch(own.state_dict(), state), _trunk_problems(own, layers))
    return _words("DeepMask", config), _checkpoint("deepmask", config, state)


def convert_sharpmask(file: Module) -> tuple[str, dict]:
    """Words for a SharpMask, and its checkpoint. See `convert_deepmask`."""
    config = Config(propose=ProposeConfig(resampling="corners"))
    deepmask, layers = _deepmask(file, config, mask_branch="maskBranchDM")
    state = {f"deepmask.{name}": value for name, value in deepmask.items()}
    nets = _refinement(file, config)
    encoder = _encoder(file)
    state["encode.weight"] = encoder.take("weight", dimensions=2)
    state["encode.bias"] = encoder.take("bias", dimensions=1)
    for name, net in nets.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = net.weight(), net.module.take("bias")
    with torch.device("meta"):
        own = build_sharpmask(config)
    others = _trunk_problems(own.deepmask, layers)
    others += problems(dict(own.named_modules()), nets, mirrored=True)
    refuse(describe_mismatch(own.state_dict(), state), others)
    return _words("SharpMask", config), _checkpoint("sharpmask", config, state)


def _deepmask(file: Module, config: Config, *, mask_branch: str) -> tuple[State, Layers]:
    """State dict and trunk layers; fills in the config's sizes."""
    trunk = file.child("trunk").modules
    ends = [n for n, part in enumerate(trunk) if part.kind == "Sequential" and n > 0]
    if not ends or len(trunk) < ends[-1] + 2:
        raise ValueError("trunk: no stages of residual blocks, or nothing behind them")
    body, tail = trunk[: ends[-1] + 1], trunk[ends[-1] + 1 :]
    name, width, layers = read_resnet(body, stages=3)
    config.trunk = TrunkConfig(name=name, weights=None, width=width)
    config.deepmask = c = DeepMaskConfig(context=2 * STRIDE * _crop(tail))
    state = {f"trunk.{key}": value for key, value in trunk_state(layers).items()}
    state |= _tail_state(tail, c, window=file.number("fSz"))
    state |= _mask_state(file.child(mask_branch), c)
    state |= _score_state(file.child("scoreBranch"), c)
    return state, layers


def _crop(tail: list[Module]) -> int:
    """Cells that are cut from each side of the trunk's map in training."""
    if tail[0].kind != "SpatialZeroPadding":
        return 0
    sides = [tail[0].field(f"pad_{side}") for side in "lrtb"]
    if type(sides[0]) is not int or sides[0] > 0 or sides != sides[:1] * 4:
        raise ValueError(f"{tail[0].place}: a crop of the same on all sides is due")
    return -sides[0]


def _tail_state(tail: list[Module], c: DeepMaskConfig, *, window: int) -> State:
    parts = [s for part in tail if part.kind != "SpatialZeroPadding" for s in steps(part)]
    convolution, _, linear = expect(parts, CONVOLUTIONS, RECTIFIERS, "Linear", where="trunk")
    (reduce,) = convolutions([convolution], norms=False)
    weight, embedding = reduce.weight(), linear.take("weight", dimensions=2)
    if weight.shape[2:] != (1, 1) or reduce.padding:
        raise ValueError(f"{convolution.place}: a 1x1 convolution is due")
    c.reduction, c.embedding = weight.shape[0], embedding.shape[0]
    if window < 1 or embedding.shape[1] != c.reduction * window**2:
        raise ValueError(
            f"{linear.place}: {embedding.shape[1]} inputs are no {window} x {window} cells (fSz) "
            f"of {c.reduction} channels"
        )
    c.patch_size = STRIDE * window
    return {
        "tail.0.weight": weight,
        "tail.0.bias": convolution.take("bias"),
        "tail.2.weight": embedding.view(c.embedding, c.reduction, window, window),
        "tail.2.bias": linear.take("bias"),
    }


def _mask_state(branch: Module, c: DeepMaskConfig) -> State:
    parts = steps(branch)
    upsampling = parts.pop() if len(parts) > 1 else None
    (linear,) = expect(parts, "Linear", where=branch.place)
    state = _as_convolution(linear, "mask_head")
    rows = len(state["mask_head.bias"])
    c.mask_size = math.isqrt(rows)
    if c.mask_size**2 != rows:
        raise ValueError(f"{linear.place}: {rows} outputs are no square mask")
    c.target_size = c.mask_size  # unless the loss sees a larger one
    if upsampling:
        expect([upsampling], "SpatialReSamplingEx", where=branch.place)
        c.target_size = upsampling.number("oheight")
    return state


def _score_state(branch: Module, c: DeepMaskConfig) -> State:
    hidden, _, score = expect(steps(branch), "Linear", RECTIFIERS, "Linear", where=branch.place)
    state = _as_convolution(hidden, "score_head.1") | _as_convolution(score, "score_head.4")
    c.score_hidden = len(state["score_head.1.bias"])
    c.dropout = max([_dropout(part) for part in branch.modules if part.kind == "Dropout"] + [0.0])
    return state


def _dropout(module: Module) -> float:
    p = module.field("p")
    if type(p) not in (int, float) or not 0 <= p < 1:
        raise ValueError(f"{module.place}: p is {short(p)}, and due is a probability")
    return float(p)


def _as_convolution(linear: Module, name: str) -> State:
    weight, bias = linear.take("weight", dimensions=2), linear.take("bias", dimensions=1)
    return {f"{name}.weight": weight[:, :, None, None], f"{name}.bias": bias}


def _encoder(file: Module) -> Module:
    """The Linear that makes the first mask encoding of an embedding."""
    return expect(file.item("netvs", 0).modules, "Linear", "View", where="netvs[0]")[0]


def _refinement(file: Module, config: Config) -> dict[str, Convolution]:
    """The convolutions of the refinement by our names; fills in the config's widths."""
    neths = file.field("neths")
    if file.field("skpos") != SKIPS or not isinstance(neths, list):
        raise ValueError(f"skpos and neths: {SKIPS} and as many nets at most are due")
    count = len(neths)
    nets: dict[str, Convolution] = {}
    for number in range(1, count + 1):
        module = file.item("refs", number)
        sides, *_ = expect(module.modules[:4], *STEP, where=module.place)
        last = module.modules[4:]
        horizontal, vertical = expect(sides.modules, "Sequential", "Sequential", where=sides.place)
        for own, other in ((horizontal, "neths"), (vertical, "netvs")):
            if own.value is not file.item(other, number).value:
                raise ValueError(f"{own.place}: it is not {other}[{number}], which it has to be")
        inner = [part for part in steps(horizontal) if part.kind != "SpatialZeroPadding"]
        for side, parts in (("horizontal", inner), ("vertical", steps(vertical))):
            for position, layer in enumerate(convolutions(parts, norms=False)):
                nets[f"refinements.{number - 1}.{side}.{2 * position}"] = layer
        final = [step for part in last for step in steps(part)]
        if (number == count) != bool(final):
            raise ValueError(f"{module.place}: the last module, and only it, predicts the mask")
        if final:
            expect(final[-1:], CONVOLUTIONS, where=module.place)
            (nets["predict"],) = convolutions(final, norms=False)
    _read_widths(nets, config, count, encoded=_rows(_encoder(file)))
    return nets


def _rows(linear: Module) -> int:
    bias = linear.field("bias")
    return bias.numel() if isinstance(bias, Tensor) else 0


def _read_widths(nets: dict[str, Convolution], config: Config, count: int, *, encoded: int) -> None:
    """Widths of the refinement from its convolutions' shapes."""

    def outputs(name: str) -> int:
        if name not in nets:
            raise ValueError(f"{name}: there is no such convolution")
        return nets[name].module.number("nOutputPlane")

    first = [outputs(f"refinements.{n}.horizontal.0") for n in range(count)]
    km = encoded // (config.deepmask.patch_size // STRIDE) ** 2
    config.sharpmask = SharpMaskConfig(
        km=km,
        ks=outputs("refinements.0.horizontal.2"),
        widths="constant" if outputs("refinements.0.vertical.2") == km else "halving",
        merge="sum",
        num_modules=count,
        horizontal_widths=tuple(first + first[-1:] * (4 - count)),
    )


def _trunk_problems(own: DeepMask, layers: Layers) -> list[str]:
    keys = {trunk_key(name): layer for name, layer in layers.items()}
    return problems(dict(own.trunk.named_modules()), keys, mirrored=True)


def _words(method: str, config: Config) -> str:
    c = config.deepmask
    return (
        f"{method} on {words(config.trunk.name, config.trunk.width)}, patch {c.patch_size}, "
        f"mask {c.mask_size}, embedding {c.embedding}"
    )


def _checkpoint(stage: str, config: Config, state: State) -> dict:
    return {"format": 1, "stage": stage, "config": config_to_dict(config), "model": state}
