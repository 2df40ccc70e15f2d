"""The sections of the report, read from a run's files: a stage's scores, plots and pictures."""

import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from datasets.categories import use_categories
from datasets.coco import CocoInstances
from datasets.images import APPLY, IGNORE, ImageFolder
from pipeline.config import STAGES
from pipeline.inference.coco_json import read_detections, read_result_categories
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Detections
from pipeline.report import pictures
from pipeline.report.plots import metric_values
from pipeline.training.run_log import read_metrics
from pipeline.training.stages import MultiPathNetStage, PatchStage, Stage

# Files of scores, and what they are for.
RECALL_FILES = {
    "metrics": "average recall",
    "perfect_ranking": "average recall of the same masks, perfectly ranked",
    "curves": "curves of average recall",
}
PRECISION_FILES = {
    "metrics": "average precision",
    "curves": "AP by IoU threshold",
    "by_proposals": "AP by number of proposals",
    "categories": "AP by category",
}

OTHER_BEST_METRICS = ("sample_ap", "accuracy")  # where training measures them, they choose


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


class RunFiles:
    """The files of a run.

    Attributes:
        summary: the content of summary.json.
        missing: (name, what it is for) of the files that are not there.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.missing: list[tuple[str, str]] = []
        self.summary = self.read("summary.json", "patch metrics and seconds") or {}

    def read(self, name: str, purpose: str, reader: Callable[[Path], Any] = read_json) -> Any:
        """What `reader` makes of a file below the run directory; None if it is not there."""
        if (path := self.directory / name).exists():
            return reader(path)
        self.missing.append((name, purpose))
        return None

    def read_settings(self, name: str) -> dict[str, str | None]:
        """The text of a file by its name."""
        return {name: self.read(name, "settings", Path.read_text)}


class Run(RunFiles):
    """The files of a run, and the images that it was evaluated on.

    Attributes:
        coco: the annotated objects, those of the chosen categories.
    """

    def __init__(
        self,
        directory: Path,
        annotations: str | Path,
        images: Path,
        chosen: Iterable[str] | None = None,
    ):
        super().__init__(directory)
        frames = {ProposalStore(directory / name / "proposals").exif() for name in STAGES}
        self.images = ImageFolder(images, exif=IGNORE if IGNORE in frames else APPLY)
        self.coco = CocoInstances.load(annotations, chosen)
        self.coco.find_files(images)


# A section, by name: the stage, its training, settings and scores as they were written (the page
# makes tables and plots of them) and its gallery; None for what the run does not have.


def read_stage(
    run: RunFiles, name: str, stage: type[Stage], scores: dict[str, str]
) -> dict[str, Any]:
    """What all sections have."""
    records = run.read(f"{name}/metrics.jsonl", "training curves", read_metrics) or []
    settings = run.read_settings(config := f"{name}/config.yaml")
    rates = metric_values(records, "train", f"{stage.samples}_per_second")[1]
    losses = {key for r in records for key in r if key.endswith("_loss") and r["split"] == "train"}
    values = {loss: metric_values(records, "train", loss)[1] for loss in losses}
    return {
        "name": name,
        "records": records,
        "training": {
            "steps": max((record["step"] for record in records), default=None),
            "epochs": records[-1]["epoch"] if records else None,
            "losses": {loss: (v[0], v[-1]) for loss, v in values.items() if v},  # first, last
            "best_step": _best_step(records, stage, _keeps_best(name, settings[config])),
            "samples": stage.samples,
            "samples_per_second": statistics.median(rates) if rates else None,
        },
        **{n: run.read(f"{name}/scores/{n}.json", purpose) for n, purpose in scores.items()},
        "settings": settings,
    }


def _keeps_best(name: str, config: str | None) -> bool:
    """Whether the stage's config, a text if it is there, says so; it does by default."""
    try:
        return bool(yaml.safe_load(config or "")[name]["optim"]["keep_best"])
    except (yaml.YAMLError, KeyError, TypeError):  # damaged, or older than the setting
        return True


def _best_step(records: list[dict], stage: type[Stage], keeps_best: bool) -> int | None:
    """The step that the best checkpoint is of, as training chose it; None without validation."""
    measured = {key for record in records if record["split"] == "val" for key in record}
    metric = next((m for m in OTHER_BEST_METRICS if m in measured), stage.best_metric)
    steps, values = metric_values(records, "val", metric)
    if steps and not keeps_best:
        return steps[-1]
    return max(zip(values, steps, strict=True), default=(0, None))[1]


def read_mask_stage(run: Run, name: str) -> dict[str, Any]:
    """The section of DeepMask or SharpMask, with its scenes for the comparison."""
    section = read_stage(run, name, PatchStage, RECALL_FILES)
    summary = run.summary.get(name, {})
    if run.summary and not summary.get("patches"):
        run.missing.append((f"{name}.patches in summary.json", "patch metrics"))
    found = run.read(f"{name}/proposals", "pictures", pictures.read_proposals) or []
    section["settings"] |= run.read_settings(f"{name}/proposals/settings.json")
    scenes = pictures.scenes_of(found, run.coco)
    return section | {
        "patches": summary.get("patches"),
        "proposals": section["metrics"] or summary.get("proposals"),
        "scenes": scenes,
        "gallery": scenes and pictures.proposal_gallery(scenes, run.coco, run.images),
    }


def read_detector(run: Run, name: str) -> dict[str, Any]:
    """The section of the detector."""
    section = read_stage(run, name, MultiPathNetStage, PRECISION_FILES)
    found = read_found(run, name)
    return section | {
        "detections": section["metrics"] or run.summary.get(name, {}).get("detections"),
        "by_iou": ap_curves(section["curves"], "iou_thresholds"),
        "by_proposals": ap_curves(section["by_proposals"], "counts"),
        "gallery": found and pictures.detection_gallery(found, run.coco, run.images),
    }


def read_found(run: Run, name: str) -> list[Detections] | None:
    """The detections in the images of a run; None if it has none."""
    coco, results = run.coco, run.directory / name / "detections.json"
    if categories := read_result_categories(results):
        use_categories(coco, categories, source=str(results))
    columns = zip(coco.image_ids.tolist(), *coco.image_sizes.T.tolist(), strict=True)
    images = [
        {"id": image_id, "file_name": coco.file_name(i), "height": height, "width": width}
        for i, (image_id, height, width) in enumerate(columns)
    ]
    reader = partial(read_detections, images=images)
    return run.read(f"{name}/detections.json", "pictures", reader)


def ap_curves(content: dict | None, x: str) -> tuple[list[float], dict[str, list]] | None:
    """The values of `x` and the AP at each of them by IoU type; None if nothing was measured."""
    if content is None:
        return None
    curves = {t: content[t] for t in ("box", "mask") if t in content}
    values = {t: c["ap_by_iou"] if isinstance(c, dict) else c for t, c in curves.items()}
    measured = {t: ap for t, ap in values.items() if any(v is not None for v in ap)}
    return (content[x], measured) if measured else None
