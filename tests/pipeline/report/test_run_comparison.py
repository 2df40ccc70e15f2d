"""Runs beside each other: what differs, and nothing that does not."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from markupsafe import Markup

from pipeline.report import plots
from pipeline.report.run_comparison import (
    read_run,
    recall_lines,
    short_names,
    stage_comparison,
    write_comparison,
)
from tests.pipeline.report.report_page import Html, decode_uri
from tests.pipeline.report.small_run import (
    CURVES,
    REFINED,
    SUMMARY,
    make_dataset,
    metrics_of,
    write_json,
    write_run,
    write_store,
)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs: the second has other settings, scores, seconds and DeepMask proposals.

    Their plots are empty, since drawing them takes long.
    """
    svg = Markup("<svg></svg>")
    monkeypatch.setattr(plots, "plot", lambda curves, *_, **__: svg if curves else None)
    annotations, images = make_dataset(tmp_path / "data")
    folders = [write_run(tmp_path / name) for name in ("a", "b <i>")]
    for number, folder in enumerate(folders):
        val = {"annotations": str(annotations), "images": str(images)}
        config = {"data": {"val": val}, "seed": number, "deepmask": {"optim": {"lr": 0.001}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    second = folders[1]
    write_json(second / "deepmask" / "scores" / "metrics.json", metrics_of(0.3))
    summary = json.loads(json.dumps(SUMMARY))
    summary["seconds"]["deepmask"] = 3599
    summary["deepmask"]["patches"]["mean_iou"] = 0.7
    write_json(second / "summary.json", summary)
    shutil.rmtree(second / "sharpmask" / "proposals")
    write_store(second / "sharpmask" / "proposals", REFINED[:2])
    return folders


def page_of(folders, output: Path) -> Html:
    assert write_comparison(folders, output) == f"{output}: {len(folders)} runs compared"
    return Html(output.read_text())


def test_what_differs_is_shown_with_its_difference(runs, tmp_path):
    page = page_of(runs, tmp_path / "out" / "x.html")
    start = page.rows.index(["setting", "a", "b <i>"])
    assert page.rows[start + 1] == ["seed", "0", "1"] and page.rows[start + 2][0] == "by mask"
    start = page.rows.index(
        ["by mask", "AR@10", "AR@100", "AR@1000", "AUC", "small", "medium", "large"]
    )
    assert [row[:3] for row in page.rows[start + 1 : start + 4]] == [
        ["a", "0.110", "0.111"],
        ["b <i>", "0.310", "0.311"],
        ["difference", "+0.200", "+0.200"],
    ]
    assert ["difference", "−0.061", "+0.000"] in [row[:3] for row in page.rows]
    assert [row[:3] for row in page.rows if "59 min 59 s" in row] == [
        ["b <i>", "59 min 59 s", "30.0"]
    ]
    assert "i" not in {tag for tag, _ in page.elements}, "a name is text"


def test_the_page_has_the_same_images_of_both_and_needs_nothing_else(runs, tmp_path):
    """Two images have objects and proposals of both runs; three have detections."""
    page = page_of(runs, tmp_path / "x.html")
    uris = page.all("img", "src")
    assert len(uris) == (2 + 3) * 3 and all(decode_uri(uri).shape[2] == 3 for uri in uris)
    assert "b <i>: mean IoU 1.00" in page.text and "No pictures" not in page.text
    sources = [v for _, given in page.elements for k, v in given.items() if k in ("src", "href")]
    assert all(source.startswith(("data:", "#")) for source in sources)


def test_curves_of_all_runs_are_in_one_plot(runs):
    found = [read_run(run, run.name) for run in runs]
    for title, _, _, curves in recall_lines({r.label: r.sections["deepmask"] for r in found}):
        labels = [label for label, *_ in curves]
        assert [label.split(",")[0] for label in labels] == sorted(
            label.split(",")[0] for label in labels
        )
        assert len({style[:2] for *_, style in curves}) == len(runs), title
    assert stage_comparison(found, "multipathnet")["has_ap"]
    many = {f"{i}": {"curves": CURVES} for i in range(7)}
    styles = [style for *_, style in recall_lines(many)[0][3]]
    assert len(set(styles)) == 7, "more runs than colors"


def test_three_runs_and_other_validation_images(runs, tmp_path):
    """A third one was validated on something else, and lacks the detector."""
    third = shutil.copytree(runs[0], tmp_path / "c")
    shutil.rmtree(third / "multipathnet")
    other, images = make_dataset(tmp_path / "other")
    other.write_text(other.read_text() + "\n")
    config = {"data": {"val": {"annotations": str(other), "images": str(images)}}}
    (third / "config.yaml").write_text(yaml.safe_dump(config))
    page = page_of([*runs, third], tmp_path / "x.html")
    assert "No pictures of c: its annotations are not those of a." in page.text
    assert len(page.all("img", "src")) == (2 + 3) * 3
    assert ["c − first", "+0.000"] in [row[:2] for row in page.rows]
    assert "Only a, b <i>: the others have none." in page.text


def test_runs_of_other_categories_have_no_pictures_in_common(runs, tmp_path):
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    config["data"]["categories"] = ["bar"]
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config))
    page = page_of(runs, tmp_path / "x.html")
    assert "No pictures of b <i>: its data.categories are not those of a." in page.text


@pytest.mark.parametrize(
    ("stage", "keep_best", "values", "best"),
    [
        ("deepmask", True, {"iou_above_0.7": [0.5, 0.7, 0.6]}, 20),
        ("deepmask", True, {"iou_above_0.7": [0.0, 0.0, 0.0]}, 30),
        ("deepmask", False, {"iou_above_0.7": [0.5, 0.7, 0.6]}, 30),
        ("multipathnet", True, {"roi_accuracy": [0.8, 0.7, 0.6], "sample_ap": [0.1, 0.3, 0]}, 20),
        ("pretrain", True, {"accuracy": [0.1, 0.2, 0.3]}, 30),
    ],
)
def test_the_best_step_is_that_of_the_checkpoint(tmp_path, stage, keep_best, values, best):
    lines = [
        {"split": "val", "step": 10 * n, "epoch": n, **{k: v[n - 1] for k, v in values.items()}}
        for n in (1, 2, 3)
    ]
    losses = {"class_loss": 1.0} if stage == "multipathnet" else {}
    lines.insert(0, {"split": "train", "step": 1, "epoch": 0, **losses})
    folder = tmp_path / stage
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {stage: {"optim": {"keep_best": keep_best}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    [section] = read_run(folder, "run").sections.values()
    assert section["training"]["best_step"] == best
    (folder / "config.yaml").write_text("seed: {")  # as of an interrupted copy
    [section] = read_run(folder, "run").sections.values()
    assert section["training"]["best_step"] == (best if keep_best else 20)


@pytest.mark.parametrize(
    "config",
    [
        None,
        "data: {shapes: {directory: nowhere}}",
        "seed: {",
        "data: {val: {annotations: nowhere.json}}",
    ],
)
def test_runs_without_their_images_or_config(runs, tmp_path, config):
    for run in runs:
        (run / "config.yaml").unlink()
        for stage in run.iterdir():
            (stage / "config.yaml").unlink(missing_ok=True) if stage.is_dir() else None
        if config is not None:
            (run / "config.yaml").write_text(config)
    page = page_of(runs, tmp_path / "x.html")
    assert page.text.count("No pictures of") == 2 and not page.all("img", "src")


def test_folders_of_scores(runs, tmp_path):
    """Those of tools/score_coco.py, and of single stages."""
    page = page_of([run / "deepmask" / "scores" for run in runs], tmp_path / "x.html")
    assert ["difference", "+0.200"] in [row[:2] for row in page.rows]
    assert "There are no settings to compare" in page.text and "Speed" not in page.text
    page = page_of([run / "multipathnet" for run in runs], tmp_path / "y.html")
    assert ["difference", "+0.000"] in [row[:2] for row in page.rows] and "AP50" in page.text
    page = page_of([runs[0] / "deepmask" / "scores", runs[1] / "deepmask"], tmp_path / "z.html")
    assert ["difference", "+0.200"] in [row[:2] for row in page.rows]
    assert [row for row in page.rows if "59 min 59 s" in row] and "No pictures" not in page.text


def test_names_tell_runs_apart(tmp_path):
    paths = [tmp_path / name for name in ("x/run", "y/run", "z")]
    assert short_names(paths[::2]) == ["run", "z"]
    assert short_names(paths[:2]) == ["x/run", "y/run"]
    assert re.fullmatch(r"z \(1\), z \(2\)", ", ".join(short_names([paths[2]] * 2)))
