"""The page of the report: what is on it, and what it says of a run that is not whole."""

import base64
import re
import shutil

import cv2
import numpy as np
import pytest
from markupsafe import Markup

from pipeline.report import plots as report_plots
from pipeline.report.report import duration, number
from tests.pipeline.report.report_page import page_of
from tests.pipeline.report.small_run import (
    NUM_WITH_OBJECTS,
    SIDE,
    SQUARE,
    STORE,
    make_dataset,
    object_of,
    proposals_of,
    write_dataset,
    write_stage,
    write_store,
    write_summary,
)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A complete run, to be changed; its plots are left empty, since they take most of the time."""
    monkeypatch.setattr(report_plots, "_svg", lambda draw: Markup("<svg></svg>"))
    write_stage(tmp_path / "run" / "deepmask", STORE)
    write_summary(tmp_path / "run", "deepmask")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of a complete run, with its plots."""
    directory = tmp_path_factory.mktemp("whole")
    write_stage(directory / "deepmask", STORE)
    write_summary(directory, "deepmask")
    return page_of(directory, make_dataset(directory / "data"))


# The page of a whole run.


def test_tables_hold_the_numbers(whole):
    # AR@10, AR@100, AR@1000, AUC, small, medium, large
    assert [row[:3] + [" ".join(row[3:])] for row in whole.rows[1:5]] == [
        ["deepmask", "mask", "by score", "0.110 0.111 0.112 0.113 – 0.114 0.115"],
        ["deepmask", "mask", "perfect", "0.210 0.211 0.212 0.213 – 0.214 0.215"],
        ["deepmask", "box", "by score", "0.100 0.101 0.102 0.103 – 0.104 0.105"],
        ["deepmask", "box", "perfect", "0.200 0.201 0.202 0.203 – 0.204 0.205"],
    ]
    assert ["deepmask", "0.761", "0.792", "0.873", "0.664", "0.915"] in whole.rows
    losses = ["0.711 → 0.213", "0.402 → 0.402"]
    assert ["deepmask", "1,200", "2.0", *losses, "100", "30.0"] in whole.rows
    assert ["deepmask", "4 min 11 s"] in whole.rows
    assert "seed: 7" in whole.text and '"num_proposals": 1000' in whole.text
    assert "python tools/train_stage.py --stage deepmask" in whole.text


def test_complete_run_has_four_plots_and_no_warning(whole):
    assert whole.warning == ""
    assert len([tag for tag, _ in whole.elements if tag == "svg"]) == 4


def test_pictures_decode(whole):
    uris = whole.all("img", "src")
    assert len(uris) == 3 * NUM_WITH_OBJECTS
    for uri in uris:
        kind, data = uri.split(",")
        assert kind == "data:image/jpeg;base64"
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (SIDE, SIDE, 3)


def test_page_needs_nothing_else(whole):
    sources = [
        value
        for _, attributes in whole.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in whole.elements}
    urls = re.findall(r"url\(([^)]{,80})", whole.html)
    assert urls and all(url.startswith("#") for url in urls)


def test_stages_stand_side_by_side_in_their_order(run, dataset):
    write_stage(run / "sharpmask", STORE, start=0.5)
    write_summary(run, "sharpmask", "deepmask")
    page = page_of(run, dataset)
    assert [row[0] for row in page.rows[1:9]] == ["deepmask"] * 4 + ["sharpmask"] * 4
    assert page.rows[5][1:4] == ["mask", "by score", "0.510"]
    assert page.warning == ""
    assert len(page.all("img", "alt")) == 2 * 3 * NUM_WITH_OBJECTS + 4  # two found by both


def test_text_from_files_is_escaped(tmp_path, run):
    name = "<i>&amp;.png"
    dataset = write_dataset(tmp_path / "odd", [name], [object_of(1, SQUARE)])
    shutil.rmtree(run / "deepmask" / "proposals")
    write_store(run / "deepmask" / "proposals", [proposals_of(1, name, [SQUARE])])
    (run / "deepmask" / "config.yaml").write_text("trunk: <script>alert(1)</script>\n")
    odd = run.rename(tmp_path / "<b>run")
    page = page_of(odd, dataset)
    assert not {"i", "script"} & {tag for tag, _ in page.elements}
    assert name in page.text and "<script>alert(1)</script>" in page.text
    assert f"Report of {odd}" in page.text


# Runs that are not whole.


@pytest.mark.parametrize(
    "part",
    [
        "metrics.jsonl",
        "config.yaml",
        "proposals",
        "proposals/settings.json",
        "scores/metrics.json",
        "scores/perfect_ranking.json",
        "scores/curves.json",
        "scores",
        "",
    ],
)
def test_missing_part_of_a_stage_is_named(run, dataset, part):
    path = run / "deepmask" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    warning = page_of(run, dataset).warning
    assert f"deepmask/{part}" in warning and "not there" in warning
    if path.suffix:
        assert warning.count("deepmask/") == 1, "more is named than is missing"


def test_missing_summary_is_named(run, dataset):
    (run / "summary.json").unlink()
    page = page_of(run, dataset)
    assert "summary.json" in page.warning
    assert page.rows[1][3] == "0.110"
    write_summary(run)
    assert "deepmask.patches in summary.json" in page_of(run, dataset).warning


def test_empty_run_gives_a_page(tmp_path, dataset):
    (tmp_path / "run").mkdir()
    page = page_of(tmp_path / "run", dataset)
    for name in ("summary.json", "deepmask/metrics.jsonl", "deepmask/proposals"):
        assert name in page.warning
    assert "sharpmask" not in page.text


def test_missing_annotations_are_named(run, dataset, tmp_path):
    page = page_of(run, (tmp_path / "none.json", dataset[1]))
    assert "none.json" in page.warning
    assert page.all("img", "src") == []
    assert page.rows[1][4] == "0.111"


@pytest.mark.parametrize("name", ["scores/curves.json", "proposals/proposals-000-000000.parquet"])
def test_broken_file_is_named_with_the_reason(run, dataset, name):
    (run / "deepmask" / name).write_bytes(b'{"half')
    page = page_of(run, dataset)
    assert f"deepmask/{name.split('/proposals-')[0]}:" in page.warning
    assert "not there" not in page.warning
    assert page.rows[1][4] == "0.111"


def test_training_that_wrote_nothing_yet(run, dataset):
    (run / "deepmask" / "metrics.jsonl").write_text("")
    page = page_of(run, dataset)
    assert ["deepmask", "–", "–", "– → –", "– → –", "–", "–"] in page.rows
    assert "No training losses were written." in page.text


def test_unreadable_image_says_why_and_the_others_are_shown(run, dataset):
    (dataset[1] / "missed.png").write_bytes(b"")
    page = page_of(run, dataset)
    assert "missed.png: the file is empty" in page.text
    assert len(page.all("img", "src")) == 3 * (NUM_WITH_OBJECTS - 1)


# Numbers.


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.03333, 3, "0.033"),
        (0.0, 3, "0.000"),
        (None, 3, "–"),
        (float("nan"), 1, "–"),
        (12345, 0, "12,345"),
    ],
)
def test_number(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.87, "9.9 s"), (62.1, "1 min 02 s"), (3599, "59 min 59 s"), (7384, "2 h 3 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
