"""The stages: what each trains and keeps, and what it starts from.

Mistakes of the command line are in tests/test_user_errors.py.
"""

import copy
import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from datasets.images import read_image
from datasets.proposal_boxes import ProposalBoxes
from datasets.shapes import CATEGORY_IDS
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.inference.detect import load_detector
from pipeline.inference.detect_folders import detect_in_part
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import results_of
from pipeline.inference.propose import load_proposer
from pipeline.networks import load_network
from pipeline.recipe import config_from_dict, load_config
from pipeline.torch7.convert import convert_file
from pipeline.training.engine import fit
from pipeline.training.prepare import CATEGORY_WEIGHTS, find_proposals, write_boxes
from pipeline.training.run_log import read_metrics
from tests.pipeline.training.runs import CPU, interrupt, last_checkpoint, make_stage, train
from tests.real_data import TORCH7, skip_without

STAGES = ("deepmask", "sharpmask", "multipathnet")
TORCH7_FILES = {
    "deepmask": "deepmask_sharpmask/deepmask.t7",
    "sharpmask": "deepmask_sharpmask/sharpmask.t7",
    "multipathnet": "multipathnet/model.t7",
}


@pytest.fixture
def checkpoints(tiny_checkpoint, tiny_sharpmask, tiny_detector) -> dict[str, Path]:
    return dict(zip(STAGES, (tiny_checkpoint, tiny_sharpmask, tiny_detector), strict=True))


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_names(one: dict, other: dict) -> set[str]:
    return {name for name in one if torch.equal(one[name], other[name])}


# What is trained.


def test_frozen_levels_do_not_change_and_the_trunk_has_its_own_rate(tiny_recipe, tmp_path):
    values = copy.deepcopy(tiny_recipe)
    values["trunk"]["frozen_levels"] = 2
    values["deepmask"]["optim"] |= {"trunk_lr_factor": 0.1}
    config = config_from_dict(values, source="test")
    stage = make_stage("deepmask", config, tmp_path)
    assert [group["lr_factor"] for group in stage.parameter_groups()] == [1.0, 0.1]
    before = weights_of(stage.model)
    fit(stage, config, tmp_path, device=CPU)
    same = equal_names(before, stage.model.state_dict())
    assert {n for n in before if n.startswith(("trunk.levels.0.", "trunk.levels.1."))} <= same
    assert not any(name.startswith("trunk.levels.3.0") for name in same)


def test_deepmask_is_bit_identical_after_training_and_the_refinement_is_not(
    tiny_config, tiny_checkpoint, tmp_path
):
    overrides = ["sharpmask.optim.batches_per_epoch=4", f"init.deepmask={tiny_checkpoint}"]
    config = load_config(tiny_config, overrides)
    stage = make_stage("sharpmask", config, tmp_path)
    start = weights_of(stage.model)
    trained = load_checkpoint(fit(stage, config, tmp_path, device=CPU))["model"]
    frozen = {k.removeprefix("deepmask."): v for k, v in trained.items() if k[:9] == "deepmask."}
    original = load_checkpoint(tiny_checkpoint)["model"]
    assert frozen.keys() == original.keys() == equal_names(frozen, original)
    for part in ("encode.", "predict.", *(f"refinements.{i}." for i in range(4))):
        names = [name for name in trained if name.startswith(part)]
        assert any(not torch.equal(trained[name], start[name]) for name in names), part


def test_trunk_is_frozen_in_phase_1_and_its_first_levels_always(tiny_config, stores, tmp_path):
    overrides = [*stores, "multipathnet.frozen_epochs=1", "multipathnet.optim.epochs=2"]
    config = load_config(tiny_config, overrides)
    stage = make_stage("multipathnet", config, tmp_path)
    start = [[p.clone() for p in level.parameters()] for level in stage.model.trunk.levels]

    def unchanged() -> list[bool]:
        return [
            all(torch.equal(a, b) for a, b in zip(old, level.parameters(), strict=True))
            for old, level in zip(start, stage.model.trunk.levels, strict=True)
        ]

    states = {}
    start_phase = stage.start_phase

    def spy(step: int) -> None:
        states[step] = unchanged()
        start_phase(step)

    stage.start_phase = spy
    fit(stage, config, tmp_path, device=CPU)
    assert states[2] == [True] * 4  # nothing of the trunk has changed before phase 2
    assert unchanged() == [True, False, False, False]  # frozen_levels is 1


def test_sharpmask_validates_on_mask_patches_only(tiny_sharpmask):
    records = read_metrics(tiny_sharpmask.parents[1] / "metrics.jsonl")
    metrics = next(record for record in records if record["split"] == "val")
    assert "mean_iou" in metrics and "score_accuracy" not in metrics


# What a checkpoint is good for.


def test_a_sharpmask_checkpoint_stands_alone_and_gives_deepmasks_masks_unrefined(
    tiny_sharpmask, tiny_checkpoint, shapes_directory, tmp_path
):
    moved = tmp_path / "alone.pt"
    shutil.copy(tiny_sharpmask, moved)
    image = read_image(next((shapes_directory / "images" / "val").iterdir()))
    coarse = load_proposer(moved, CPU, refine=False)[0](image)
    deepmask = load_proposer(tiny_checkpoint, CPU)[0](image)
    assert coarse.rles == deepmask.rles
    assert load_proposer(moved, CPU)[0].refinement is not None
    np.testing.assert_array_equal(coarse.scores, deepmask.scores)


def test_settings_tell_refined_from_coarse_and_zoomed_from_not(tiny_sharpmask):
    settings = [
        load_proposer(tiny_sharpmask, CPU, **options)[1]
        for options in (
            {},
            {"refine": False},
            {"zoom": True},
            {"nms": 0.5},
            {"nms": 0.5, "soft_nms": True},
        )
    ]
    assert all(a != b for n, a in enumerate(settings) for b in settings[:n])
    assert settings[2]["log2_scales"] == [*settings[0]["log2_scales"], 1.0]


def test_an_nms_that_is_asked_for_drops_whatever_the_checkpoint_does(tiny_sharpmask, tmp_path):
    content = load_checkpoint(tiny_sharpmask)
    content["config"]["propose"] |= {"nms": 0.8, "soft_nms": True}
    torch.save(content, tmp_path / "soft.pt")
    chosen = [
        {k: load_proposer(tmp_path / "soft.pt", CPU, **options)[1][k] for k in ("nms", "soft_nms")}
        for options in ({}, {"nms": 0.7}, {"nms": 0.7, "soft_nms": True})
    ]
    assert [tuple(each.values()) for each in chosen] == [(0.8, True), (0.7, False), (0.7, True)]


def test_a_detectors_checkpoint_knows_its_categories(tiny_detector):
    categories = load_checkpoint(tiny_detector)["categories"]
    assert [(c["name"], c["id"]) for c in categories] == list(CATEGORY_IDS.items())


# What a stage starts from.


def test_the_deepmask_run_beside_the_output_is_found(tiny_config, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "deepmask")
    stage = make_stage("sharpmask", load_config(tiny_config), tmp_path / "sharpmask")
    expected = load_network(tiny_run / "checkpoints" / "best.pt")[0].state_dict()
    assert equal_names(expected, stage.model.deepmask.state_dict()) == expected.keys()


@pytest.mark.parametrize("proposer", ["deepmask", "sharpmask"])
def test_a_detectors_trunk_starts_from_the_mask_network(
    proposer, checkpoints, tiny_config, stores, tmp_path
):
    trunk = ["multipathnet.trunk.weights=deepmask", f"init.proposer={checkpoints[proposer]}"]
    stage = make_stage("multipathnet", load_config(tiny_config, [*stores, *trunk]), tmp_path)
    state = load_checkpoint(checkpoints["deepmask"])["model"]
    for name, value in stage.model.trunk.state_dict().items():
        assert torch.equal(value, state[f"trunk.{name}"]), name


def test_proposals_are_made_once_with_the_network_beside(tiny_config, tiny_sharpmask, tmp_path):
    shutil.copytree(tiny_sharpmask.parents[1], tmp_path / "sharpmask")
    config = load_config(tiny_config, ["multipathnet.sampling.max_proposals=7"])
    output = tmp_path / "multipathnet"
    store = find_proposals(config, "val", output, CPU)
    assert store.directory == output / "proposals" / "val"
    boxes = ProposalBoxes.load(write_boxes(config, "val", output, store))
    expected = {p.image_id: p for p in store}
    assert len(expected) == 8 and max(map(len, expected.values())) <= 7
    for image_id, proposals in expected.items():
        np.testing.assert_array_equal(boxes.of(image_id), proposals.boxes)
    assert not (store.directory / "proposals.json").exists()  # nobody reads those of training
    shards = store.shards()
    find_proposals(config, "val", output, CPU)
    assert store.shards() == shards
    empty = ProposalStore(tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no proposals"):
        write_boxes(config, "val", output, empty)


@pytest.mark.parametrize("name", STAGES)
def test_fine_tuning_starts_from_a_checkpoint_of_the_stage(
    name, checkpoints, tiny_config, stores, tmp_path, capsys
):
    """With a new optimizer; resumed, the run continues with its own weights."""
    start = tmp_path / "start.pt"
    start.write_bytes(checkpoints[name].read_bytes())
    config = load_config(tiny_config, [*stores, "seed=3", f"init.weights={start}"])
    stage = make_stage(name, config, tmp_path / name)
    weights = load_checkpoint(start)["model"]
    assert equal_names(stage.model.state_dict(), weights) == weights.keys()
    assert capsys.readouterr().out.splitlines()[-1] == f"weights from {start}"
    fit(stage, config, tmp_path / name, device=CPU)
    trained = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
    assert trained["step"] == 2
    assert equal_names(trained["model"], weights) < weights.keys()
    start.unlink()  # what it started from may be gone by then
    train(name, config, tmp_path / name, resume=True)
    again = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")["model"]
    assert equal_names(again, trained["model"]) == again.keys()


@pytest.mark.parametrize("name", ["deepmask", "multipathnet"])
def test_a_run_is_resumed_without_the_weights_that_its_trunk_began_with(
    name, tiny_config, stores, tmp_path
):
    trunk = tmp_path / "resnet18.pth"
    torch.save(resnet18().state_dict(), trunk)
    prefix = "multipathnet." if name == "multipathnet" else ""
    overrides = [*stores, f"{prefix}trunk.name=resnet18", f"{prefix}trunk.weights={trunk}"]
    config = load_config(tiny_config, overrides)
    interrupt(name, config, tmp_path / "run", steps=1)
    trunk.unlink()
    train(name, config, tmp_path / "run", resume=True)
    assert last_checkpoint(tmp_path / "run")["step"] == 2


def test_scores_of_one_cell_learn_from_parts_without_an_object(tiny_config, tmp_path):
    """They have the shape of the others', and their cells are of none."""
    sampling = {"score_targets": "iou", "patches_per_image": 1, "mask_batch_prob": 0}
    settings = [f"deepmask.sampling.{key}={value}" for key, value in sampling.items()]
    optim = ["deepmask.optim.batch_size=16", "deepmask.optim.accumulate=16"]
    stage = make_stage("deepmask", load_config(tiny_config, [*settings, *optim]), tmp_path)
    with closing(stage.training_batches(range(1), CPU)) as batches:
        parts = next(batches)
    without = [part for part in parts if not len(part["decode"])]
    assert 0 < len(without) < len(parts)
    for part in parts:
        assert torch.isfinite(stage.losses(stage.model, part)["loss"])


def test_a_detector_of_other_categories_gets_new_outputs(
    tiny_detector, tiny_config, stores, tmp_path, capsys
):
    content = load_checkpoint(tiny_detector)
    content["categories"][0]["name"] = "of another dataset"
    save_checkpoint(tmp_path / "other.pt", content)
    config = load_config(tiny_config, [*stores, "seed=3", f"init.weights={tmp_path / 'other.pt'}"])
    stage = make_stage("multipathnet", config, tmp_path / "run")
    count = len(content["categories"])
    line = f"its {count} categories are not the dataset's {count}"
    assert sum(line in printed for printed in capsys.readouterr().out.splitlines()) == 1
    changed = set(content["model"]) - equal_names(weights_of(stage.model), content["model"])
    assert {"cls_score.weight", "bbox_pred.weight"} <= changed
    assert all(name.startswith(CATEGORY_WEIGHTS) for name in changed)


def test_no_other_weights_are_looked_for_beside_those(checkpoints, tiny_config, stores, tmp_path):
    """Neither ImageNet's nor a DeepMask's nor a proposer's trunk."""
    overrides = ["multipathnet.trunk.weights=deepmask", *stores]
    config = load_config(tiny_config, [*overrides, f"init.weights={checkpoints['multipathnet']}"])
    make_stage("multipathnet", config, tmp_path / "run")
    overrides = ["trunk.weights=nowhere.pt", f"init.weights={checkpoints['deepmask']}"]
    make_stage("deepmask", load_config(tiny_config, overrides), tmp_path / "run")


# The originals' files.


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder of the reference networks as checkpoints, with their recipes."""
    skip_without(TORCH7)
    folder = tmp_path_factory.mktemp("converted")
    for name, file in TORCH7_FILES.items():
        lines = convert_file(TORCH7 / file, folder / f"{name}.pt")
        assert any(line.endswith(f"{name}.pt.yaml") for line in lines)
    return folder


@pytest.mark.parametrize("name", STAGES)
def test_training_starts_from_a_converted_file(
    name, converted, tiny_recipe, stores, tmp_path, call_tool, capsys
):
    data = [f"data.{s}.{k}={tiny_recipe['data'][s][k]}" for s in ("train", "val")
            for k in ("annotations", "images")]  # fmt: skip
    # The rate is for random weights, on which losses are large.
    small = [f"{name}.optim.{setting}" for setting in (
        "lr=1e-7", "batch_size=2", "batches_per_epoch=2", "epochs=1", "validation_batches=1"
    )]  # fmt: skip
    if name == "multipathnet":
        small += [*stores, "multipathnet.sampling.short_side=160"]
    status = call_tool(
        "train_stage", "--stage", name, "--config", converted / f"{name}.pt.yaml",
        "--output", tmp_path / name, "--device", "cpu",
        "--set", *data, "data.workers=0", *small, f"init.weights={converted / f'{name}.pt'}",
    )  # fmt: skip
    assert status in (0, None)
    new_outputs = f"its 80 categories are not the dataset's {len(CATEGORY_IDS)}"
    assert (new_outputs in capsys.readouterr().out) == (name == "multipathnet")
    start = load_checkpoint(converted / f"{name}.pt")["model"]
    trained = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
    assert trained["step"] == 2 and trained["model"].keys() == start.keys()
    start = {k: v for k, v in start.items() if not k.startswith(CATEGORY_WEIGHTS)}
    assert equal_names(start, trained["model"]) < start.keys()
    for key, value in start.items():
        torch.testing.assert_close(trained["model"][key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_a_converted_files_recipe_is_its_networks_settings(converted):
    for name in TORCH7_FILES:
        content = load_checkpoint(converted / f"{name}.pt")
        recipe = load_config(converted / f"{name}.pt.yaml")
        assert recipe == config_from_dict(content["config"], source="the test")


def test_the_best_detector_may_be_that_of_the_highest_ap(tiny_config, stores, tmp_path):
    """On the first images of the store, as the detections of those images score."""
    options = ["multipathnet.validation_images=3", "detect.score_threshold=0.0"]
    config = load_config(tiny_config, [*stores, *options])
    best = train("multipathnet", config, tmp_path / "run")
    state = load_checkpoint(best)
    (line,) = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if x["split"] == "val"]
    assert state["best"] == line["sample_ap"] and "roi_accuracy" in line
    store = ProposalStore(stores[1].partition("=")[2])
    first = store.parts()[0]
    assert len(store.images_of(first)) >= 3
    detector, _ = load_detector(best, CPU)
    images = Path(config.data.val.images)
    found = [d for _, d in detect_in_part(detector, store, first, images, broken=[])]
    ids = {image["id"] for image in store.images_of(first)}
    truth = load_ground_truth(config.data.val.annotations, ids)
    assert set(truth.getImgIds()) == ids
    scores = evaluate_detections(truth, [r for d in found for r in results_of(d)])
    assert line["sample_ap"] == pytest.approx(scores.metrics()["box"]["AP"])


def test_a_store_may_have_more_images_than_are_annotated(tiny_config, stores, tmp_path, capsys):
    """Its other images do not count; an annotated one that it lacks is left out."""
    config = load_config(tiny_config)
    truth = json.loads(Path(config.data.val.annotations).read_text())
    gone = truth["images"].pop(0)["id"]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] != gone]
    first = truth["annotations"][0]
    (image,) = [image for image in truth["images"] if image["id"] == first["image_id"]]
    truth["images"].append(image | {"id": 999})
    truth["annotations"].append(first | {"id": 999, "image_id": 999})
    (tmp_path / "val.json").write_text(json.dumps(truth))
    options = [f"data.val.annotations={tmp_path / 'val.json'}", "multipathnet.validation_images=9"]
    train("multipathnet", load_config(tiny_config, [*stores, *options]), tmp_path / "run")
    (line,) = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if x["split"] == "val"]
    assert "sample_ap" in line
    assert "val.json: 1 images with objects are left out" in capsys.readouterr().out
