"""Checkpoints: one file of tensors and plain types that loads with `weights_only=True`."""

import hashlib
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
    """The file that is meant: of a run's folder, its best checkpoint.

    Raises:
        FileNotFoundError: no such file or folder, or no run in the folder.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    for file in (path / "checkpoints" / BEST, path / BEST):
        if file.is_file():
            return file
    runs = sorted(str(file.parents[1]) for file in path.glob(f"*/checkpoints/{BEST}"))
    hint = f"; give one of {', '.join(runs)}" if runs else ""
    raise FileNotFoundError(f"{path} is a folder without checkpoints/{BEST}{hint}")


def load_checkpoint(
    path: str | Path, *, stage: str | tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Reads a checkpoint of this project, of the given stages; None for any.

    `path` may be a run's folder, see `find_checkpoint`.

    Raises:
        ValueError or FileNotFoundError: no such file, another kind of file, or another stage.
    """
    path = find_checkpoint(path)
    checkpoint = load_file(path)
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
    with open(find_checkpoint(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
