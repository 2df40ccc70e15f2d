"""The plots of the report, and a training in numbers."""

from xml.etree import ElementTree

from small_run import RECORDS

from pipeline.report_plots import plot_losses
from pipeline.report_run import training_facts


def test_training_facts_of_an_interrupted_run():
    facts = training_facts(RECORDS[:1])
    assert facts["steps"] == 20 and facts["best_step"] is None
    assert "first_score_loss" not in facts


def test_plot_is_well_formed_and_takes_its_colours_from_the_page():
    svg = plot_losses(RECORDS)
    texts = [t.text for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"step", "mask loss", "score loss"} <= set(texts)
    assert "var(--ink)" in svg and "var(--series-1)" in svg and "#0a0b" not in svg
    assert plot_losses([]) is None
