"""The report of a run: one self-contained page with its curves, numbers and pictures.

Read top to bottom: the page, what is read from the run, the plots, the pictures.
Letters: D proposals and G annotated objects (crowds are none) of one image.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.files import atomic_path
from datasets.images import ImageError, read_image
from pipeline.proposals import Proposals, ProposalStore
from pipeline.run_log import read_metrics
from pipeline.visualize import colour, draw_mask, put_label

STAGES = ("deepmask", "sharpmask")  # those that make proposals, in the order of the pipeline
KINDS = ("mask", "box")
BEST_METRIC = "iou_above_0.7"  # of the validation that chooses the best checkpoint


def write_report(run: str | Path, *, annotations: str | Path, images: str | Path) -> Path:
    """Write `run/report.html` from what the run directory holds; the page names what is missing.

    Args:
        annotations: COCO instances json of the images that the proposals were made for.
        images: the folder of these images.

    Returns:
        The path of the page.
    """
    files = RunFiles(Path(run))
    summary = files.read("summary.json", _read_json, "patch metrics and seconds") or {}
    what = "the annotated objects, and with them the pictures"
    coco = files.read(annotations, CocoInstances.load, what, inside=False)
    names = [name for name in STAGES if (files.run / name).is_dir() or name in summary]
    stages = [
        read_stage(files, name, summary.get(name, {}), coco, Path(images))
        for name in names or STAGES[:1]
    ]
    commands = [line for s in stages for line in stage_commands(s.name, run, annotations, images)]
    path = files.run / "report.html"
    page = _template().render(
        run=run,
        stages=stages,
        missing=files.missing,
        seconds=summary.get("seconds") or {},
        commands=commands,
        this_command=shlex.join(["python", *sys.argv]),
        software=software(),
        date=datetime.now().astimezone(),
        top=TOP,
        shown=SHOWN,
        kinds=KINDS,
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
    environment.filters |= {"number": number, "duration": duration}
    return environment.get_template("report.html.jinja")


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that a person would use."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
    )


def stage_commands(stage: str, run, annotations, images) -> list[str]:
    """The steps of a stage one by one, as command lines."""
    at = Path(run) / stage
    weights, store = at / "checkpoints" / "best.pt", at / "proposals"
    inputs = ["--annotations", annotations, "--images", images]
    scores = ["--annotations", annotations, "--results", store]
    lines = (
        ["train_stage.py", "--stage", stage, "--config", at / "config.yaml", "--output", at],
        ["score_coco.py", "patches", "--checkpoint", weights, *inputs, "--output", at / "patches"],
        ["propose.py", "--checkpoint", weights, *inputs, "--output", store],
        ["score_coco.py", "proposals", *scores, "--output", at / "scores"],
    )
    return [f"python tools/{shlex.join(map(str, line))}" for line in lines]


def software() -> dict[str, str]:
    """Versions of what this process runs on."""
    packages = ("torch", "torchvision", "numpy", "pycocotools")
    return {
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
        "OpenCV": cv2.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
    }


# What is read from the run.


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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text())


@dataclass(frozen=True)
class Stage:
    """What the page shows of a stage; None for what the run does not have.

    Attributes:
        patches, proposals, perfect: metrics; perfect is for the same masks, perfectly ranked.
        training: see `training_facts`. plots: SVG by name. examples: the pictures.
        settings: texts of the files that say how it was made, by their names.
    """

    name: str
    patches: dict[str, float] | None
    proposals: dict[str, dict[str, float | None]] | None
    perfect: dict[str, dict[str, float | None]] | None
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
    metrics = files.read(f"{name}/scores/metrics.json", _read_json, "average recall")
    what = "average recall of the same masks, perfectly ranked"
    perfect = files.read(f"{name}/scores/perfect_ranking.json", _read_json, what)
    curves = files.read(f"{name}/scores/curves.json", _read_json, "curves of average recall")
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
        training=training_facts(records),
        plots={
            "losses": plot_losses(records),
            "validation": plot_validation(records),
            "average_recall": curves and plot_average_recall(curves, perfect),
            "recall_by_iou": curves and plot_recall_by_iou(curves),
        },
        examples=examples,
        settings={file: text for file, text in settings.items() if text},
    )


def training_facts(records: list[dict]) -> dict[str, float | None]:
    """A training in a few numbers; None for those that the metrics do not tell."""
    steps, rates = [record["step"] for record in records], values_of(records, "patches_per_second")
    validation = dict(zip(*values_of(records, BEST_METRIC, split="val"), strict=True))
    facts = {
        "steps": max(steps, default=None),
        "epochs": records[-1]["epoch"] if records else None,
        "patches_per_second": statistics.median(rates[1]) if rates[1] else None,
        "best_step": max(validation, key=validation.get, default=None),
    }
    for loss in ("mask_loss", "score_loss"):
        values = values_of(records, loss)[1]
        facts |= {f"first_{loss}": values[0], f"last_{loss}": values[-1]} if values else {}
    return facts


def values_of(
    records: list[dict], name: str, *, split: str = "train"
) -> tuple[list[int], list[float]]:
    """The steps at which a metric was written, and its values."""
    found = [r for r in records if r["split"] == split and r.get(name) is not None]
    return [r["step"] for r in found], [r[name] for r in found]


# Plots. They are drawn in stand-ins for colours that the page's style sheet decides, so that they
# are readable on light and on dark.

COLOURS = ("ink", "grid", "series-1", "series-2", "series-3", "series-4", "series-5")
STAND_INS = {name: f"#0a0b{n:02x}" for n, name in enumerate(COLOURS)}
INK, GRID, *SERIES = STAND_INS.values()
PLOT_STYLE = {
    "figure.figsize": (4.6, 3.3),  # inches; 331 px wide at 72 px an inch: a phone's width
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.prop_cycle": matplotlib.cycler(color=SERIES),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "none",  # text stays text, in the page's font
}


def plot_losses(records: list[dict]) -> Markup | None:
    """Training losses over the steps; None without any."""
    names = {"mask_loss": "mask loss", "score_loss": "score loss", "loss": "weighted sum"}
    return _plot_metrics(records, "train", names, "loss")


def plot_validation(records: list[dict]) -> Markup | None:
    """Patch metrics on validation patches over the steps; None without any."""
    return _plot_metrics(records, "val", PATCH_METRICS, "value", top=1)


PATCH_METRICS = {
    "mean_iou": "mean IoU",
    "median_iou": "median IoU",
    "iou_above_0.5": "share IoU > 0.5",
    "iou_above_0.7": "share IoU > 0.7",
    "score_accuracy": "score accuracy",
}


def _plot_metrics(
    records: list[dict], split: str, labels: dict[str, str], unit: str, top: float | None = None
) -> Markup | None:
    curves = {label: values_of(records, name, split=split) for name, label in labels.items()}
    if not any(steps for steps, _ in curves.values()):
        return None

    def draw(axes: Axes) -> None:
        for label, (steps, values) in curves.items():
            if steps:
                axes.plot(steps, values, marker="o" if len(steps) <= 12 else "", label=label)
        axes.set(xlabel="step", ylabel=unit, ylim=(0, top))

    return _svg(draw)


def plot_average_recall(curves: dict, perfect: dict | None) -> Markup:
    """AR against the number of proposals; circles: what a perfect ranking reaches."""

    def draw(axes: Axes) -> None:
        for kind, rgb in zip(KINDS, SERIES, strict=False):
            axes.plot(curves["counts"], _no_none(curves[kind]["ar_by_count"]), c=rgb, label=kind)
            if perfect:
                points = {k: perfect[kind][f"AR@{k}"] for k in (10, 100, 1000)}
                axes.plot(
                    points.keys(),
                    _no_none(points.values()),
                    "o",
                    c=rgb,
                    mfc="none",
                    label=f"{kind}, perfect ranking",
                )
        axes.set(xscale="log", xlabel="proposals per image", ylabel="average recall")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:g}")

    return _svg(draw)


def plot_recall_by_iou(curves: dict) -> Markup:
    """Recall at each IoU threshold for 10, 100 and 1000 proposals, by masks and by boxes."""

    def draw(axes: Axes) -> None:
        for kind, dashes in zip(KINDS, ("-", "--"), strict=True):
            recall = curves[kind]["recall_by_iou"].items()
            for (count, values), rgb in zip(recall, SERIES, strict=False):
                label = f"{kind}, {count}"
                axes.plot(curves["iou_thresholds"], _no_none(values), dashes, c=rgb, label=label)
        axes.set(xlabel="IoU threshold", ylabel="recall")
        axes.set_ylim(bottom=0)

    return _svg(draw)


def _no_none(values) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _svg(draw: Callable[[Axes], None]) -> Markup:
    """The axes that `draw` fills, with a legend below, as an <svg> element."""
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(layout="constrained")
        draw(figure.add_subplot())
        figure.legend(loc="outside lower center", ncols=2)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    for name, stand_in in STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return Markup(svg[svg.index("<svg") :])


# Pictures of the images that came out best and worst.

TOP = 100  # proposals of an image that are looked at
SHOWN = 5  # of them, in the picture of the proposals with the highest scores
FOUND_IOU = 0.5
NUM_EXAMPLES = 6  # the best, and as many of the worst
PICTURE_SIDE = 480  # px, the longer one at most
JPEG_QUALITY = 85
SCORE_COLOUR = 32  # of the palette, the first for the highest scores: apart from the objects'
FULL, FAINT = 0.35, 0.15  # tints
LABEL_SIZE, LABEL_SCALE = (40, 17), 0.5  # px; of the font


@dataclass(frozen=True)
class Example:
    """An image with its objects and proposals drawn.

    Attributes:
        ious: (G,) IoU of each object with the best of the first `TOP` proposals.
        pictures: data URIs of the objects, the best proposal for each, the highest scores.
        error: why there are no pictures.
    """

    file_name: str
    ious: np.ndarray
    pictures: tuple[str, ...] = ()
    error: str = ""

    @property
    def quality(self) -> float:
        """The mean IoU of the objects: what images are ordered by."""
        return float(self.ious.mean())

    @property
    def num_found(self) -> int:
        """Objects with a proposal of IoU 0.5 or more."""
        return int((self.ious >= FOUND_IOU).sum())


@dataclass(frozen=True)
class Examples:
    """The best images, best first, and the worst, worst first, of `num_images` with objects."""

    best: list[Example]
    worst: list[Example]
    num_images: int


def read_examples(directory: Path, *, coco: CocoInstances, images: Path) -> Examples:
    """Draw the images of a proposal store that came out best and worst.

    Goes through the store twice, so that only a number for each image is kept.

    Raises:
        FileNotFoundError: there is no store. ValueError: a shard of it is broken.
    """
    store = ProposalStore(directory)
    if not store.shards():
        raise FileNotFoundError(directory)
    qualities = {
        image: float(best_matches(proposals, coco, objects)[0].mean())
        for image, proposals, objects in images_with_objects(store, coco)
    }
    best, worst = choose_examples(qualities)
    drawn = {
        image: draw_example(images / coco.file_name(image), proposals, coco, objects)
        for image, proposals, objects in images_with_objects(store, coco)
        if image in {*best, *worst}
    }
    return Examples([drawn[i] for i in best], [drawn[i] for i in worst], len(qualities))


def images_with_objects(
    store: ProposalStore, coco: CocoInstances
) -> Iterator[tuple[int, Proposals, list[int]]]:
    """The index, the proposals and the objects, largest first, of each image that has objects.

    An image for which the network proposed nothing comes too.
    """
    index = {image_id: i for i, image_id in enumerate(coco.image_ids.tolist())}
    for proposals in _also_empty(store):
        image = index.get(proposals.image_id)
        if image is None:
            continue
        annotations = range(coco.image_starts[image], coco.image_starts[image + 1])
        objects = [a for a in annotations if not coco.is_crowd[a]]
        if objects:
            yield image, proposals, sorted(objects, key=lambda a: -coco.areas[a])


def _also_empty(store: ProposalStore) -> Iterator[Proposals]:
    left = {image["id"]: image for image in store.images().values()}
    for proposals in store:
        left.pop(proposals.image_id, None)
        yield proposals
    for image in left.values():
        none = np.empty(0, np.float32)
        size = (image["height"], image["width"])
        yield Proposals(image["id"], image["file_name"], *size, none, none.reshape(0, 4), [])


def best_matches(
    proposals: Proposals, coco: CocoInstances, objects: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The best mask IoU of each object with the first `TOP` proposals, and whose it is.

    Returns:
        (G,) IoU and (G,) number of the proposal; IoU 0 where no proposal overlaps.
    """
    masks = [proposals.rle(n) for n in range(min(TOP, len(proposals)))]
    if not masks:
        return np.zeros(len(objects)), np.zeros(len(objects), int)
    ious = coco_mask.iou(masks, [coco.rle(a) for a in objects], [0] * len(objects))  # (D, G)
    return ious.max(axis=0).clip(min=0), ious.argmax(axis=0)


def choose_examples(qualities: dict[int, float]) -> tuple[list[int], list[int]]:
    """The best images, best first, and the worst, worst first; no image is in both."""
    ranked = sorted(qualities, key=lambda image: -qualities[image])
    best = ranked[: min(NUM_EXAMPLES, math.ceil(len(ranked) / 2))]
    return best, ranked[len(best) :][: -NUM_EXAMPLES - 1 : -1]


def draw_example(
    path: Path, proposals: Proposals, coco: CocoInstances, objects: list[int]
) -> Example:
    """Three pictures of an image: objects, the best proposal for each, the highest scores."""
    ious, numbers = best_matches(proposals, coco, objects)
    name = proposals.file_name
    try:
        image = _scaled_down(read_image(path))
    except ImageError as error:
        return Example(name, ious, error=str(error))
    truth = [Mark(coco.rle(a), colour(n), tint=0) for n, a in enumerate(objects)]
    matches = [
        Mark(
            proposals.rle(numbers[n]), colour(n), FULL if iou >= FOUND_IOU else FAINT, f"{iou:.2f}"
        )
        for n, iou in enumerate(ious)
        if iou > 0
    ]
    scored = [
        Mark(proposals.rle(n), colour(SCORE_COLOUR + n), FAINT, f"{proposals.scores[n]:.2f}")
        for n in reversed(range(min(SHOWN, len(proposals))))
    ]
    drawings = (jpeg_uri(draw_marks(image, marks)) for marks in (truth, matches, scored))
    return Example(name, ious, tuple(drawings))


def _scaled_down(image: np.ndarray) -> np.ndarray:
    factor = min(1, PICTURE_SIDE / max(image.shape))
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class Mark:
    """A mask to be drawn."""

    rle: dict
    rgb: tuple[int, int, int]
    tint: float
    label: str = ""


def draw_marks(image: np.ndarray, marks: list[Mark]) -> np.ndarray:
    """Marks on a copy of an image, (H, W, 3) uint8, the last on top; their masks may be larger."""
    picture = image.copy()
    height, width = picture.shape[:2]
    for mark in marks:
        mask = cv2.resize(coco_mask.decode(mark.rle), (width, height), interpolation=cv2.INTER_AREA)
        draw_mask(picture, mask, mark.rgb, tint=mark.tint)
    put_labels(picture, [mark for mark in marks[::-1] if mark.label])
    return picture


def put_labels(picture: np.ndarray, marks: list[Mark]) -> None:
    """Labels at the top left of their masks, moved down where one is already, in place."""
    width, taken = picture.shape[1], []
    for mark in marks:
        x, y = coco_mask.toBbox(mark.rle)[:2] * width / mark.rle["size"][1]
        x, y = min(x, width - LABEL_SIZE[0]), max(y, LABEL_SIZE[1])
        while any(abs(x - u) < LABEL_SIZE[0] and abs(y - v) < LABEL_SIZE[1] for u, v in taken):
            y += 1
        taken.append((x, y))
        pale = tuple((channel + 255) // 2 for channel in mark.rgb)
        put_label(picture, mark.label, (int(x), int(y)), pale, scale=LABEL_SCALE)


def jpeg_uri(picture: np.ndarray) -> str:
    """(H, W, 3) uint8 RGB as a data URI."""
    ok, data = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert ok
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
