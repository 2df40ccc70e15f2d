"""Weights as the Hugging Face hub has them: read back equal to the bit, wherever one is named."""

import ast
import json
import shutil
import sys

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import hubconf
from pipeline.checkpoint import file_sha256, load_checkpoint
from pipeline.hub import write_hub_folder
from pipeline.hub_model import HubModel
from pipeline.networks import load_network, network_settings
from pipeline.pretrained import PRETRAINED_STAGES, pretrained_checkpoint
from tests.test_imports import FILES, packages

STAGES = {
    "deepmask": "tiny_checkpoint",
    "sharpmask": "tiny_sharpmask",
    "multipathnet": "tiny_detector",
}


@pytest.fixture
def folder(tiny_sharpmask, tmp_path):
    write_hub_folder(tiny_sharpmask, tmp_path / "hub")
    return tmp_path / "hub"


def assert_same_network(a, b) -> None:
    (first, first_config, first_rest), (second, second_config, second_rest) = a, b
    state = second.state_dict()
    assert state.keys() == first.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in first.state_dict().items())
    settings = [network_settings(r["stage"], c) for _, c, r in (a, b)]
    assert settings[0] == settings[1]
    for key in ("stage", "categories", "object_sides", "compressed_fc"):
        assert first_rest.get(key) == second_rest.get(key)
    assert first_config.propose == second_config.propose


@pytest.mark.parametrize("stage", STAGES)
def test_a_folder_gives_the_same_network(stage, request, tmp_path):
    checkpoint = request.getfixturevalue(STAGES[stage])
    line = write_hub_folder(checkpoint, tmp_path / "hub")
    assert "model.safetensors" in line
    assert_same_network(load_network(checkpoint), load_network(tmp_path / "hub"))
    theirs = load_network(tmp_path / "hub" / "model.safetensors", stage=stage)
    assert_same_network(load_network(checkpoint), theirs)
    words = "".join(
        f.read_text() for f in (tmp_path / "hub").iterdir() if f.suffix != ".safetensors"
    )
    assert str(tmp_path.parent) not in words


@pytest.mark.parametrize("stage", PRETRAINED_STAGES)
def test_the_weights_in_the_box_stay_as_they_are(stage, tmp_path):
    """In half precision: the file is not twice as large."""
    path = pretrained_checkpoint(stage)
    write_hub_folder(path, tmp_path)
    expected, found = (load_checkpoint(p)["model"] for p in (path, tmp_path))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.dtype == found[name].dtype and torch.equal(value, found[name])
    assert (tmp_path / "model.safetensors").stat().st_size < 1.02 * path.stat().st_size


def test_the_card_is_the_hubs(tiny_detector, tmp_path, monkeypatch):
    write_hub_folder(tiny_detector, tmp_path / "det")
    card = ModelCard.load(tmp_path / "det" / "README.md")
    assert card.data.license == "bsd-3-clause" and card.data.pipeline_tag == "object-detection"
    assert card.data.library_name == "maskpath" and "multipathnet" in card.data.tags
    names = [c["name"] for c in load_checkpoint(tiny_detector)["categories"]]
    assert ", ".join(names) in card.text and "`instances_train.json`" in card.text
    assert "tools/detect.py --checkpoint det" in card.text
    (tmp_path / "det" / "README.md").write_text("mine")
    write_hub_folder(tiny_detector, tmp_path / "det")
    assert (tmp_path / "det" / "README.md").read_text() == "mine"


def test_tools_and_torch_hub_read_the_folder(folder, tiny_sharpmask, shapes_directory, call_tool):
    image = min((shapes_directory / "images" / "val").iterdir())
    results = []
    for number, checkpoint in enumerate((tiny_sharpmask, folder)):
        output = folder.parent / str(number)
        options = ["--device", "cpu", "--images", image, "--output", output, "--scales", -1, 0, 1]
        assert call_tool("propose", "--checkpoint", checkpoint, *options) == 0
        results.append((output / "proposals.json").read_text())
    assert results[0] == results[1] and len(results[0]) > 100
    model = hubconf.sharpmask(checkpoint=str(folder))
    state = load_checkpoint(tiny_sharpmask)["model"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_hash_tells_configs_apart(folder):
    before = file_sha256(folder)
    config = json.loads((folder / "config.json").read_text())
    config["config"]["propose"]["mask_threshold"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert file_sha256(folder) != before
    assert load_network(folder)[1].propose.mask_threshold == 0.5


def test_the_mixin_with_local_folders(folder, tmp_path):
    model = HubModel.from_pretrained(folder)
    patches = torch.zeros(1, 3, 128, 128)
    logits = load_network(folder)[0](patches)["mask_logits"]
    assert torch.equal(model(patches)["mask_logits"], logits)
    model.save_pretrained(tmp_path / "saved")
    assert_same_network(load_network(folder), load_network(tmp_path / "saved"))
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.pipeline_tag == "mask-generation"


def test_pushing_and_pulling_without_internet(folder, tmp_path, monkeypatch):
    """The hub is a folder: what is uploaded is what is downloaded."""
    hub = tmp_path / "on_the_hub"

    def upload(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, hub / repo_id)
        return "https://hub/commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: HubName(repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert HubModel.from_checkpoint(folder).push_to_hub("user/name") == "https://hub/commit"
    files = {path.name for path in (hub / "user" / "name").iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md"}

    def download(repo_id, *, allow_patterns, revision, **options):
        assert revision == "v1" and allow_patterns == ["model.safetensors", "config.json"]
        return str(hub / repo_id)

    def download_file(repo_id, filename, **options):
        return str(hub / repo_id / filename)

    monkeypatch.setattr("pipeline.hub_model.snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download_file)
    pulled = HubModel.from_pretrained("user/name", revision="v1")
    state = load_network(folder)[0].state_dict()
    assert all(torch.equal(v, state[name]) for name, v in pulled.network.state_dict().items())


class HubName:
    def __init__(self, repo_id: str):
        self.repo_id = repo_id


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json does not exist; it belongs to model.safetensors"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", '{"model_type": "bert"}', "config.json is not of this project"),
        ("model.safetensors", "text", "model.safetensors is not a safetensors file"),
    ],
)
def test_a_damaged_folder_is_one_line(folder, file, content, words):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_network(folder)


def test_another_projects_folder_is_left_alone(tiny_sharpmask, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="not of this project"):
        write_hub_folder(tiny_sharpmask, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_without_safetensors(folder, tiny_sharpmask, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: load_network(folder), lambda: write_hub_folder(tiny_sharpmask, tmp_path)):
        with pytest.raises(ValueError, match="pip install safetensors"):
            call()


def test_nothing_but_the_mixin_needs_the_hub_to_start():
    for path in FILES:
        needed = packages(ast.parse(path.read_text()).body)
        wanted = {"huggingface_hub"} if path.name == "hub_model.py" else set()
        assert needed & {"huggingface_hub", "safetensors"} == wanted
