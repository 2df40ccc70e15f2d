"""What benchmarks of both mask stages share: train, score, and the table of several seeds."""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.full_run import run_pipeline, score_masks
from pipeline.recipe import load_config
from tools.benchmarks.timing import Rows

MASK_STAGES = ("deepmask", "sharpmask")
COLUMNS = [(iou_type, k) for iou_type in ("mask", "box") for k in (10, 100, 1000)]


def add_coarse(parser: argparse.ArgumentParser) -> None:
    """Adds --coarse."""
    parser.add_argument("--coarse", action="store_true", help="DeepMask alone, its coarse masks")


def trained_stages(args: argparse.Namespace) -> Sequence[str]:
    """Both mask stages, or DeepMask with --coarse."""
    return MASK_STAGES[:1] if args.coarse else MASK_STAGES


def recall_of_recipe(
    config: str,
    output: Path,
    settings: dict[str, Any],
    *,
    overrides: list[str],
    device: str,
    stages: Sequence[str] = MASK_STAGES,
) -> dict[str, float]:
    """Average recall on the validation images after the last of the stages, by column.

    `settings` come after `overrides`. A run that `output` holds already is continued or only read.
    """
    settings = settings | {"stages": f"[{','.join(stages)}]"}
    changes = [*overrides, *(f"{key}={value}" for key, value in settings.items())]
    summary = run_pipeline(config, output, overrides=changes, device=torch.device(device))
    return _columns(summary[stages[-1]])


def recall_of_changed(
    config: str,
    run: Path,
    output: Path,
    change: Callable[[dict[str, Any]], None],
    *,
    overrides: list[str],
    device: str,
) -> dict[str, float]:
    """As `recall_of_recipe`, of a finished stage's best checkpoint with a change in it."""
    content = load_checkpoint(run)
    change(content)
    save_checkpoint(output / "changed.pt", content)
    changed = load_config(config, overrides)
    return _columns(score_masks(changed, output / "changed.pt", output, torch.device(device)))


def _columns(scores: dict[str, Any]) -> dict[str, float]:
    metrics = scores["proposals"]
    return {f"{iou_type} AR@{k}": metrics[iou_type][f"AR@{k}"] for iou_type, k in COLUMNS}


def over_seeds(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means by column and, of several seeds, standard deviations by "±column"."""
    row: dict[str, float] = {}
    for column in scores[0]:
        values = [score[column] for score in scores]
        row[column] = statistics.mean(values)
        if len(values) > 1:
            row[f"±{column}"] = statistics.stdev(values)
    return row


def markdown(rows: Rows, title: str) -> str:
    """The table of the docs: AR at 10, 100 and 1000, by masks and by boxes."""
    lines = [f"| {title} | mask AR@10 / 100 / 1000 | box |", "|---|---|---|"]
    for name, row in rows.items():
        cells = []
        for iou_type in ("mask", "box"):
            columns = [column for column in row if column.startswith(iou_type)]
            values = [_fraction(row[column]) for column in columns]
            spreads = [f" ± {_fraction(row['±' + c])}" if "±" + c in row else "" for c in columns]
            cells.append(" / ".join(v + s for v, s in zip(values, spreads, strict=True)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _fraction(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
