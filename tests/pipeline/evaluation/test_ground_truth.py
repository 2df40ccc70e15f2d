"""Annotation files as evaluation reads them."""

import numpy as np
import pytest

from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import METRICS, evaluate_detections
from pipeline.evaluation.recall import evaluate_proposals
from tests.pipeline.evaluation import scenes
from tests.pipeline.evaluation.scenes import annotation, make_truth, perfect_results
from tests.real_data import COCO_MINI_VAL

BOX = (10, 20, 30, 40)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(None, marks=scenes.needs_real_data)])
def test_the_ground_truth_scores_one(tmp_path, seed):
    path = COCO_MINI_VAL if seed is None else scenes.random_scene(tmp_path, seed, per_image=0)[0]
    ground_truth = load_ground_truth(path)
    results = perfect_results(ground_truth)
    for values in evaluate_detections(ground_truth, results).metrics().values():
        assert [values[name] for name in METRICS[:6]] == pytest.approx([1.0] * 6, abs=1e-12)
        assert values["AR@100"] == 1
    for values in evaluate_proposals(ground_truth, results).metrics().values():
        assert [v for name, v in values.items() if name.startswith("AR@1000")] == [1.0] * 4


@pytest.mark.parametrize(
    "segmentation",
    [scenes.rectangle(*BOX), scenes.uncompressed(BOX), scenes.compressed(scenes.rectangle(*BOX))],
)
def test_every_segmentation_is_read_and_missing_keys_are_filled_in(tmp_path, segmentation):
    given = {"id": 1, "image_id": 1, "category_id": 3, "segmentation": segmentation}
    ground_truth = make_truth(tmp_path, [given])
    [filled] = ground_truth.dataset["annotations"]
    assert (filled["area"], filled["bbox"], filled["iscrowd"]) == (1200, list(BOX), 0)
    expected = np.zeros((scenes.HEIGHT, scenes.WIDTH), np.uint8)
    expected[20:60, 10:40] = 1
    assert np.array_equal(ground_truth.annToMask(filled), expected)


def test_unusable_annotations_are_left_out_and_counted(tmp_path, capsys):
    path = scenes.write_dataset(tmp_path, [annotation(1, BOX), annotation(2, BOX, category_id=2)])
    ground_truth = load_ground_truth(path)
    assert [a["bbox"] for a in ground_truth.dataset["annotations"]] == [list(BOX)]
    [warning] = capsys.readouterr().out.splitlines()
    assert warning.startswith(str(path)) and "left out 1" in warning
    metrics = evaluate_proposals(ground_truth, perfect_results(ground_truth)).metrics()
    assert metrics["mask"]["AR@10"] == metrics["box"]["AR@10"] == 1


@pytest.mark.parametrize("content", [None, b"{", b"\xff\xd8", b"[]"])
def test_a_bad_annotation_file_is_named_in_one_line(tmp_path, content):
    path = tmp_path / "truth.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_ground_truth(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
