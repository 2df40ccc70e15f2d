"""All stages, with trunks of every family, train, validate and resume on the pretended GPU.

Without mixed precision their results are the CPU's.
"""

import copy
from dataclasses import replace

import pytest
import torch

from pipeline.recipe import config_from_dict
from pipeline.training.engine import fit
from pipeline.training.run_log import read_metrics
from tests.pipeline.training.runs import CPU, interrupt, last_checkpoint, make_stage, train
from tests.pretend_cuda import CUDA, pretended_cuda

STAGES = ("deepmask", "sharpmask", "multipathnet")
TIMES = ("time", "patches_per_second", "images_per_second", "minutes_left")


@pytest.fixture
def configure(tiny_recipe, tiny_checkpoint, stores):
    """A config of a stage, by settings of its optimizer and of the others."""

    def configure(name, *, optim=None, trunk=None, stage=None):
        values = copy.deepcopy(tiny_recipe)
        values["init"] = {"deepmask": str(tiny_checkpoint)}
        values["init"] |= dict(each.removeprefix("init.").split("=") for each in stores)
        values[name]["optim"] |= optim or {}
        values[name] |= stage or {}
        (values["multipathnet"] if name == "multipathnet" else values)["trunk"] |= trunk or {}
        return config_from_dict(values, source="test")

    return configure


def on_gpu(run, *arguments, **options):
    with pretended_cuda() as gpu:
        run(*arguments, **options, device=CUDA)
    return gpu


def losses_of(path):
    lines = read_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_near(a, b):
    """Two runs' weights and metrics, but for rounding."""
    one, two = last_checkpoint(a), last_checkpoint(b)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    for line, other in zip(losses_of(a), losses_of(b), strict=True):
        assert line.pop("split") == other.pop("split")
        assert line == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "optimizer"), [("deepmask", "adamw"), ("sharpmask", "sgd"), ("multipathnet", "adamw")]
)
def test_a_run_equals_the_cpus_and_resumes_to_the_bit(name, optimizer, configure, tmp_path):
    config = configure(
        name, optim={"optimizer": optimizer, "amp": False, "epochs": 2, "clip_gradient": 1.0},
        stage={"frozen_epochs": 1} if name == "multipathnet" else None,
    )  # fmt: skip
    train(name, config, tmp_path / "cpu")
    on_gpu(train, name, config, tmp_path / "gpu")
    assert_near(tmp_path / "cpu", tmp_path / "gpu")
    on_gpu(interrupt, name, config, tmp_path / "parts", steps=3)
    on_gpu(train, name, config, tmp_path / "parts", resume=True)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "gpu")
    whole, parts = (last_checkpoint(tmp_path / each) for each in ("gpu", "parts"))
    assert all(torch.equal(value, parts["model"][key]) for key, value in whole["model"].items())


@pytest.mark.parametrize("name", STAGES)
def test_with_mixed_precision_it_learns_nearly_the_same(name, configure, tmp_path):
    for amp in (True, False):
        config = configure(name, optim={"amp": amp, "batches_per_epoch": 3})
        gpu = on_gpu(train, name, config, tmp_path / str(amp))
        low = {name for name, types in gpu.calls if torch.bfloat16 in types}
        assert ("aten::convolution" in low) == amp
        assert not {each for each in low if "loss" in each or "soft" in each}
    one, two = (losses_of(tmp_path / str(amp)) for amp in (True, False))
    assert [line["loss"] for line in one[:-1]] == pytest.approx(
        [line["loss"] for line in two[:-1]], rel=0.05
    )


@pytest.mark.parametrize(
    ("name", "trunk", "stage"),
    [
        ("deepmask", {"name": "tiny"}, {"separate_heads": True}),
        ("deepmask", {"name": "resnet18", "width": 8}, {}),
        ("deepmask", {"name": "resnet50", "width": 8}, {}),
        ("deepmask", {"name": "vgg11"}, {}),
        ("deepmask", {"name": "densenet121"}, {}),
        ("multipathnet", {"name": "caffenet", "frozen_levels": 0}, {}),
        ("multipathnet", {"name": "resnet18", "width": 8}, {"head": "layer4", "roi_pool": "lua"}),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else value,
)
def test_with_every_family_of_trunks(name, trunk, stage, configure, tmp_path):
    small = {"batch_size": 2, "batches_per_epoch": 2, "validation_batches": 1}
    if name == "deepmask":
        stage |= {"patch_size": 32, "sampling": {"patches_per_image": 2}}
    config = configure(name, optim=small | {"lr": 1e-4}, trunk=trunk, stage=stage)
    made = make_stage(name, config, tmp_path / "made")
    runs = {each: copy.deepcopy(made) for each in ("cpu", "gpu", "amp")}
    for each in ("cpu", "gpu"):
        runs[each].optim = replace(made.optim, amp=False)
    fit(runs["cpu"], config, tmp_path / "cpu", device=CPU)
    with pretended_cuda():
        for each in ("gpu", "amp"):
            fit(runs[each], config, tmp_path / each, device=CUDA)
    assert_near(tmp_path / "cpu", tmp_path / "gpu")
    losses, low = (losses_of(tmp_path / each)[0]["loss"] for each in ("cpu", "amp"))
    assert low == pytest.approx(losses, rel=0.02)


def test_a_loss_that_is_not_finite_stops_the_run_with_the_minibatch_for_any_machine(
    configure, tmp_path
):
    config = configure("deepmask", optim={"lr": 1e38})
    with pretended_cuda(), pytest.raises(FloatingPointError, match="not finite at step 1"):
        train("deepmask", config, tmp_path, device=CUDA)
    (path,) = tmp_path.glob("non_finite_batch_*.pt")
    [part] = torch.load(path, map_location="cpu", weights_only=True)["parts"]
    assert part["patches"].shape == (8, 3, 128, 128)
