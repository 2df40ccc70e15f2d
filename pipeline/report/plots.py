"""The plots of the report, as SVG.

They are drawn in stand-ins for colors that the page's style sheet decides, so that they are
readable on light and on dark.
"""

import io
import math
import re
from collections.abc import Callable

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

KINDS = ("mask", "box")
COLORS = ("ink", "grid", "series-1", "series-2", "series-3", "series-4", "series-5")
STAND_INS = {name: f"#0a0b{n:02x}" for n, name in enumerate(COLORS)}
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


def values_of(
    records: list[dict], name: str, *, split: str = "train"
) -> tuple[list[int], list[float]]:
    """The steps at which a metric was written, and its values."""
    found = [r for r in records if r["split"] == split and r.get(name) is not None]
    return [r["step"] for r in found], [r[name] for r in found]


def plot_losses(records: list[dict]) -> Markup | None:
    """Training losses over the steps; None without any.

    Their weighted sum is left out: on the same axes it would press the two down to one line.
    """
    names = {"mask_loss": "mask loss", "score_loss": "score loss"}
    return plot_metrics(records, "train", names, "loss")


def plot_validation(records: list[dict]) -> Markup | None:
    """Patch metrics on validation patches over the steps; None without any."""
    return plot_metrics(records, "val", PATCH_METRICS, "value", top=1)


PATCH_METRICS = {
    "mean_iou": "mean IoU",
    "median_iou": "median IoU",
    "iou_above_0.5": "share IoU > 0.5",
    "iou_above_0.7": "share IoU > 0.7",
    "score_accuracy": "score accuracy",
}


def plot_metrics(
    records: list[dict], split: str, labels: dict[str, str], unit: str, top: float | None = None
) -> Markup | None:
    """Metrics of a split over the steps, under their labels; None without any.

    Args:
        unit: what the other axis says. top: its upper end; None for that of the values.
    """
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


def plot_recalls(curves: dict[str, dict], kind: str) -> Markup:
    """Recall at each IoU threshold of several stages, by name, for 10, 100 and 1000 proposals."""

    def draw(axes: Axes) -> None:
        for (name, curve), rgb in zip(curves.items(), SERIES, strict=False):
            recall = curve[kind]["recall_by_iou"].items()
            for (count, values), dashes in zip(recall, (":", "--", "-"), strict=True):
                thresholds, label = curve["iou_thresholds"], f"{name}, {count}"
                axes.plot(thresholds, _no_none(values), dashes, c=rgb, label=label)
        axes.set(xlabel="IoU threshold", ylabel=f"recall by {kind}")
        axes.set_ylim(bottom=0)

    return _svg(draw)


def plot_average_recalls(curves: dict[str, dict]) -> Markup:
    """AR of several stages, by name, against the number of proposals; by mask and by box."""

    def draw(axes: Axes) -> None:
        for (name, curve), rgb in zip(curves.items(), SERIES, strict=False):
            for kind, dashes in zip(KINDS, ("-", "--"), strict=True):
                values, label = _no_none(curve[kind]["ar_by_count"]), f"{name}, {kind}"
                axes.plot(curve["counts"], values, dashes, c=rgb, label=label)
        axes.set(xscale="log", xlabel="proposals per image", ylabel="average recall")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:g}")

    return _svg(draw)


def plot_ap_by_iou(thresholds: list[float], values: dict[str, list[float | None]]) -> Markup:
    """AP at each IoU threshold, by kind."""

    def draw(axes: Axes) -> None:
        for kind, ap in values.items():
            axes.plot(thresholds, _no_none(ap), "o-", c=SERIES[KINDS.index(kind)], label=kind)
        axes.set(xlabel="IoU threshold", ylabel="average precision")
        axes.set_ylim(bottom=0)

    return _svg(draw)


def plot_ap_by_proposals(
    counts: list[int], values: dict[str, list[float | None]], published: int
) -> Markup:
    """AP against the number of proposals, by kind.

    Args:
        published: where the published system levels off; marked.
    """

    def draw(axes: Axes) -> None:
        for kind, ap in values.items():
            axes.plot(counts, _no_none(ap), "o-", c=SERIES[KINDS.index(kind)], label=kind)
        label = f"published: {published}"
        axes.axvline(published, color=INK, linestyle=":", linewidth=1, label=label)
        axes.set(xscale="log", xlabel="proposals per image", ylabel="average precision")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter("{x:g}")

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
