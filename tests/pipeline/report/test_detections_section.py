"""The detector in the report: tables, plots, commands, and what is said of a run without them."""

import json
import shutil

import pytest
from markupsafe import Markup

from pipeline.report import plots as report_plots
from pipeline.report.detections import (
    PUBLISHED_COUNT,
    read_ap_by_iou,
    read_ap_by_proposals,
    read_categories,
)
from tests.pipeline.report.report_page import page_of
from tests.pipeline.report.small_run import (
    CATEGORIES,
    DETECTION_METRICS,
    FOUND,
    NUM_WITH_OBJECTS,
    STORE,
    make_dataset,
    write_detector,
    write_stage,
    write_summary,
)

DETECTOR = "multipathnet"


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of DeepMask and the detector, to be changed; its plots are left empty."""
    monkeypatch.setattr(report_plots, "_svg", lambda draw: Markup("<svg></svg>"))
    write_stage(tmp_path / "run" / "deepmask", STORE)
    write_detector(tmp_path / "run" / DETECTOR, FOUND)
    write_summary(tmp_path / "run", "deepmask")
    return tmp_path / "run"


# The page of a whole run.


def test_tables_hold_the_numbers(run, dataset):
    page = page_of(run, dataset)
    assert page.warning == ""
    shown = ["0.301", "0.302", "0.303", "0.304", "0.305", "0.306", "0.307", "0.308"]
    assert [DETECTOR, "box", "0.300", *shown] in page.rows
    assert [DETECTOR, "mask", "0.200", *(v.replace("0.3", "0.2") for v in shown)] in page.rows
    assert ["200", "2.0", "1.510 → 0.520", "0.410 → 0.220", "100", "8.0"] in page.rows
    for table in (
        [["IoU at least", "0.50", "0.75", "0.95"],
         ["box AP", "0.610", "0.310", "0.010"],
         ["mask AP", "0.520", "0.220", "–"]],
        [["proposals per image", "10", "400"],
         ["box AP", "0.151", "0.300"],
         ["mask AP", "0.142", "0.200"]],
        [["category", "annotations", "detections", "box AP", "mask AP"],
         ["<i>ring", "12", "1,234", "0.410", "0.320"],
         ["bar", "3", "5", "0.230", "0.110"],
         ["none", "0", "1", "–", "–"],
         ["sum, mean", "15", "1,240", "0.320", "0.215"]],
    ):  # fmt: skip
        first = page.rows.index(table[0])
        assert page.rows[first : first + len(table)] == table
    assert "2 of the 3 categories have annotated objects" in page.text
    assert "1 of them has fewer than 10" in page.text
    assert f"The published system saturates near {PUBLISHED_COUNT} proposals" in page.text
    assert "seed: 9" in page.text


def test_plots_and_pictures(run, dataset):
    page = page_of(run, dataset)
    assert len([tag for tag, _ in page.elements if tag == "svg"]) == 4 + 4
    alts = [alt for alt in page.all("img", "alt") if "annotated objects" in alt]
    assert len(page.all("img", "src")) == (3 + 2) * NUM_WITH_OBJECTS == len(alts) / 2 * 5
    assert "score of 0.3 or more: 4 of all 6" in page.text
    assert "the 3 images with objects were ordered" in page.text


def test_seconds_take_the_detector_up(run, dataset):
    summary = json.loads((run / "summary.json").read_text())
    summary["seconds"][DETECTOR] = 62.1
    (run / "summary.json").write_text(json.dumps(summary))
    rows = page_of(run, dataset).rows
    assert [DETECTOR, "1 min 02 s"] in rows and ["together", "5 min 13 s"] in rows


def test_commands_repeat_the_steps(run, dataset):
    page, at = page_of(run, dataset), run / DETECTOR
    annotations, images = dataset
    for line in (
        f"train_stage.py --stage {DETECTOR} --config {at}/config.yaml --output {at}",
        f"detect.py --checkpoint {at}/checkpoints/best.pt --proposals {run}/deepmask/proposals "
        f"--images {images} --output {at}",
        f"score_coco.py detections --annotations {annotations} --results {at}/detections.json "
        f"--output {at}/scores",
    ):
        assert f"python tools/{line}" in page.text
    (run / "sharpmask" / "proposals").mkdir(parents=True)
    assert f"--proposals {run}/sharpmask/proposals" in page_of(run, dataset).text


def test_links_of_the_page_lead_somewhere(run, dataset):
    page = page_of(run, dataset)
    ids = {given["id"] for _, given in page.elements if "id" in given}
    links = {href[1:] for href in page.all("a", "href")}
    assert DETECTOR in links and links <= ids


# Runs that are not whole.


def test_detector_without_a_proposing_stage(run, dataset):
    """Trained on a store from elsewhere: nothing else is expected, or shown empty."""
    shutil.rmtree(run / "deepmask")
    write_summary(run)
    page = page_of(run, dataset)
    assert page.warning == "" and "deepmask" not in page.html.replace(str(run), "").split("Time")[0]
    assert "Proposals on whole images" not in page.text
    assert f"--proposals {run}/{DETECTOR}/proposals/val" in page.text


def test_page_without_detector_does_not_speak_of_it(run, dataset):
    shutil.rmtree(run / DETECTOR)
    page = page_of(run, dataset)
    assert DETECTOR not in page.text and "Detections" not in page.text and page.warning == ""


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("metrics.jsonl", "No training losses were written."),
        ("config.yaml", ""),
        ("detections.json", "there are no detections for images with annotated objects"),
        ("scores/metrics.json", ""),
        ("scores/curves.json", "The detections were not scored."),
        ("scores/by_proposals.json", "It was not measured"),
        ("scores/categories.csv", "The detections were not scored."),
        ("scores", "The detections were not scored."),
    ],
)
def test_missing_part_is_named(run, dataset, part, text):
    path = run / DETECTOR / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = page_of(run, dataset)
    assert f"{DETECTOR}/{part}" in page.warning and "not there" in page.warning.lower()
    assert page.warning.count(f"{DETECTOR}/") == (1 if path.suffix else 4)
    assert text in page.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scores/metrics.json", '{"half'),
        ("scores/curves.json", "[]"),
        ("scores/curves.json", '{"iou_thresholds": [0.5], "box": {"recall_by_iou": {}}}'),
        ("scores/curves.json", '{"iou_thresholds": [0.5], "box": {"ap_by_iou": [0.5, 0.4]}}'),
        ("scores/by_proposals.json", '{"counts": 10, "box": [0.1], "mask": [0.1]}'),
        ("scores/by_proposals.json", '{"counts": [10], "box": [null], "mask": [null]}'),
        ("scores/categories.csv", ""),
        ("scores/categories.csv", "category,AP\nring,0.5\n"),
        ("scores/categories.csv", CATEGORIES.replace("1234", "many")),
        ("scores/categories.csv", "category_id,category,annotations,detections\n1,ring\n"),
        ("detections.json", '[{"image_id": 77}]'),
    ],
)
def test_broken_file_is_named_with_the_reason(run, dataset, name, content):
    (run / DETECTOR / name).write_text(content)
    page = page_of(run, dataset)
    assert f"{DETECTOR}/{name}:" in page.warning and "not there" not in page.warning
    assert page.warning.count(f"({DETECTOR}/") == 1


def test_empty_detector_directory_gives_a_page(run, dataset):
    shutil.rmtree(run / DETECTOR)
    (run / DETECTOR).mkdir()
    page = page_of(run, dataset)
    assert [DETECTOR, "box", *["–"] * 9] in page.rows
    assert page.warning.count(f"{DETECTOR}/") == 7


def test_summary_stands_in_for_metrics(run, dataset):
    shutil.rmtree(run / DETECTOR)
    summary = json.loads((run / "summary.json").read_text())
    summary[DETECTOR] = {"detections": DETECTION_METRICS}
    (run / "summary.json").write_text(json.dumps(summary))
    assert [DETECTOR, "mask", "0.200", "0.201"] in [r[:4] for r in page_of(run, dataset).rows]


# Reading.


def test_results_without_masks_have_curves_of_boxes_alone(tmp_path):
    path = tmp_path / "curves.json"
    path.write_text('{"iou_thresholds": [0.5], "box": {"ap_by_iou": [0.4]}}')
    assert read_ap_by_iou(path).values == {"box": [0.4]}
    path.write_text('{"counts": [10], "box": [0.4], "mask": [null]}')
    assert read_ap_by_proposals(path).values == {"box": [0.4]}


def test_category_name_may_hold_commas_and_lines(tmp_path):
    path = tmp_path / "categories.csv"
    path.write_text('category_id,category,annotations,detections,box_AP50\n1,"a, \n""b""",2,3,\n')
    categories = read_categories(path)
    assert categories.measures == ["box AP50"]
    assert categories.rows == [('a, \n"b"', 2, 3, [None])]
