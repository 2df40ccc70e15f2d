"""The page of a run that is not whole: it shows what there is and names what is missing."""

import json
import shutil

import pytest

from tests.pipeline.report.report_page import page_of
from tests.pipeline.report.small_run import (
    DETECTION_METRICS,
    NUM_WITH_OBJECTS,
    write_summary,
)

DETECTOR = "multipathnet"
SCORES = f"{DETECTOR}/scores"
NOT_SCORED = "The detections were not scored."


@pytest.mark.parametrize(
    ("part", "num_missing", "text"),
    [
        ("deepmask/metrics.jsonl", 1, "No training losses were written."),
        ("deepmask/config.yaml", 1, ""),
        ("deepmask/proposals", 2, "there are no proposals for images with annotated objects"),
        ("deepmask/proposals/settings.json", 1, ""),
        ("deepmask/scores/metrics.json", 1, ""),
        ("deepmask/scores/perfect_ranking.json", 1, ""),
        ("deepmask/scores/curves.json", 1, "The proposals were not scored."),
        (f"{DETECTOR}/metrics.jsonl", 1, "No training losses were written."),
        (f"{DETECTOR}/config.yaml", 1, ""),
        (f"{DETECTOR}/detections.json", 1, "there are no detections for images with annotated"),
        (f"{SCORES}/metrics.json", 1, ""),
        (f"{SCORES}/curves.json", 1, NOT_SCORED),
        (f"{SCORES}/by_proposals.json", 1, "It was not measured"),
        (f"{SCORES}/categories.json", 1, NOT_SCORED),
        ("summary.json", 1, ""),
    ],
)
def test_missing_part_is_named(run, dataset, part, num_missing, text):
    path = run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run, dataset)
    assert part in page.warning and text in page.text
    assert len(page.missing) == num_missing


def test_missing_patch_metrics_are_named(run, dataset):
    write_summary(run)
    page = page_of(run, dataset)
    assert "deepmask.patches in summary.json" in page.warning
    assert ["deepmask", *["–"] * 5] in page.rows


@pytest.mark.parametrize(
    ("num_lines", "row"),
    [(0, ["–", "–", "– → –", "– → –", "–", "–"]),
     (1, ["20", "0.2", "0.711 → 0.711", "– → –", "–", "10.0"])],
)  # fmt: skip
def test_interrupted_training_shows_what_it_wrote(run, dataset, num_lines, row):
    path = run / "deepmask" / "metrics.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:num_lines]))
    page = page_of(run, dataset)
    assert ["deepmask", *row] in page.rows
    assert ("No training losses were written." in page.text) == (num_lines == 0)


def test_unreadable_image_says_why_and_the_others_are_shown(run, dataset):
    (dataset[1] / "missed.png").write_bytes(b"")
    page = page_of(run, dataset)
    assert page.text.count("missed.png: the file is empty") == 2
    assert len(page.all("img", "src")) == (3 + 2) * (NUM_WITH_OBJECTS - 1)


def test_ap_that_nothing_was_measured_of_is_absent(run, dataset):
    ap = '{"counts": [10], "box": [null], "mask": [null]}'
    (run / SCORES / "by_proposals.json").write_text(ap)
    page = page_of(run, dataset)
    assert "It was not measured" in page.text and ["proposals per image", "10"] not in page.rows


def test_results_without_masks_have_curves_of_boxes_alone(run, dataset):
    scores = run / DETECTOR / "scores"
    (scores / "curves.json").write_text('{"iou_thresholds": [0.5], "box": {"ap_by_iou": [0.4]}}')
    (scores / "by_proposals.json").write_text('{"counts": [10], "box": [0.3], "mask": [null]}')
    page = page_of(run, dataset)
    assert page.warning == ""
    assert ["box AP", "0.400"] in page.rows and ["box AP", "0.300"] in page.rows
    assert "mask AP" not in [row[0] for row in page.rows if row]


# Stages that are missing.


def test_empty_run_gives_a_page(tmp_path, dataset):
    (tmp_path / "run").mkdir()
    page = page_of(tmp_path / "run", dataset)
    for name in ("summary.json", "deepmask/metrics.jsonl", "deepmask/proposals"):
        assert name in page.warning
    assert "sharpmask" not in page.text


@pytest.mark.parametrize(("stage", "num_missing"), [("deepmask", 7), (DETECTOR, 7)])
def test_empty_stage_gives_a_page(run, dataset, stage, num_missing):
    shutil.rmtree(run / stage)
    (run / stage).mkdir()
    page = page_of(run, dataset)
    assert len(page.missing) == num_missing and page.warning.count(f"({stage}/") == num_missing
    assert [DETECTOR, "box", *["–"] * 9] in page.rows or stage != DETECTOR


def test_detector_without_a_proposing_stage(run, dataset):
    """Trained on a store from elsewhere: nothing else is expected, or shown empty."""
    shutil.rmtree(run / "deepmask")
    write_summary(run)
    page = page_of(run, dataset)
    assert page.warning == "" and "deepmask" not in page.html.replace(str(run), "").split("Time")[0]
    assert "Proposals on whole images" not in page.text
    assert f"--proposals {run}/{DETECTOR}/proposals/val" in page.text


def test_summary_stands_in_for_metrics(run, dataset):
    shutil.rmtree(run / DETECTOR)
    summary = json.loads((run / "summary.json").read_text())
    summary[DETECTOR] = {"detections": DETECTION_METRICS}
    (run / "summary.json").write_text(json.dumps(summary))
    assert [DETECTOR, "mask", "0.200", "0.201"] in [r[:4] for r in page_of(run, dataset).rows]
