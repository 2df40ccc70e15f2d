"""Recipes: what comes with the project loads, old names load, mistakes name their source."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from pipeline import distributed
from pipeline.config import Config
from pipeline.full_run import run_pipeline
from pipeline.recipe import (
    RENAMED,
    RENAMED_VALUES,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
)
from pipeline.training.stages import check_batch
from tests.pipeline.training.runs import CPU

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def keys_of(config, prefix: str = "") -> set[str]:
    keys = set()
    for field in fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        keys |= keys_of(value, f"{key}.") if is_dataclass(value) else {key}
    return keys


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_project_load_and_survive_being_saved(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(f"configs/{path.name}")  # found below the project's root
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(config), source="test") == config
    assert not set(RENAMED) & set(_dotted(yaml.safe_load(path.read_text())))


def _dotted(values: dict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


@pytest.mark.parametrize("old", RENAMED)
def test_every_old_name_sets_the_new_one(old, tmp_path):
    new = RENAMED[old]
    assert new in keys_of(Config()) and old not in keys_of(Config())
    value = {
        "optimiser": "adamw", "thresholds": "[0.6]", "roi_bins": "rounded",
        "resampling": "corners", "scales": "[-1, 0, 0.5]", "proposal_scales": "[-1, 0, 0.5]",
        "score_scales": "[-1, 0]", "score_log2_scales": "[-1, 0]", "localisations": "2",
        "box_tower": "false", "normalise": "false", "draw_threshold": "true",
    }.get(old.rsplit(".", 1)[1], "0.35")  # fmt: skip
    (tmp_path / "empty.yaml").write_text("seed: 0\n")
    new_value = str(RENAMED_VALUES.get(value, value)).lower()
    configs = [
        load_config(tmp_path / "empty.yaml", [f"{key}={setting}"])
        for key, setting in ((old, value), (new, new_value))
    ]
    assert configs[0] == configs[1] != Config()


@pytest.mark.parametrize(
    ("overrides", "source"),
    [
        (["trunk.name=foo"], "--set trunk.name=foo: trunk.name must be one of"),
        (["seed=1", "sharpmask.km=7", "seed=2"], "--set sharpmask.km=7: sharpmask.km must be"),
        (["detect.nms=2"], "--set detect.nms=2: detect.nms must be above 0 and at most 1, got 2.0"),
        (["stages=[sharpmask]"], "stages must be a prefix of deepmask, sharpmask, multipathnet"),
        (["deepmask.optim.schedule=x"], "deepmask.optim.schedule must be one of steps, cosine"),
    ],
)
def test_a_wrong_value_names_its_source(overrides, source):
    with pytest.raises(ValueError) as error:
        load_config("configs/shapes.yaml", overrides)
    assert source in str(error.value)


def test_settings_that_only_fit_together_may_come_in_any_order():
    halves = ["sharpmask.km=24", "sharpmask.ks=24", "sharpmask.num_modules=3"]
    assert load_config("configs/coco.yaml", halves).sharpmask.km == 24


GPUS = {
    "coco": (1, 2, 4),
    "coco_vgg": (1, 2, 4),
    "voc": (1, 2),
    "voc_multipathnet": (1, 2),
    "coco_1gpu": (1,),
    "coco_8gpu": (1, 2, 4, 8),
}


@pytest.mark.parametrize(
    ("recipe", "processes"), [(name, n) for name, counts in GPUS.items() for n in counts]
)
def test_every_stage_of_a_recipe_runs_on_the_gpus_that_it_names(recipe, processes, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    config = load_config(f"configs/{recipe}.yaml")
    for stage in config.stages:
        check_batch(config, stage)


def test_a_pipeline_refuses_a_batch_of_its_last_stage_before_anything_is_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(distributed, "world_size", lambda: 8)
    with pytest.raises(ValueError, match=r"multipathnet.optim.batch_size 4 .* processes 8; .*=8"):
        run_pipeline("configs/coco.yaml", tmp_path / "run", overrides=[], device=CPU)
    assert not (tmp_path / "run").exists()


def test_a_mapping_replaces_the_one_before_like_any_value(tmp_path):
    """The rate of an epoch is that of the last drop: one that was not asked for would undo them."""
    (tmp_path / "a.yaml").write_text("deepmask: {optim: {lr_drops: {30: 0.1}}}\n")

    def drops(*overrides: str) -> dict:
        return load_config(tmp_path / "a.yaml", [*overrides]).deepmask.optim.lr_drops

    assert Config().deepmask.optim.lr_drops == {50: 0.5, 120: 0.1}
    assert drops() == {30: 0.1}
    assert drops("deepmask.optim.lr_drops={60: 0.2}") == {60: 0.2}
    assert drops("deepmask.optim.lr_drops={}") == {}
    assert drops("deepmask.optim.lr=0.1") == {30: 0.1}
