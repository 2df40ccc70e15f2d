"""The SharpMask stage: frozen DeepMask, a checkpoint that stands alone, resuming, mistakes."""

import contextlib
import shutil

import numpy as np
import pytest
import torch
from pipeline.load import load_mask_network, load_proposer
from pipeline.training.patch_stages import SharpMaskStage

from datasets.images import read_image
from pipeline.checkpoint import load_checkpoint
from pipeline.recipe import load_config
from pipeline.training import engine
from pipeline.training.engine import Interrupted, fit
from pipeline.training.run_log import read_metrics
from pipeline.training.stages import build_stage

CPU = torch.device("cpu")


def test_deepmask_is_bit_identical_after_training_and_the_refinement_is_not(
    tiny_config, tiny_checkpoint, tmp_path
):
    config = load_config(tiny_config, ["sharpmask.optim.batches_per_epoch=4"])
    stage = SharpMaskStage(config, tiny_checkpoint)
    start = {name: value.clone() for name, value in stage.model.state_dict().items()}
    best = fit(stage, config, tmp_path / "run", device=CPU)
    trained, original = load_checkpoint(best)["model"], load_checkpoint(tiny_checkpoint)["model"]
    frozen = {k.removeprefix("deepmask."): v for k, v in trained.items() if k[:9] == "deepmask."}
    assert frozen.keys() == original.keys()
    assert all(torch.equal(frozen[name], original[name]) for name in original)
    for part in ("encode.", "predict.", *(f"refinements.{i}." for i in range(4))):
        names = [name for name in trained if name.startswith(part)]
        assert any(not torch.equal(trained[name], start[name]) for name in names), part


def test_checkpoint_stands_alone_and_gives_deepmasks_masks_without_refinement(
    tiny_sharpmask, tiny_checkpoint, shapes_directory, tmp_path
):
    moved = tmp_path / "alone.pt"
    shutil.copy(tiny_sharpmask, moved)
    image = read_image(next((shapes_directory / "images" / "val").iterdir()))
    coarse = load_proposer(moved, CPU, refine=False)[0](image)
    deepmask = load_proposer(tiny_checkpoint, CPU)[0](image)
    assert coarse.counts == deepmask.counts
    assert load_proposer(moved, CPU)[0].refinement is not None
    np.testing.assert_array_equal(coarse.scores, deepmask.scores)


def test_settings_tell_refined_from_coarse_and_zoomed_from_not(tiny_sharpmask):
    settings = [
        load_proposer(tiny_sharpmask, CPU, **options)[1]
        for options in ({}, {"refine": False}, {"zoom": True}, {"nms": 0.5})
    ]
    assert all(a != b for n, a in enumerate(settings) for b in settings[:n])
    assert settings[2]["octaves"] == [*settings[0]["octaves"], 1.0]


def test_the_deepmask_run_beside_the_output_is_found(tiny_config, tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "deepmask")
    config = load_config(tiny_config)
    stage = build_stage("sharpmask", config, tmp_path / "sharpmask", CPU)
    expected, _ = load_mask_network(tiny_run / "checkpoints" / "best.pt")
    for own, theirs in zip(
        stage.model.deepmask.state_dict().values(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(own, theirs)


def test_resumed_equals_uninterrupted_without_the_deepmask_run(
    tiny_config, tiny_run, tmp_path, monkeypatch
):
    """To the bit; the run's own checkpoint is enough, so the DeepMask run may be gone."""
    config = load_config(
        tiny_config, ["sharpmask.optim.batches_per_epoch=3", "sharpmask.optim.epochs=2"]
    )
    shutil.copytree(tiny_run, tmp_path / "deepmask")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(build_stage("sharpmask", config, whole, CPU), config, whole, device=CPU)

    class StopAfterTwo(dict):
        steps = 2

        def __getitem__(self, _):
            self.steps -= 1
            return self.steps <= 0

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(engine, "_stop_signals", lambda: contextlib.nullcontext(StopAfterTwo()))
        fit(build_stage("sharpmask", config, parts, CPU), config, parts, device=CPU)
    shutil.rmtree(tmp_path / "deepmask")
    fit(build_stage("sharpmask", config, parts, CPU), config, parts, device=CPU, resume=True)
    first, second = (load_checkpoint(p / "checkpoints" / "last.pt") for p in (whole, parts))
    assert first["step"] == second["step"] == 6
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_validation_is_of_mask_patches_only(tiny_sharpmask):
    records = read_metrics(tiny_sharpmask.parents[1] / "metrics.jsonl")
    metrics = next(record for record in records if record["split"] == "val")
    assert "mean_iou" in metrics and "score_accuracy" not in metrics


def test_without_a_deepmask_it_says_how_to_get_one(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage deepmask --output .*init.deepmask|init"):
        build_stage("sharpmask", load_config(tiny_config), tmp_path / "sharpmask", CPU)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trunk.name=resnet18", "trunk.name tiny instead of resnet18"),
        ("deepmask.patch_size=64", "deepmask.patch_size 96 instead of 64"),
    ],
)
def test_a_deepmask_of_another_model_is_described(
    tiny_config, tiny_checkpoint, tmp_path, override, words
):
    config = load_config(tiny_config, [override])
    with pytest.raises(ValueError, match=words):
        SharpMaskStage(config, tiny_checkpoint)
