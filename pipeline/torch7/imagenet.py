"""ResNets of fb.resnet.torch in Torch7 files: whole ImageNet networks, and DeepMask's trunk."""

import re
from collections.abc import Iterator

import torch
import torchvision
from torch import Tensor, nn

from models.trunk import RESNET_LEVELS, describe_mismatch, load_backbone
from pipeline.torch7.layers import (
    CONVOLUTIONS,
    EPSILON,
    FIXED_NORMS,
    NORMS,
    Convolution,
    convolutions,
    live_norm,
)
from pipeline.torch7.modules import RECTIFIERS, Module, expect, kind, steps, submodules

# Convolutions in a block and blocks in each stage, by torchvision's name.
LAYOUTS = {
    "resnet18": (2, (2, 2, 2, 2)),
    "resnet34": (2, (3, 4, 6, 3)),
    "resnet50": (3, (3, 4, 6, 3)),
    "resnet101": (3, (3, 4, 23, 3)),
    "resnet152": (3, (3, 8, 36, 3)),
}
# Letters of what a block computes: convolutions, norms that are not folded into them, ReLUs.
ORDER = (
    dict.fromkeys(CONVOLUTIONS, "c") | dict.fromkeys(NORMS, "n") | dict.fromkeys(RECTIFIERS, "r")
)

Layers = dict[str, Convolution]  # by torchvision's name of the convolution


def read_resnet(parts: list[Module], *, stages: int) -> tuple[str, int, Layers]:
    """The name, stem width and layers of the network whose first modules are `parts`.

    Args:
        parts: convolution, norm, ReLU and max-pool, then a Sequential of blocks for each stage.

    Raises:
        ValueError: another structure.
    """
    blocks = [stage.modules for stage in parts[len(parts) - stages :]]
    layers: Layers = {}
    stem = [step for part in parts[: len(parts) - stages] for step in steps(part)]
    expect(stem[-1:], "SpatialMaxPooling", where="the stem")
    *stem, pool = stem
    if not re.fullmatch("cn?r", _order(stem)):
        raise ValueError(f"{pool.place}: a convolution, its norm and a ReLU are due before it")
    if tuple(pool.field(name) for name in ("kH", "kW", "dH", "dW", "padH", "padW")) != (
        (3, 3, 2, 2, 1, 1)
    ) or pool.field("ceil_mode"):
        raise ValueError(f"{pool.place}: a max-pool of 3x3, stride 2 and padding 1 is due")
    (layers["conv1"],) = convolutions(stem, norms=True)
    for number, stage in enumerate(blocks, 1):
        for position, block in enumerate(stage):
            for name, layer in _block_layers(block):
                layers[f"layer{number}.{position}.{name}"] = layer
    depth = sum(name.startswith("layer1.0.conv") for name in layers)
    counts = tuple(map(len, blocks))
    width = layers["conv1"].module.number("nOutputPlane")
    return _name(depth, counts, where=parts[-stages].place), width, layers


def _order(parts: list[Module]) -> str:
    return "".join(ORDER.get(part.kind, "") for part in parts)


def _name(depth: int, counts: tuple[int, ...], *, where: str) -> str:
    for name, layout in LAYOUTS.items():
        if (layout[0], layout[1][: len(counts)]) == (depth, counts):
            return name
    raise ValueError(
        f"{where}: stages of {', '.join(map(str, counts))} blocks of {depth} convolutions are of "
        f"no ResNet known here ({', '.join(LAYOUTS)})"
    )


def _block_layers(block: Module) -> Iterator[tuple[str, Convolution]]:
    branches, _, _ = expect(
        block.modules, "ConcatTable", "CAddTable", RECTIFIERS, where=block.place
    )
    main, shortcut = expect(
        branches.modules, "Sequential", ("Sequential", "Identity"), where=branches.place
    )
    inner = steps(main)
    if inner and inner[-1].kind in RECTIFIERS:
        raise ValueError(f"{inner[-1].place}: a {inner[-1].kind} behind the last norm")
    found = convolutions(inner, norms=True)
    if not re.fullmatch("(cn?r)*cn?", _order(inner)):
        raise ValueError(
            f"{main.place}: norm and ReLU have to follow each convolution but the last"
        )
    for number, layer in enumerate(found, 1):
        yield f"conv{number}", layer
    for layer in convolutions(steps(shortcut), norms=True):
        yield "downsample.0", layer


def trunk_state(layers: Layers) -> dict[str, Tensor]:
    """The state dict of `models.trunk.Trunk`."""
    state = {}
    for name, layer in layers.items():
        key = trunk_key(name)
        state[f"{key}.weight"] = layer.weight()
        state[f"{key}.scale"], state[f"{key}.shift"] = layer.scale_and_shift()
    return state


def trunk_key(name: str) -> str:
    """A convolution's name in `models.trunk.Trunk`."""
    top = name.partition(".")[0]
    level = next(n for n, names in enumerate(RESNET_LEVELS) if top in names)
    return f"levels.{level}.{name}"


def is_imagenet_resnet(value: object) -> bool:
    """Whether this is a Sequential of four stages of residual blocks and a classifier."""
    kinds = [kind(part) for part in submodules(value)]
    stages = [part for part in submodules(value) if is_stage(part)]
    return len(stages) == 4 and kinds[-1] == "Linear" and len(kinds) == 11


def is_stage(value: object) -> bool:
    """Whether this is a Sequential of residual blocks."""
    blocks = submodules(value)
    return bool(blocks) and all(
        (parts := submodules(block)) and kind(parts[0]) == "ConcatTable" for block in blocks
    )


def imagenet_state(network: Module) -> tuple[str, dict[str, Tensor]]:
    """Words for the network, and its state dict with torchvision's names.

    Raises:
        ValueError: another structure, or layers of other shapes or padding.
    """
    *trunk, pool, view, classifier = network.modules
    expect([pool, view, classifier], "SpatialAveragePooling", "View", "Linear", where="the end")
    name, width, layers = read_resnet(trunk, stages=4)
    state = {}
    for key, layer in layers.items():
        state[f"{key}.weight"] = layer.weight()
        norm = key[:-1] + "1" if key.endswith("downsample.0") else key.replace("conv", "bn")
        state |= {f"{norm}.{part}": value for part, value in _live_norm(layer).items()}
    state["fc.weight"] = classifier.take("weight", dimensions=2)
    state["fc.bias"] = classifier.take("bias", dimensions=1)
    with torch.device("meta"):
        own = load_backbone(name, width=width)
    _check(own, state, layers)
    return f"ImageNet {words(name, width)}", state


def _live_norm(layer: Convolution) -> dict[str, Tensor]:
    """The batch norm's own numbers; of a frozen one, those that give the same function."""
    if layer.norm is None or layer.norm.kind in FIXED_NORMS:
        scale, shift = layer.scale_and_shift()
        mean, variance = torch.zeros_like(shift), torch.full_like(scale, 1 - EPSILON)
        return {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}
    scale, shift, mean, variance = live_norm(layer.norm)
    if layer.module.has("bias"):
        bias = layer.module.take("bias", dimensions=1)
        if len(bias) != len(mean):
            raise ValueError(f"{layer.module.place}: a bias of {len(bias)} and a norm of another")
        mean = mean - bias
    return {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}


def _check(own: torchvision.models.ResNet, state: dict[str, Tensor], layers: Layers) -> None:
    expected = {k: v for k, v in own.state_dict().items() if not k.endswith("num_batches_tracked")}
    expected["fc.weight"] = expected["fc.weight"].new_empty(
        len(state["fc.bias"]), own.fc.in_features
    )
    expected["fc.bias"] = state["fc.bias"]  # any number of classes
    refuse(describe_mismatch(expected, state), problems(dict(own.named_modules()), layers))


def problems(modules: dict[str, nn.Module], layers: Layers, *, mirrored: bool = False) -> list[str]:
    """In what the arithmetic of convolutions differs from that of ours of the same name."""
    found = [(modules[name], layer) for name, layer in layers.items() if name in modules]
    each = [layer.check(own, mirrored=mirrored) for own, layer in found]
    return [problem for own in each for problem in own]


def refuse(difference: str, others: list[str]) -> None:
    """Raises a ValueError with what does not fit, if anything does not."""
    if difference or others:
        raise ValueError("; ".join(filter(None, [difference, *others])))


def words(name: str, width: int) -> str:
    """For reports: "ResNet-50", or with its width when it is not the usual one."""
    title = name.replace("resnet", "ResNet-")
    return title if width == 64 else f"{title} of width {width}"
