"""All stages in a row on a tiny dataset, as a user runs them.

And one overfitted network that must find its object.
"""

import copy
import json

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import yaml

from pipeline.evaluation.patches import evaluate_patches, validation_heads
from pipeline.inference.propose import Proposer
from pipeline.networks import load_network
from pipeline.recipe import config_from_dict
from tests.pipeline.training.runs import CPU, make_stage, train


def test_run_pipeline_leaves_scores_and_a_report_and_can_be_run_again(
    tiny_recipe, tmp_path, call_tool, capsys
):
    recipe = copy.deepcopy(tiny_recipe)
    recipe["data"] = {
        "shapes": {"directory": str(tmp_path / "shapes"), "train_images": 12, "val_images": 4},
        "workers": 0,
        "categories": ["disk", "3", "leaf"],
    }
    # As in configs/pretrained.yaml; scores are of published patches all the same.
    recipe["deepmask"]["sampling"] = {"score_cells": 3, "jitter_color": 0.3}
    recipe["deepmask"]["optim"]["ema_decay"] = 0.9
    config, output = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(recipe))
    arguments = ("run_pipeline", "--config", config, "--output", output, "--device", "cpu")
    assert call_tool(*arguments) == 0
    summary = json.loads((output / "summary.json").read_text())
    deepmask = summary["deepmask"]
    assert set(deepmask["patches"]) == {
        "mean_iou",
        "median_iou",
        "iou_above_0.5",
        "iou_above_0.7",
        "score_accuracy",
    }
    for kind in ("box", "mask"):
        assert {"AR@10", "AR@100", "AR@1000", "AUC"} <= set(deepmask["proposals"][kind])
    assert summary["sharpmask"].keys() == deepmask.keys()
    assert summary["sharpmask"]["patches"].keys() == deepmask["patches"].keys()
    assert summary["seconds"]["deepmask"] > 0 and summary["seconds"]["sharpmask"] > 0
    detections = summary["multipathnet"]["detections"]
    for kind in ("box", "mask"):
        assert {"AP", "AP50", "AP75", "APs", "AR@100"} <= set(detections[kind])
    rows = json.loads((output / "multipathnet" / "scores" / "categories.json").read_text())
    assert [row["category"] for row in rows] == ["disk", "square", "leaf"]
    report = (output / "report.html").read_text()
    assert "<html" in report and report.count("--categories disk 3 leaf") == 5
    stores = sorted(p.name for p in (output / "deepmask" / "proposals").glob("*.parquet"))

    assert call_tool(*arguments) == 0  # nothing is left to do
    again = json.loads((output / "summary.json").read_text())
    assert again["deepmask"] == deepmask and again["sharpmask"] == summary["sharpmask"]
    assert again["multipathnet"] == summary["multipathnet"]
    assert sorted(p.name for p in (output / "deepmask" / "proposals").glob("*.parquet")) == stores

    more = [
        *arguments,
        "--set",
        "deepmask.optim.epochs=3",
    ]  # trained on: the old proposals are stale
    assert call_tool(*more) == 0
    settings = json.loads((output / "deepmask" / "proposals" / "settings.json").read_text())
    assert settings["checkpoint_sha256"]
    capsys.readouterr()


def square_dataset(folder):
    """One image with one bright square on dark noise."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    image = rng.integers(0, 60, (120, 160, 3), np.uint8)
    image[40:88, 50:102] = rng.integers(180, 255, (48, 52, 3), np.uint8)
    cv2.imwrite(str(folder / "1.png"), image)
    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "iscrowd": 0,
        "area": 48 * 52,
        "bbox": [50, 40, 52, 48],
        "segmentation": [[50, 40, 102, 40, 102, 88, 50, 88]],
    }
    content = {
        "images": [{"id": 1, "file_name": "1.png", "width": 160, "height": 120}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [annotation],
    }
    (folder / "instances.json").write_text(json.dumps(content))
    return {"annotations": str(folder / "instances.json"), "images": str(folder)}, image


def test_a_network_that_learned_one_object_proposes_it_first(tiny_recipe, tmp_path):
    """Training, checkpoint, dense inference and pasting agree on frames.

    The best mask is the square.
    """
    split, image = square_dataset(tmp_path / "data")
    recipe = copy.deepcopy(tiny_recipe)
    recipe["data"] = {"train": split, "val": split, "workers": 0}
    recipe["deepmask"] |= {"mask_weight": 20.0}
    recipe["deepmask"]["sampling"] = {"jitter_shift": 9.6, "negative_distance": 28.8}
    recipe["deepmask"]["optim"] |= {
        "optimizer": "adamw",
        "lr": 1e-3,
        "batch_size": 16,
        "batches_per_epoch": 150,
        "schedule": "cosine",
        "log_every": 50,
        "validation_batches": 8,
    }
    config = config_from_dict(recipe, source="test")
    model, _, _ = load_network(train("deepmask", config, tmp_path / "run"))
    metrics = evaluate_patches(
        model,
        make_stage("deepmask", config, tmp_path / "new").val_data,
        CPU,
        heads=validation_heads(8),
        batch_size=16,
        workers=0,
    )
    assert metrics["mean_iou"] > 0.8 and metrics["score_accuracy"] > 0.9
    options = {"num_proposals": 5, "log2_scales": (-0.5, 0.5, 0.25), "mask_threshold": 0.5}
    proposals = Proposer(model, device=CPU, **options)(image)
    square = np.zeros(image.shape[:2], np.uint8, order="F")
    square[40:88, 50:102] = 1
    masks = [proposals.rle(n) for n in range(len(proposals))]
    ious = coco_mask.iou(masks, [coco_mask.encode(square)], [0])[:, 0]
    assert ious[0] > 0.65  # a mask pasted one 16-pixel cell off would overlap by half
