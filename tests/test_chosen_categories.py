"""Training and scores on some categories of a json, and on federated annotations."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datasets.coco import CocoInstances
from pipeline.checkpoint import load_checkpoint
from pipeline.evaluation.ground_truth import IOU_TYPES
from pipeline.evaluation.precision import METRICS
from pipeline.evaluation.scores import score_detections, score_proposals
from pipeline.recipe import load_config
from tests.coco_json import rectangle
from tests.pipeline.evaluation.scenes import CATEGORIES, random_scene
from tests.pipeline.training.runs import CPU, make_stage, train

NAMES = {2: "car", 5: "person", 7: "5", 8: "twin", 9: "twin"}


@pytest.fixture
def path(tmp_path):
    """Images 1 and 2 show a car; 1 also a broken one of another category, 3 a crowd of persons."""
    boxes = [(1, 2, {}), (2, 2, {}), (2, 5, {}), (1, 7, {"bbox": None, "segmentation": [[1]]})]
    boxes += [(3, 5, {"iscrowd": 1})]
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 60, "width": 80} for i in range(1, 5)
        ],
        "categories": [{"id": id_, "name": name} for id_, name in NAMES.items()],
        "annotations": [
            rectangle(number, image, category, 5, 5, 20, 20, **more)
            for number, (image, category, more) in enumerate(boxes, 1)
        ],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("chosen", "ids", "categories", "left_out"),
    [
        (None, [1, 2, 3, 5], [2, 5, 7, 8, 9], True),
        (["person", "car"], [1, 2, 3, 5], [2, 5], False),
        (["person"], [3, 5], [5], False),
        (["2"], [1, 2], [2], False),
        (["5"], [], [7], True),  # a name counts before an id
        (["8", "9"], [], [8, 9], False),
    ],
)
def test_objects_of_other_categories_are_not_there(path, chosen, ids, categories, left_out):
    """Broken ones neither, so that their image counts as searched; the json's order stays."""
    coco = CocoInstances.load(path, chosen)
    assert coco.annotation_ids.tolist() == ids and coco.category_ids.tolist() == categories
    assert coco.category_names == [NAMES[id_] for id_ in categories] and len(coco) == 4
    assert coco.has_left_out.tolist() == [left_out, False, False, False]
    assert coco.is_crowd.tolist() == [id_ == 5 for id_ in ids]
    if chosen == ["person"]:
        assert "1 of 5 categories ('person') in 2 of the images" in coco.summary()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["car", "Persn"], "no category is 'Persn'; did you mean 'person'"),
        (["zebra"], "no category is 'zebra'; it has 'car', 'person', '5', 'twin' and 1 more"),
        (["car", "2"], r"'car' \(id 2\) is there twice"),
        (["twin"], "2 categories are named 'twin'; give the id, one of 8, 9"),
        ([], "the list is empty"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(path, chosen, words):
    with pytest.raises(ValueError, match=f"a.json: .*data.categories.*{words}"):
        CocoInstances.load(path, chosen)


def test_a_detector_has_the_chosen_categories_and_is_scored_on_them(tiny_config, stores, tmp_path):
    options = [*stores, "data.categories=[leaf,disk]", "multipathnet.validation_images=3"]
    checkpoint = train("multipathnet", load_config(tiny_config, options), tmp_path / "run")
    state = load_checkpoint(checkpoint)
    assert [c["name"] for c in state["categories"]] == ["disk", "leaf"]
    assert state["config"]["data"]["categories"] == ["leaf", "disk"] and "best" in state
    config = load_config(tiny_config, [*options, "data.categories=[leaf,cross]"])
    with pytest.raises(ValueError, match="trained on other categories"):
        train("multipathnet", config, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="data.categories must be null or a list"):
        load_config(tiny_config, ["data.categories=[]"])


def test_other_objects_are_negatives_of_a_mask_stage(tiny_config, tmp_path):
    config = load_config(tiny_config, ["data.categories=[square]"])
    stage = make_stage("deepmask", config, tmp_path)
    every = CocoInstances.load(config.data.train.annotations)
    squares = every.category_names.index("square") == every.category_index
    for data in (stage.train_data, stage.val_data):
        assert data.coco.category_names == ["square"]
    assert np.array_equal(stage.train_data.coco.annotation_ids, every.annotation_ids[squares])
    assert len(stage.train_data.sampler.empty_images) > 0
    stage.validate(stage.model, CPU)


# Scores.


def coco_eval(truth, results, iou_type, ids, max_dets, **params):
    """pycocotools' evaluation of some categories."""
    regions = {"box": "segmentation", "mask": "bbox"}
    coco, found = (
        COCO(truth),
        [{k: v for k, v in r.items() if k != regions[iou_type]} for r in results],
    )
    evaluation = COCOeval(coco, coco.loadRes(found), IOU_TYPES[iou_type])
    evaluation.params.catIds, evaluation.params.maxDets = ids, max_dets
    vars(evaluation.params).update(params)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def test_scores_on_some_categories_are_pycocotools(tmp_path):
    truth, results = random_scene(tmp_path, 3)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    chosen, ids = ["car", "1"], [1, 3]
    detections = score_detections(truth, path, tmp_path / "ap", chosen=chosen)
    proposals = score_proposals(truth, path, tmp_path / "ar", chosen=chosen, perfect_ranking=False)
    for iou_type in IOU_TYPES:
        evaluation = coco_eval(truth, results, iou_type, ids, [1, 10, 100])
        evaluation.summarize()
        assert list(detections[iou_type].values()) == evaluation.stats[: len(METRICS)].tolist()
        # Without categories pycocotools takes only results of the chosen ids, which proposals lack.
        agnostic = [result | {"category_id": 1} for result in results]
        evaluation = coco_eval(truth, agnostic, iou_type, ids, [10, 100, 1000], useCats=0)
        recall = evaluation.eval["recall"]
        expected = [recall[:, 0, 0, k].mean() for k in range(3)]
        found = [proposals[iou_type][f"AR@{k}"] for k in (10, 100, 1000)]
        assert found == pytest.approx(expected)
    names = [row["category"] for row in json.loads((tmp_path / "ap/categories.json").read_text())]
    assert names == ["person", "car"]
    assert score_detections(truth, path, tmp_path / "all") != detections


@pytest.mark.parametrize("names_are_given", [True, False])
def test_a_detector_of_fewer_categories_is_scored_and_the_lacking_are_named(
    tmp_path, names_are_given, capsys
):
    """Its own ids may be others; COCO's mean over all categories stays."""
    truth, results = random_scene(tmp_path, 3)
    few = [r for r in results if r["category_id"] == 3]
    own_id = 1 if names_are_given else 3  # 1 is another category of the annotations
    path = tmp_path / "results.json"
    path.write_text(json.dumps([r | {"category_id": own_id} for r in few]))
    if names_are_given:
        path.with_suffix(".categories.json").write_text('[{"id": 1, "name": "car"}]')
    metrics = score_detections(truth, path, tmp_path / "s")
    [line] = [line for line in capsys.readouterr().out.splitlines() if "of the 3" in line]
    assert "1 of the 3 categories" in line and "--categories NAME" in line
    lacking = sorted(repr(name) for name in CATEGORIES.values() if name not in ("car", "nowhere"))
    assert all(name in line for name in lacking)
    expected = coco_eval(truth, few, "box", [1, 3, 5], [1, 10, 100])
    expected.summarize()
    assert list(metrics["box"].values()) == expected.stats[: len(METRICS)].tolist()
    restricted = score_detections(truth, path, tmp_path / "s", chosen=["car"])
    assert restricted["box"]["AP"] == pytest.approx(3 * metrics["box"]["AP"])


# Federated annotations, and many categories.


def lvis(federated: bool) -> dict:
    """An object of every second of 1203 categories, in images without file names."""
    more = {"neg_category_ids": [7], "not_exhaustive_category_ids": []} if federated else {}
    url = "http://images.cocodataset.org/train2017/{}.jpg"
    return {
        "images": [
            {"id": i, "coco_url": url.format(i), "height": 90, "width": 90, **more}
            for i in range(1, 31)
        ],
        "categories": [
            {"id": i, "name": f"c{i}", **({"frequency": "r"} if federated else {})}
            for i in range(1, 1204)
        ],
        "annotations": [
            rectangle(i, i % 30 + 1, i, i % 40, i % 50, 30, 30) for i in range(1, 1204, 2)
        ],
    }


def test_many_categories_are_scored_and_federated_annotations_only_by_recall(
    tmp_path, tiny_config, call_tool, capsys
):
    truth, path, output = tmp_path / "lvis.json", tmp_path / "results.json", tmp_path / "s"
    content = lvis(federated=False)
    keys = ("image_id", "category_id", "bbox")
    path.write_text(
        json.dumps([{k: a[k] for k in keys} | {"score": 0.5} for a in content["annotations"]])
    )
    truth.write_text(json.dumps(content))
    assert CocoInstances.load(truth).file_name(0) == "train2017/1.jpg"
    assert score_detections(truth, path, output)["box"]["AP"] == pytest.approx(1)
    assert max(map(len, (output / "scores.txt").read_text().splitlines())) < 200

    truth.write_text(json.dumps(lvis(federated=True)))
    options = ["--annotations", truth, "--results", path, "--output", output]
    capsys.readouterr()
    assert call_tool("score_coco", "proposals", *options) == 0
    assert (output / "recall.png").read_bytes().startswith(b"\x89PNG")
    words = "[0].neg_category_ids: there may be objects that are not annotated"
    assert words in capsys.readouterr().out
    train = ["train_stage", "--stage", "multipathnet", "--config", tiny_config, "--set"]
    for command in (
        ["score_coco", "detections", *options],
        [*train, f"data.train.annotations={truth}", "--output", tmp_path / "run"],
    ):
        assert call_tool(*command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"{truth}: images[0].neg_category_ids says" in line and len(line) < 500
