"""The report of a run: one self-contained page with its scores, curves and pictures."""

import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import jinja2

from datasets.files import write_atomically
from pipeline.config import STAGES
from pipeline.report import drawing, pictures, plots
from pipeline.report.comparison import object_gallery
from pipeline.report.sections import Run, read_detector, read_mask_stage

DETECTOR = STAGES[-1]


def write_report(
    run: str | Path,
    *,
    annotations: str | Path,
    images: str | Path,
    chosen: Sequence[str] | None = None,
) -> Path:
    """Write `run/report.html` from what the run directory holds; the page names what is missing.

    Its path is returned. The annotations (COCO instances json) and the folder of images are those
    that the proposals were made for; `chosen` are the categories that were scored, see
    `CocoInstances.load`.
    """
    files = Run(Path(run), annotations, Path(images), chosen)
    names = [n for n in STAGES if (files.directory / n).is_dir() or n in files.summary]
    names = names or [STAGES[0]]
    masks = [read_mask_stage(files, name) for name in names if name != DETECTOR]
    comparison = None
    if len(masks) == 2:
        coarse, refined = (stage["scenes"] for stage in masks)
        comparison = object_gallery(coarse, refined, files.coco, files.images)
    page = render(
        "report.html.jinja",
        run=run,
        annotations=str(annotations),
        images=str(images),
        chosen=chosen,
        stages=masks,
        detector=read_detector(files, DETECTOR) if DETECTOR in names else None,
        comparison=comparison,
        missing=files.missing,
        seconds=files.summary.get("seconds") or {},
        this_command=shlex.join(["python", *sys.argv]),
        software={
            "Python": platform.python_version(),
            **{name: version(name) for name in ("torch", "torchvision", "numpy", "pycocotools")},
            "OpenCV": cv2.__version__,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        },
    )
    path = files.directory / "report.html"
    # A path may hold bytes that are no text.
    write_atomically(path, page.encode(errors="replace"))
    return path


def render(template: str, **context: Any) -> str:
    """A page of one of the templates beside this file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"decimal": decimal, "duration": duration, "quote": shlex.quote}
    modules = {"pictures": pictures, "drawing": drawing, "plots": plots}
    date = datetime.now().astimezone()
    return environment.get_template(template).render(date=date, gain=gain, **modules, **context)


def decimal(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def gain(
    before: float | None, after: float | None, *, relative: bool = False, digits: int = 3
) -> str:
    """A difference with its sign, absolute or in percent; a dash where there is none."""
    if before is None or after is None or (relative and not before):
        return "–"
    text = f"{after / before - 1:+.1%}" if relative else f"{after - before:+.{digits}f}"
    return text.replace("-", "−").replace("%", " %")


def duration(seconds: float) -> str:
    """Seconds in the two largest units that a person would use."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, remaining = divmod(minutes, 60)
    return f"{hours} h {remaining} min" if hours else f"{minutes} min {rest:02d} s"
