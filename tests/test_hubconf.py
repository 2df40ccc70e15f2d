"""The library entry: networks through torch.hub, in a process of their own."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.trunk import TrunkConfig
from pipeline.checkpoint import save_checkpoint
from pipeline.config import Config, DeepMaskStageConfig
from pipeline.networks import load_network, make_deepmask
from pipeline.recipe import config_to_dict

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, *arguments: object, folder: Path) -> str:
    """The output of a script, which gets the project's root and the arguments."""
    command = [sys.executable, "-c", code, str(ROOT), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, cwd=folder, check=True, **options).stdout.strip()


TRAINED = """
import sys, torch
root, stage, checkpoint = sys.argv[1:]
model = torch.hub.load(root, stage, source="local", checkpoint=checkpoint)
state = torch.load(checkpoint, weights_only=True)["model"]
assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
assert not model.training
coarse = torch.hub.load(root, "deepmask", source="local", checkpoint=checkpoint)
new = torch.hub.load(root, "deepmask", source="local", trunk="tiny", patch_size=96, mask_size=8)
patches = torch.zeros(1, 3, 128, 128)
print(*(tuple(each.eval()(patches)["mask_logits"].shape) for each in (model, coarse, new)))
"""


@pytest.mark.parametrize("stage, side", [("deepmask", 14), ("sharpmask", 96)])
def test_hub_gives_trained_and_new_networks(stage, side, request, tmp_path):
    name = {"deepmask": "tiny_checkpoint", "sharpmask": "tiny_sharpmask"}[stage]
    printed = run(TRAINED, stage, request.getfixturevalue(name), folder=tmp_path)
    assert printed.endswith(f"(1, {side}, {side}) (1, 14, 14) (1, 8, 8)")


OUTPUTS = """
import sys, torch
root, *checkpoints = sys.argv[1:]
patches = torch.load("patches.pt")
models = [torch.hub.load(root, "deepmask", source="local", checkpoint=c) for c in checkpoints]
with torch.no_grad():
    torch.save([model(patches)["mask_logits"] for model in models], "outputs.pt")
"""


@torch.no_grad()
def test_hub_gives_the_networks_of_inference_whatever_their_padding_and_pooling(tmp_path):
    """Padding and pooling do not show in the weights: the config has to say it."""
    torch.manual_seed(0)
    patches = torch.randn(2, 3, 96, 96)
    torch.save(patches, tmp_path / "patches.pt")
    sizes = DeepMaskStageConfig(
        patch_size=64, mask_size=8, reduction=8, embedding=16, score_hidden=8
    )
    checkpoints, expected, weights = [], [], None
    for padding, ceil in itertools.product(("symmetric", "zero"), (False, True)):
        trunk = TrunkConfig("resnet18", width=8, padding=padding, ceil_pooling=ceil)
        config = Config(trunk=trunk, deepmask=sizes)
        weights = weights or make_deepmask(config).state_dict()
        checkpoints.append(tmp_path / f"{padding}-{ceil}.pt")
        checkpoint = {"stage": "deepmask", "config": config_to_dict(config), "model": weights}
        save_checkpoint(checkpoints[-1], checkpoint)
        expected.append(load_network(checkpoints[-1])[0](patches)["mask_logits"])
    run(OUTPUTS, *checkpoints, folder=tmp_path)
    outputs = torch.load(tmp_path / "outputs.pt")
    assert len(outputs) == 4 and all(map(torch.equal, outputs, expected))
    for one, other in itertools.combinations(outputs, 2):
        assert (one - other).abs().max() > 1e-3 * one.abs().max()


def test_another_package_called_models_is_named(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    code = "import sys, models, torch; torch.hub.load(sys.argv[1], 'deepmask', source='local')"
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(code, folder=tmp_path)
    assert str(tmp_path / "models") in error.value.stderr
