"""Pretraining: crops in, a classifier that learns, and its trunk in the later stages."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import pytest
import torch
from torch import nn

from datasets.class_folder import ClassFolder
from datasets.coco import CocoInstances
from datasets.crops import CropConfig, LabeledCrops
from datasets.images import read_image
from datasets.shapes import CATEGORY_IDS
from models.trunk import FrozenNorm
from pipeline import distributed
from pipeline.config import Config
from pipeline.networks import load_network, make_deepmask, make_multipathnet
from pipeline.recipe import config_from_dict
from pipeline.training.optimizer import average_weights
from pipeline.training.run_log import read_metrics
from tests.pipeline.training.runs import CPU, interrupt, last_checkpoint, make_stage, train


@pytest.fixture(scope="module")
def class_folders(shapes_directory, tmp_path_factory) -> dict[str, Path]:
    """The objects of the shapes as pictures in class folders, by split."""
    folders = {}
    for split in ("train", "val"):
        folders[split] = tmp_path_factory.mktemp(split)
        coco = CocoInstances.load(shapes_directory / "annotations" / f"instances_{split}.json")
        crops = LabeledCrops.of_objects(coco, min_side=24)
        for row, label in enumerate(crops.labels):
            name = coco.file_name(crops.image_index[row])
            region = crops.cut(
                row, read_image(shapes_directory / "images" / split / name), context=0
            )
            file = folders[split] / crops.categories[label]["name"] / f"{row}.png"
            file.parent.mkdir(exist_ok=True)
            cv2.imwrite(str(file), cv2.resize(region, (48, 40))[..., ::-1])
    return folders


@pytest.fixture(scope="module")
def recipe(class_folders) -> dict:
    return {
        "data": {"workers": 0},
        "trunk": {"name": "resnet18", "width": 8, "weights": None},
        "pretrain": {
            "trunk": {"name": "resnet18", "width": 8, "padding": "zero"},
            "train_folder": str(class_folders["train"]),
            "val_folder": str(class_folders["val"]),
            # Without variation: so few crops are learned by heart, in two seconds.
            "crops": {"size": 32, "scale": [1, 1], "ratio": [1, 1], "flip": False},
            "optim": {
                "batch_size": 16, "batches_per_epoch": 25, "epochs": 2, "log_every": 5,
                "optimizer": "adamw", "lr": 5e-3, "validate_every": 1,
            },
        },
    }  # fmt: skip


def make_config(recipe: dict, **changes: dict) -> Config:
    """The recipe, with keys of its `pretrain` section, and of the others, changed."""
    pretrain = {**recipe["pretrain"], **changes.pop("pretrain", {})}
    return config_from_dict({**recipe, **changes, "pretrain": pretrain}, source="test")


@pytest.fixture(scope="module")
def pretrained(recipe, tmp_path_factory) -> Path:
    """The run directory of a pretrained trunk; read it, do not change it."""
    output = tmp_path_factory.mktemp("run") / "pretrain"
    train("pretrain", make_config(recipe), output)
    return output


def test_it_learns_to_classify(pretrained):
    lines = read_metrics(pretrained / "metrics.jsonl")
    errors = [line["error"] for line in lines if line["split"] == "train"]
    assert errors[-1] < 0.5 < 0.75 < errors[0]  # chance: 6 of 7
    val = [line for line in lines if line["split"] == "val"]
    assert len(val) == 2 and val[-1]["accuracy"] == pytest.approx(1 - val[-1]["error"])
    best = last_checkpoint(pretrained)
    assert best["best"] == max(line["accuracy"] for line in val)
    assert {c["name"] for c in best["categories"]} == set(CATEGORY_IDS)


@torch.no_grad()
def test_its_trunk_computes_the_same_in_a_later_stage(recipe, pretrained):
    """There with frozen batch norm, whose numbers were learned here.

    A detector's from the run's folder, a DeepMask's from the file.
    """
    classifier, _, _ = load_network(pretrained)
    norms = [m for m in classifier.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(norm.running_mean.any() for norm in norms)
    x = torch.randn(2, 3, 64, 64)
    makers = {
        pretrained: partial(make_multipathnet, num_classes=2),
        pretrained / "checkpoints" / "best.pt": make_deepmask,
    }
    for weights, make in makers.items():
        settings = recipe["pretrain"]["trunk"] | {"weights": str(weights)}
        detector = {"trunk": settings, "width": 8, "features": 8}
        config = make_config(recipe, trunk=settings, multipathnet=detector)
        trunk = make(config, pretrained=True).trunk
        assert not any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())
        assert any(isinstance(m, FrozenNorm) for m in trunk.modules())
        for found, expected in zip(trunk(x), classifier.trunk(x), strict=True):
            torch.testing.assert_close(found, expected)
    random = make_deepmask(make_config(recipe)).trunk
    assert not torch.equal(random.levels[0].conv1.weight, trunk.levels[0].conv1.weight)


def test_another_trunk_is_refused_in_one_line(recipe, pretrained):
    config = make_config(recipe, trunk={"name": "resnet34", "weights": str(pretrained)})
    words = "trunk.weights: .*best.pt is of another trunk: name resnet18 instead of resnet34, width"
    with pytest.raises(ValueError, match=words):
        make_deepmask(config, pretrained=True)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(recipe, tmp_path):
    optim = recipe["pretrain"]["optim"] | {"batches_per_epoch": 2, "optimizer": "sgd"}
    crops = {"size": 32, "jitter_color": 0.2}
    config = make_config(recipe, pretrain={"optim": optim, "crops": crops})
    train("pretrain", config, tmp_path / "whole")
    interrupt("pretrain", config, tmp_path / "parts", steps=3)
    train("pretrain", config, tmp_path / "parts", resume=True)
    whole, parts = (last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    assert all(torch.equal(value, parts["model"][key]) for key, value in whole["model"].items())


def test_class_folders_and_a_json_give_the_same_batches(recipe, class_folders, tmp_path):
    data = {"workers": 0}
    for split, folder in class_folders.items():
        names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
        classes = sorted({file.name for file in class_folders["train"].iterdir()})
        sizes = {"width": 48, "height": 40}
        boxes = [
            {
                "id": i, "image_id": i, "bbox": [0, 0, 48, 40], "iscrowd": 0,
                "category_id": classes.index(Path(name).parent.name) + 1,
            }
            for i, name in enumerate(names)
        ]  # fmt: skip
        content = {
            "images": [{"id": i, "file_name": name, **sizes} for i, name in enumerate(names)],
            "annotations": boxes,
            "categories": [{"id": i, "name": name} for i, name in enumerate(classes, start=1)],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        data[split] = {"annotations": str(tmp_path / f"{split}.json"), "images": str(folder)}
    no_folders = {"train_folder": None, "val_folder": None}
    configs = make_config(recipe), make_config(recipe, data=data, pretrain=no_folders)
    stages = [make_stage("pretrain", config, tmp_path / "run") for config in configs]
    assert stages[0].metadata == stages[1].metadata
    steps = range(8, 10)  # here all crops have been drawn, and all are again
    for [one], [other] in zip(*(s.training_batches(steps, CPU) for s in stages), strict=True):
        assert torch.equal(one["images"], other["images"]) and one["images"].std() > 0.1
        assert torch.equal(one["labels"], other["labels"])
    assert stages[0].validate(stages[0].model, CPU) == stages[1].validate(stages[1].model, CPU)


def test_hidden_files_and_folders_are_no_class_and_no_image(class_folders, tmp_path):
    """Jupyter writes .ipynb_checkpoints, and macOS ._NAME."""
    folder = shutil.copytree(class_folders["train"], tmp_path / "train")
    (hidden := folder / ".ipynb_checkpoints").mkdir()
    image = next(folder.rglob("*.png"))
    shutil.copy(image, hidden / "0-checkpoint.png")
    (image.parent / f"._{image.name}").write_bytes(b"resource fork")
    one, other = ClassFolder(class_folders["train"]), ClassFolder(folder)
    assert one.classes == other.classes and len(one) == len(other)


def test_crops_are_squares_with_context_without_crowds_and_tiny_objects(shapes_directory):
    path = shapes_directory / "annotations" / "instances_train.json"
    coco = CocoInstances.load(path)
    coco.is_crowd = coco.is_crowd.copy()
    coco.is_crowd[0] = True
    longest = (coco.boxes[:, 2:] - coco.boxes[:, :2]).max(axis=1)
    crops = LabeledCrops.of_objects(coco, min_side=40)
    assert len(crops) == (~coco.is_crowd & (longest >= 40)).sum() < len(coco.annotation_ids)
    crops.boxes = torch.tensor([[10.0, 20, 30, 60], [90, 0, 100, 100]]).numpy()
    image = torch.arange(100 * 100).view(100, 100).numpy()
    region = crops.cut(0, image, context=0.25)  # 60 px around (20, 40), of which 10 are outside
    assert region.shape == (60, 50) and region[0, 0] == 1000
    assert crops.cut(1, image, context=0).shape == (100, 55)
    with pytest.raises(ValueError, match="no object to classify: .*smaller than 9999 px"):
        LabeledCrops.of_objects(coco, min_side=9999)


def test_crops_in_validation_are_of_the_center():
    image = torch.zeros(3, 40, 80, dtype=torch.uint8)
    image[:, :, 16:64] = 255
    crop = CropConfig(size=20, center=1.0).validation_transform()(image)
    assert crop.shape == (3, 20, 20) and crop.min() > 2  # white


@pytest.mark.parametrize(("mean", "deviation", "atol"), [(1, 2, 1e-5), (30, 0.03, 1e-3)])
def test_batch_norm_counts_the_minibatches_of_all_processes(mean, deviation, atol, monkeypatch):
    """Two processes, threads here, see half a minibatch each, and compute what one does."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 3, 5, 5) * deviation + mean, torch.randn(8, 3, 5, 5)
    one, norms = nn.BatchNorm2d(3), [nn.BatchNorm2d(3), nn.BatchNorm2d(3)]
    for norm in norms:
        distributed._synchronize_norms(nn.Sequential(norm), CPU)
    barrier, parts = threading.Barrier(2, timeout=30), dict[int, torch.Tensor]()

    def exchange(part: torch.Tensor) -> torch.Tensor:
        parts[threading.get_ident()] = part
        barrier.wait()
        total = sum(parts.values())
        barrier.wait()
        return total

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_processes", exchange)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    with ThreadPoolExecutor(2) as threads:
        halves = list(threads.map(lambda norm, half: norm(half), norms, leaves[1].chunk(2)))
    expected = one(leaves[0])
    torch.testing.assert_close(torch.cat(halves), expected, rtol=1.3e-6, atol=atol)
    for name, value in one.named_buffers():
        torch.testing.assert_close(norms[0].get_buffer(name), value)
    (expected * weight).sum().backward()
    (torch.cat(halves) * weight).sum().backward()
    theirs = leaves[0].grad * deviation  # the gradient grows as the deviation shrinks
    torch.testing.assert_close(leaves[1].grad * deviation, theirs, rtol=1.3e-6, atol=atol)


def test_averaged_weights_have_averaged_statistics():
    """Batch norm's mean and variance of the trained weights do not fit the average."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    average = average_weights(network, 0.75)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    average.update_parameters(network)  # the first one copies
    for value in (*network.parameters(), network[1].running_mean, network[1].running_var):
        value.data += 1
    average.update_parameters(network)
    for name, value in average.module.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[name] + 0.25)


def test_crops_vary_with_the_sample_and_nothing_else_is_drawn(recipe, tmp_path):
    config = make_config(recipe, pretrain={"crops": {"size": 32, "jitter_color": 0.2}})
    data = make_stage("pretrain", config, tmp_path).train_data
    state = torch.get_rng_state()
    first, again = (data[None, 0, 0]["images"] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    drawn, count = data.sampler.draw(0, 0), len(data.crops)
    indices = (divmod(i, data.sampler.samples_per_epoch) for i in range(count, 2 * count))
    [later] = [index for index in indices if data.sampler.draw(*index).row == drawn.row]
    assert not torch.equal(data[None, *later]["images"], first)
