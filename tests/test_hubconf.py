"""The library entry: networks through torch.hub, in a process of their own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import sys, torch
root, checkpoint = sys.argv[1:]
model = torch.hub.load(root, "deepmask", source="local", checkpoint=checkpoint)
state = torch.load(checkpoint, weights_only=True)["model"]
assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
assert not model.training
new = torch.hub.load(root, "deepmask", source="local", trunk="tiny", patch_size=96, mask_size=8)
side = new.patch_size + new.context
print(tuple(new.eval()(torch.zeros(1, 3, side, side))["mask_logits"].shape))
"""


def run(code, *arguments, folder):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_hub_gives_trained_and_new_networks(tiny_checkpoint, tmp_path):
    done = run(SCRIPT, ROOT, tiny_checkpoint, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("(1, 8, 8)")


REFINED = """
import sys, torch
root, checkpoint = sys.argv[1:]
model = torch.hub.load(root, "sharpmask", source="local", checkpoint=checkpoint)
state = torch.load(checkpoint, weights_only=True)["model"]
assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
coarse = torch.hub.load(root, "deepmask", source="local", checkpoint=checkpoint)
print(tuple(model(torch.zeros(1, 3, 128, 128))["mask_logits"].shape), coarse.mask_size)
"""


def test_hub_gives_a_sharpmask_and_the_deepmask_within(tiny_sharpmask, tmp_path):
    done = run(REFINED, ROOT, tiny_sharpmask, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("(1, 96, 96) 14")


def test_another_package_called_models_is_named(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    code = "import sys, models, torch; torch.hub.load(sys.argv[1], 'deepmask', source='local')"
    done = run(code, ROOT, folder=tmp_path)
    assert done.returncode != 0
    assert str(tmp_path / "models") in done.stderr
