"""Scores of a proposal store and of results files: the files and tables that are written."""

import csv
import json

import numpy as np
import pytest

from pipeline.evaluation.ground_truth import IOU_TYPES, load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.scores import score_proposals
from pipeline.inference.coco_json import StoredResults, read_results
from tests.pipeline.evaluation.scenes import CATEGORIES, random_scene, result, write_dataset
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    SQUARE,
    STORE,
    make_dataset,
    proposals_of,
    write_store,
)

# Proposals


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "store", STORE)
    return tmp_path / "store"


def test_a_store_and_its_results_file_score_alike(tmp_path, store, capsys):
    annotations, _ = make_dataset(tmp_path / "data")
    shuffled = sorted(read_results(store), key=lambda r: r["score"])
    (tmp_path / "results.json").write_text(json.dumps(shuffled))
    outputs = [tmp_path / "of_store", tmp_path / "of_file"]
    for results, output in zip((store, tmp_path / "results.json"), outputs, strict=True):
        metrics = score_proposals(annotations, results, output)
        assert (output / "scores.txt").read_text() == capsys.readouterr().out
    for name in ("metrics", "curves", "perfect_ranking"):
        first, second = (json.loads((o / f"{name}.json").read_text()) for o in outputs)
        assert first == second
    # Of three objects one is found exactly, one with IoU .5: at one threshold of ten.
    assert metrics["mask"]["AR@10"] == metrics["box"]["AR@10"] == pytest.approx((1 + 0.1) / 3)


def test_the_table_and_curves_of_proposals(tmp_path, store):
    annotations, _ = make_dataset(tmp_path / "data")
    metrics = score_proposals(annotations, store, tmp_path / "scores")
    heading, *lines = (tmp_path / "scores" / "scores.txt").read_text().splitlines()
    names = ["AR@10", "AR@100", "AR@1000", "AUC", "small", "medium", "large"]
    assert heading.split() == ["average", "recall,", "percent", *names]
    labels = [f"{t} {ranking}" for t in IOU_TYPES for ranking in ("as ranked", "perfect ranking")]
    assert [" ".join(line.split()[:3]) for line in lines] == labels
    assert lines[0].split()[3:6] == ["36.7"] * 3 and lines[0].split()[-2:] == ["-", "-"]
    perfect = json.loads((tmp_path / "scores" / "perfect_ranking.json").read_text())
    assert perfect["box"]["AUC"] > metrics["box"]["AUC"]

    curves = json.loads((tmp_path / "scores" / "curves.json").read_text())
    assert (curves["counts"][0], curves["counts"][-1]) == (1, 1000)
    for iou_type in IOU_TYPES:
        assert curves[iou_type]["ar_by_count"][-1] == metrics[iou_type]["AR@1000"]
        recall = curves[iou_type]["recall_by_iou"]["100"]
        assert np.mean(recall) == pytest.approx(metrics[iou_type]["AR@100"])
        assert len(recall) == len(curves["iou_thresholds"]) == 10


def test_a_store_is_read_as_often_as_it_is_gone_through_and_never_whole(store):
    write_store(store, [proposals_of(9, "late.png", [SQUARE, ELSEWHERE])])
    results = read_results(store)
    assert isinstance(results, StoredResults) and list(results) == list(results)
    assert len(list(results)) == sum(map(len, STORE)) + 2
    (store / "proposals-000-000001.parquet").write_bytes(b"broken")
    assert next(iter(results))["image_id"] == 1, "the second shard is not touched yet"


def test_an_image_that_was_done_twice_is_named(tmp_path, store):
    write_store(store, STORE[:1])
    annotations, _ = make_dataset(tmp_path / "data")
    with pytest.raises(ValueError, match="store: .*image_id 1 comes a second time"):
        score_proposals(annotations, store, tmp_path / "scores")


# Detections


def test_the_tool_writes_json_csv_and_text(tmp_path, call_tool, capsys):
    path, results = random_scene(tmp_path, 1)
    (tmp_path / "detections.json").write_text(json.dumps(results))
    output = tmp_path / "scores"
    arguments = ("--annotations", path, "--results", tmp_path / "detections.json")
    assert call_tool("score_coco", "detections", *arguments, "--output", output) == 0
    table = capsys.readouterr().out
    scores = evaluate_detections(load_ground_truth(path), results)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == scores.metrics()
    assert (output / "scores.txt").read_text() == table
    for iou_type in IOU_TYPES:
        assert f"{100 * metrics[iou_type]['AP']:.1f}" in table
    assert all(f"AP{iou}" in table for iou in range(50, 100, 5))

    curves = json.loads((output / "curves.json").read_text())
    assert curves["mask"]["ap_by_iou"] == scores.ap_by_iou("mask").tolist()
    assert len(curves["recall_points"]) == len(curves["box"]["precision_by_recall"]["0.5"]) == 101
    assert curves["voc_ap50"] == pytest.approx(np.nanmean(scores.voc_ap50))

    with (output / "categories.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    as_json = json.loads((output / "categories.json").read_text())
    texts = [{k: "" if v is None else str(v) for k, v in row.items()} for row in as_json]
    assert texts == rows and as_json[-1]["box_AP"] is None
    assert [row["category"] for row in rows] == list(CATEGORIES.values())
    objects = [a for a in json.loads(path.read_text())["annotations"] if not a["iscrowd"]]
    for row in rows:
        category_id = int(row["category_id"])
        same = [[r for r in rs if r["category_id"] == category_id] for rs in (objects, results)]
        assert [int(row["annotations"]), int(row["detections"])] == [len(rs) for rs in same]
    assert rows[-1]["box_AP"] == rows[-1]["mask_AP50"] == ""
    mean = np.mean([float(row["mask_AP"]) for row in rows[:-1]])
    assert mean == pytest.approx(metrics["mask"]["AP"])


def test_no_objects_write_none(tmp_path, call_tool, capsys):
    truth = write_dataset(tmp_path / "truth.json", [])
    (tmp_path / "detections.json").write_text(json.dumps([result([1, 1, 9, 9], 0.5)]))
    arguments = ("--annotations", truth, "--results", tmp_path / "detections.json")
    assert call_tool("score_coco", "detections", *arguments, "--output", tmp_path / "out") == 0
    assert "VOC AP50 of boxes (all-point): -" in capsys.readouterr().out
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert curves["voc_ap50"] is None and set(curves["mask"]["ap_by_iou"]) == {None}


BAD_FILES = {
    "object": ('{"annotations": []}', "must be a list of detections, not dict"),
    "half": ("[{", "is not JSON"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "latin": ("\xff", "is not JSON"),
    "missing": (None, "do not exist"),
    "wrong result": ('[{"image_id": 7}]', "results[0]"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_results_file_is_named_in_one_line(text, message, tmp_path, call_tool, capsys):
    path = tmp_path / "detections.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    line = error_line(tmp_path, path, call_tool, capsys)
    assert "detections.json" in line and message in line


def test_the_folder_of_the_results_is_told_from_the_file(tmp_path, call_tool, capsys):
    line = error_line(tmp_path, tmp_path, call_tool, capsys)
    assert "is a folder; give the detections.json in it" in line


def error_line(folder, results, call_tool, capsys):
    truth = write_dataset(folder / "truth.json", [])
    arguments = ("--annotations", truth, "--results", results, "--output", folder / "out")
    assert call_tool("score_coco", "detections", *arguments) == 2
    assert not (folder / "out").exists()
    [line] = capsys.readouterr().err.splitlines()
    return line
