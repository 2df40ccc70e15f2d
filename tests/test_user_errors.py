"""A user's mistake is one line on stderr that names the file, key or value, and exit status 2."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from models.trunk import TrunkConfig
from pipeline.inference.detect import compress_checkpoint
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Proposals
from pipeline.networks import make_multipathnet
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
    (folder / "ids.txt").write_text("12345\n")
    for run, last in (("broken_run", "text.pt"), ("other_run", "sharpmask.pt")):
        (folder / run / "checkpoints").mkdir(parents=True)
        shutil.copy(folder / last, folder / run / "checkpoints" / "last.pt")
    (folder / "truncated.pt").write_bytes(checkpoint.read_bytes()[:5000])


def write_detectors(folder: Path, detector: Path) -> None:
    content = torch.load(detector, weights_only=True)
    compress_checkpoint(detector, 3, folder / "rank3.pt")
    config = config_from_dict(content["config"], source="test")
    trunk = TrunkConfig(name="resnet18", weights=None, width=8)
    section = replace(config.multipathnet, trunk=trunk, head="layer4")
    config = replace(config, multipathnet=section)
    model = make_multipathnet(config, num_classes=len(content["categories"]))
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


def read_mistakes() -> dict[str, tuple[str, str]]:
    """Command and expected words of each mistake in the table."""
    mistakes, macros = {}, {}
    for line in (Path(__file__).parent / "user_errors.txt").read_text().splitlines():
        if line.startswith("["):
            name, _, command = line.partition(" = ")
            macros[name] = command
        elif line and not line.startswith("#"):
            name, command, words = line.split(" | ")
            for macro, text in macros.items():
                command = command.replace(macro, text)
            mistakes[name] = command, words
    return mistakes


MISTAKES = read_mistakes()


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
