"""The plots of the report."""

import re
from xml.etree import ElementTree

import pytest

from pipeline.report.plots import (
    PROPOSALS,
    average_recall,
    plot,
    plot_ap,
    plot_metrics,
    recall_by_area,
)
from tests.pipeline.report.small_run import AP_BY_PROPOSALS, CURVES, RECORDS, metrics_of

LOSSES = {"mask_loss": "mask loss", "score_loss": "score loss"}
RECALL = {iou_type: CURVES[iou_type] for iou_type in ("mask", "box")}
AP = {iou_type: AP_BY_PROPOSALS[iou_type] for iou_type in ("box", "mask")}
GAP = {"box": [0.5, None, 0.1]}
# What is plotted, and which texts and numbers of colors the plot has.
PLOTS = {
    "losses": (lambda: plot_metrics(RECORDS, "train", LOSSES, "loss"),
               "step,loss,mask loss,score loss", "12"),
    "one loss": (lambda: plot_metrics([RECORDS[2]], "train", LOSSES, "loss"),
                 "step,loss,score loss", "2"),
    "AP": (lambda: plot_ap(([10, 400], AP), PROPOSALS),
           "box,mask,published: 400,proposals per image,average precision", "12"),
    "a gap": (lambda: plot_ap(([0.5, 0.75, 0.95], GAP), "IoU threshold"),
              "box,IoU threshold,average precision", "2"),
    "ranked": (lambda: plot(*average_recall(CURVES["counts"], RECALL)),
               "mask,box,proposals per image,average recall", "12"),
    "by area": (lambda: plot(*recall_by_area(CURVES["counts"], RECALL)),
                "medium, mask,medium, box,large, mask,large, box,"
                "proposals per image,average recall", "45"),
    "perfect": (lambda: plot(*average_recall(CURVES["counts"], RECALL, metrics_of(0.5))),
                "mask,box,proposals per image,average recall,mask, perfect ranking,"
                "box, perfect ranking", "12"),
}  # fmt: skip


@pytest.mark.parametrize(("draw", "texts", "colors"), PLOTS.values(), ids=PLOTS)
def test_labels_and_colors_of_the_page(draw, texts, colors):
    """A metric keeps its color where another one is missing."""
    svg = draw()
    elements = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    labels = [t.text for t in elements if not re.fullmatch("[0-9.]+", t.text)]
    assert sorted(labels) == sorted(re.split(",(?! )", texts))
    variables = {"ink", "grid", *(f"series-{i}" for i in colors)}
    assert set(re.findall(r"var\(--(.*?)\)", svg)) == variables
    assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a color of matplotlib's"


def test_no_plot_without_a_curve():
    assert plot_metrics([], "train", LOSSES, "loss") is None
