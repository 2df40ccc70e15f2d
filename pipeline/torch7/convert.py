"""Converts Torch7 files of the released models, recognized by what is in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.checkpoint import save_checkpoint
from pipeline.recipe import config_to_dict, save_config
from pipeline.torch7.detector import convert_detector
from pipeline.torch7.imagenet import convert_caffe_network, convert_resnet
from pipeline.torch7.masks import convert_masks
from pipeline.torch7.modules import (
    Used,
    is_stage,
    submodules,
    typename,
    unpacked,
    unused_parameters,
)
from pipeline.torch7.proposals import FIELDS, convert_proposals
from pipeline.torch7.reader import read_torch7

# A converter returns a description and either a checkpoint, its config as a Config, or a state dict
# of torchvision's names for `trunk.weights`.
Converter = Callable[[Any, Used], tuple[str, dict]]


def find_converter(value: Any) -> Converter | None:
    """The converter of a network that `read_torch7` gave; None for anything else."""
    network = unpacked(value)  # DeepMask and SharpMask are saved as {model, config}
    parts = submodules(network)
    if typename(network) in ("DeepMask", "SharpMask"):
        return convert_masks
    if typename(network) == "Sequential" and "ROIPooling" in map(typename, parts):
        return convert_detector
    if len(parts) == 11 and sum(map(is_stage, parts)) == 4:
        return convert_resnet
    if isinstance(value, dict) and all(
        typename(unpacked(value.get(name))) == "Sequential" for name in ("features", "top")
    ):
        return convert_caffe_network
    return None


def convert_file(
    path: str | Path,
    output: str | Path,
    *,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
) -> list[str]:
    """Converts a Torch7 file; returns lines that say what it is and what was not used.

    Args:
        output: the checkpoint or state dict; for a file of proposals the folder of a store.
        annotations, images: a COCO json or an image folder, for proposals, which do not say how
            large their images are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, nothing known here, or parameters that do not fit; one line that
            names the file and lists all of them.
    """
    if Path(output).resolve() == Path(path).resolve():
        raise ValueError(f"--output {output} is the file to convert; choose another name")
    value, source = read_torch7(path), Path(path).name
    try:
        if isinstance(value, dict) and set(FIELDS) <= set(value):
            return convert_proposals(
                value, output, source=source, annotations=annotations, images=images
            )
        if annotations or images:
            raise ValueError("--annotations and --images are for proposals, and this is a network")
        if (convert := find_converter(value)) is None:
            raise ValueError(
                "expected DeepMask, SharpMask, an ImageNet ResNet of fb.resnet.torch, an ImageNet "
                "VGG or CaffeNet of multipathnet, a detector of one region (integral loss, Fast "
                "R-CNN) or proposals; --describe shows what is in the file"
            )
        used: Used = set()
        description, content = convert(value, used)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    unused = unused_parameters(value, used)
    lines = [
        description,
        f"{len(used)} parameters used, each once; {len(unused)} not used",
        *(f"  not used: {parameter}" for parameter in unused),
        f"written to {output}",
    ]
    if "stage" in content:
        config = content["config"]
        save_config(config, f"{output}.yaml")
        content |= {"config": config_to_dict(config), "converted_from": source}
        lines.append(f"its settings, a recipe to fine-tune it by: {output}.yaml")
    save_checkpoint(output, content)
    return lines
