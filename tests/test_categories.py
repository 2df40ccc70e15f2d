"""Categories of training, validation and results that differ: matched, or refused in one line."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from datasets.categories import match_categories, use_categories
from datasets.coco import CocoInstances
from datasets.shapes import CATEGORY_IDS
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.inference.coco_json import categories_file
from pipeline.recipe import load_config
from pipeline.training.engine import TrainingRun
from tests.coco_json import rectangle, write_coco
from tests.pipeline.training.runs import CPU, make_stage

FIRST = min(CATEGORY_IDS.values())


def renumbered(content: dict) -> dict:
    """Every category under another id, most of which are another category's in training."""
    ids = [c["id"] for c in content["categories"]]
    new = dict(zip(ids, [*ids[1:], 4711], strict=True))
    return content | {
        "categories": [c | {"id": new[c["id"]]} for c in content["categories"]],
        "annotations": [a | {"category_id": new[a["category_id"]]} for a in content["annotations"]],
    }


def with_root(content: dict) -> dict:
    """A category that nothing is annotated with, as some exporters write it."""
    return content | {"categories": [{"id": 0, "name": "objects"}, *content["categories"]]}


def without_first(content: dict) -> dict:
    return content | {
        "categories": [c for c in content["categories"] if c["id"] != FIRST],
        "annotations": [a for a in content["annotations"] if a["category_id"] != FIRST],
    }


def without_first_name(content: dict) -> dict:
    """Objects of a category that training does not have."""
    categories = [c | {"name": "zebra"} if c["id"] == FIRST else c for c in content["categories"]]
    return content | {"categories": categories}


def shuffled(content: dict) -> dict:
    return content | {"categories": content["categories"][::-1]}


MATCHED = {
    "another order": (shuffled, ""),
    "renumbered": (renumbered, "with another id"),
    "a root category": (with_root, "1 left out that no annotation is of"),
}


@pytest.fixture
def truth(tiny_config) -> Path:
    return Path(load_config(tiny_config).data.val.annotations)


@pytest.fixture
def write(truth, tmp_path):
    """The validation annotations, changed."""

    def write_changed(change) -> Path:
        path = tmp_path / "val.json"
        path.write_text(json.dumps(change(json.loads(truth.read_text()))))
        return path

    return write_changed


@pytest.mark.parametrize(
    ("these", "those", "expected"),
    [
        ({1: "a", 2: "b"}, {1: "a", 2: "b"}, {1: 1, 2: 2}),
        ({1: "a", 2: "b"}, {1: "b", 2: "a"}, {1: 2, 2: 1}),  # the name counts
        ({1: "a"}, {1: "b"}, {}),
        ({1: "a"}, {1: "A"}, {}),
        # Names that are twice in a file: only with the same id.
        ({1: "a", 2: "a"}, {1: "a", 2: "a"}, {1: 1, 2: 2}),
        ({1: "a", 2: "a"}, {1: "a"}, {1: 1}),
        ({1: "a"}, {2: "a", 3: "a"}, {}),
        # A converted detector without names.
        ({1: "a", 2: "b"}, {1: "class 1", 2: "class 2"}, {1: 1, 2: 2}),
        ({1: "class 2", 2: "class 1"}, {1: "class 1", 2: "class 2"}, {1: 2, 2: 1}),
        ({1: "a", 2: "class 1"}, {1: "class 1"}, {2: 1}),
    ],
)
def test_matched_by_name_and_id_where_that_is_certain(these, those, expected):
    assert match_categories(these, those) == expected


def test_annotations_take_the_ids_and_the_order(tmp_path):
    boxes = [rectangle(n, 1, category, 5 * n, 5, 20, 20) for n, category in enumerate([9, 4, 9], 1)]
    coco = write_coco(tmp_path / "a.json", {1: (60, 60)}, boxes, [4, 7, 9])  # c4, c7, c9
    line = use_categories(coco, {1: "c9", 2: "other", 3: "c4"}, source="b.json")
    assert coco.category_ids.tolist() == [1, 2, 3] and coco.category_names == ["c9", "other", "c4"]
    assert coco.category_ids[coco.category_index].tolist() == [1, 3, 1]
    assert "2 with another id, 1 left out that no annotation is of, 1 missing" in line


def test_what_cannot_be_matched_is_refused_with_the_difference(tmp_path):
    boxes = [rectangle(n, 1, n, 5 * n, 5, 20, 20) for n in (1, 2)]
    coco = write_coco(tmp_path / "a.json", {1: (60, 60)}, boxes, [1, 2])
    before = coco.category_index.copy()
    with pytest.raises(ValueError) as error:
        use_categories(coco, {1: "c1", 2: "x\ny", 3: "z"}, source="b.json")
    assert "unknown there 'c2' (id 2) of 1 annotations, id 2 is 'x\\ny' there" in str(error.value)
    assert "missing here 'x\\ny' (id 2), 'z' (id 3)" in str(error.value)
    assert "\n" not in str(error.value) and (coco.category_index == before).all()


def test_a_chosen_category_that_a_detector_lacks_has_no_id_of_the_detectors(tmp_path):
    """Its results of other categories would count as the chosen one's."""
    boxes = [rectangle(n, 1, n, 5 * n, 5, 20, 20) for n in (1, 2)]
    path = tmp_path / "a.json"
    write_coco(path, {1: (60, 60)}, boxes, [1, 2])
    for chosen, known in ((["c1"], {}), (["c1", "c2"], {"c2": 7})):
        truth = load_ground_truth(path, chosen=chosen, categories={1: "x", 3: "y", 7: "c2"})
        ids = {each["name"]: each["id"] for each in truth.dataset["categories"]}
        assert ids.pop("c1") not in (1, 3, 7) and ids == known


# Training.


def test_validation_of_other_ids_gives_the_same_metrics(
    write, tiny_config, stores, tmp_path, capsys
):
    options = [*stores, "multipathnet.validation_images=3", "detect.score_threshold=0.0"]
    same = make_stage("multipathnet", load_config(tiny_config, options), tmp_path)
    metrics = same.validate(same.model, CPU)
    assert metrics["sample_ap"] > 0
    for function, words in MATCHED.values():
        setting = f"data.val.annotations={write(function)}"
        other = make_stage("multipathnet", load_config(tiny_config, [*options, setting]), tmp_path)
        assert words in capsys.readouterr().out
        for name in ("category_ids", "category_index"):
            assert np.array_equal(*(getattr(s.val_data.coco, name) for s in (same, other)))
        assert other.validate(other.model, CPU) == metrics


def test_a_category_that_validation_lacks_keeps_its_class(write, tiny_config, stores, tmp_path):
    path = write(without_first)
    config = load_config(tiny_config, [*stores, f"data.val.annotations={path}"])
    stage = make_stage("multipathnet", config, tmp_path)
    coco, trained = CocoInstances.load(path), stage.val_data.coco
    assert len(coco.category_ids) == len(trained.category_ids) - 1
    before, after = ([c.category_names[i] for i in c.category_index] for c in (coco, trained))
    assert before == after


@pytest.mark.parametrize("tool", ["train_stage --stage multipathnet", "run_pipeline"])
def test_objects_of_an_unknown_category_are_refused_before_anything_is_made(
    tool, write, tiny_config, call_tool, tmp_path, capsys
):
    options = ["--config", tiny_config, "--output", tmp_path / "run", "--device", "cpu"]
    setting = f"data.val.annotations={write(without_first_name)}"
    assert call_tool(*tool.split(), *options, "--set", setting) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "unknown there 'zebra'" in line and "missing here" in line
    assert not list((tmp_path / "run").rglob("*.pt"))


def test_a_detector_is_resumed_on_the_categories_of_its_outputs(
    tiny_detector, tiny_config, stores, tmp_path
):
    """Other ids in the same order are the same outputs; in another order they are not."""
    state = load_checkpoint(tiny_detector)
    config = load_config(tiny_config, stores)
    stage = make_stage("multipathnet", config, tmp_path)
    save_checkpoint(tmp_path / "checkpoints" / "last.pt", state)

    for category in stage.metadata["categories"]:
        category["id"] += 1000
    TrainingRun(stage, config, tmp_path, CPU).prepare(resume=True)
    first, second = stage.metadata["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]
    words = f"other categories.*'{second['name']}' -> '{first['name']}'"
    with pytest.raises(ValueError, match=words):
        TrainingRun(stage, config, tmp_path, CPU).prepare(resume=True)


# Scores.


@pytest.fixture
def detections(tiny_detector, stores, tiny_config, call_tool, tmp_path) -> Path:
    images = load_config(tiny_config).data.val.images
    options = ["--proposals", stores[1].partition("=")[2], "--images", images, "--device", "cpu"]
    output = tmp_path / "found"
    assert call_tool("detect", "--checkpoint", tiny_detector, *options, "--output", output) == 0
    return output / "detections.json"


def test_results_are_scored_by_the_names_of_the_detectors_categories(
    detections, truth, write, call_tool, tmp_path, capsys
):
    def score(annotations: Path, results: Path = detections) -> dict:
        options = ["--annotations", annotations, "--results", results, "--output", tmp_path / "s"]
        assert call_tool("score_coco", "detections", *options) == 0
        return json.loads((tmp_path / "s" / "metrics.json").read_text())

    expected = score(truth)
    assert expected["box"]["AP"] > 0
    for change, _ in MATCHED.values():
        assert score(write(change)) == expected
    options = ["--results", detections, "--output", tmp_path / "s"]
    path = write(without_first_name)
    assert call_tool("score_coco", "detections", "--annotations", path, *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "unknown there 'zebra'" in line and str(path) in line
    # Another tool's results have ids only.
    foreign = shutil.copy(detections, tmp_path / "foreign.json")
    assert score(truth, foreign) == expected


def test_a_file_of_categories_that_is_none_is_named(detections, truth, call_tool, tmp_path, capsys):
    categories_file(detections).write_text('{"id": 1}')
    options = ["--results", detections, "--output", tmp_path / "s", "--annotations", truth]
    assert call_tool("score_coco", "detections", *options) == 2
    assert "detections.categories.json" in capsys.readouterr().err
