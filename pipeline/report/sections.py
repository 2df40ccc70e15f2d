"""The sections of the report, read from a run's files: a stage's scores, plots and pictures."""

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup

from datasets.coco import CocoInstances
from pipeline.inference.coco_json import read_detections
from pipeline.report import pictures, plots
from pipeline.report.comparison import object_gallery
from pipeline.report.plots import COLORS, PROPOSALS, metric_values
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
T = TypeVar("T")


class Run:
    """The files of a run, and the images that it was evaluated on.

    Attributes:
        summary: the content of summary.json.
        coco: the annotated objects.
        missing: (name, what it is for) of the files that are not there.
    """

    def __init__(self, directory: Path, annotations: str | Path, images: Path):
        self.directory, self.images = directory, images
        self.missing: list[tuple[str, str]] = []
        self.summary = self.read_json("summary.json", "patch metrics and seconds") or {}
        self.coco = CocoInstances.load(annotations)

    def read(self, name: str, reader: Callable[[Path], T], purpose: str) -> T | None:
        """What `reader` makes of a file below the run directory; None if it is not there."""
        if (path := self.directory / name).exists():
            return reader(path)
        self.missing.append((name, purpose))
        return None

    def read_json(self, name: str, purpose: str) -> Any | None:
        """The content of a JSON file; None if it is not there."""
        return self.read(name, lambda path: json.loads(path.read_text()), purpose)

    def read_settings(self, *names: str) -> dict[str, str | None]:
        """The text of files by name."""
        return {name: self.read(name, Path.read_text, "settings") for name in names}


# A section: the name of a stage, its scores, plots (SVG), gallery, training and settings, by
# name; None for what the run does not have.


def read_mask_stage(run: Run, name: str) -> dict[str, Any]:
    """The section of DeepMask or SharpMask, with its scenes for the comparison."""
    summary = run.summary.get(name, {})
    training, svgs = read_training(run, name, PatchStage, PATCH_LOSSES, PATCH_METRICS)
    metrics = run.read_json(f"{name}/scores/metrics.json", "average recall")
    purpose = "average recall of the same masks, perfectly ranked"
    perfect = run.read_json(f"{name}/scores/perfect_ranking.json", purpose)
    curves = run.read_json(f"{name}/scores/curves.json", "curves of average recall")
    if curves:
        by_type = {t: curves[t] for t in COLORS}
        svgs["average_recall"] = plots.plot_average_recall(curves["counts"], by_type, perfect)
        svgs["recall_by_iou"] = plots.plot_recall_by_iou(curves["iou_thresholds"], by_type)
    if run.summary and not summary.get("patches"):
        run.missing.append((f"{name}.patches in summary.json", "patch metrics"))
    found = run.read(f"{name}/proposals", pictures.read_proposals, "pictures") or []
    scenes = pictures.scenes_of(found, run.coco)
    return {
        "name": name,
        "patches": summary.get("patches"),
        "proposals": metrics or summary.get("proposals"),
        "perfect": perfect,
        "curves": curves,
        "plots": svgs,
        "scenes": scenes,
        "gallery": scenes and pictures.proposal_gallery(scenes, run.coco, run.images),
        "training": training,
        "settings": run.read_settings(f"{name}/config.yaml", f"{name}/proposals/settings.json"),
    }


def read_detector(run: Run, name: str) -> dict[str, Any]:
    """The section of the detector."""
    training, svgs = read_training(run, name, MultiPathNetStage, ROI_LOSSES, ROI_METRICS)
    metrics = run.read_json(f"{name}/scores/metrics.json", "average precision")
    curves = run.read_json(f"{name}/scores/curves.json", "AP by IoU threshold")
    by_iou = curves and ap_curves(curves, "iou_thresholds", "ap_by_iou")
    counts = run.read_json(f"{name}/scores/by_proposals.json", "AP by number of proposals")
    by_proposals = counts and ap_curves(counts, "counts")
    categories = run.read_json(f"{name}/scores/categories.json", "AP by category")
    svgs["by_iou"] = by_iou and plots.plot_ap(by_iou, "IoU threshold")
    svgs["by_proposals"] = by_proposals and plots.plot_ap(by_proposals, PROPOSALS)
    coco = run.coco
    columns = zip(coco.image_ids.tolist(), coco.image_sizes.tolist(), strict=True)
    images = [
        {"id": image_id, "file_name": coco.file_name(i), "height": height, "width": width}
        for i, (image_id, (height, width)) in enumerate(columns)
    ]
    reader = partial(read_detections, images=images)
    found = run.read(f"{name}/detections.json", reader, "pictures")
    return {
        "name": name,
        "detections": metrics or run.summary.get(name, {}).get("detections"),
        "by_iou": by_iou,
        "by_proposals": by_proposals,
        "categories": categories and category_table(categories),
        "plots": svgs,
        "gallery": found and pictures.detection_gallery(found, coco, run.images),
        "training": training,
        "settings": run.read_settings(f"{name}/config.yaml"),
    }


def compare(run: Run, coarse: dict[str, Any], refined: dict[str, Any]) -> dict[str, Any]:
    """The section of DeepMask and SharpMask beside each other, from those of the two."""
    stages = {"DeepMask": coarse, "SharpMask": refined}
    svgs, gallery = {}, None
    if coarse["curves"] and refined["curves"]:
        recalls = {name: stage["curves"]["mask"] for name, stage in stages.items()}
        averages = {f"{name}, {t}": s["curves"][t] for name, s in stages.items() for t in COLORS}
        x = coarse["curves"]
        svgs["recall_by_iou"] = plots.plot_recall_by_iou(x["iou_thresholds"], recalls)
        svgs["average_recall"] = plots.plot_average_recall(x["counts"], averages)
    if coarse["scenes"] and refined["scenes"]:
        gallery = object_gallery(coarse["scenes"], refined["scenes"], run.coco, run.images)
    return {"stages": stages, "plots": svgs, "gallery": gallery}


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
    svgs = {
        # Without their weighted sum, which would press the others down to one line.
        "losses": plots.plot_metrics(records, "train", losses, "loss"),
        "validation": plots.plot_metrics(records, "val", metrics, "value", top=1),
    }
    return training, svgs


def ap_curves(content: dict, x: str, key: str = "") -> tuple[list[float], dict[str, list]] | None:
    """The values of `x` and the AP at each of them by IoU type; None if nothing was measured."""
    values = {t: content[t][key] if key else content[t] for t in ("box", "mask") if t in content}
    measured = {t: ap for t, ap in values.items() if any(v is not None for v in ap)}
    return (content[x], measured) if measured else None


def category_table(content: list[dict]) -> dict[str, Any]:
    """From categories.json: the names of measures, and their mean over the categories."""
    measures = list(content[0])[4:]
    known = [[c[m] for c in content if c[m] is not None] for m in measures]
    means = [statistics.fmean(values) if values else None for values in known]
    return {"measures": measures, "rows": content, "means": means}
