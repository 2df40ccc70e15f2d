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
from pipeline.report.pictures import read_proposals, scenes_of
from pipeline.report.plots import COLORS, PROPOSALS, metric_values
from pipeline.training.run_log import read_metrics
from pipeline.training.stages import MultiPathNetStage, PatchStage, Stage

NAMES = {"deepmask": "DeepMask", "sharpmask": "SharpMask"}  # coarse, refined
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
            reason = "not there"
        except (KeyError, TypeError) as error:
            reason = f"is not what it should be: {error!r}"
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
        self.missing.append((str(name), purpose, reason))
        return None

    def read_json(self, name: str, purpose: str, parse: Callable[[Any], Any] = dict) -> Any | None:
        """What `parse` makes of the content of a JSON file; None if it cannot."""
        return self.read(name, lambda path: parse(json.loads(path.read_text())), purpose)

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
        run.missing.append((f"{name}.patches in summary.json", "patch metrics", "not there"))
    scenes, gallery = [], None
    if run.coco and (found := run.read(f"{name}/proposals", read_proposals, "pictures")):
        scenes = scenes_of(found, run.coco)
        gallery = pictures.proposal_gallery(scenes, run.coco, run.images) if scenes else None
    return {
        "name": name,
        "patches": summary.get("patches"),
        "proposals": metrics or summary.get("proposals"),
        "perfect": perfect,
        "curves": curves,
        "plots": svgs,
        "scenes": scenes,
        "gallery": gallery,
        "training": training,
        "settings": run.read_settings(f"{name}/config.yaml", f"{name}/proposals/settings.json"),
    }


def read_detector(run: Run, name: str) -> dict[str, Any]:
    """The section of the detector."""
    training, svgs = read_training(run, name, MultiPathNetStage, ROI_LOSSES, ROI_METRICS)
    metrics = run.read_json(f"{name}/scores/metrics.json", "average precision")
    parse = partial(ap_curves, x="iou_thresholds", key="ap_by_iou")
    by_iou = run.read_json(f"{name}/scores/curves.json", "AP by IoU threshold", parse)
    purpose, parse = "AP by number of proposals", partial(ap_curves, x="counts")
    by_proposals = run.read_json(f"{name}/scores/by_proposals.json", purpose, parse)
    purpose = "AP by category"
    categories = run.read_json(f"{name}/scores/categories.json", purpose, category_table)
    svgs["by_iou"] = by_iou and plots.plot_ap(by_iou, "IoU threshold")
    svgs["by_proposals"] = by_proposals and plots.plot_ap(by_proposals, PROPOSALS)
    gallery = None
    if coco := run.coco:
        sizes = zip(coco.image_ids.tolist(), coco.image_sizes.tolist(), strict=True)
        images = [
            {"id": image_id, "file_name": coco.file_name(i), "height": height, "width": width}
            for i, (image_id, (height, width)) in enumerate(sizes)
        ]
        reader = partial(read_detections, images=images)
        found = run.read(f"{name}/detections.json", reader, "pictures")
        gallery = pictures.detection_gallery(found, coco, run.images) if found else None
    return {
        "name": name,
        "detections": metrics or run.summary.get(name, {}).get("detections"),
        "by_iou": by_iou,
        "by_proposals": by_proposals,
        "categories": categories,
        "plots": svgs,
        "gallery": gallery,
        "training": training,
        "settings": run.read_settings(f"{name}/config.yaml"),
    }


def compare(run: Run, coarse: dict[str, Any], refined: dict[str, Any]) -> dict[str, Any]:
    """The section of DeepMask and SharpMask beside each other, from those of the two."""
    stages = {NAMES[stage["name"]]: stage for stage in (coarse, refined)}
    svgs, gallery = {}, None
    if coarse["curves"] and refined["curves"]:
        recalls = {name: stage["curves"]["mask"] for name, stage in stages.items()}
        averages = {f"{name}, {t}": s["curves"][t] for name, s in stages.items() for t in COLORS}
        x = coarse["curves"]
        svgs["recall_by_iou"] = plots.plot_recall_by_iou(x["iou_thresholds"], recalls)
        svgs["average_recall"] = plots.plot_average_recall(x["counts"], averages)
    if run.coco and coarse["scenes"] and refined["scenes"]:
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


def ap_curves(content: dict, x: str, key: str = "") -> tuple[list[float], dict[str, list]]:
    """The values of `x` and the AP at each of them by IoU type; ValueError if there is none."""
    values = {t: content[t][key] if key else content[t] for t in ("box", "mask") if t in content}
    measured = {t: ap for t, ap in values.items() if any(v is not None for v in ap)}
    if not measured or {len(ap) for ap in measured.values()} != {len(content[x])}:
        raise ValueError(f"does not have an AP for each of {x}")
    return content[x], measured


def category_table(content: list[dict]) -> dict[str, Any]:
    """From categories.json: rows of (name, annotations, detections, values), and mean values."""
    measures = list(content[0])[4:] if content else []
    rows = [
        (c["category"], int(c["annotations"]), int(c["detections"]), [c[m] for m in measures])
        for c in content
    ]
    known = [[c[m] for c in content if c[m] is not None] for m in measures]
    means = [statistics.fmean(values) if values else None for values in known]
    return {"measures": [m.replace("_", " ") for m in measures], "rows": rows, "means": means}
