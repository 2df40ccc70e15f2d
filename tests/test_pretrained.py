"""The weights in the box: packed small, and what the tools use where no checkpoint is named."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from datasets.images import read_image
from pipeline.checkpoint import load_checkpoint, save_checkpoint
from pipeline.inference.propose import load_proposer
from pipeline.networks import load_network
from pipeline.pretrained import PRETRAINED_STAGES, pack_checkpoint, pretrained_checkpoint
from tests.test_hubconf import run

MAX_MEGABYTES = 16
CPU = torch.device("cpu")
EXAMPLE = Path(__file__).parents[1] / "docs" / "examples" / "000000014473.jpg"


def test_packed_weights_are_small_and_say_nothing_of_the_machine(tiny_sharpmask, tmp_path):
    checkpoint = load_checkpoint(tiny_sharpmask)
    packed, path = pack_checkpoint(checkpoint, source="test"), tmp_path / "packed.pt"
    save_checkpoint(path, packed)
    assert path.stat().st_size < 0.6 * sum(4 * v.numel() for v in checkpoint["model"].values())
    assert "optimizer" not in packed and packed["object_sides"] == checkpoint["object_sides"]
    words = json.dumps(packed["config"])
    assert str(tmp_path.parents[1]) not in words and ".json" not in words
    model, config, _ = load_network(path)
    whole, as_trained, _ = load_network(tiny_sharpmask)
    assert (config.trunk, config.sharpmask) == (as_trained.trunk, as_trained.sharpmask)
    for name, value in whole.state_dict().items():
        rounded = value.half().float() if value.dim() > 1 else value
        assert torch.equal(model.state_dict()[name], rounded), name


def test_the_files_load_and_are_as_small_as_promised():
    paths = [pretrained_checkpoint(stage) for stage in PRETRAINED_STAGES]
    assert sum(path.stat().st_size for path in paths) <= MAX_MEGABYTES * 1e6
    for stage, path in zip(PRETRAINED_STAGES, paths, strict=True):
        model, config, checkpoint = load_network(path, stage=stage)
        assert config.trunk.weights is None and not config.data.train.annotations
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert len(checkpoint.get("categories", range(80))) == 80


def test_a_photograph_needs_no_checkpoint_and_no_output(call_tool, tmp_path, monkeypatch, capsys):
    """Proposals and detections, and pictures of both, below runs/."""
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    cv2.imwrite("photo.jpg", image)
    assert call_tool("propose", "--images", "photo.jpg", "--scales", "-1", "0", "1") == 0
    assert "pictures of the best 10 in runs/proposals/photo/drawn" in capsys.readouterr().out
    assert call_tool("detect", "--proposals", "runs/proposals/photo") == 0
    for kind in ("proposals", "detections"):
        output = tmp_path / "runs" / kind / "photo"
        assert json.loads((output / f"{kind}.json").read_text())
        assert cv2.imread(str(output / "drawn" / "photo.jpg.jpg")).shape == image.shape


def test_the_objects_of_a_real_photograph_are_found():
    """A train and seven people of 250 to 450 pixels: 7 of 8, and none if pixels are misread."""
    coco = CocoInstances.load(str(EXAMPLE.with_suffix(".json")))
    proposer, _ = load_proposer(pretrained_checkpoint("sharpmask"), CPU, precision="fp32")
    found = proposer(read_image(EXAMPLE))
    objects = [coco.rle(row) for row in range(len(coco.boxes))]
    masks = [found.rle(row) for row in range(100)]
    best = coco_mask.iou(masks, objects, [False] * len(objects)).max(axis=0)
    assert len(objects) == 8 and (best >= 0.5).sum() >= 6


HUB = """
import sys, torch
model = torch.hub.load(sys.argv[1], "sharpmask", source="local", pretrained=True)
coarse = torch.hub.load(sys.argv[1], "deepmask", source="local", pretrained=True)
side = model.patch_size + model.context
patches = torch.zeros(1, 3, side, side)
print(*(tuple(each(patches)["mask_logits"].shape) for each in (model, coarse)))
"""


def test_hub_has_the_pretrained_networks(tmp_path):
    assert run(HUB, folder=tmp_path).endswith("(1, 160, 160) (1, 40, 40)")


def test_a_checkout_without_them_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("pipeline.pretrained.DIRECTORY", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sharpmask\.pt is not there; name a checkpoint"):
        pretrained_checkpoint("sharpmask")
