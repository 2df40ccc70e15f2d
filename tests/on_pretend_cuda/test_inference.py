"""Proposals and detections on the pretended GPU, without mixed precision those of the CPU."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from datasets.images import read_image
from pipeline.inference.detect import load_detector
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import load_proposer
from tests.pipeline.training.runs import CPU
from tests.pretend_cuda import CUDA, pretended_cuda

DETECT = {
    "short_sides": (160, 128), "flip": True, "box_refinement_iters": 1, "box_voting_iou": 0.5,
    "score_threshold": 0.0, "chunk": 16,
}  # fmt: skip


@pytest.fixture
def image(shapes_directory) -> np.ndarray:
    return read_image(sorted((shapes_directory / "images" / "val").iterdir())[0])


def propose(checkpoint, image, device, *, amp, align_corners):
    proposer, _ = load_proposer(checkpoint, device, precision="bf16" if amp else "fp32")
    proposer.options = replace(proposer.options, align_corners=align_corners)
    return proposer(image)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("stage", ["tiny_checkpoint", "tiny_sharpmask"])
def test_proposals_are_the_cpus(stage, align_corners, image, request):
    checkpoint = request.getfixturevalue(stage)
    expected = propose(checkpoint, image, CPU, amp=False, align_corners=align_corners)
    with pretended_cuda() as gpu:
        found = propose(checkpoint, image, CUDA, amp=False, align_corners=align_corners)
    assert not [types for _, types in gpu.calls if torch.bfloat16 in types]
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    assert found.rles == expected.rles and len(expected) > 0


@pytest.mark.parametrize("stage", ["tiny_checkpoint", "tiny_sharpmask"])
def test_with_mixed_precision_scores_stay_in_full_precision(stage, image, request):
    checkpoint = request.getfixturevalue(stage)
    expected = propose(checkpoint, image, CPU, amp=False, align_corners=False)
    with pretended_cuda() as gpu:
        found = propose(checkpoint, image, CUDA, amp=True, align_corners=False)
    convolutions = {types[0] for name, types in gpu.calls if name == "aten::convolution"}
    assert convolutions == {torch.bfloat16, torch.float32}  # the trunk's, the scores'
    assert not [
        name
        for name, types in gpu.calls
        if name in ("aten::sort.stable", "aten::sigmoid", "aten::lerp.Tensor")
        and torch.bfloat16 in types
    ]
    assert found.logits.dtype == np.float32 and len(found) > 0.9 * len(expected)
    count = min(len(found), len(expected))
    np.testing.assert_allclose(found.scores[:count], expected.scores[:count], atol=0.02)


def test_detections_are_the_cpus(tiny_detector, tiny_sharpmask, image):
    proposals = propose(tiny_sharpmask, image, CPU, amp=False, align_corners=False)
    expected, _ = load_detector(tiny_detector, CPU, overrides=DETECT)
    (few, all_of_them) = expected.detect_by_count(image, proposals, [10, 50])
    with pretended_cuda():
        detector, _ = load_detector(tiny_detector, CUDA, overrides=DETECT, precision="fp32")
        pairs = zip(
            detector.detect_by_count(image, proposals, [10, 50]), (few, all_of_them), strict=True
        )
    for found, wanted in pairs:
        np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4)
        np.testing.assert_allclose(found.boxes, wanted.boxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_array_equal(found.labels, wanted.labels)
        assert found.rles == wanted.rles and len(wanted) > 0


def test_tools_make_proposals_train_on_them_and_detect(
    tiny_config, tiny_sharpmask, shapes_directory, tmp_path, call_tool, capsys
):
    """With worker processes, which load into pinned memory."""
    small = [
        "data.workers=1", "multipathnet.sampling.max_images=3",
        "multipathnet.sampling.max_proposals=20", f"init.proposer={tiny_sharpmask}",
    ]  # fmt: skip
    output, store = tmp_path / "multipathnet", tmp_path / "detections"
    images = shapes_directory / "images" / "val"
    with pretended_cuda():
        assert call_tool(
            "train_stage", "--stage", "multipathnet", "--config", tiny_config,
            "--output", output, "--set", *small,
        ) == 0  # fmt: skip
        checkpoint = output / "checkpoints" / "best.pt"
        assert call_tool(
            "detect", "--checkpoint", checkpoint, "--proposals", output / "proposals" / "val",
            "--output", store, "--images", images, "--draw", "2", "--num-proposals", "10",
        ) == 0  # fmt: skip
    assert "parameters trained, on cuda" in capsys.readouterr().out
    assert len(list(ProposalStore(output / "proposals" / "val"))) == 8
    assert json.loads((store / "detections.json").read_text())
    load_detector(checkpoint, CPU)  # what was trained on the GPU is used without one
