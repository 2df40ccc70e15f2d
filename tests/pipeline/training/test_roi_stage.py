"""The MultiPathNet stage: phases of the trunk, resuming, what it starts from, mistakes."""

import contextlib
import shutil

import numpy as np
import pytest
import torch
from pipeline.training.roi_stage import roi_dataset

from datasets.shapes import CATEGORY_IDS
from pipeline.checkpoint import load_checkpoint
from pipeline.inference.proposals import ProposalStore
from pipeline.recipe import load_config
from pipeline.training import engine
from pipeline.training.engine import Interrupted, fit
from pipeline.training.stages import build_stage, find_proposals

CPU = torch.device("cpu")


@pytest.fixture
def stores(tiny_detector) -> list[str]:
    """Overrides that name the proposals which `tiny_detector` was trained on."""
    folder = tiny_detector.parents[1] / "proposals"
    return [f"init.{split}_proposals={folder / split}" for split in ("train", "val")]


def build(config, output):
    return build_stage("multipathnet", config, output, CPU)


class StopAfter(dict):
    def __init__(self, steps: int):
        self.steps = steps

    def __getitem__(self, _):
        self.steps -= 1
        return self.steps <= 0


def test_trunk_is_frozen_in_phase_1_and_its_first_levels_always(tiny_config, stores, tmp_path):
    config = load_config(
        tiny_config, [*stores, "multipathnet.frozen_epochs=1", "multipathnet.optim.epochs=2"]
    )
    stage = build(config, tmp_path / "run")
    start = [[p.clone() for p in level.parameters()] for level in stage.model.trunk.levels]
    states = {}
    original = stage.start_phase

    def spy(step: int) -> None:
        states[step] = [
            all(torch.equal(a, b) for a, b in zip(old, level.parameters(), strict=True))
            for old, level in zip(start, stage.model.trunk.levels, strict=True)
        ]
        original(step)

    stage.start_phase = spy
    fit(stage, config, tmp_path / "run", device=CPU)
    after = [
        all(torch.equal(a, b) for a, b in zip(old, level.parameters(), strict=True))
        for old, level in zip(start, stage.model.trunk.levels, strict=True)
    ]
    assert states[2] == [True] * 4  # nothing of the trunk has changed before phase 2
    assert after == [True, False, False, False]  # frozen_levels is 1


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_equals_uninterrupted_to_the_bit(tiny_config, stores, tmp_path, monkeypatch, stop):
    """Stopped before and after the trunk thaws."""
    config = load_config(
        tiny_config,
        [
            *stores,
            "multipathnet.frozen_epochs=1",
            "multipathnet.optim.epochs=2",
            "multipathnet.draw_threshold=true",
        ],
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(build(config, whole), config, whole, device=CPU)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(engine, "_stop_signals", lambda: contextlib.nullcontext(StopAfter(stop)))
        fit(build(config, parts), config, parts, device=CPU)
    fit(build(config, parts), config, parts, device=CPU, resume=True)
    first, second = (load_checkpoint(p / "checkpoints" / "last.pt") for p in (whole, parts))
    assert first["step"] == second["step"] == 4
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_trunk_starts_from_the_mask_network(tiny_config, tiny_checkpoint, stores, tmp_path):
    config = load_config(
        tiny_config,
        [*stores, "multipathnet.trunk.weights=deepmask", f"init.proposer={tiny_checkpoint}"],
    )
    stage = build(config, tmp_path / "run")
    state = load_checkpoint(tiny_checkpoint)["model"]
    for name, value in stage.model.trunk.state_dict().items():
        assert torch.equal(value, state[f"trunk.{name}"]), name


def test_proposals_are_made_once_with_the_network_beside(tiny_config, tiny_sharpmask, tmp_path):
    shutil.copytree(tiny_sharpmask.parents[1], tmp_path / "sharpmask")
    config = load_config(tiny_config, ["multipathnet.sampling.max_proposals=7"])
    output = tmp_path / "multipathnet"
    boxes = find_proposals(config, "val", output, CPU).boxes()
    store = ProposalStore(output / "proposals" / "val")
    expected = {p.image_id: p for p in store}
    assert len(expected) == 8 and max(map(len, expected.values())) <= 7
    for image_id, proposals in expected.items():
        own, scores = boxes.of(image_id)
        np.testing.assert_array_equal(own, proposals.boxes)
        np.testing.assert_array_equal(scores, proposals.scores)
    shards = store.shards()
    find_proposals(config, "val", output, CPU)
    assert store.shards() == shards


def test_the_checkpoint_knows_its_categories(tiny_detector, shapes_directory):
    categories = load_checkpoint(tiny_detector)["categories"]
    assert [(c["name"], c["id"]) for c in categories] == list(CATEGORY_IDS.items())


def test_without_proposals_it_says_how_to_get_them(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="init.train_proposals=DIR.*init.proposer"):
        build(load_config(tiny_config), tmp_path / "multipathnet")


def test_proposals_of_other_images_are_refused(tiny_config, stores, tmp_path):
    train = stores[0].split("=")[1]
    config = load_config(tiny_config, [*stores, f"init.val_proposals={train}"])
    with pytest.raises(ValueError, match="other images than .*val.*: image_id 1 has"):
        build(config, tmp_path / "run")  # ids 1 to 8 are in both
    coco = build(load_config(tiny_config, stores), tmp_path / "run").val_data.coco
    coco.image_ids[:] += 1000
    boxes = ProposalStore(train).boxes()
    with pytest.raises(ValueError, match="no id is in both"):
        roi_dataset(config.multipathnet, coco, tmp_path, boxes, seed=0)
