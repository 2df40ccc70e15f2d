"""Scores of a proposal store and of a results file, and what they write."""

import json

import pytest

from pipeline.evaluation.scores import score_proposals
from pipeline.inference.coco_json import StoredResults, read_results
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    SQUARE,
    STORE,
    make_dataset,
    proposals_of,
    write_store,
)


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "store", STORE)
    return tmp_path / "store"


def test_a_store_and_its_results_file_score_alike(tmp_path, store):
    annotations, _ = make_dataset(tmp_path / "data")
    shuffled = sorted(read_results(store), key=lambda r: r["score"])
    (tmp_path / "results.json").write_text(json.dumps(shuffled))
    outputs = [tmp_path / "of_store", tmp_path / "of_file"]
    for results, output in zip((store, tmp_path / "results.json"), outputs, strict=True):
        metrics = score_proposals(annotations, results, output)
    for name in ("metrics", "curves", "perfect_ranking"):
        first, second = (json.loads((o / f"{name}.json").read_text()) for o in outputs)
        assert first == second
    # Of three objects one is found exactly, one with IoU .5: at one threshold of ten.
    assert metrics["mask"]["AR@10"] == metrics["box"]["AR@10"] == pytest.approx((1 + 0.1) / 3)


def test_a_store_is_read_as_often_as_it_is_gone_through_and_never_whole(store, monkeypatch):
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
