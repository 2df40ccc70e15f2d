"""Scales and patch size `auto`: chosen by training, kept in checkpoints, taken by what proposes."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
import yaml

from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.command import parse_scales
from pipeline.config import Config
from pipeline.inference.propose import load_proposer
from pipeline.networks import make_deepmask
from pipeline.recipe import config_from_dict, config_to_dict, load_config
from pipeline.sizes import choose_by_data
from pipeline.training.prepare import choose_sizes, prepare_stage
from tests.pipeline.training.runs import CPU, train
from tests.test_old_checkpoints import OLD

SCALES = [0.0, 0.5, 1.0, 1.5, 2.0]  # of objects of 11 to 30 px in a patch of 64


@pytest.fixture(scope="module")
def small_objects(tmp_path_factory, tiny_recipe):
    """A recipe of images full of squares of 11 to 30 px, patch size and scales auto."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    data = {}
    for split, count in (("train", 12), ("val", 2)):
        images, annotations = [], []
        (folder / split).mkdir()
        for image_id in range(1, count + 1):
            image = np.full((96, 96, 3), 120, np.uint8)
            for side in np.linspace(11, 30, 12).tolist():
                x1, y1 = rng.uniform(0, 96 - side, 2).tolist()
                x2, y2 = x1 + side, y1 + side
                image[int(y1) : int(y2), int(x1) : int(x2)] = 9
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": 1,
                    "bbox": [x1, y1, side, side], "area": side**2, "iscrowd": 0,
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                })  # fmt: skip
            cv2.imwrite(str(folder / split / f"{image_id}.jpg"), image)
            name = f"{image_id}.jpg"
            images.append({"id": image_id, "file_name": name, "height": 96, "width": 96})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 1, "name": "cell"}]
        (folder / f"{split}.json").write_text(json.dumps(content))
        data[split] = {"annotations": str(folder / f"{split}.json"), "images": str(folder / split)}
    sizes = ("patch_size", "target_size", "mask_size")
    deepmask = {k: v for k, v in tiny_recipe["deepmask"].items() if k not in sizes}
    recipe = tiny_recipe | {"data": data | {"workers": 0}, "propose": {"num_proposals": 20}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"deepmask": {**deepmask, "patch_size": "auto"}}))
    return path


@pytest.fixture(scope="module")
def run(small_objects, tmp_path_factory):
    """The folder of a DeepMask's and a SharpMask's run on it."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("deepmask", "sharpmask"):
        train(name, load_config(small_objects), folder / name)
    return folder


@pytest.mark.parametrize("stage", ["deepmask", "sharpmask"])
def test_a_run_holds_the_numbers_that_were_chosen(run, stage):
    checkpoint = load_checkpoint(run / stage, stage=stage)
    saved = load_config(run / stage / "config.yaml")
    assert config_from_dict(checkpoint["config"], source="it") == saved
    c = saved.deepmask
    assert (c.patch_size, c.target_size, c.mask_size) == (64, 44, 28)
    for sampling in (c.sampling, saved.sharpmask.sampling):
        assert (sampling.jitter_shift, sampling.negative_distance) == (6.4, 19.2)
    assert checkpoint["object_sides"]["count"] == 144
    assert saved.propose.log2_scales is None
    assert checkpoint["config"]["propose"]["log2_scales"] == "auto"


@pytest.mark.parametrize("stage", ["deepmask", "sharpmask"])
def test_proposals_are_made_at_the_scales_of_the_training_objects(
    run, stage, small_objects, tmp_path, call_tool, capsys
):
    images = load_config(small_objects).data.val.images
    options = ["--checkpoint", run / stage, "--images", images, "--device", "cpu"]
    for scales, expected, why in (
        ([], SCALES, "96% of 144 training objects"),
        (["--scales", "auto"], SCALES, "96% of 144 training objects"),
        (["--scales", "-1", "0", ".5"], [-1.0, -0.5, 0.0], "as asked for"),
    ):
        store = tmp_path / "-".join(["store", *scales])
        assert call_tool("propose", *options, "--output", store, *scales) == 0
        assert json.loads((store / "settings.json").read_text())["log2_scales"] == expected
        assert why in capsys.readouterr().out.splitlines()[0]


def test_a_recipe_that_names_scales_and_old_checkpoints_keep_them(run, tmp_path, capsys):
    checkpoint = load_checkpoint(run / "deepmask")
    checkpoint["config"]["propose"]["log2_scales"] = [-1.0, 0.0, 1.0]
    save_checkpoint(tmp_path / "named.pt", checkpoint)
    assert load_proposer(tmp_path / "named.pt", CPU)[1]["log2_scales"] == [-1.0, 0.0]
    assert "the checkpoint's config" in capsys.readouterr().out
    assert load_proposer(tmp_path / "named.pt", CPU, log2_scales="auto")[1]["log2_scales"] == SCALES

    values = load_checkpoint(OLD / "deepmask.pt")["config"]
    named = config_from_dict(values, source="the old one").propose.log2_scales
    assert named is not None
    settings = load_proposer(OLD / "deepmask.pt", CPU)[1]
    assert settings["log2_scales"][0] == named[0] and settings["log2_scales"][-1] == named[1]
    published = load_proposer(OLD / "deepmask.pt", CPU, log2_scales="auto")[1]["log2_scales"]
    assert (published[0], published[-1], len(published)) == (-2.5, 0.5, 7)
    assert "does not say how large its objects are" in capsys.readouterr().out


def test_a_broken_distribution_is_one_line(run, tmp_path):
    checkpoint = load_checkpoint(run / "deepmask") | {"object_sides": torch.zeros(3)}
    save_checkpoint(tmp_path / "broken.pt", checkpoint)
    with pytest.raises(ValueError, match="broken.pt: object_sides must be"):
        load_proposer(tmp_path / "broken.pt", CPU)


def test_the_detector_takes_the_proposers_scales_and_patch(run, small_objects, tmp_path):
    config = load_config(small_objects, [f"init.proposer={run / 'deepmask'}"])
    config = choose_sizes("multipathnet", config, tmp_path)
    assert config.deepmask.patch_size == 64
    prepare_stage("multipathnet", config, tmp_path, CPU)
    settings = json.loads((tmp_path / "proposals" / "train" / "settings.json").read_text())
    assert settings["log2_scales"] == SCALES
    stores = {f"{s}_proposals": str(tmp_path / "proposals" / s) for s in ("train", "val")}
    given = load_config(small_objects)
    given = replace(given, init=replace(given.init, **stores))
    assert choose_sizes("multipathnet", given, tmp_path / "other") == given  # no network is known


def test_a_run_goes_on_and_is_fine_tuned_with_its_own_patch(run, small_objects, tmp_path, capsys):
    last = run / "deepmask" / "checkpoints" / "last.pt"
    longer = ["deepmask.optim.epochs=2", "propose.log2_scales=[-1,0,0.5]"]
    other = ["deepmask.sampling.min_side=29"]  # of larger objects
    for overrides, output in (
        ([f"init.weights={last}", *other], tmp_path / "tuned"),
        ([*longer, *other], tmp_path / "tuned"),
    ):
        config = load_config(small_objects, overrides)
        path = train("deepmask", config, output, resume=output.exists())
        assert load_checkpoint(path)["config"]["deepmask"]["patch_size"] == 64
    out = capsys.readouterr().out
    assert "deepmask.patch_size auto: 64" in out and "propose.log2_scales auto -> [-1.0" in out
    assert choose_by_data(load_config(small_objects, other)).deepmask.patch_size > 64


def test_lengths_that_a_recipe_names_stay(small_objects, capsys):
    named = [f"deepmask.{setting}" for setting in ("target_size=50", "mask_size=20")]
    config = choose_by_data(
        load_config(small_objects, [*named, "sharpmask.sampling.jitter_shift=3"])
    )
    assert (config.deepmask.target_size, config.deepmask.mask_size) == (50, 20)
    assert config.sharpmask.sampling.jitter_shift == 3
    assert config.deepmask.sampling.jitter_shift == 6.4
    line = capsys.readouterr().out
    assert line.startswith("deepmask.patch_size auto: 64, target_size 50, mask_size 20")
    assert "scales up to 2 (log2), with a patch of 160 up to 3.5" in line
    number = load_config(small_objects, ["deepmask.patch_size=128"])
    assert choose_by_data(number) is number


def test_auto_is_a_word_of_recipes(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "deepmask: {patch_size: auto}\npropose: {log2_scales: auto}\n"
        "multipathnet: {sampling: {proposal_log2_scales: null}}\n"
    )
    config = load_config(path)
    saved = config_to_dict(config)
    assert saved["deepmask"]["patch_size"] == saved["propose"]["log2_scales"] == "auto"
    assert config_from_dict(saved, source="it") == config
    assert config.propose.log2_scales is config.multipathnet.sampling.proposal_log2_scales is None
    with pytest.raises(ValueError, match="chosen by training"):
        make_deepmask(config)
    assert config_to_dict(Config())["deepmask"]["patch_size"] == 160


@pytest.mark.parametrize("value", ["many", "0", "-16", "1.5", "true", "[96]", "'96'", "null"])
def test_other_patch_sizes_are_one_line(value):
    with pytest.raises(ValueError, match="deepmask.patch_size must be a number of pixels or auto"):
        load_config("configs/shapes.yaml", [f"deepmask.patch_size={value}"])


@pytest.mark.parametrize("words", ["auto 1", "-1 0", "x y z", "1 2 3 4", "Auto"])
def test_other_scales_are_one_line(words):
    with pytest.raises(ValueError, match=f"--scales must be auto or MIN MAX STEP, got {words}"):
        parse_scales(words.split())
    with pytest.raises(ValueError, match="propose.log2_scales must be"):
        load_config("configs/shapes.yaml", ["propose.log2_scales=all"])
    assert parse_scales(None) is None and parse_scales(["auto"]) == "auto"
    assert parse_scales(["-1", "0", ".5"]) == (-1, 0, 0.5)
