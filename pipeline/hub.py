"""Weights as the Hugging Face hub has them: a folder of safetensors, config.json and a model card.

`load_checkpoint` reads it wherever a checkpoint is named; `pipeline.hub_model` is for who uses
`huggingface_hub`.
"""

from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from datasets.files import write_atomically, write_json
from datasets.object_sizes import ObjectSides
from pipeline.checkpoint import HUB_CONFIG, HUB_WEIGHTS, load_checkpoint, read_hub_config
from pipeline.config import PRETRAIN
from pipeline.pretrained import without_training

CARD = "README.md"
LICENSE = "bsd-3-clause"  # of the project
# Of a stage: what it is called, the hub's tag for what it does, and in a sentence.
STAGES = {
    "deepmask": (
        "DeepMask",
        "mask-generation",
        "Class-agnostic mask proposals: masks of objects, without their categories.",
    ),
    "sharpmask": (
        "SharpMask",
        "mask-generation",
        "Class-agnostic mask proposals: masks of objects, without their categories. It refines "
        "those of a DeepMask, which it holds.",
    ),
    "multipathnet": (
        "MultiPathNet",
        "object-detection",
        "Classifies mask proposals: boxes and masks of objects with their categories. It needs a "
        "DeepMask or SharpMask that proposes.",
    ),
    PRETRAIN: ("Trunk", "image-classification", "A trunk that has learned to classify images."),
}
TAGS = ["instance-segmentation", "object-proposals", "pytorch"]
MAX_NAMES = 100  # of categories in the card


def write_hub_folder(checkpoint: str | Path, output: str | Path) -> str:
    """Writes a checkpoint as model.safetensors, config.json and README.md; returns a line on it.

    The weights are those of the checkpoint, to the bit. The config is whole but for data and paths
    of the machine it was trained on. A README.md that is there already stays.

    Args:
        checkpoint: of any stage; or a run's folder, or a folder that this has written.

    Raises:
        FileNotFoundError, ValueError: no checkpoint; a folder that holds another project's
            config.json; or safetensors is not installed.
    """
    content = load_checkpoint(checkpoint)
    data = Path(content["config"].get("data", {}).get("train", {}).get("annotations") or "").name
    content = without_training(content, source=str(checkpoint))
    save_hub_folder(content, output, data=data)
    megabytes = (Path(output) / HUB_WEIGHTS).stat().st_size / 1e6
    return f"{output}: {HUB_WEIGHTS} ({megabytes:.1f} MB), {HUB_CONFIG}, {CARD}"


def save_hub_folder(checkpoint: dict[str, Any], output: str | Path, *, data: str = "") -> None:
    """The same of a checkpoint's content; `data` is the name of what it was trained on."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError("writing safetensors needs them: pip install safetensors") from None
    output = Path(output)
    if (output / HUB_CONFIG).exists():
        read_hub_config(output / HUB_CONFIG)  # refuses another project's
    # Copies: safetensors takes no two names of one memory.
    weights: dict[str, Tensor] = {k: v.contiguous().clone() for k, v in checkpoint["model"].items()}
    write_atomically(output / HUB_WEIGHTS, save(weights, metadata={"format": "pt"}))
    rest = {key: value for key, value in checkpoint.items() if key != "model"}
    write_json(output / HUB_CONFIG, rest)
    if not (output / CARD).exists():
        count = sum(value.numel() for value in weights.values())
        write_atomically(
            output / CARD, _model_card(checkpoint, count, data, output.resolve().name).encode()
        )


def _model_card(checkpoint: dict[str, Any], count: int, data: str, name: str) -> str:
    """A model card with the hub's metadata; what only its author knows is asked for."""
    stage, config = checkpoint["stage"], checkpoint["config"]
    title, task, what = STAGES[stage]
    sections = {PRETRAIN: config["pretrain"], "multipathnet": config["multipathnet"]}
    trunk = sections.get(stage, config)["trunk"]["name"]
    metadata = {
        "license": LICENSE,
        "library_name": "maskpath",
        "pipeline_tag": task,
        "tags": [*([] if stage == PRETRAIN else [stage]), *TAGS],
    }
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).strip(),
        "---",
        f"# {title}, {trunk}",
        f"{what} {count / 1e6:.1f} million weights, for the project MaskPath (DeepMask, SharpMask "
        "and MultiPathNet in PyTorch).",
        "## Training data",
        f"`{data}`." if data else "Not named in the checkpoint.",
    ]
    if names := [str(category["name"]) for category in checkpoint.get("categories", [])]:
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        lines.append(f"{len(names)} categories: {', '.join(names[:MAX_NAMES])}{more}.")
    if "object_sides" in checkpoint:
        sides = ObjectSides.from_plain(checkpoint["object_sides"], source=name)
        least, median, most = (f"{sides.pixels[percent]:.0f}" for percent in (2, 50, 98))
        lines.append(
            f"{sides.count:,} objects, whose longest sides are {least} to {most} px (2nd to 98th "
            f"percentile), half of them below {median} px."
        )
    tool = "detect" if stage == "multipathnet" else "propose"
    if stage == PRETRAIN:
        usage = [f"python tools/train_stage.py --stage deepmask --set trunk.weights={name} ..."]
    else:
        usage = [f"python tools/{tool}.py --checkpoint {name} --images photo.jpg"]
    hub = ["from pipeline.hub_model import HubModel", "", f'HubModel.from_pretrained("{name}")']
    lines += [
        "## Use",
        "In a checkout of MaskPath, with this folder as the checkpoint:",
        "\n".join(["```", *usage, "```"]),
        "\n".join(["```python", *hub, "```"]),
        "## Figures and limits",
        "Not stated. `tools/score_coco.py` measures average recall and precision on annotations.",
        "## License",
        "The license above is that of the code. Name the one of these weights, which also depends "
        "on the images and on the weights that training began with.",
    ]
    # The metadata has no blank lines between.
    return "\n".join(lines[:3]) + "\n\n" + "\n\n".join(lines[3:]) + "\n"
