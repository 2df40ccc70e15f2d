"""Files of strangers never run code, read the environment or take the machine down."""

import json
import os
import pickle
import resource
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from models.backbone import load_file
from pipeline.networks import load_network, make_deepmask
from pipeline.recipe import MAX_BYTES, config_from_dict, load_config
from tests.pipeline.report.report_page import Page
from tests.pipeline.report.small_run import (
    CATEGORIES,
    SQUARE,
    make_dataset,
    proposals_of,
    write_json,
    write_run,
    write_store,
)

MEGABYTES = 200  # that refusing a file may take


@pytest.fixture(autouse=True)
def limits():
    """No test here may take long or much memory."""
    before, started = peak_megabytes(), time.process_time()
    yield
    assert time.process_time() - started < 20
    assert peak_megabytes() - before < MEGABYTES


def peak_megabytes() -> float:
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class RunsCode:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# Checkpoints.


def repacked(source: Path, target: Path, change, method=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


@pytest.mark.filterwarnings("error")  # they would be lines, too
@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_code_in_a_checkpoint_is_not_run(form, tmp_path, call_tool, capsys):
    path, trap = tmp_path / "code.pt", tmp_path / "trap"
    content = {"stage": "deepmask", "config": RunsCode(trap), "model": {}}
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    options = ["--images", tmp_path, "--output", tmp_path / "out", "--device", "cpu"]
    assert call_tool("propose", "--checkpoint", path, *options) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "could run code" in line and str(path) in line
    assert not trap.exists()


def test_a_checkpoint_that_unpacks_to_more_is_refused(tmp_path):
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    path = repacked(
        tmp_path / "plain.pt", tmp_path / "bomb.pt", lambda _, data: data, zipfile.ZIP_DEFLATED
    )
    with pytest.raises(ValueError, match=r"bomb.pt is compressed: 4,19\d,\d+ bytes"):
        load_file(path)


def test_a_tensor_that_claims_terabytes_is_refused(tmp_path):
    torch.save({"w": torch.zeros(100)}, tmp_path / "plain.pt")

    def claim(name: str, data: bytes) -> bytes:
        number = b"\x8a\x06" + (10**12).to_bytes(6, "little")  # pickle's LONG1
        return data.replace(b"Kd", number) if name.endswith("data.pkl") else data

    path = repacked(tmp_path / "plain.pt", tmp_path / "claims.pt", claim)
    with pytest.raises(
        ValueError, match=r"claims.pt is (not a PyTorch file|damaged: a tensor claims more)"
    ):
        load_file(path)


@pytest.mark.parametrize("repeats", [False, True])
def test_a_network_larger_than_its_file_is_not_built(repeats, tiny_checkpoint, tmp_path):
    """Of terabytes: by its settings alone, and with weights that repeat one stored number."""
    content = torch.load(tiny_checkpoint, weights_only=True)
    content["config"]["deepmask"]["score_hidden"] = 10**10
    if repeats:
        config = config_from_dict(content["config"], source="test")
        with torch.device("meta"):
            shapes = {n: v.shape for n, v in make_deepmask(config).state_dict().items()}
        stored = content["model"].items()
        small = {n: v if v.shape == shapes[n] else torch.zeros(1) for n, v in stored}
        content["model"] = {n: v.expand(shapes[n]) for n, v in small.items()}
    torch.save(content, tmp_path / "huge.pt")
    words = r"holds [\d,]+ bytes of weights for" if repeats else "does not fit"
    with pytest.raises(ValueError, match=f"huge.pt {words}"):
        load_network(tmp_path / "huge.pt")


# Recipes, and those in checkpoints.

SECRET = "MASKPATH_TEST_SECRET"
INTERPOLATIONS = [
    "${oc.env:" + SECRET + "}",
    "${oc.create:${oc.decode:'[1]'}}",
    "${seed}",
    "x${",
]


@pytest.mark.parametrize("text", INTERPOLATIONS)
def test_interpolations_are_not_resolved(text, tmp_path, monkeypatch):
    monkeypatch.setenv(SECRET, "hush")
    path = tmp_path / "recipe.yaml"
    path.write_text(f'init: {{weights: "{text}"}}\n')
    sources = {
        "recipe.yaml": lambda: load_config(path),
        "--set": lambda: load_config("configs/shapes.yaml", [f"init.weights={text}"]),
        "some.pt": lambda: config_from_dict({"init": {"weights": text}}, source="some.pt"),
        "key.pt": lambda: config_from_dict({"init": {text: 1}}, source="key.pt"),
    }
    for source, load in sources.items():
        with pytest.raises(ValueError) as error:
            load()
        line = str(error.value)
        assert source in line and "\n" not in line and "hush" not in line


def cyclic() -> dict:
    values: dict = {}
    values["deepmask"] = values
    return values


def deep() -> dict:
    values: dict = {}
    for _ in range(100_000):
        values = {"deepmask": values}
    return values


STRANGE = {
    "a list": ([1], "is a list"),
    "nothing": (None, "is a NoneType"),
    "text": ("seed: 1", "is a str"),
    "a tensor": ({"seed": torch.zeros(3)}, "seed is a Tensor"),
    "bytes": ({"data": {"train": {"images": b"x"}}}, "data.train.images is a bytes"),
    "no text as a key": ({None: 1}, "unknown key None"),
    "a cycle": (cyclic(), "nested deeper"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_settings_in_a_checkpoint_are_one_line(name):
    values, words = STRANGE[name]
    with pytest.raises(ValueError, match=words) as error:
        config_from_dict(values, source="some.pt")
    assert str(error.value).startswith("some.pt: ") and "\n" not in str(error.value)


def test_depth_of_settings_has_a_limit_that_is_not_pythons():
    values = deep()
    with pytest.raises(ValueError, match="nested deeper"):
        config_from_dict(values, source="some.pt")
    while values:  # Python would free it by recursion
        values = values.pop("deepmask")


def laughs(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]")
    return "\n".join(lines)


RECIPES = {
    "aliases": (laughs(12), "is not YAML"),
    "aliases within the limit": (laughs(2), "unknown key a0"),
    "merged aliases": ("a: &a {x: 1}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}", "is not YAML"),
    "itself": ("seed: &a {b: *a}", "is not YAML"),
    "deep lists": ("seed: " + "[" * 50_000, "is not YAML"),
    "deep mappings": ("{a: " * 20_000, "is not YAML"),
    "deep blocks": ("- " * 50_000, "is not YAML"),
    "a long number": ("seed: " + "9" * 100_000, "(?i)seed|is not YAML"),
    "a hexadecimal number": ("seed: 0x" + "f" * 100_000, "(?i)seed|is not YAML"),
    "sexagesimals": ("seed: 1" + ":1" * 50_000, "(?i)seed|is not YAML"),
    "no date": ("seed: 2001-99-99", "(?i)seed|is not YAML"),
    "code": ("seed: !!python/object/apply:os.mkdir [trap]", "is not YAML"),
    "a new object": ("seed: !!python/object/new:os.system [touch trap]", "is not YAML"),
    "too large": ("seed: 1\n" + "#" * MAX_BYTES, "more than 262,144 bytes"),
    "NUL": ("seed: 1\0", "is not YAML"),
    "no UTF-8": ("seed: \udcff", "is not YAML"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_hostile_recipes_are_one_line(name, tmp_path, monkeypatch):
    text, words = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=words) as error:
        load_config(path)
    assert "recipe.yaml" in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 1000 and not (tmp_path / "trap").exists()


# Names in a report.


def test_names_in_a_report_are_text(tmp_path):
    script, image = "<script>alert(1)</script>", "<img src=x onerror=alert(2)>\"'&.png"
    (tmp_path / "data").mkdir()
    annotations, images = make_dataset(tmp_path / "data")
    (images / "found.png").rename(images / image)
    content = json.loads(annotations.read_text())
    content["images"][0]["file_name"] = image
    for category in content["categories"]:
        category["name"] = script
    annotations.write_text(json.dumps(content))
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / "sharpmask" / "proposals")
    write_store(run / "sharpmask" / "proposals", [proposals_of(1, image, [SQUARE])])
    scores = [category | {"category": script} for category in CATEGORIES]
    write_json(run / "multipathnet" / "scores" / "categories.json", scores)

    page = Page(run, (annotations, images))
    assert script in page.text
    assert any(image in value for _, attributes in page.elements for value in attributes.values())
    assert "script" not in {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        assert tag != "img" or attributes["src"].startswith("data:image/")
