"""The plots of the report."""

import re
from xml.etree import ElementTree

from pipeline.report.plots import PROPOSALS, plot_ap, plot_average_recall, plot_metrics
from pipeline.report.sections import PATCH_LOSSES
from tests.pipeline.report.small_run import AP_BY_IOU, AP_BY_PROPOSALS, CURVES, RECORDS, metrics_of


def texts_of(svg):
    return {t.text for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}


def test_plot_is_well_formed_and_takes_its_colors_from_the_page():
    svg = plot_metrics(RECORDS, "train", PATCH_LOSSES, "loss")
    assert {"step", "loss", "mask loss", "score loss"} <= texts_of(svg)
    assert set(re.findall(r"var\(--(.*?)\)", svg)) == {"ink", "grid", "series-1", "series-2"}
    assert not re.findall(r"#[0-9a-f]{6}\b", svg), "a color of matplotlib's"
    assert plot_metrics([], "train", PATCH_LOSSES, "loss") is None


def test_a_metric_keeps_its_color_where_another_one_is_missing():
    svg = plot_metrics([RECORDS[2]], "train", PATCH_LOSSES, "loss")
    assert "mask loss" not in texts_of(svg)
    assert "var(--series-2)" in svg and "var(--series-1)" not in svg


def test_plots_of_ap_keep_the_colors_of_mask_and_box():
    """Whichever of them there are; a threshold without a value leaves a gap."""
    ap = {iou_type: AP_BY_PROPOSALS[iou_type] for iou_type in ("box", "mask")}
    both = plot_ap((AP_BY_PROPOSALS["counts"], ap), PROPOSALS)
    assert {"box", "mask", "published: 400", "proposals per image"} <= texts_of(both)
    box = plot_ap((AP_BY_IOU["iou_thresholds"], {"box": [0.5, None, 0.1]}), "IoU threshold")
    assert {"box", "IoU threshold"} <= texts_of(box) and "mask" not in texts_of(box)
    assert "var(--series-1)" in both and "var(--series-2)" in both
    assert "var(--series-1)" not in box and "var(--series-2)" in box


def test_perfect_ranking_is_beside_the_curves():
    curves = {iou_type: CURVES[iou_type] for iou_type in ("mask", "box")}
    svg = plot_average_recall(CURVES["counts"], curves, metrics_of(0.5))
    assert {"mask", "box", "mask, perfect ranking", "box, perfect ranking"} <= texts_of(svg)
    assert "mask, perfect ranking" not in texts_of(plot_average_recall(CURVES["counts"], curves))
