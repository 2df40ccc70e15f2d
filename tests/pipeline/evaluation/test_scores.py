"""Scores of a proposal store and of results files: the files and tables that are written."""

import csv
import json

import numpy as np
import pytest

from pipeline.evaluation.ground_truth import IOU_TYPES, load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.scores import score_detections, score_proposals
from pipeline.inference.coco_json import StoredResults, read_results
from tests.pipeline.evaluation.scenes import (
    CATEGORIES,
    annotation,
    random_scene,
    result,
    write_dataset,
)
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


@pytest.fixture
def annotations(tmp_path):
    return make_dataset(tmp_path / "data")[0]


def test_a_store_and_its_results_file_score_alike(tmp_path, store, annotations, capsys):
    shuffled = sorted(read_results(store), key=lambda r: r["score"])
    (tmp_path / "results.json").write_text(json.dumps(shuffled))
    of_store, of_file = tmp_path / "of_store", tmp_path / "of_file"
    metrics = score_proposals(annotations, store, of_store)
    assert (of_store / "scores.txt").read_text() == capsys.readouterr().out
    assert score_proposals(annotations, tmp_path / "results.json", of_file) == metrics
    files = {path.name: path.read_bytes() for path in of_store.iterdir()}
    assert {path.name: path.read_bytes() for path in of_file.iterdir()} == files
    assert json.loads(files["metrics.json"]) == metrics
    # Of three objects one is found exactly, one with IoU .5: at one threshold of ten.
    assert metrics["mask"]["AR@10"] == metrics["box"]["AR@10"] == pytest.approx((1 + 0.1) / 3)

    heading, *lines = files["scores.txt"].decode().splitlines()
    names = ["AR@10", "AR@100", "AR@1000", "AUC", "small", "medium", "large"]
    assert heading.split() == ["average", "recall,", "percent", *names]
    labels = [f"{t} {ranking}" for t in IOU_TYPES for ranking in ("as ranked", "perfect ranking")]
    assert [" ".join(line.split()[:3]) for line in lines] == labels
    assert lines[0].split()[3:6] == ["36.7"] * 3 and lines[0].split()[-2:] == ["-", "-"]
    assert json.loads(files["perfect_ranking.json"])["box"]["AUC"] > metrics["box"]["AUC"]
    curves = json.loads(files["curves.json"])
    assert (curves["counts"][0], curves["counts"][-1]) == (1, 1000)
    for iou_type in IOU_TYPES:
        assert curves[iou_type]["ar_by_count"][-1] == metrics[iou_type]["AR@1000"]
        for area, values in curves[iou_type]["ar_by_area"].items():
            assert values[-1] == metrics[iou_type][f"AR@1000/{area}"]
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


def test_an_image_that_was_done_twice_is_named(tmp_path, store, annotations):
    write_store(store, STORE[:1])
    with pytest.raises(ValueError, match="store: .*image_id 1 comes a second time"):
        score_proposals(annotations, store, tmp_path / "scores")


# Detections


def test_the_files_of_detections(tmp_path, capsys):
    truth, results = random_scene(tmp_path, 1)
    path, output = tmp_path / "detections.json", tmp_path / "scores"
    path.write_text(json.dumps(results))
    metrics, table = score_detections(truth, path, output), capsys.readouterr().out
    assert metrics == read_json(output / "metrics.json")
    assert metrics == evaluate_detections(load_ground_truth(truth), results).metrics()
    assert table == (output / "scores.txt").read_text()
    assert all(f"AP{iou}" in table for iou in range(50, 100, 5))
    curves = read_json(output / "curves.json")
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


CROWD = annotation(1, (1, 1, 9, 9), iscrowd=1)
LINE = annotation(2, (1, 1, 9, 0), segmentation=[[1, 1, 10, 1, 5, 1]])
NOTHING = {
    "none": ([], "there is no annotation"),
    "crowds": ([CROWD], "crowd 1"),
    "all kinds": ([CROWD, LINE, annotation(3, (1, 1, 9, 9), image_id=77)], "unknown image 1"),
    "zero": ([LINE], "zero area 1"),
}


@pytest.mark.parametrize(("annotations", "reason"), NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("score", [score_detections, score_proposals])
def test_scores_over_no_object_are_an_error_that_says_why(score, annotations, reason, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps([result([1, 1, 9, 9], 0.5)]))
    truth = write_dataset(tmp_path, annotations)
    with pytest.raises(ValueError, match="no object to score against: ") as error:
        score(truth, tmp_path / "results.json", tmp_path / "scores")
    assert str(error.value).startswith(f"{truth}: ") and reason in str(error.value)
    assert not (tmp_path / "scores").exists()


BAD_FILES = {  # more of them in user_errors.txt
    "half": (b"[{", "not valid JSON"),
    "deep": (b"[" * 100_000, "maximum recursion depth"),
    "latin": (b"\xff", "not valid JSON"),
    "wrong result": (b'[{"image_id": 7}]', "results[0]"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_results_file_is_named_in_one_line(content, message, tmp_path):
    path = tmp_path / "detections.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        truth = write_dataset(tmp_path, [CROWD | {"iscrowd": 0}])
        score_detections(truth, path, tmp_path / "scores")
    line = str(error.value)
    assert str(path) in line and message in line and "\n" not in line
    assert not (tmp_path / "scores").exists()
