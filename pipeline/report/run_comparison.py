"""Runs beside each other: settings that differ, scores with differences, curves, pictures.

Letters: R runs; the first is what the others are compared with.
"""

import filecmp
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.coco import CocoInstances
from datasets.files import write_atomically
from datasets.images import Image
from pipeline.config import STAGES
from pipeline.data import split_files
from pipeline.inference.proposal_store import ProposalStore
from pipeline.recipe import config_to_dict, flatten, load_config
from pipeline.report import pictures, plots
from pipeline.report.plots import Curve
from pipeline.report.report import render
from pipeline.report.sections import (
    PRECISION_FILES,
    RECALL_FILES,
    Run,
    RunFiles,
    ap_curves,
    read_found,
    read_json,
    read_stage,
)
from pipeline.training.stages import MultiPathNetStage, PatchStage, Stage

DETECTOR = STAGES[-1]
SCORES = "scores"  # the section of folders that are not of all stages
UNTOLD = ("checkpoint_sha256", "image_folder")  # settings that say nothing of how a run was made
NUM_IMAGES = 6
COLORS = 5  # of the page's plots


@dataclass
class ComparedRun:
    """What is compared of a run.

    Attributes:
        label: a short name that no other run has.
        sections: by stage, as `read_stage` gives them; or one, `SCORES`.
        settings: by dotted key.
        dataset: annotations and images of the validation split, and the categories; None if they
            are not known or not there any more, which `why_not` says.
    """

    path: Path
    label: str
    sections: dict[str, dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    dataset: tuple[Path, Path, tuple[str, ...] | None] | None = None
    why_not: str = "its config.yaml is not there"


def write_comparison(folders: Sequence[str | Path], output: str | Path) -> str:
    """Writes a self-contained page on runs of all stages, of one, or on folders of scores.

    Returns a line on it.

    Raises:
        ValueError: fewer than two, or a folder that is neither of these.
    """
    if len(folders) < 2:
        raise ValueError("give two runs or more")
    paths = [Path(folder) for folder in folders]
    runs = [read_run(p, name) for p, name in zip(paths, short_names(paths), strict=True)]
    names = list(dict.fromkeys(name for run in runs for name in run.sections))
    page = render(
        "run_comparison.html.jinja",
        runs=runs,
        settings=different_settings(runs),
        stages=[stage_comparison(runs, name) for name in names],
        galleries=galleries(runs),
        without=[run for run in runs if run.dataset is None],
        this_command=shlex.join(["python", *sys.argv]),
    )
    write_atomically(output, page.encode(errors="replace"))
    return f"{output}: {len(runs)} runs compared"


def short_names(paths: Sequence[Path]) -> list[str]:
    """Names of folders: their last parts, as many as tell them apart; else with a number."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = [os.path.join(*part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i})" for i, path in enumerate(paths, 1)]  # a folder twice


def read_run(path: Path, label: str) -> ComparedRun:
    """A run of all stages, or of one, or a folder of scores.

    Raises:
        ValueError: nothing of these.
    """
    stages = [name for name in STAGES if (path / name).is_dir()]
    if stages:
        files = RunFiles(path)
        sections = {name: _read_stage(files, name, is_detector=name == DETECTOR) for name in stages}
        run = ComparedRun(path, label, sections)
    elif (path / "metrics.jsonl").is_file():
        lines = (path / "metrics.jsonl").read_text()
        files = RunFiles(path.resolve().parent)
        section = _read_stage(files, path.resolve().name, is_detector='"class_loss"' in lines)
        run = ComparedRun(path, label, {SCORES: section})
    elif (path / "metrics.json").is_file():
        curves = path / "curves.json"
        section = {"metrics": read_json(path / "metrics.json"), "curves": None}
        if curves.is_file():
            section["curves"] = read_json(curves)
        return ComparedRun(path, label, {SCORES: section})
    else:
        raise ValueError(
            f"{path} is neither a run of tools/run_pipeline.py or tools/train_stage.py nor a "
            "folder of scores"
        )
    configs = [path / "config.yaml", *(path / name / "config.yaml" for name in stages)]
    if written := [file for file in configs if file.is_file()]:
        try:
            config = load_config(written[0])
            run.settings = flatten(config_to_dict(config))
            annotations, images = split_files(config, "val")
            if not annotations.is_file():  # shapes, which training draws
                raise FileNotFoundError(f"{annotations} does not exist")
            run.dataset = annotations, images, config.data.categories
        except (ValueError, OSError) as error:
            run.why_not = str(error)
    for name in stages:
        settings = ProposalStore(path / name / "proposals").settings()
        kept = {key: value for key, value in settings.items() if key not in UNTOLD}
        run.settings |= flatten(kept, f"{name}/proposals: ")
    return run


def _read_stage(files: RunFiles, name: str, *, is_detector: bool) -> dict[str, Any]:
    """A stage's training and scores; those that are in the summary alone, too."""
    stage: type[Stage] = MultiPathNetStage if is_detector else PatchStage
    section = read_stage(files, name, stage, PRECISION_FILES if is_detector else RECALL_FILES)
    summary = files.summary.get(name, {})
    section["metrics"] = section["metrics"] or summary.get("detections", summary.get("proposals"))
    return section | {
        "patches": summary.get("patches"),
        "seconds": files.summary.get("seconds", {}).get(name),
        "validation": plots.metric_values(section["records"], "val", stage.best_metric),
        "measure": "RoI accuracy" if is_detector else "patches with IoU > 0.7",
    }


def different_settings(runs: Sequence[ComparedRun]) -> list[tuple[str, list[str]]]:
    """The settings that differ between runs that have any: the key, and the value of each run."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows = [(key, [run.settings.get(key, "–") for run in runs]) for key in keys]
    known = [i for i, run in enumerate(runs) if run.settings]
    return [
        (key, [str(value) for value in values])
        for key, values in rows
        if any(values[i] != values[known[0]] for i in known)
    ]


def stage_comparison(runs: Sequence[ComparedRun], name: str) -> dict[str, Any]:
    """What the page shows of a stage: of each run its section, and plots of all."""
    sections = {run.label: run.sections[name] for run in runs if name in run.sections}
    has_ap = any("AP" in (values or {}) for s in sections.values() for values in _metrics(s))
    lines = ap_lines(sections) if has_ap else recall_lines(sections)
    drawn = [(title, plots.plot(curves, xlabel, ylabel)) for title, xlabel, ylabel, curves in lines]
    trained = {label: section for label, section in sections.items() if "records" in section}
    if trained:
        measure = " or ".join(dict.fromkeys(section["measure"] for section in trained.values()))
        validation: list[Curve] = [
            (label, *section["validation"], _style(i))
            for i, (label, section) in enumerate(sections.items())
            if label in trained and section["validation"][0]
        ]
        drawn.append(("Validation while training", plots.plot(validation, "step", measure)))
    return {
        "name": name,
        "sections": sections,
        "trained": trained,
        "has_ap": has_ap,
        "plots": drawn,
    }


def _metrics(section: dict[str, Any]) -> list[dict | None]:
    return list((section.get("metrics") or {}).values())


def _style(index: int, dashes: str = "-") -> str:
    """A color for each run, and beyond those of the page a dashed line."""
    return f"C{index % COLORS}{dashes if index < COLORS else '--'}"


Lines = list[tuple[str, str, str, list[Curve]]]  # title, names of the axes, curves


def recall_lines(sections: dict[str, dict]) -> Lines:
    """Curves of average recall of all runs: of masks, or of boxes where there are none."""
    by_count: list[Curve] = []
    by_iou: list[Curve] = []
    for i, (label, section) in enumerate(sections.items()):
        curves = section["curves"] or {}
        values = curves.get("mask") or curves.get("box")
        if values:
            by_count.append((label, curves["counts"], values["ar_by_count"], _style(i)))
            recall = values["recall_by_iou"]
            for count, dashes in (("100", "--"), ("1000", "-")):
                x = curves["iou_thresholds"]
                by_iou.append((f"{label}, {count}", x, recall[count], _style(i, dashes)))
    return [
        ("Average recall by number of proposals", plots.PROPOSALS, "average recall", by_count),
        ("Recall by IoU threshold", "IoU threshold", "recall", by_iou),
    ]


def ap_lines(sections: dict[str, dict]) -> Lines:
    """Curves of average precision of all runs, of boxes and of masks."""
    lines: Lines = []
    for iou_type in ("box", "mask"):
        curves: list[Curve] = []
        for i, (label, section) in enumerate(sections.items()):
            at, values = ap_curves(section["curves"], "iou_thresholds") or ([], {})
            if iou_type in values:
                curves.append((label, at, values[iou_type], _style(i)))
        lines.append((f"AP by IoU threshold, {iou_type}", "IoU threshold", "AP", curves))
    return lines


def galleries(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """The same validation images with what the runs found; none if they have other ones."""
    known = [run for run in runs if run.dataset is not None]
    if len(known) < 2:
        return []
    annotations, images, chosen = known[0].dataset or (Path(), Path(), None)
    same = []
    for run in known:
        assert run.dataset is not None
        what = None
        if not filecmp.cmp(run.dataset[0], annotations, shallow=False):
            what = "annotations"
        elif run.dataset[2] != chosen:
            what = "data.categories"
        if what is None:
            same.append((run.label, Run(run.path, annotations, images, chosen)))
        else:
            run.dataset, run.why_not = None, f"its {what} are not those of {known[0].label}"
    stages = [s for s in STAGES if all((run.directory / s).is_dir() for _, run in same)]
    # Of two stages of masks, the last is enough.
    shown = stages[-2:] if DETECTOR in stages else stages[-1:]
    return [g for stage in shown if len(same) > 1 and (g := gallery(dict(same), stage))]


def gallery(runs: dict[str, Run], stage: str) -> dict[str, Any] | None:
    """Images in the order of the last run's gain over the first, cut into equal parts."""
    coco = next(iter(runs.values())).coco
    scenes: list[dict[int, pictures.Scene]] = []
    for run in runs.values():
        if stage == DETECTOR:
            found: list | None = read_found(run, stage)
            found = found and [pictures.confident(f) for f in found]
        else:
            found = run.read(f"{stage}/proposals", "pictures", pictures.read_proposals)
        scenes.append({s.found.image_id: s for s in pictures.scenes_of(found or [], coco)})
    ids = set.intersection(*map(set, scenes))
    if not ids:
        return None

    def means(image_id: int) -> list[float]:
        return [float(each[image_id].ious.mean()) for each in scenes]

    ranked = sorted(sorted(ids), key=lambda i: means(i)[-1] - means(i)[0])
    images = next(iter(runs.values())).images
    examples = []
    for image_id in pictures.spread(ranked, NUM_IMAGES):
        of_runs = [each[image_id] for each in scenes]

        def draw(image: Image, of_runs: list = of_runs) -> list:
            return _draw(of_runs, coco, image)

        name = of_runs[0].found.file_name
        example = pictures.make_example(images, name, of_runs[0].ious, draw)
        examples.append(example | {"means": means(image_id)})
    return {"stage": stage, "labels": list(runs), "examples": examples, "images": len(ids)}


def _draw(scenes: list[pictures.Scene], coco: CocoInstances, image: Image) -> list:
    """The annotated objects, and what each run found."""
    is_detector = hasattr(scenes[0].found, "labels")
    draw = pictures.draw_detections if is_detector else pictures.draw_proposals
    drawn = [draw(scene, coco, image) for scene in scenes]
    return [drawn[0][0], *(each[1] for each in drawn)]
