"""The plots of the report, and a training in numbers."""

from xml.etree import ElementTree

from pipeline.report.plots import plot_ap_by_iou, plot_ap_by_proposals, plot_losses
from pipeline.report.run_files import training_facts
from tests.pipeline.report.small_run import AP_BY_IOU, AP_BY_PROPOSALS, RECORDS


def test_training_facts_of_an_interrupted_run():
    facts = training_facts(RECORDS[:1], samples="patches")
    assert facts["steps"] == 20 and facts["best_step"] is None
    assert "first_score_loss" not in facts


def texts_of(svg):
    return [t.text for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_plot_is_well_formed_and_takes_its_colors_from_the_page():
    svg = plot_losses(RECORDS)
    assert {"step", "mask loss", "score loss"} <= set(texts_of(svg))
    assert "var(--ink)" in svg and "var(--series-1)" in svg and "#0a0b" not in svg
    assert plot_losses([]) is None


def test_plots_of_ap_keep_the_colors_of_mask_and_box():
    """Whichever of them there are; a threshold without a value leaves a gap."""
    counts = AP_BY_PROPOSALS["counts"]
    curves = {kind: AP_BY_PROPOSALS[kind] for kind in ("box", "mask")}
    both = plot_ap_by_proposals(counts, curves, 400)
    assert {"box", "mask", "published: 400", "proposals per image"} <= set(texts_of(both))
    box = plot_ap_by_iou(AP_BY_IOU["iou_thresholds"], {"box": [0.5, None, 0.1]})
    assert {"box", "IoU threshold"} <= set(texts_of(box)) and "mask" not in texts_of(box)
    assert "var(--series-1)" in both and "var(--series-2)" in both
    assert "var(--series-1)" not in box and "var(--series-2)" in box
