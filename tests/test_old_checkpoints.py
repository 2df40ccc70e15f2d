"""Checkpoints of the version before this one load, give the same outputs, and go on training.

tests/old_checkpoints has one of each stage (a narrow ResNet-18; padding, pooling and batch norm
that matter), inputs, and the outputs of the version that wrote them.
"""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import load_checkpoint
from pipeline.config import DataConfig, SplitConfig
from pipeline.networks import load_network
from pipeline.recipe import config_from_dict
from pipeline.training.engine import fit
from pipeline.training.stages import DeepMaskStage

ROOT = Path(__file__).resolve().parents[1]
OLD = ROOT / "tests" / "old_checkpoints"
STAGES = ("deepmask", "sharpmask", "multipathnet")
HUB = """
import sys, torch
root, old = sys.argv[1:3]
known, outputs = torch.load(f"{old}/outputs.pt", weights_only=True), {}
for name in ("deepmask", "sharpmask", "multipathnet"):
    model = torch.hub.load(root, name, source="local", checkpoint=f"{old}/{name}.pt")
    inputs = ("images", "rois") if name == "multipathnet" else ("patches",)
    with torch.no_grad():
        outputs[name] = model(*(known[key] for key in inputs))
torch.save(outputs, "outputs.pt")
"""


@pytest.fixture(scope="module")
def known() -> dict:
    return torch.load(OLD / "outputs.pt", weights_only=True)


@pytest.fixture(scope="module")
def hub_outputs(tmp_path_factory) -> dict:
    """Of the networks that torch.hub loads, in a process that has nothing else of ours."""
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, "-c", HUB, ROOT, OLD], cwd=folder, check=True, timeout=120)
    return torch.load(folder / "outputs.pt", weights_only=True)


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("stage", STAGES)
@torch.no_grad()
def test_outputs_are_those_of_the_old_version(stage, known):
    model, _, _ = load_network(OLD / f"{stage}.pt", stage=stage)
    inputs = ("images", "rois") if stage == "multipathnet" else ("patches",)
    assert_same(model(*(known[key] for key in inputs)), known[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_through_torch_hub_are_those_of_the_old_version(stage, known, hub_outputs):
    assert_same(hub_outputs[stage], known[stage])


def test_training_goes_on(shapes_directory, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    last = Path(shutil.copy(OLD / "deepmask.pt", tmp_path / "checkpoints" / "last.pt"))
    old = load_checkpoint(last)
    splits = {
        split: SplitConfig(
            annotations=str(shapes_directory / "annotations" / f"instances_{split}.json"),
            images=str(shapes_directory / "images" / split),
        )
        for split in ("train", "val")
    }
    config = config_from_dict(old["config"], source="the old config")
    optim = replace(config.deepmask.optim, epochs=2)
    deepmask = replace(config.deepmask, optim=optim)
    config = replace(config, data=DataConfig(**splits, workers=0), deepmask=deepmask)
    stage = DeepMaskStage(config)
    fit(stage, config, tmp_path, device=torch.device("cpu"), resume=True)
    # The optimizer's state belongs to parameters by their order.
    names = [name for name, _ in stage.model.named_parameters()]
    assert [name for name in old["model"] if name in names] == names
    new = load_checkpoint(last)
    before, after = (checkpoint["optimizer"]["state"] for checkpoint in (old, new))
    assert before.keys() <= after.keys()
    for steps, checkpoint, state in ((2, old, before), (4, new, after)):
        assert steps == checkpoint["step"] == max(moments["step"] for moments in state.values())
    assert new["model"].keys() == old["model"].keys()
    assert not torch.equal(*(c["model"]["trunk.levels.0.conv1.weight"] for c in (old, new)))
