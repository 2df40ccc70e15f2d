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


def read_json(path):
    return json.loads(path.read_text())


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
    for name in ("metrics.json", "curves.json", "perfect_ranking.json"):
        assert read_json(outputs[0] / name) == read_json(outputs[1] / name)
    assert read_json(outputs[0] / "metrics.json") == metrics
    # Of three objects one is found exactly, one with IoU .5: at one threshold of ten.
    assert metrics["mask"]["AR@10"] == metrics["box"]["AR@10"] == pytest.approx((1 + 0.1) / 3)


def test_the_table_and_curves_of_proposals(tmp_path, store):
    annotations, _ = make_dataset(tmp_path / "data")
    metrics = score_proposals(annotations, store, tmp_path)
    heading, *lines = (tmp_path / "scores.txt").read_text().splitlines()
    names = ["AR@10", "AR@100", "AR@1000", "AUC", "small", "medium", "large"]
    assert heading.split() == ["average", "recall,", "percent", *names]
    labels = [f"{t} {ranking}" for t in IOU_TYPES for ranking in ("as ranked", "perfect ranking")]
    assert [" ".join(line.split()[:3]) for line in lines] == labels
    assert lines[0].split()[3:6] == ["36.7"] * 3 and lines[0].split()[-2:] == ["-", "-"]
    perfect = read_json(tmp_path / "perfect_ranking.json")
    assert perfect["box"]["AUC"] > metrics["box"]["AUC"]

    curves = read_json(tmp_path / "curves.json")
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


@pytest.fixture
def score(tmp_path, call_tool, capsys):
    """Scores a file of detections by the tool: (truth, path) -> exit status and what it says."""

    def call(truth, results):
        arguments = ("--annotations", truth, "--results", results, "--output", tmp_path / "scores")
        status = call_tool("score_coco", "detections", *arguments)
        return status, "".join(capsys.readouterr())

    return call


def test_the_tool_writes_json_csv_and_text(tmp_path, score):
    truth, results = random_scene(tmp_path, 1)
    path, output = tmp_path / "detections.json", tmp_path / "scores"
    path.write_text(json.dumps(results))
    status, table = score(truth, path)
    metrics, curves = (read_json(output / f"{name}.json") for name in ("metrics", "curves"))
    assert status == 0 and (output / "scores.txt").read_text() == table
    assert metrics == evaluate_detections(load_ground_truth(truth), results).metrics()
    assert all(f"AP{iou}" in table for iou in range(50, 100, 5))

    rows = read_json(output / "categories.json")
    with (output / "categories.csv").open(newline="") as file:
        texts = [{k: "" if v is None else str(v) for k, v in row.items()} for row in rows]
        assert list(csv.DictReader(file)) == texts
    objects = [a for a in read_json(truth)["annotations"] if not a["iscrowd"]]
    for row, (category_id, name) in zip(rows, CATEGORIES.items(), strict=True):
        same = [sum(r["category_id"] == category_id for r in rs) for rs in (objects, results)]
        assert [row["annotations"], row["detections"]] == same
        assert (row["category_id"], row["category"]) == (category_id, name)

    def average(column):
        values = [row[column] for row in rows]
        assert values.pop() is None, "the last category has no object"
        return pytest.approx(np.mean(values))

    assert curves["voc_ap50"] == average("box_VOC_AP50")
    for iou_type, values in metrics.items():
        assert f"{100 * values['AP']:.1f}" in table
        assert values["AP"] == average(f"{iou_type}_AP")
        assert values["AP50"] == average(f"{iou_type}_AP50")
        by_iou = dict(zip(curves["iou_thresholds"], curves[iou_type]["ap_by_iou"], strict=True))
        assert np.mean([*by_iou.values()]) == pytest.approx(values["AP"])
        assert (by_iou[0.5], by_iou[0.75]) == pytest.approx((values["AP50"], values["AP75"]))
        for iou, by_recall in curves[iou_type]["precision_by_recall"].items():
            assert len(by_recall) == len(curves["recall_points"]) == 101
            assert np.mean(by_recall) == pytest.approx(by_iou[float(iou)])


def test_no_objects_write_none(tmp_path, score):
    (tmp_path / "detections.json").write_text(json.dumps([result([1, 1, 9, 9], 0.5)]))
    status, table = score(write_dataset(tmp_path, []), tmp_path / "detections.json")
    assert status == 0 and "VOC AP50 of boxes (all-point): -" in table
    metrics, curves = (read_json(tmp_path / "scores" / f"{n}.json") for n in ("metrics", "curves"))
    assert [set(values.values()) for values in metrics.values()] == [{None}, {None}]
    assert curves["voc_ap50"] is None and set(curves["mask"]["ap_by_iou"]) == {None}


BAD_FILES = {
    "object": ('{"annotations": []}', "must be a list, not dict"),
    "half": ("[{", "is not JSON"),
    "deep": ("[" * 100_000, "maximum recursion depth"),
    "latin": ("\xff", "is not JSON"),
    "missing": (None, "do not exist"),
    "wrong result": ('[{"image_id": 7}]', "results[0]"),
    "folder": ("folder", "is a folder; give the detections.json in it"),
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_results_file_is_named_in_one_line(text, message, tmp_path, score):
    path = tmp_path / "detections.json"
    if text == "folder":
        path.mkdir()
    elif text is not None:
        path.write_bytes(text.encode("latin-1"))
    status, line = score(write_dataset(tmp_path, []), path)
    assert status == 2 and not (tmp_path / "scores").exists()
    assert "detections.json" in line and message in line and line.count("\n") == 1
