"""A user's mistake is one line on stderr that names the file, key or value, and exit status 2."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pipeline.load import compress_checkpoint

from pipeline.config import TrunkConfig
from pipeline.inference.proposals import Proposals, ProposalStore
from pipeline.networks import build_multipathnet
from pipeline.recipe import config_from_dict, config_to_dict

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def wrong(tmp_path_factory, shapes_directory, tiny_recipe, tiny_checkpoint, tiny_detector) -> Path:
    """A folder of files with something wrong about each."""
    folder = tmp_path_factory.mktemp("wrong")
    write_configs(folder, tiny_recipe)
    write_annotations(folder, shapes_directory)
    write_checkpoints(folder, tiny_checkpoint)
    write_detectors(folder, tiny_detector)
    write_results(folder, shapes_directory)
    write_images(folder, shapes_directory)
    (folder / "empty").mkdir()
    for name in ("store", "settings", "shard"):
        (folder / name).mkdir()
    (folder / "store" / "settings.json").write_text(json.dumps({"num_proposals": 7}))
    (folder / "settings" / "settings.json").write_text("// an editor's")
    pq.write_table(pa.table({"score": [0.5]}), folder / "shard" / "proposals-1.parquet")
    write_stores(folder, tiny_detector.parents[1] / "proposals" / "val")
    return folder


def write_stores(folder: Path, good: Path) -> None:
    [shard] = good.glob("*.parquet")
    (folder / "torn_store").mkdir()
    (folder / "torn_store" / shard.name).write_bytes(shard.read_bytes()[:2000])
    store = ProposalStore(folder / "foreign_store")
    store.open_for({})
    box, score = np.array([[1, 2, 30, 40]], np.float32), np.array([0.5], np.float32)
    store.write_shard([Proposals(4711, "elsewhere.jpg", 480, 640, score, box, [b"0"])])


def write_images(folder: Path, shapes_directory: Path) -> None:
    shutil.copytree(shapes_directory / "images" / "train", folder / "some_broken")
    (folder / "broken_images").mkdir()
    for number, path in enumerate(sorted((folder / "some_broken").iterdir())):
        (folder / "broken_images" / path.name).write_text("no JPEG")
        if number % 2:
            path.write_bytes(path.read_bytes()[:1000])


def write_configs(folder: Path, recipe: dict) -> None:
    texts = {
        "key": yaml.safe_dump({**recipe, "dropout": 0.1}),
        "nested_key": yaml.safe_dump({**recipe, "deepmask": {"optim": {"learning_rate": 0.1}}}),
        "type": yaml.safe_dump({**recipe, "trunk": {"frozen_levels": "two"}}),
        "section": yaml.safe_dump({**recipe, "trunk": "resnet50"}),
        "syntax": "trunk: {name: tiny\ndata:\n",
        "list": "- trunk\n- data\n",
        "twice": "seed: 1\nseed: 2\n",
        "foreign_shapes": yaml.safe_dump({"data": {"shapes": {"directory": str(folder)}}}),
        "no_data": yaml.safe_dump({"trunk": recipe["trunk"]}),
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def write_annotations(folder: Path, shapes_directory: Path) -> None:
    whole = (shapes_directory / "annotations" / "instances_train.json").read_text()
    content = json.loads(whole)
    contents = {
        "no_coco.json": {"shapes": [1, 2, 3]},
        "no_size.json": {**content, "images": [{"id": 1, "file_name": "a.jpg"}]},
        "no_images.json": {**content, "images": []},
        "unusable.json": {
            **content,
            "annotations": [{**a, "segmentation": [[1, 2, 3]]} for a in content["annotations"]],
        },
        "text_ids.json": {"images": [{"id": "first", "file_name": "000001.jpg"}]},
        "other_names.json": {
            **content,
            "images": [{**i, "file_name": "no" + i["file_name"]} for i in content["images"]],
        },
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "truncated.json").write_text(whole[: len(whole) // 2])
    (folder / "annotations").mkdir()
    (folder / "annotations" / "instances_train.json").write_text(whole.replace("shapes", "COCO"))


def write_checkpoints(folder: Path, checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    resnet = {**content["config"], "trunk": {**content["config"]["trunk"], "name": "resnet18"}}
    contents = {
        "foreign.pt": {"layer.weight": torch.zeros(2)},
        "sharpmask.pt": {**content, "stage": "sharpmask"},
        "detector.pt": {**content, "stage": "multipathnet"},
        "resnet.pt": {**content, "config": resnet},
        "schema.pt": {**content, "config": {**content["config"], "zoom": 2}},
    }
    for name, value in contents.items():
        torch.save(value, folder / name)
    (folder / "text.pt").write_text("no checkpoint")
    for run, last in (("broken_run", "text.pt"), ("other_run", "sharpmask.pt")):
        (folder / run / "checkpoints").mkdir(parents=True)
        shutil.copy(folder / last, folder / run / "checkpoints" / "last.pt")
    (folder / "truncated.pt").write_bytes(checkpoint.read_bytes()[:5000])


def write_detectors(folder: Path, detector: Path) -> None:
    content = torch.load(detector, weights_only=True)
    compress_checkpoint(detector, 3, folder / "compressed")
    config = config_from_dict(content["config"], source="test")
    config.multipathnet.trunk = TrunkConfig(name="resnet18", weights=None, width=8)
    config.multipathnet.head = "layer4"
    classes = len(content["categories"])
    model = build_multipathnet(config, num_classes=classes, pretrained=False)
    weights = {"model": model.state_dict(), "config": config_to_dict(config)}
    torch.save(content | weights, folder / "layer4.pt")


def write_results(folder: Path, shapes_directory: Path) -> None:
    images = json.loads((shapes_directory / "annotations" / "instances_val.json").read_text())
    size = [images["images"][0]["height"], images["images"][0]["width"]]
    result = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [0, 0, 10, 10]}
    contents = {
        "no_list.json": {"results": [result]},
        "unknown_category.json": [result, {**result, "category_id": 4712}],
        "unknown_image.json": [{**result, "image_id": 4711}],
        "no_score.json": [{key: result[key] for key in ("image_id", "bbox")}],
        "mask_size.json": [{**result, "segmentation": {"size": [5, 5], "counts": "I0"}}],
        "mask_runs.json": [{**result, "segmentation": {"size": size, "counts": "I0"}}],
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value))


@pytest.fixture
def fill(
    wrong, shapes_directory, tiny_config, tiny_run, tiny_sharpmask, tiny_detector, tmp_path
) -> Callable[[str], list[str]]:
    """The arguments of a command line that names right and wrong files by {placeholders}."""
    places = {
        "wrong": wrong,
        "config": tiny_config,
        "run": tiny_run,
        "checkpoint": tiny_run / "checkpoints" / "best.pt",
        "refined": tiny_sharpmask,
        "detector": tiny_detector,
        "stores": tiny_detector.parents[1] / "proposals",
        "annotations": shapes_directory / "annotations" / "instances_val.json",
        "images": shapes_directory / "images" / "val",
        "out": tmp_path / "out",
    }
    return lambda command: [argument.format(**places) for argument in command.split()]


TRAIN = "train_stage --stage deepmask --device cpu --output {out} "
SET = TRAIN + "--config {config} --set "
SHARP = SET.replace("--stage deepmask", "--stage sharpmask")
DETECTOR = SET.replace("--stage deepmask", "--stage multipathnet")
STORES = "init.train_proposals={stores}/train init.val_proposals={stores}/val "
PROPOSE = "propose --device cpu --output {out} "
GOOD = "--checkpoint {checkpoint} --images {images} "
DETECT = "detect --device cpu --output {out} --checkpoint {detector} "
STORE = "--proposals {stores}/val --images {images} "
AR = "score_coco proposals --output {out} "
AP = "score_coco detections --output {out} --annotations {annotations} "
PATCHES = "score_coco patches --device cpu --workers 0 --output {out} "
SHEET = "show_patches --output {out}.png "
SUBSET = "subset_coco --output {out} --annotations {annotations} --images {images} "
ALL = "run_pipeline --device cpu --output {out} "

# What is wrong: a command line, and what the error line has to name.
MISTAKES = {
    # configs
    "config missing": (TRAIN + "--config nowhere.yaml", "nowhere.yaml does not exist"),
    "config unknown key": (TRAIN + "--config {wrong}/key.yaml", "key.yaml: unknown key dropout"),
    "config unknown nested key": (
        TRAIN + "--config {wrong}/nested_key.yaml",
        "nested_key.yaml: unknown key deepmask.optim.learning_rate",
    ),
    "config wrong type": (TRAIN + "--config {wrong}/type.yaml", "trunk.frozen_levels: 'two'"),
    "config value for a section": (TRAIN + "--config {wrong}/section.yaml", "trunk 'resnet50'"),
    "config not YAML": (TRAIN + "--config {wrong}/syntax.yaml", "syntax.yaml not YAML line"),
    "config a list": (TRAIN + "--config {wrong}/list.yaml", "list.yaml mapping"),
    "config key twice": (TRAIN + "--config {wrong}/twice.yaml", "twice.yaml duplicate seed"),
    "config a folder": (TRAIN + "--config {wrong}", "{wrong}"),
    "config without data": (TRAIN + "--config {wrong}/no_data.yaml", "data.train.annotations"),
    "config is a checkpoint": (TRAIN + "--config {checkpoint}", "best.pt not YAML"),
    # --set
    "set unknown key": (
        SET + "deepmask.optim.lrr=1",
        "--set deepmask.optim.lrr mean deepmask.optim.lr?",
    ),
    "set no value": (SET + "deepmask.optim.lr", "--set deepmask.optim.lr key=value"),
    "set wrong type": (SET + "deepmask.optim.lr=fast", "deepmask.optim.lr: 'fast'"),
    "set not YAML": (SET + "trunk.name=[", "--set trunk.name=["),
    "set interpolation": (SET + "seed=${{nothing}}", "seed: 'nothing'"),
    "set zero batch": (SET + "deepmask.optim.batch_size=0", "deepmask.optim.batch_size 0"),
    "set dropout 1": (SET + "deepmask.dropout=1", "deepmask.dropout 1"),
    "set negative seed": (SET + "seed=-1", "seed -1"),
    "set not a choice": (SET + "deepmask.optim.optimizer=adam", "sgd adamw 'adam'"),
    "set two scales": (SET + "propose.scales=[-1,1]", "propose.scales [-1, 1]"),
    "set scales MIN > MAX": (SET + "propose.scales=[1,0,0.5]", "propose.scales MIN 1.0"),
    "set endless scales": (SET + "propose.scales=[-.inf,0,0.5]", "propose.scales MIN -inf"),
    "set factors": (SET + "deepmask.optim.lr_drops={{3:-1}}", "deepmask.optim.lr_drops -1"),
    "set too many levels": (SET + "trunk.frozen_levels=5", "trunk.frozen_levels 0 4 5"),
    "set patch size": (SET + "deepmask.patch_size=100", "patch_size 16 100"),
    "set context": (SET + "deepmask.context=20", "context 32 20"),
    "set batch not divisible": (
        SET + "deepmask.sampling.patches_per_image=3",
        "deepmask.optim.batch_size 8 patches_per_image 3",
    ),
    "set unknown trunk": (SET + "trunk.name=resnet19", "resnet19 resnet18"),
    "set weights for tiny": (SET + "trunk.weights=imagenet", "tiny weights 'imagenet'"),
    # weights
    "weights missing": (SET + "trunk.weights=nowhere.pth", "trunk.weights nowhere.pth"),
    "weights of another trunk": (
        SET + "trunk.name=resnet18 trunk.weights={checkpoint}",
        "best.pt missing conv1.weight unexpected",
    ),
    "weights not torch": (SET + "trunk.name=resnet18 trunk.weights={wrong}/text.pt", "text.pt"),
    # training data
    "annotations missing": (
        SET + "data.train.annotations=no.json",
        "data.train.annotations no.json",
    ),
    "annotations a folder": (SET + "data.val.annotations={wrong}", "{wrong} folder"),
    "annotations not COCO": (
        SET + "data.val.annotations={wrong}/no_coco.json",
        'no_coco.json "images"',
    ),
    "annotations truncated": (
        SET + "data.train.annotations={wrong}/truncated.json",
        "truncated.json not valid JSON line",
    ),
    "annotations are a config": (
        SET + "data.train.annotations={config}",
        "tiny.yaml not valid JSON",
    ),
    "annotations without sizes": (
        SET + "data.train.annotations={wrong}/no_size.json",
        'no_size.json images[0] "height"',
    ),
    "annotations without images": (
        SET + "data.train.annotations={wrong}/no_images.json",
        'no_images.json "images" empty',
    ),
    "annotations unusable": (
        SET + "data.train.annotations={wrong}/unusable.json",
        "unusable.json no annotation",
    ),
    "image folder missing": (SET + "data.train.images=nowhere", "data.train.images nowhere"),
    "image folder is a file": (
        SET + "data.train.images={annotations}",
        "data.train.images instances_val.json",
    ),
    "images broken": (SET + "data.train.images={wrong}/broken_images", "broken_images 50 in a row"),
    "images broken for a worker": (
        SET + "data.train.images={wrong}/broken_images data.workers=1",
        "50 images in a row broken_images",
    ),
    "images not in the folder": (
        SET + "data.train.images={wrong}/empty",
        "{wrong}/empty 50 in a row",
    ),
    "too many images broken": (
        SET + "data.train.images={wrong}/some_broken data.max_broken_share=0.05",
        "data.max_broken_share 0.05 some_broken 2 of 24",
    ),
    "shapes over other annotations": (
        TRAIN + "--config {wrong}/foreign_shapes.yaml",
        "instances_train.json write_shapes another directory",
    ),
    # runs
    "stage unknown": ("train_stage --stage deepmsk --config {config} --output {out}", "deepmsk"),
    "loss not finite": (
        SET + "deepmask.optim.lr=1e30 deepmask.optim.epochs=5",
        "not finite step {out}/non_finite_batch deepmask.optim.lr",
    ),
    "device unknown": (SET + "seed=1 --device gpu", "'gpu' cpu"),
    "run there already": (TRAIN.replace("{out}", "{run}") + "--config {config}", "{run} --resume"),
    "resume with another seed": (
        SET.replace("{out}", "{run}") + "seed=5 --resume",
        "last.pt seed 0 5",
    ),
    "resume with another network": (
        SET.replace("{out}", "{run}") + "deepmask.embedding=16 --resume",
        "last.pt tail.2.weight",
    ),
    "resume with another optimizer": (
        SET.replace("{out}", "{run}") + "trunk.frozen_levels=2 --resume",
        "last.pt optimizer",
    ),
    "resume with a broken checkpoint": (
        TRAIN.replace("{out}", "{wrong}/broken_run") + "--resume --config {config}",
        "last.pt",
    ),
    "resume a run of another stage": (
        TRAIN.replace("{out}", "{wrong}/other_run") + "--resume --config {config}",
        "last.pt sharpmask deepmask",
    ),
    "output below a file": (
        TRAIN.replace("{out}", "{config}/x") + "--config {config}",
        "tiny.yaml/x",
    ),
    # SharpMask
    "no deepmask": (SHARP + "seed=0", "deepmask init.deepmask --stage deepmask"),
    "deepmask missing": (SHARP + "init.deepmask=nowhere.pt", "init.deepmask nowhere.pt"),
    "deepmask of another trunk": (
        SHARP + "init.deepmask={checkpoint} trunk.name=resnet18",
        "best.pt trunk.name tiny resnet18",
    ),
    "deepmask of another size": (
        SHARP + "init.deepmask={checkpoint} deepmask.patch_size=64 deepmask.mask_size=7",
        "best.pt deepmask.patch_size 96 64 deepmask.mask_size 14 7",
    ),
    "deepmask is a sharpmask": (
        SHARP + "init.deepmask={wrong}/sharpmask.pt",
        "sharpmask.pt sharpmask deepmask",
    ),
    # weights to start from
    "start weights missing": (SET + "init.weights=nowhere.pt", "init.weights nowhere.pt"),
    "weights of another stage": (
        SHARP + "init.weights={checkpoint}",
        "best.pt deepmask sharpmask",
    ),
    "weights of another network": (
        SET + "init.weights={checkpoint} deepmask.embedding=16 trunk.padding=zero",
        "best.pt deepmask.embedding 32 16 trunk.padding symmetric zero",
    ),
    "weights that do not fit": (
        SET + "init.weights={wrong}/resnet.pt trunk.name=resnet18",
        "resnet.pt missing trunk.levels",
    ),
    "weights and a deepmask": (
        SHARP + "init.weights={wrong}/sharpmask.pt init.deepmask={checkpoint}",
        "init.weights init.deepmask",
    ),
    "weights for all stages": (
        ALL + "--config {config} --set init.weights={checkpoint}",
        "init.weights best.pt train_stage",
    ),
    "km odd": (SHARP + "init.deepmask={checkpoint} sharpmask.km=20", "km 20 16"),
    "merge unknown": (SHARP + "sharpmask.merge=product", "sharpmask.merge sum concat 'product'"),
    # MultiPathNet
    "no proposals and no proposer": (DETECTOR + "seed=0", "init.train_proposals init.proposer"),
    "proposals of one split only": (
        DETECTOR + "init.train_proposals={stores}/train",
        "init.train_proposals init.proposer",
    ),
    "proposals missing": (
        DETECTOR + "init.train_proposals=nowhere init.val_proposals={stores}/val",
        "init.train_proposals nowhere",
    ),
    "proposals no store": (
        DETECTOR + "init.train_proposals={wrong}/empty init.val_proposals={stores}/val",
        "{wrong}/empty holds no proposals",
    ),
    "proposals torn": (
        DETECTOR + "init.train_proposals={wrong}/torn_store init.val_proposals={stores}/val",
        "torn_store/proposals-000-000000.parquet",
    ),
    "proposals of other images": (
        DETECTOR + "init.train_proposals={wrong}/foreign_store init.val_proposals={stores}/val",
        "instances_train.json other images",
    ),
    "proposals of the other split": (
        DETECTOR + "init.train_proposals={stores}/val init.val_proposals={stores}/train",
        "{stores}/val instances_train.json other images image_id 1",
    ),
    "proposer is a detector": (
        DETECTOR + "init.proposer={detector}",
        "best.pt multipathnet deepmask sharpmask",
    ),
    "proposer missing": (DETECTOR + "init.proposer=nowhere.pt", "init.proposer nowhere.pt"),
    "trunk of no proposer": (
        DETECTOR + STORES + "multipathnet.trunk.weights=deepmask",
        "init.proposer",
    ),
    "trunk of another proposer": (
        DETECTOR + STORES + "multipathnet.trunk.weights=deepmask init.proposer={refined} "
        "multipathnet.trunk.name=vgg11",
        "{refined} trunk missing",
    ),
    "layer4 of no ResNet": (
        DETECTOR + STORES + "multipathnet.head=layer4",
        "multipathnet.head layer4 tiny fc",
    ),
    "thresholds falling": (
        DETECTOR + STORES + "multipathnet.thresholds=[0.7,0.5]",
        "multipathnet.thresholds [0.7, 0.5]",
    ),
    "trunk of detectors only": (SET + "trunk.name=caffenet", "trunk.name caffenet"),
    # propose
    "checkpoint missing": (PROPOSE + "--images {images} --checkpoint nowhere.pt", "nowhere.pt"),
    "checkpoint text": (PROPOSE + "--images {images} --checkpoint {wrong}/text.pt", "text.pt"),
    "checkpoint truncated": (
        PROPOSE + "--images {images} --checkpoint {wrong}/truncated.pt",
        "truncated.pt",
    ),
    "checkpoint foreign": (
        PROPOSE + "--images {images} --checkpoint {wrong}/foreign.pt",
        "foreign.pt stage",
    ),
    "checkpoint of another stage": (
        PROPOSE + "--images {images} --checkpoint {wrong}/detector.pt",
        "detector.pt multipathnet deepmask sharpmask",
    ),
    "checkpoint without a refinement": (
        PROPOSE + "--images {images} --checkpoint {wrong}/sharpmask.pt",
        "sharpmask.pt missing deepmask.trunk",
    ),
    "checkpoint of another trunk": (
        PROPOSE + "--images {images} --checkpoint {wrong}/resnet.pt",
        "resnet.pt missing trunk.levels",
    ),
    "checkpoint of another version": (
        PROPOSE + "--images {images} --checkpoint {wrong}/schema.pt",
        "schema.pt unknown key zoom",
    ),
    "no such images": (PROPOSE + "--checkpoint {checkpoint} --images nowhere", "nowhere"),
    "empty folder": (
        PROPOSE + "--checkpoint {checkpoint} --images {wrong}/empty",
        "{wrong}/empty no image",
    ),
    "glob without a match": (
        PROPOSE + "--checkpoint {checkpoint} --images {images}/*.webp",
        "*.webp",
    ),
    "no proposals": (PROPOSE + GOOD + "--num-proposals 0", "--num-proposals 0"),
    "scales MIN > MAX": (PROPOSE + GOOD + "--scales 1 0 0.5", "MIN 1 0 0.5"),
    "scales without end": (PROPOSE + GOOD + "--scales 0 1 0", "STEP 0 1 0"),
    "nms of nothing": (PROPOSE + GOOD + "--nms 0", "--nms 0"),
    "negative draw": (PROPOSE + GOOD + "--draw -1", "--draw -1"),
    "ids not COCO": (
        PROPOSE + GOOD + "--annotations {wrong}/no_coco.json",
        'no_coco.json "images"',
    ),
    "ids truncated": (
        PROPOSE + GOOD + "--annotations {wrong}/truncated.json",
        "truncated.json JSON",
    ),
    "ids missing": (PROPOSE + GOOD + "--annotations nowhere.json", "nowhere.json"),
    "ids of other images": (
        PROPOSE
        + "--checkpoint {checkpoint} --images {images}/*.jpg"
        + " --annotations {wrong}/other_names.json",
        "*.jpg other_names.json",
    ),
    "ids of no image of the folder": (
        PROPOSE + GOOD + "--annotations {wrong}/other_names.json",
        "{images} other_names.json",
    ),
    "ids of another form": (
        PROPOSE + GOOD + "--annotations {wrong}/text_ids.json",
        "text_ids.json id",
    ),
    "output is a file": (PROPOSE.replace("{out}", "{config}") + GOOD, "tiny.yaml"),
    "store of other settings": (
        PROPOSE.replace("{out}", "{wrong}/store") + GOOD,
        "store num_proposals 7 -> 50",
    ),
    "no store's settings": (PROPOSE.replace("{out}", "{wrong}/settings") + GOOD, "settings.json"),
    "no store's shard": (PROPOSE.replace("{out}", "{wrong}/shard") + GOOD, "proposals-1.parquet"),
    # detect
    "detector missing": (
        "detect --device cpu --output {out} --checkpoint nowhere.pt " + STORE,
        "nowhere.pt",
    ),
    "detector is a sharpmask": (
        "detect --device cpu --output {out} --checkpoint {refined} " + STORE,
        "best.pt sharpmask multipathnet",
    ),
    "detector without a detector's weights": (
        "detect --device cpu --output {out} --checkpoint {wrong}/detector.pt " + STORE,
        "detector.pt",
    ),
    "no proposals given": (DETECT + "--images {images}", "--proposals --proposal-checkpoint"),
    "proposals given twice": (
        DETECT + STORE + "--proposal-checkpoint {refined}",
        "--proposal-checkpoint not allowed --proposals",
    ),
    "store missing": (DETECT + "--proposals nowhere", "nowhere proposal store"),
    "store empty": (DETECT + "--proposals {wrong}/empty --images {images}", "{wrong}/empty store"),
    "store torn": (
        DETECT + "--proposals {wrong}/torn_store --images {images}",
        "torn_store/proposals-000-000000.parquet",
    ),
    "store without a folder": (
        DETECT + "--proposals {wrong}/foreign_store",
        "foreign_store --images",
    ),
    "store of other images": (
        DETECT + "--proposals {wrong}/foreign_store --images {images}",
        "{images} none foreign_store",
    ),
    "images of a store missing": (
        DETECT + "--proposals {stores}/val --images nowhere",
        "--images nowhere folder",
    ),
    "images of a store of another split": (
        DETECT + "--proposals {stores}/train --images {images}",
        "{images} {stores}/train pixels",
    ),
    "no images to propose for": (DETECT + "--proposal-checkpoint {refined}", "--images"),
    "ids for a store that has them": (
        DETECT + STORE + "--annotations {annotations}",
        "--annotations --proposal-checkpoint",
    ),
    "proposals by a detector": (
        DETECT + "--images {images} --proposal-checkpoint {detector}",
        "best.pt multipathnet deepmask sharpmask",
    ),
    "detect with no proposals": (DETECT + STORE + "--num-proposals 0", "--num-proposals 0"),
    "vote beyond 1": (DETECT + STORE + "--vote 1.5", "--vote 1.5"),
    "negative localizations": (DETECT + STORE + "--localizations -1", "--localizations -1"),
    "short side of nothing": (DETECT + STORE + "--short-sides 0", "--short-sides 0"),
    "draw less than nothing": (DETECT + STORE + "--draw -1", "--draw -1"),
    "compress to nothing": (DETECT + "--compress-fc 0", "--compress-fc 0"),
    "compress a number and a half": (DETECT + "--compress-fc 1.5", "--compress-fc 1.5"),
    "compress twice": (
        "detect --output {out} --checkpoint {wrong}/compressed/rank3.pt --compress-fc 2",
        "rank3.pt compressed already",
    ),
    "compress what has no such layers": (
        "detect --output {out} --checkpoint {wrong}/layer4.pt --compress-fc 2",
        "layer4.pt no fully connected layers layer4",
    ),
    "compress a sharpmask": (
        "detect --output {out} --checkpoint {refined} --compress-fc 2",
        "best.pt sharpmask multipathnet",
    ),
    "detections below a file": (
        "detect --device cpu --output {config}/x --checkpoint {detector} " + STORE,
        "tiny.yaml",
    ),
    # score_coco
    "detections missing": (AP + "--results nowhere.json", "nowhere.json"),
    "detections no list": (AP + "--results {wrong}/no_list.json", "no_list.json list dict"),
    "detections in unknown images": (
        AP + "--results {wrong}/unknown_image.json",
        "unknown_image.json results[0] 4711",
    ),
    "detections of unknown categories": (
        AP + "--results {wrong}/unknown_category.json",
        "unknown_category.json results[1] category_id 4712",
    ),
    "detections of another size": (
        AP + "--results {wrong}/mask_size.json",
        "mask_size.json results[0] [5, 5]",
    ),
    "detections are a store": (AP + "--results {stores}/val", "{stores}/val folder"),
    "detections against no images": (
        AP + "--results {wrong}/no_score.json --annotations {wrong}/no_images.json",
        "no_images.json images empty",
    ),
    "results missing": (AR + "--annotations {annotations} --results nowhere.json", "nowhere.json"),
    "results no list": (
        AR + "--annotations {annotations} --results {wrong}/no_list.json",
        "no_list.json list dict",
    ),
    "results not JSON": (
        AR + "--annotations {annotations} --results {wrong}/text.pt",
        "text.pt JSON",
    ),
    "results no store": (
        AR + "--annotations {annotations} --results {wrong}/empty",
        "{wrong}/empty store",
    ),
    "results of unknown images": (
        AR + "--annotations {annotations} --results {wrong}/unknown_image.json",
        "unknown_image.json 4711",
    ),
    "results without scores": (
        AR + "--annotations {annotations} --results {wrong}/no_score.json",
        "no_score.json results[0] score",
    ),
    "results of another size": (
        AR + "--annotations {annotations} --results {wrong}/mask_size.json",
        "mask_size.json results[0] [5, 5]",
    ),
    "results with broken masks": (
        AR + "--annotations {annotations} --results {wrong}/mask_runs.json",
        "mask_runs.json results[0] runs",
    ),
    "scores against no COCO": (
        AR + "--annotations {wrong}/no_coco.json --results {out}",
        "no_coco.json",
    ),
    "scores against nothing": (AR + "--annotations nowhere.json --results {out}", "nowhere.json"),
    "patches from nowhere": (
        PATCHES + "--annotations {annotations} --images nowhere --checkpoint {checkpoint}",
        "nowhere",
    ),
    "patches of one kind": (
        PATCHES + "--annotations {annotations} --batches 1 " + GOOD,
        "--batches 1",
    ),
    "patches unreadable": (
        PATCHES
        + "--annotations {annotations} --images {wrong}/broken_images --checkpoint {checkpoint}",
        "broken_images",
    ),
    # show_patches
    "sheet of nothing": (SHEET + "--config {config} --count 0", "--count 0"),
    "sheet with a negative seed": (SHEET + "--config {config} --seed -3", "-3"),
    "sheet of broken images": (
        SHEET + "--config {config} --set data.train.images={wrong}/broken_images",
        "broken_images",
    ),
    "sheet is a folder": ("show_patches --output {wrong} --config {config}", "{wrong}: directory"),
    # subset_coco
    "subset of too many": (SUBSET + "--num-images 1000", "1000 instances_val.json 8"),
    "subset of none": (SUBSET + "--num-images 0", "0"),
    "subset negative seed": (SUBSET + "--num-images 2 --seed -1", "seed -1"),
    "subset without images": (SUBSET + "--num-images 2 --images nowhere", "nowhere"),
    "subset of an empty folder": (
        SUBSET + "--num-images 2 --images {wrong}/empty",
        "{wrong}/empty 0 of the 2",
    ),
    "subset of no COCO": (
        SUBSET + "--num-images 2 --annotations {wrong}/no_coco.json",
        "no_coco.json",
    ),
    "subset of nothing": (SUBSET + "--num-images 2 --annotations nowhere.json", "nowhere.json"),
    # run_pipeline
    "pipeline unknown key": (ALL + "--config {wrong}/key.yaml", "key.yaml dropout"),
    "pipeline without data": (ALL + "--config {wrong}/no_data.yaml", "data.train.annotations"),
}


def error_line(stderr: str) -> str:
    """The one line of the error; argparse prints its usage before it."""
    assert "Traceback" not in stderr
    before, mark, line = stderr.rpartition("error: ")
    assert mark and line.endswith("\n") and line.count("\n") == 1
    usage = before.startswith("usage:")
    assert usage or before == "", f"more than one line: {stderr!r}"
    return line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_line(mistake, fill, call_tool, monkeypatch, capsys, tmp_path):
    command, named = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    status = call_tool(*fill(command))
    line = error_line(capsys.readouterr().err)
    assert status == 2
    for part in fill(named):
        assert part in line


@pytest.mark.parametrize(
    "arguments",
    [[], ["--resume", "--set", "seed=5"], ["--resume", "--set", "deepmask.embedding=16"]],
    ids=["without --resume", "another seed", "another network"],
)
def test_a_refused_run_leaves_the_directory_as_it_is(
    arguments, tiny_run, tiny_config, tmp_path, call_tool
):
    directory = tmp_path / "run"
    shutil.copytree(tiny_run, directory)
    command = ["train_stage", "--stage", "deepmask", "--device", "cpu", "--config", tiny_config]
    assert call_tool(*command, "--output", directory, *arguments) == 2
    assert content_of(directory) == content_of(tiny_run)


def content_of(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def test_mistakes_as_a_shell_sees_them(fill, tmp_path):
    """The same through a process: standard error and exit status are what a script gets."""
    chosen = ["config unknown nested key", "empty folder", "results missing"]

    def start(mistake: str) -> subprocess.CompletedProcess:
        name, *arguments = fill(MISTAKES[mistake][0])
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        for mistake, process in zip(chosen, pool.map(start, chosen), strict=True):
            assert process.returncode == 2
            line = error_line(process.stderr)
            assert all(part in line for part in fill(MISTAKES[mistake][1]))
