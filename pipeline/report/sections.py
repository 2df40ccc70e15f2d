"""The sections of the report, read from a run's files: a stage's scores, plots and pictures."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from datasets.coco import CocoInstances
from pipeline.inference.proposals import Proposals
from pipeline.report.comparison import NAMES, object_gallery
from pipeline.report.pictures import (
    Gallery,
    Scene,
    detection_gallery,
    proposal_gallery,
    read_proposals,
)
from pipeline.report.plots import (
    COLORS,
    PROPOSALS,
    Curve,
    metric_values,
    plot,
    plot_average_recall,
    plot_metrics,
    plot_recall_by_iou,
)
from pipeline.training.run_log import read_metrics
from pipeline.training.stages import MultiPathNetStage, PatchStage, Stage

PATCH_LOSSES = {"mask_loss": "mask loss", "score_loss": "score loss"}
PATCH_METRICS = {
    "mean_iou": "mean IoU",
    "median_iou": "median IoU",
    "iou_above_0.5": "IoU > 0.5",
    "iou_above_0.7": "IoU > 0.7",
    "score_accuracy": "score accuracy",
}
ROI_LOSSES = {"class_loss": "class loss", "box_loss": "box loss"}
ROI_METRICS = {
    "roi_accuracy": "mean of the two",
    "foreground_accuracy": "foreground",
    "background_accuracy": "background",
}
SATURATION = 400  # proposals, from where on the published AP hardly grows (BMVC 2016)
ApCurves = tuple[list[float], dict[str, list]]  # thresholds or numbers; AP at each, by IoU type
T = TypeVar("T")


class Run:
    """The files of a run, and the images that it was evaluated on.

    Attributes:
        summary: the content of summary.json.
        coco: the annotated objects; None if they could not be read.
        missing: (name, what it is for, why it is not there) of the files that could not be read.
    """

    def __init__(self, directory: Path, annotations: Path, images: Path):
        self.directory, self.images = directory, images
        self.missing: list[tuple[str, str, str]] = []
        self.summary = self.read_json("summary.json", "patch metrics and seconds") or {}
        purpose = "the annotated objects, and with them the pictures"
        self.coco = self.read(annotations.absolute(), CocoInstances.load, purpose)

    def read(self, name: str | Path, reader: Callable[[Path], T], purpose: str) -> T | None:
        """What `reader` makes of a file below the run directory; None if it cannot."""
        try:
            return reader(self.directory / name)
        except FileNotFoundError:
            self.missing.append((str(name), purpose, "not there"))
        except (OSError, ValueError) as error:
            self.missing.append((str(name), purpose, " ".join(str(error).split())))
        return None

    def read_json(self, name: str, purpose: str, parse: Callable[[Any], Any] = dict) -> Any | None:
        """What `parse` makes of the content of a JSON file; None if it cannot."""

        def read(path: Path) -> Any:
            try:
                return parse(json.loads(path.read_text()))
            except (KeyError, TypeError) as error:
                raise ValueError(f"is not what it should be: {error!r}") from None

        return self.read(name, read, purpose)

    def read_text(self, *names: str) -> dict[str, str]:
        """The settings files that can be read, by name."""
        texts = {name: self.read(name, Path.read_text, "settings") for name in names}
        return {name: text for name, text in texts.items() if text}


@dataclass(frozen=True)
class Section:
    """What the page shows of a stage, or of two compared; None for what the run does not have.

    Attributes:
        scores: metrics and tables. plots: SVG. training: see `read_training`.
        settings: the files that say how it was made. All of these by name.
        scenes: the proposals, for the comparison.
    """

    name: str
    scores: dict[str, Any]
    plots: dict[str, Markup | None]
    gallery: Gallery | None
    training: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    scenes: list[Scene[Proposals]] | None = None


def read_mask_stage(run: Run, name: str) -> Section:
    """Read what the run has of DeepMask or SharpMask."""
    summary, files = run.summary.get(name, {}), f"{name}/scores"
    training, plots = read_training(run, name, PatchStage, PATCH_LOSSES, PATCH_METRICS)
    metrics = run.read_json(f"{files}/metrics.json", "average recall")
    purpose = "average recall of the same masks, perfectly ranked"
    perfect = run.read_json(f"{files}/perfect_ranking.json", purpose)
    curves = run.read_json(f"{files}/curves.json", "curves of average recall")
    if curves:
        averages = {t: curves[t]["ar_by_count"] for t in COLORS}
        recalls = {t: curves[t]["recall_by_iou"] for t in COLORS}
        plots["average_recall"] = plot_average_recall(curves["counts"], averages, perfect)
        plots["recall_by_iou"] = plot_recall_by_iou(curves["iou_thresholds"], recalls)
    if run.summary and not summary.get("patches"):
        run.missing.append((f"{name}.patches in summary.json", "patch metrics", "not there"))
    scenes = gallery = None
    if run.coco:
        scenes = run.read(f"{name}/proposals", partial(read_proposals, coco=run.coco), "pictures")
        gallery = proposal_gallery(scenes, run.coco, run.images) if scenes else None
    scores = {
        "patches": summary.get("patches"),
        "proposals": metrics or summary.get("proposals"),
        "perfect": perfect,
        "curves": curves,
    }
    settings = run.read_text(f"{name}/config.yaml", f"{name}/proposals/settings.json")
    return Section(name, scores, plots, gallery, training, settings, scenes)


def read_detector(run: Run, name: str) -> Section:
    """Read what the run has of the detector."""
    summary, files = run.summary.get(name, {}), f"{name}/scores"
    training, plots = read_training(run, name, MultiPathNetStage, ROI_LOSSES, ROI_METRICS)
    metrics = run.read_json(f"{files}/metrics.json", "average precision")
    parse = partial(ap_curves, x="iou_thresholds", key="ap_by_iou")
    by_iou = run.read_json(f"{files}/curves.json", "AP by IoU threshold", parse)
    purpose, parse = "AP by number of proposals", partial(ap_curves, x="counts")
    by_proposals = run.read_json(f"{files}/by_proposals.json", purpose, parse)
    categories = run.read_json(f"{files}/categories.json", "AP by category", category_table)
    plots["by_iou"] = by_iou and plot_ap(by_iou, "IoU threshold")
    plots["by_proposals"] = by_proposals and plot_ap(by_proposals, PROPOSALS)
    gallery = None
    if run.coco:
        reader = partial(detection_gallery, coco=run.coco, images=run.images)
        gallery = run.read(f"{name}/detections.json", reader, "pictures")
    scores = {
        "detections": metrics or summary.get("detections"),
        "by_iou": by_iou,
        "by_proposals": by_proposals,
        "categories": categories,
    }
    return Section(name, scores, plots, gallery, training, run.read_text(f"{name}/config.yaml"))


def compare(run: Run, coarse: Section, refined: Section) -> Section:
    """DeepMask and SharpMask beside each other."""
    scores = {NAMES[stage.name]: stage.scores for stage in (coarse, refined)}
    curves = {name: s["curves"] for name, s in scores.items() if s["curves"]}
    plots, gallery = {}, None
    if len(curves) == len(NAMES):
        x = coarse.scores["curves"]
        recalls = {name: c["mask"]["recall_by_iou"] for name, c in curves.items()}
        averages = {
            f"{name}, {t}": c[t]["ar_by_count"] for name, c in curves.items() for t in COLORS
        }
        plots["recall_by_iou"] = plot_recall_by_iou(x["iou_thresholds"], recalls)
        plots["average_recall"] = plot_average_recall(x["counts"], averages)
    if run.coco and coarse.scenes is not None and refined.scenes is not None:
        gallery = object_gallery(coarse.scenes, refined.scenes, run.coco, run.images)
    return Section("comparison", scores, plots, gallery)


def read_training(
    run: Run, name: str, stage: type[Stage], losses: dict[str, str], metrics: dict[str, str]
) -> tuple[dict[str, Any], dict[str, Markup | None]]:
    """A training in a few numbers, None for those that the run does not tell, and its plots.

    Args:
        losses, metrics: labels, by the names in metrics.jsonl.
    """
    records = run.read(f"{name}/metrics.jsonl", read_metrics, "training curves") or []
    rates = metric_values(records, "train", f"{stage.samples}_per_second")[1]
    validation = dict(zip(*metric_values(records, "val", stage.best_metric), strict=True))
    values = {label: metric_values(records, "train", loss)[1] for loss, label in losses.items()}
    training = {
        "steps": max((record["step"] for record in records), default=None),
        "epochs": records[-1]["epoch"] if records else None,
        "losses": {label: (v[0], v[-1]) if v else (None, None) for label, v in values.items()},
        "best_step": max(validation, key=lambda step: validation[step], default=None),
        "samples": stage.samples,
        "samples_per_second": statistics.median(rates) if rates else None,
    }
    plots = {
        # Without their weighted sum, which would press the others down to one line.
        "losses": plot_metrics(records, "train", losses, "loss"),
        "validation": plot_metrics(records, "val", metrics, "value", top=1),
    }
    return training, plots


def ap_curves(content: dict, x: str, key: str = "") -> ApCurves:
    """The AP at each of `x` by IoU type, from a file of scores; ValueError if there is none."""
    values = {t: content[t][key] if key else content[t] for t in ("box", "mask") if t in content}
    measured = {t: ap for t, ap in values.items() if any(v is not None for v in ap)}
    if not measured or {len(ap) for ap in measured.values()} != {len(content[x])}:
        raise ValueError(f"does not have an AP for each of {x}")
    return content[x], measured


def plot_ap(ap: ApCurves, xlabel: str) -> Markup | None:
    """Average precision by IoU type; by number of proposals, with the published saturation."""
    x, values = ap
    curves: list[Curve] = [(t, x, y, f"{COLORS[t]}o-") for t, y in values.items()]
    if xlabel == PROPOSALS:
        highest = max(v for y in values.values() for v in y if v is not None)
        curves.append((f"published: {SATURATION}", [SATURATION] * 2, [0, highest], "k:"))
    return plot(curves, xlabel, "average precision")


def category_table(content: list[dict]) -> dict[str, Any]:
    """From categories.json: rows of (name, annotations, detections, values), and mean values."""
    measures = list(content[0])[4:] if content else []
    rows = [
        (c["category"], int(c["annotations"]), int(c["detections"]), [c[m] for m in measures])
        for c in content
    ]
    columns = zip(*(values for *_, values in rows), strict=True)
    known = [[value for value in column if value is not None] for column in columns]
    means = [statistics.fmean(column) if column else None for column in known]
    return {"measures": [m.replace("_", " ") for m in measures], "rows": rows, "means": means}
