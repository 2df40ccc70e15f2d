"""Checkpoints: one file of tensors and plain types that loads with `weights_only=True`.

As the Hugging Face hub has them, they are two files in a folder: the weights as safetensors, the
rest as config.json. `pipeline.hub` writes these.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datasets.files import atomic_path
from models.backbone import describe_mismatch, load_file
from models.trunk import upgrade_trunk_weights

LAST, BEST = "last.pt", "best.pt"  # in a run directory's checkpoints/
HUB_WEIGHTS, HUB_CONFIG = "model.safetensors", "config.json"  # in a folder for the hub
KEYS = ("stage", "config", "model")  # what inference and the next stage need; training adds more
# Names of weights in the first checkpoints, and those of today.
RENAMED_WEIGHTS = (
    (re.compile(r"^classify\."), "cls_score."),
    (re.compile(r"^regress\."), "bbox_pred."),
    (re.compile(r"\.pooling\.mix\."), ".pooling.reduce."),
)


def save_checkpoint(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Writes a checkpoint; the file is whole or absent, also after a power failure.

    Raises:
        OSError: it cannot be written; an earlier file of that name stays.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # PyTorch's own words for a write that failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def find_checkpoint(path: str | Path) -> Path:
    """The file that is meant: of a run's folder, its best checkpoint; of one for the hub, weights.

    Raises:
        FileNotFoundError: no such file or folder, or no run in the folder.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for file in (path / "checkpoints" / BEST, path / BEST, path / HUB_WEIGHTS):
        if file.is_file():
            return file
    runs = sorted(str(file.parents[1]) for file in path.glob(f"*/checkpoints/{BEST}"))
    hint = f"; give one of {', '.join(runs)}" if runs else ""
    raise FileNotFoundError(f"{path} is a folder without checkpoints/{BEST}{hint}")


def run_of(checkpoint: Path) -> Path:
    """The folder of the run, or of the weights for the hub, that a file is of; else the file."""
    checkpoint = checkpoint.resolve()
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    return checkpoint.parent if checkpoint.name == HUB_WEIGHTS else checkpoint


def find_proposer_beside(run: Path) -> Path | None:
    """The best SharpMask, or else DeepMask, of the runs beside a run's folder."""
    for stage in ("sharpmask", "deepmask"):
        path = run.parent / stage / "checkpoints" / BEST
        if path.is_file():
            return path
    return None


def read_checkpoint(path: Path) -> Any:
    """The content of a checkpoint's file, unchecked; of weights for the hub, with the config.json.

    Raises:
        ValueError or FileNotFoundError: there is no such file, or it is of another kind.
    """
    return _read_safetensors(path) if path.suffix == Path(HUB_WEIGHTS).suffix else load_file(path)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file as load_safetensors
    except ImportError:
        raise ValueError(f"{path}: reading it needs safetensors: pip install safetensors") from None
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    config = read_hub_config(path.with_name(HUB_CONFIG))
    try:
        return config | {"model": load_safetensors(path)}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from None


def read_hub_config(path: Path) -> dict[str, Any]:
    """A config.json beside weights: all of a checkpoint but these.

    Raises:
        ValueError or FileNotFoundError: there is none, or it is another project's.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_with_numbers)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; it belongs to {HUB_WEIGHTS}") from None
    except ValueError:
        raise ValueError(f"{path} is not valid JSON") from None
    if not isinstance(config, dict) or not {"stage", "config"} <= config.keys():
        raise ValueError(f"{path} is not of this project: it lacks stage, config")
    return config


def _with_numbers(mapping: dict[str, Any]) -> dict[int | str, Any]:
    """JSON has no keys but texts; those of `optim.lr_drops` are epochs."""
    return {int(key) if key.isdecimal() else key: value for key, value in mapping.items()}


def load_checkpoint(
    path: str | Path, *, stage: str | tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Reads a checkpoint of this project, of the given stages; None for any.

    `path` may be a folder, see `find_checkpoint`.

    Raises:
        ValueError or FileNotFoundError: no such file, another kind of file, or another stage.
    """
    path = find_checkpoint(path)
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, Mapping) or not all(key in checkpoint for key in KEYS):
        raise ValueError(
            f"{path} is a PyTorch file but not a checkpoint of this project: "
            f"it lacks {', '.join(KEYS)}"
        )
    stages = (stage,) if isinstance(stage, str) else stage
    if stages and checkpoint["stage"] not in stages:
        raise ValueError(
            f"{path} is a {checkpoint['stage']} checkpoint, needed is {' or '.join(stages)}"
        )
    return {**checkpoint, "model": _with_new_names(checkpoint["model"])}


def _with_new_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, new in RENAMED_WEIGHTS:
            name = pattern.sub(new, name)
        renamed[name] = value
    return upgrade_trunk_weights(renamed)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Copies a state dict into a model, or raises a ValueError that lists all that does not fit."""
    difference = describe_mismatch(model.state_dict(), state)
    if difference:
        raise ValueError(f"{source} does not fit the configured model: {difference}")
    model.load_state_dict(state)


def check_weights(model: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Raises a ValueError if a network without memory (on "meta") is larger than its file.

    The settings in a checkpoint may ask for any size, and a tensor of any size may repeat one
    stored number.
    """
    difference = describe_mismatch(model.state_dict(), state)
    if difference:
        raise ValueError(f"{source} does not fit the configured model: {difference}")
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in state.values()}
    stored = sum(storage.nbytes() for storage in storages.values())
    needed = sum(t.numel() * t.element_size() for t in state.values())
    if needed > stored:
        raise ValueError(
            f"{source} holds {stored:,} bytes of weights for a network of {needed:,} bytes"
        )


def file_sha256(path: str | Path) -> str:
    """Hash of a checkpoint's content: tells those apart that have the same name."""
    path = find_checkpoint(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    if path.name == HUB_WEIGHTS:
        digest.update(path.with_name(HUB_CONFIG).read_bytes())
    return digest.hexdigest()
