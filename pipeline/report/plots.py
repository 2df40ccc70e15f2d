"""The plots of the report, as SVG whose colors the page's style sheet decides, light or dark.

Those of recall can also be a picture.
"""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from datasets.files import atomic_path

# matplotlib's default colors, and the variables of the style sheet that replace them.
VARIABLES = {"#000000": "ink", "#b0b0b0": "grid"}
VARIABLES |= {to_hex(f"C{i}"): f"series-{i + 1}" for i in range(5)}
STYLE: dict[Any, Any] = {
    "figure.figsize": (4.6, 3.3),  # inches; 331 px wide at 72 px an inch: a phone's width
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": "#b0b0b0",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # text stays text, in the page's font and color
}
COLORS = {"mask": "C0", "box": "C1"}  # by IoU type
PROPOSALS = "proposals per image"
SATURATION = 400  # of them, from where on the published AP hardly grows (BMVC 2016)
# Label, x, y (None leaves a gap) and matplotlib's format: color and style.
Curve = tuple[str, Sequence[float], Sequence[float | None], str]


class Plot(NamedTuple):
    """Curves and the names of their axes."""

    curves: Sequence[Curve]
    xlabel: str  # `PROPOSALS` makes x logarithmic
    ylabel: str
    top: float | None = None  # end of the y axis; else the values are


def draw(axes: Axes, content: Plot) -> None:
    """Draws curves, without a legend."""
    for label, x, y, style in content.curves:
        axes.plot(x, np.array(y, float), style, label=label)
    axes.set(xlabel=content.xlabel, ylabel=content.ylabel, ylim=(0, content.top))
    if content.xlabel == PROPOSALS:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")


def plot(
    curves: Sequence[Curve], xlabel: str, ylabel: str, top: float | None = None
) -> Markup | None:
    """A `Plot` above its legend, as an <svg> element; None if there is no curve."""
    if not curves:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        draw(figure.add_subplot(), Plot(curves, xlabel, ylabel, top))
        figure.legend(loc="outside lower center", ncols=2)
        file = io.StringIO()
        figure.savefig(file, format="svg")
    svg = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)  # of points
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Markup(svg[svg.index("<svg") :])


def metric_values(records: list[dict], split: str, name: str) -> tuple[list[int], list[float]]:
    """The steps at which a metric was written, and its values."""
    found = [r for r in records if r["split"] == split and r.get(name) is not None]
    return [r["step"] for r in found], [r[name] for r in found]


def plot_metrics(
    records: list[dict], split: str, labels: dict[str, str], ylabel: str, top: float | None = None
) -> Markup | None:
    """Metrics of a split over the steps, under their labels; None without any."""
    curves: list[Curve] = []
    for i, (name, label) in enumerate(labels.items()):
        steps, values = metric_values(records, split, name)
        if steps:
            curves.append((label, steps, values, f"C{i}o-" if len(steps) <= 12 else f"C{i}-"))
    return plot(curves, "step", ylabel, top)


def recall_by_iou(thresholds: list[float], curves: Mapping[str, dict]) -> Plot:
    """Recall at each IoU threshold for 10, 100 and 1000 proposals; `curves` by label."""
    lines = [
        (f"{label}, {k}", thresholds, recall, f"C{i}{dashes}")
        for i, (label, values) in enumerate(curves.items())
        for dashes, (k, recall) in zip(
            (":", "--", "-"), values["recall_by_iou"].items(), strict=True
        )
    ]
    return Plot(lines, "IoU threshold", "recall")


def average_recall(
    num_proposals: list[int], curves: Mapping[str, dict], perfect: dict[str, dict] | None = None
) -> Plot:
    """AR by number of proposals; `curves` and, as points, metrics of a perfect ranking by label."""
    lines: list[Curve] = []
    for i, (label, values) in enumerate(curves.items()):
        lines.append((label, num_proposals, values["ar_by_count"], f"C{i}-"))
        if perfect:
            recalls = [perfect[label][f"AR@{k}"] for k in (10, 100, 1000)]
            lines.append((f"{label}, perfect ranking", (10, 100, 1000), recalls, f"C{i}o"))
    return Plot(lines, PROPOSALS, "average recall")


def recall_by_area(num_proposals: list[int], curves: Mapping[str, dict]) -> Plot:
    """AR by number of proposals, of small, medium and large objects; `curves` by label."""
    lines: list[Curve] = [
        (f"{area}, {label}", num_proposals, values, f"C{i}{dashes}")
        for dashes, (label, of_label) in zip(("-", "--"), curves.items(), strict=False)
        for i, (area, values) in enumerate(of_label["ar_by_area"].items(), 2)
        if any(value is not None for value in values)
    ]
    return Plot(lines, PROPOSALS, "average recall")


def save_recall_plots(scores: Path, *, perfect_ranking: bool) -> None:
    """Draws what a folder of scores of proposals holds as recall.png beside it."""
    content = json.loads((scores / "curves.json").read_text())
    perfect = None
    if perfect_ranking:
        perfect = json.loads((scores / "perfect_ranking.json").read_text())
    curves = {t: content[t] for t in ("mask", "box") if t in content}
    plots = (
        recall_by_iou(content["iou_thresholds"], curves),
        average_recall(content["counts"], curves, perfect),
        recall_by_area(content["counts"], curves),
    )
    with matplotlib.rc_context(STYLE | {"figure.facecolor": "white"}):
        figure = Figure((13, 4.2), layout="constrained")
        for axes, each in zip(figure.subplots(1, len(plots)), plots, strict=True):
            draw(axes, each)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        with atomic_path(scores / "recall.png") as path:
            figure.savefig(path, format="png", dpi=110)


def plot_ap(ap: tuple[list[float], dict[str, list]] | None, xlabel: str) -> Markup | None:
    """Average precision by IoU type; by number of proposals, with the published saturation."""
    x, values = ap or ([], {})
    lines: list[Curve] = [(t, x, y, f"{COLORS[t]}o-") for t, y in values.items()]
    if values and xlabel == PROPOSALS:
        highest = max(v for y in values.values() for v in y if v is not None)
        lines.append((f"published: {SATURATION}", [SATURATION] * 2, [0, highest], "k:"))
    return plot(lines, xlabel, "average precision")
