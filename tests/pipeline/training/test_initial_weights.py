"""init.weights: a stage starts from a checkpoint's weights, also a converted one's.

Mistakes of the command line are in tests/test_user_errors.py.
"""

from pathlib import Path

import pytest
import torch

from datasets.shapes import CATEGORY_IDS
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.recipe import config_from_dict, load_config
from pipeline.torch7.convert import convert_file
from pipeline.training.engine import fit
from pipeline.training.stages import build_stage
from tests.real_data import TORCH7

CPU = torch.device("cpu")
REFERENCE = TORCH7
FILES = {
    "deepmask": "deepmask_sharpmask/deepmask.t7",
    "sharpmask": "deepmask_sharpmask/sharpmask.t7",
    "multipathnet": "multipathnet/model.t7",
}
CATEGORY_WEIGHTS = ("classify.", "regress.", "delta_")


@pytest.fixture
def checkpoints(tiny_checkpoint, tiny_sharpmask, tiny_detector) -> dict[str, Path]:
    return {
        "deepmask": tiny_checkpoint, "sharpmask": tiny_sharpmask, "multipathnet": tiny_detector
    }  # fmt: skip


@pytest.fixture
def stores(tiny_detector) -> list[str]:
    folder = tiny_detector.parents[1] / "proposals"
    return [f"init.{split}_proposals={folder / split}" for split in ("train", "val")]


def weights_of(stage) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in stage.model.state_dict().items()}


def same(one: dict, other: dict) -> list[str]:
    """The names of equal tensors."""
    return [name for name in one if torch.equal(one[name], other[name])]


@pytest.mark.parametrize("name", FILES)
def test_starts_from_its_own_checkpoint_with_a_new_optimizer(
    name, checkpoints, tiny_config, stores, tmp_path, capsys
):
    config = load_config(tiny_config, [*stores, "seed=3", f"init.weights={checkpoints[name]}"])
    stage = build_stage(name, config, tmp_path / name, CPU)
    content = load_checkpoint(checkpoints[name])
    assert len(same(stage.model.state_dict(), content["model"])) == len(content["model"])
    assert capsys.readouterr().out.splitlines()[-1] == f"weights from {checkpoints[name]}"
    fit(stage, config, tmp_path / name, device=CPU)
    trained = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
    assert trained["step"] == 2
    assert len(same(trained["model"], content["model"])) < len(content["model"])


def test_a_resumed_run_goes_on_with_its_own_weights(checkpoints, tiny_config, tmp_path):
    start, output = tmp_path / "start.pt", tmp_path / "run"
    start.write_bytes(checkpoints["deepmask"].read_bytes())
    config = load_config(tiny_config, [f"init.weights={start}", "deepmask.optim.lr=0.1"])
    fit(build_stage("deepmask", config, output, CPU), config, output, device=CPU)
    before = load_checkpoint(output / "checkpoints" / "last.pt")["model"]
    start.unlink()  # what it started from may be gone by then
    stage = build_stage("deepmask", config, output, CPU)
    fit(stage, config, output, device=CPU, resume=True)
    assert len(same(stage.model.state_dict(), before)) == len(before)


def test_a_detector_of_other_categories_gets_new_outputs(
    checkpoints, tiny_config, stores, tmp_path, capsys
):
    content = load_checkpoint(checkpoints["multipathnet"])
    content["categories"][0]["name"] = "of another dataset"
    save_checkpoint(tmp_path / "other.pt", content)
    config = load_config(tiny_config, [*stores, "seed=3", f"init.weights={tmp_path / 'other.pt'}"])
    stage = build_stage("multipathnet", config, tmp_path / "run", CPU)
    printed = capsys.readouterr().out.splitlines()
    count = len(content["categories"])
    line = f"its {count} categories are not the dataset's {count}"
    assert sum(line in each for each in printed) == 1
    equal = same(weights_of(stage), content["model"])
    rest = set(content["model"]) - set(equal)
    assert {"classify.weight", "regress.weight"} <= rest
    assert all(name.startswith(CATEGORY_WEIGHTS) for name in rest)


def test_no_weights_are_looked_for_beside_those(checkpoints, tiny_config, stores, tmp_path):
    """Neither ImageNet's nor a DeepMask's nor a proposer's trunk."""
    overrides = ["multipathnet.trunk.weights=deepmask", *stores]
    config = load_config(tiny_config, [*overrides, f"init.weights={checkpoints['multipathnet']}"])
    build_stage("multipathnet", config, tmp_path / "run", CPU)
    config = load_config(
        tiny_config, ["trunk.weights=nowhere.pt", f"init.weights={checkpoints['deepmask']}"]
    )
    build_stage("deepmask", config, tmp_path / "run", CPU)


# The rate is for random weights, on which losses are large.
SMALL = ("lr=1e-7", "batch_size=2", "batches_per_epoch=2", "epochs=1", "validation_batches=1")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder of the reference networks as checkpoints, with their recipes."""
    if not REFERENCE.is_dir():
        pytest.skip(f"{REFERENCE} is not there")
    folder = tmp_path_factory.mktemp("converted")
    for name, file in FILES.items():
        lines = convert_file(REFERENCE / file, folder / f"{name}.pt")
        assert lines[-1].endswith(f"{name}.pt.yaml")
    return folder


@pytest.mark.parametrize("name", FILES)
def test_training_starts_from_a_converted_file(
    name, converted, tiny_recipe, stores, tmp_path, call_tool, capsys
):
    data = [f"data.{s}.{k}={tiny_recipe['data'][s][k]}" for s in ("train", "val")
            for k in ("annotations", "images")]  # fmt: skip
    small = [f"{name}.optim.{setting}" for setting in SMALL]
    if name == "multipathnet":
        small += [*stores, "multipathnet.sampling.short_side=160"]
    status = call_tool(
        "train_stage", "--stage", name, "--config", converted / f"{name}.pt.yaml",
        "--output", tmp_path / name, "--device", "cpu",
        "--set", *data, "data.workers=0", *small, f"init.weights={converted / f'{name}.pt'}",
    )  # fmt: skip
    assert status in (0, None)
    anew = f"its 80 categories are not the dataset's {len(CATEGORY_IDS)}" in capsys.readouterr().out
    assert anew == (name == "multipathnet")
    start = load_checkpoint(converted / f"{name}.pt")["model"]
    trained = load_checkpoint(tmp_path / name / "checkpoints" / "last.pt")
    assert trained["step"] == 2 and trained["model"].keys() == start.keys()
    start = {k: v for k, v in start.items() if not k.startswith(CATEGORY_WEIGHTS)}
    assert len(same(start, trained["model"])) < len(start)
    for key, value in start.items():
        torch.testing.assert_close(trained["model"][key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_a_recipe_is_of_its_networks_settings(converted):
    for name in FILES:
        content = load_checkpoint(converted / f"{name}.pt")
        recipe = load_config(converted / f"{name}.pt.yaml")
        assert recipe == config_from_dict(content["config"], source="the test")
