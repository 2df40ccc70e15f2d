"""--precision: what is chosen, and networks in bfloat16 beside those in full precision."""

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch

from datasets.images import read_image
from models.build import build_deepmask, build_multipathnet, build_sharpmask
from models.deepmask import DeepMask
from models.inference import optimize_for_inference
from models.sharpmask import DenseNetwork
from models.trunk import TRUNKS, TrunkConfig, build_trunk
from pipeline import precision
from pipeline.inference.detect import load_detector
from pipeline.inference.propose import load_proposer
from pipeline.precision import FULL_PRECISION, choose_precision, to_bfloat16
from pipeline.recipe import load_config
from pipeline.training.run_log import read_metrics
from tests.pipeline.training.runs import CPU, interrupt, last_checkpoint, train

CUDA = torch.device("cuda")
SMALL = {"patch_size": 96, "mask_size": 14, "reduction": 16, "embedding": 32, "score_hidden": 32}


@pytest.fixture
def image(shapes_directory) -> np.ndarray:
    return read_image(sorted((shapes_directory / "images" / "val").iterdir())[0])


@pytest.mark.parametrize(
    ("asked", "device", "amp", "units", "speedup", "chosen"),
    [
        ("fp32", CUDA, True, True, 9.0, "fp32"),
        ("bf16", CPU, False, False, 0.1, "bf16"),
        (None, CUDA, True, False, 0.1, "bf16"),
        (None, CUDA, False, False, 9.0, "fp32"),
        (None, CPU, True, True, 9.0, "fp32"),
        ("auto", CUDA, True, False, 0.1, "bf16"),
        ("auto", CPU, True, False, 9.0, "fp32"),
        ("auto", CPU, True, True, 1.1, "fp32"),
        ("auto", CPU, True, True, 1.8, "bf16"),
    ],
)
def test_the_precision_that_is_chosen(
    asked, device, amp, units, speedup, chosen, monkeypatch, capsys
):
    monkeypatch.setattr(precision, "has_units", lambda: units)
    monkeypatch.setattr(precision, "_speedup", lambda network, train, side: speedup)
    dtype = choose_precision(asked, build_trunk("tiny"), device, amp=amp)
    assert dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[chosen]
    said = capsys.readouterr().out
    measured = asked == "auto" and device == CPU and units
    assert said == (
        f"precision: {chosen} (bf16 is {speedup} times as fast as fp32)\n" if measured else ""
    )


@pytest.mark.parametrize("train", [False, True])
def test_auto_measures_a_network_and_leaves_it_as_it_is(train, monkeypatch):
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    trunk = build_trunk("tiny")
    network = trunk if train else DenseNetwork(DeepMask(trunk, **SMALL).eval(), None)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert precision._speedup(network, train, side=192) > 0
    assert all(torch.equal(before[n], v) for n, v in network.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in network.parameters())


def test_detect_measures_once_for_both_networks(
    tiny_detector, tiny_sharpmask, shapes_directory, call_tool, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(precision, "has_units", lambda: True)
    monkeypatch.setattr(precision, "_speedup", lambda network, train, side: 1.8)
    [image, *_] = sorted((shapes_directory / "images" / "val").iterdir())
    arguments = ("--checkpoint", tiny_detector, "--proposal-checkpoint", tiny_sharpmask)
    assert call_tool("detect", *arguments, "--images", image, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("precision: bf16") == 1


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("folded", [False, True])
@torch.inference_mode()
def test_every_trunk_runs_in_bfloat16(name, folded):
    torch.manual_seed(0)
    trunk = build_trunk(name).eval()
    images = torch.randn(1, 3, 64, 96)
    expected = trunk(images)[-1]
    if folded:
        optimize_for_inference(trunk)
    to_bfloat16(trunk)
    found = trunk(images.bfloat16())[-1]
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.99


@pytest.mark.parametrize("kind", ["shared", "separate", "sharpmask", "multipathnet"])
def test_layers_that_give_scores_stay_in_full_precision(kind):
    trunk = TrunkConfig(name="tiny", weights=None)
    if kind == "multipathnet":
        network = build_multipathnet(trunk, num_classes=3, width=8, features=16)
    elif kind == "sharpmask":
        network = build_sharpmask(trunk, deepmask=SMALL, km=16, ks=16)
    else:
        network = build_deepmask(trunk, **SMALL, separate_heads=kind == "separate")
    to_bfloat16(network)
    kept = {n for n, p in network.named_parameters() if p.dtype == torch.float32}
    assert kept == {
        n for n, _ in network.named_parameters() if set(n.split(".")) & set(FULL_PRECISION)
    }
    assert kept and all(
        b.dtype == torch.float32 for n, b in network.named_buffers() if "delta" in n
    )


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_sharpmask"])
def test_proposals_in_bfloat16_are_nearly_those_in_full_precision(checkpoint, image, request):
    path = request.getfixturevalue(checkpoint)
    proposers = [load_proposer(path, CPU, precision=p)[0] for p in ("fp32", "bf16")]
    scale = proposers[1].run_scale(image, 0.0)
    assert scale.embeddings.dtype == torch.bfloat16 and scale.score_logits.dtype == torch.float32
    full, half = (proposer(image) for proposer in proposers)
    assert len(full) == len(half) > 20
    np.testing.assert_allclose(full.scores, half.scores, atol=5e-3)
    ious = coco_mask.iou(*([p.rle(i) for i in range(20)] for p in (half, full)), [0] * 20)
    assert np.median(ious.max(axis=1)) > 0.95


def test_detections_in_bfloat16_have_nearly_the_same_scores(tiny_detector, tiny_sharpmask, image):
    proposals = load_proposer(tiny_sharpmask, CPU)[0](image)
    # None is dropped for its overlap, which may be on either side of a limit.
    options = {"score_threshold": 0.0, "num_proposals": 20, "nms": 1.0}
    full, half = (
        load_detector(tiny_detector, CPU, overrides=options, precision=p)[0](image, proposals)
        for p in ("fp32", "bf16")
    )
    assert len(full) == len(half) > 0 and half.scores.dtype == full.scores.dtype == np.float64
    np.testing.assert_allclose(np.sort(full.scores), np.sort(half.scores), atol=5e-3)


def test_a_run_in_bfloat16_learns_and_is_resumed_in_it(tiny_config, tmp_path):
    config = load_config(tiny_config)
    losses = {}
    for name in ("fp32", "bf16"):
        run = tmp_path / name
        train("deepmask", config, run, precision=name)
        losses[name] = [
            line["loss"] for line in read_metrics(run / "metrics.jsonl") if "loss" in line
        ]
        assert last_checkpoint(run)["precision"] == name
    assert losses["fp32"] != losses["bf16"]
    np.testing.assert_allclose(losses["fp32"], losses["bf16"], rtol=0.01)
    interrupt("deepmask", config, tmp_path / "resumed", steps=1, precision="bf16")
    train("deepmask", config, tmp_path / "resumed", resume=True)  # asks for nothing
    whole, resumed = (last_checkpoint(tmp_path / run) for run in ("bf16", "resumed"))
    assert resumed["precision"] == "bf16"
    assert all(torch.equal(resumed["model"][n], v) for n, v in whole["model"].items())
