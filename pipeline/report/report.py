"""The report of a run: one self-contained page with its curves, numbers and pictures.

What is on it is read by `report_run`, `report_comparison` puts two stages side by side,
`report_detections` reads the detector.
"""

import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import cv2
import jinja2

from datasets.coco import CocoInstances
from datasets.files import atomic_path
from pipeline.report.comparison import read_comparison
from pipeline.report.crops import MASK_RGB, TRUTH_RGB
from pipeline.report.detection_pictures import MIN_SCORE
from pipeline.report.detections import (
    DETECTOR,
    FEW_OBJECTS,
    PUBLISHED_COUNT,
    read_detection_stage,
)
from pipeline.report.pictures import SHOWN, TOP
from pipeline.report.plots import KINDS
from pipeline.report.run_files import RunFiles, read_json, read_stage

STAGES = ("deepmask", "sharpmask")  # those that make proposals, in the order of the pipeline


def write_report(run: str | Path, *, annotations: str | Path, images: str | Path) -> Path:
    """Write `run/report.html` from what the run directory holds; the page names what is missing.

    Args:
        annotations: COCO instances json of the images that the proposals were made for.
        images: the folder of these images.

    Returns:
        The path of the page.
    """
    files = RunFiles(Path(run))
    summary = files.read("summary.json", read_json, "patch metrics and seconds") or {}
    what = "the annotated objects, and with them the pictures"
    coco = files.read(annotations, CocoInstances.load, what, inside=False)
    known = [n for n in (*STAGES, DETECTOR) if (files.run / n).is_dir() or n in summary]
    names = known or STAGES[:1]
    stages = [
        read_stage(files, name, summary.get(name, {}), coco, Path(images))
        for name in names
        if name != DETECTOR
    ]
    detector = None
    if DETECTOR in names:
        detector = read_detection_stage(files, summary.get(DETECTOR, {}), coco, Path(images))
    path = files.run / "report.html"
    page = _template().render(
        run=run,
        stages=stages,
        detector=detector,
        comparison=read_comparison(files.run, stages, coco, Path(images)),
        missing=files.missing,
        seconds=summary.get("seconds") or {},
        settings=[item for s in (*stages, detector) if s for item in s.settings.items()],
        commands=commands(names, run, annotations, images),
        this_command=shlex.join(["python", *sys.argv]),
        software=software(),
        date=datetime.now().astimezone(),
        top=TOP,
        shown=SHOWN,
        kinds=KINDS,
        min_score=MIN_SCORE,
        published_count=PUBLISHED_COUNT,
        few=FEW_OBJECTS,
        colors={"truth": TRUTH_RGB, "mask": MASK_RGB},
    )
    with atomic_path(path) as temporary:
        # A path may hold bytes that are no text.
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "change": change, "duration": duration}
    return environment.get_template("report.html.jinja")


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def change(value: float | None, style: str) -> str:
    """A difference with its sign: in the style "+.3f", "+.1%", ...; a dash where there is none."""
    return "–" if value is None else format(value, style).replace("-", "−").replace("%", " %")


def duration(seconds: float) -> str:
    """Seconds in the two largest units that a person would use."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


def commands(names: Sequence[str], run, annotations, images) -> list[str]:
    """The steps of the stages one by one, as command lines."""
    makers = {name: mask_commands for name in STAGES} | {DETECTOR: detection_commands}
    lines = [line for name in names for line in makers[name](Path(run) / name, annotations, images)]
    return [f"python tools/{shlex.join(map(str, line))}" for line in lines]


def mask_commands(at: Path, annotations, images) -> list[list]:
    """Train, score patches, propose, score proposals, in a stage's directory."""
    weights, store = at / "checkpoints" / "best.pt", at / "proposals"
    inputs = ["--annotations", annotations, "--images", images]
    scores = ["--annotations", annotations, "--results", store]
    return [
        train_command(at),
        ["score_coco.py", "patches", "--checkpoint", weights, *inputs, "--output", at / "patches"],
        ["propose.py", "--checkpoint", weights, *inputs, "--output", store],
        ["score_coco.py", "proposals", *scores, "--output", at / "scores"],
    ]


def detection_commands(at: Path, annotations, images) -> list[list]:
    """Train, detect, score detections, in the detector's directory."""
    weights = at / "checkpoints" / "best.pt"
    inputs = ["--proposals", proposals_beside(at), "--images", images]
    scores = ["--annotations", annotations, "--results", at / "detections.json"]
    return [
        train_command(at),
        ["detect.py", "--checkpoint", weights, *inputs, "--output", at],
        ["score_coco.py", "detections", *scores, "--output", at / "scores"],
    ]


def train_command(at: Path) -> list:
    """Trains the stage that a directory is named after once more."""
    return ["train_stage.py", "--stage", at.name, "--config", at / "config.yaml", "--output", at]


def proposals_beside(at: Path) -> Path:
    """The proposals that a detector had: of the last stage before it, else those that it made."""
    stores = [at.parent / name / "proposals" for name in reversed(STAGES)]
    return next((store for store in stores if store.is_dir()), at / "proposals" / "val")


def software() -> dict[str, str]:
    """Versions of what this process runs on."""
    packages = ("torch", "torchvision", "numpy", "pycocotools")
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
        "OpenCV": cv2.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }
