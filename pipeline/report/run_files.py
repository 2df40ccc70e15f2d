"""What the report shows of a run: its files, and a stage's numbers, plots and pictures."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from datasets.coco import CocoInstances
from pipeline.report.pictures import Examples, read_examples
from pipeline.report.plots import (
    plot_average_recall,
    plot_losses,
    plot_recall_by_iou,
    plot_validation,
    values_of,
)
from pipeline.training.run_log import read_metrics

BEST_METRIC = "iou_above_0.7"  # of the validation that chooses the best checkpoint


class RunFiles:
    """Reads the parts of a run; `missing` collects (name, what it is for, why it is not there)."""

    def __init__(self, run: Path):
        self.run = run
        self.missing: list[tuple[str, str, str]] = []

    def read(
        self, name: str | Path, reader: Callable[[Path], Any], what: str, *, inside: bool = True
    ) -> Any | None:
        """What `reader` makes of a file (`inside`: of the run directory), None if it cannot."""
        try:
            return reader(self.run / name if inside else Path(name))
        except FileNotFoundError:
            self.missing.append((str(name), what, "not there"))
        except (OSError, ValueError) as error:
            self.missing.append((str(name), what, " ".join(str(error).split())))
        return None


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Stage:
    """What the page shows of a stage; None for what the run does not have.

    Attributes:
        patches, proposals, perfect: metrics; perfect is for the same masks, perfectly ranked.
        curves: of `score_proposals`. training: see `training_facts`. plots: SVG by name.
        examples: the pictures.
        settings: texts of the files that say how it was made, by their names.
    """

    name: str
    patches: dict[str, float] | None
    proposals: dict[str, dict[str, float | None]] | None
    perfect: dict[str, dict[str, float | None]] | None
    curves: dict | None
    training: dict[str, float | None]
    plots: dict[str, Markup | None]
    examples: Examples | None
    settings: dict[str, str]


def read_stage(
    files: RunFiles, name: str, summary: dict, coco: CocoInstances | None, images: Path
) -> Stage:
    """Read what the run has of a stage.

    Args:
        summary: the stage's part of summary.json.
        coco: the annotated objects; None if they could not be read.
    """
    records = files.read(f"{name}/metrics.jsonl", read_metrics, "training curves") or []
    metrics = files.read(f"{name}/scores/metrics.json", read_json, "average recall")
    what = "average recall of the same masks, perfectly ranked"
    perfect = files.read(f"{name}/scores/perfect_ranking.json", read_json, what)
    curves = files.read(f"{name}/scores/curves.json", read_json, "curves of average recall")
    if summary.get("patches") is None and (files.run / "summary.json").exists():
        files.missing.append((f"{name}.patches in summary.json", "patch metrics", "not there"))
    examples = None
    if coco is not None:
        reader = partial(read_examples, coco=coco, images=images)
        examples = files.read(f"{name}/proposals", reader, "pictures")
    settings = {
        f"{name}/{file}": files.read(f"{name}/{file}", Path.read_text, what)
        for file, what in (
            ("config.yaml", "settings of the training"),
            ("proposals/settings.json", "settings of the proposals"),
        )
    }
    return Stage(
        name=name,
        patches=summary.get("patches"),
        proposals=metrics or summary.get("proposals"),
        perfect=perfect,
        curves=curves,
        training=training_facts(records, samples="patches"),
        plots={
            "losses": plot_losses(records),
            "validation": plot_validation(records),
            "average_recall": curves and plot_average_recall(curves, perfect),
            "recall_by_iou": curves and plot_recall_by_iou(curves),
        },
        examples=examples,
        settings={file: text for file, text in settings.items() if text},
    )


def training_facts(
    records: list[dict],
    *,
    samples: str,
    losses: Iterable[str] = ("mask_loss", "score_loss"),
    best_metric: str = BEST_METRIC,
) -> dict[str, float | None]:
    """A training in a few numbers; None for those that the metrics do not tell.

    Args:
        samples: what the stage counts in a second.
    """
    steps = [record["step"] for record in records]
    rates = values_of(records, f"{samples}_per_second")
    validation = dict(zip(*values_of(records, best_metric, split="val"), strict=True))
    facts = {
        "steps": max(steps, default=None),
        "epochs": records[-1]["epoch"] if records else None,
        "samples_per_second": statistics.median(rates[1]) if rates[1] else None,
        "best_step": max(validation, key=validation.get, default=None),
    }
    for loss in losses:
        values = values_of(records, loss)[1]
        facts |= {f"first_{loss}": values[0], f"last_{loss}": values[-1]} if values else {}
    return facts
