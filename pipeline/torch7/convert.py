"""Converts Torch7 files of the released models, recognized by what is in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint import save_checkpoint
from pipeline.recipe import config_from_dict, save_config
from pipeline.torch7.caffe import convert_caffe_network, is_caffe_network
from pipeline.torch7.detector import convert_detector, is_detector
from pipeline.torch7.imagenet import imagenet_state, is_imagenet_resnet
from pipeline.torch7.masks import (
    convert_deepmask,
    convert_sharpmask,
    is_deepmask,
    is_sharpmask,
)
from pipeline.torch7.modules import Module, Taken
from pipeline.torch7.proposals import convert_proposals, is_proposals
from pipeline.torch7.reader import read_torch7


def _of_model(convert: Callable[[Module], tuple[str, dict]]) -> Callable:
    """A converter of `model` in the table that the training saves."""
    return lambda value, taken: convert(Module(value["model"], "", taken))


def _of_top(convert: Callable[[Module], tuple[str, dict]]) -> Callable:
    """A converter of a file that is one module."""
    return lambda value, taken: convert(Module(value, "", taken))


# What tells a file, from what `read_torch7` gave; and what gives words for it and what to save: a
# checkpoint, or a state dict of torchvision's names for `trunk.weights`.
NETWORKS: list[tuple[Callable[[Any], bool], Callable[[Any, Taken], tuple[str, dict]]]] = [
    (is_deepmask, _of_model(convert_deepmask)),
    (is_sharpmask, _of_model(convert_sharpmask)),
    (is_imagenet_resnet, _of_top(imagenet_state)),
    (is_detector, convert_detector),
    (is_caffe_network, convert_caffe_network),
]
KINDS = (
    "DeepMask, SharpMask, ImageNet ResNets of fb.resnet.torch, detectors of one region (integral "
    "loss, Fast R-CNN), ImageNet VGG and CaffeNet of multipathnet, proposals"
)


def convert_file(
    path: str | Path,
    output: str | Path,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
) -> list[str]:
    """Converts a Torch7 file.

    Args:
        output: the checkpoint or state dict; for a file of proposals the folder of a store.
        annotations, images: a COCO json, or an image folder; of proposals, which do not say how
            large their images are.

    Returns:
        Lines that say what the file is, and of each parameter that it is used, or that it is not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, nothing known here, or parameters that do not fit; one line that
            names the file and lists all of them.
    """
    if Path(output).resolve() == Path(path).resolve():
        raise ValueError(f"--output {output} is the file to convert; choose another name")
    value = read_torch7(path)
    try:
        if is_proposals(value):
            return convert_proposals(
                value, output, source=Path(path).name, annotations=annotations, images=images
            )
        if annotations or images:
            raise ValueError("--annotations and --images are for proposals, and this is a network")
        return _convert_network(value, output, source=Path(path).name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _convert_network(value: Any, output: str | Path, *, source: str) -> list[str]:
    convert = next((convert for recognize, convert in NETWORKS if recognize(value)), None)
    if convert is None:
        raise ValueError(
            f"nothing that can be converted ({KINDS}); --describe shows what is in the file"
        )
    taken = Taken(value)
    what, content = convert(value, taken)
    written = [f"written to {output}"]
    if "stage" in content:
        content["converted_from"] = source
        config = config_from_dict(content["config"], source=source)
        save_config(config, f"{output}.yaml")
        written.append(f"its settings, a recipe to fine-tune it by: {output}.yaml")
    save_checkpoint(output, content)
    return [what, *_accounts(taken), *written]


def _accounts(taken: Taken) -> list[str]:
    unused, left_out = taken.unused(), taken.left_out()
    lines = [f"{taken.count()} parameters used, each once; {len(unused)} not used"]
    lines += [f"  not used: {place}" for place in unused]
    if left_out:
        others = ", ".join(f"{count} {name}" for name, count in sorted(left_out.items()))
        lines.append(f"left out, no parameters (gradients and buffers): {others}")
    return lines
