"""The library entry: networks through torch.hub, in a process of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

import hubconf

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


def test_a_trunk_that_only_classifies_is_refused():
    with pytest.raises(ValueError, match=r"trunk cifar_resnet20 .* strides \(1, 2, 4\)"):
        hubconf.deepmask(trunk="cifar_resnet20")


def test_another_package_called_models_is_named(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    code = "import sys, models, torch; torch.hub.load(sys.argv[1], 'deepmask', source='local')"
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(code, folder=tmp_path)
    assert str(tmp_path / "models") in error.value.stderr


def test_dependencies_name_all_that_the_import_needs():
    """torch.hub checks them before it imports, and names what is missing."""
    code = """
import re, sys
from importlib.metadata import requires
import hubconf
names = {"opencv-python": "cv2"}
needed = {re.match(r"[\\w-]+", line)[0] for line in requires("maskpath") if "extra" not in line}
imported = {names.get(name, name) for name in needed} & set(sys.modules)
print(*sorted(imported - set(hubconf.dependencies)))
"""
    assert run(code, folder=ROOT) == ""
