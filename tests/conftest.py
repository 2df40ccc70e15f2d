"""A small synthetic dataset, a network trained on it for two steps, and the tools as functions."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from datasets.shapes import write_shapes
from pipeline import precision
from pipeline.command import run_tool
from pipeline.recipe import load_config
from tests.fuzzing import RUN
from tests.pipeline.training.runs import train
from tests.real_data import DATA, say_what_lacked

ROOT = Path(__file__).resolve().parents[1]
TRAIN_IMAGES, VAL_IMAGES = 24, 8


@pytest.fixture(scope="session")
def shapes_directory(tmp_path_factory) -> Path:
    """`annotations/instances_{train,val}.json` and `images/{train,val}`."""
    directory = tmp_path_factory.mktemp("shapes")
    write_shapes(directory, num_images=TRAIN_IMAGES, seed=0, split="train")
    write_shapes(directory, num_images=VAL_IMAGES, seed=0, split="val")
    return directory


@pytest.fixture(scope="session")
def tiny_recipe(shapes_directory) -> dict:
    """The values of `tiny_config`; copy before you change them."""
    data = {
        split: {
            "annotations": str(shapes_directory / "annotations" / f"instances_{split}.json"),
            "images": str(shapes_directory / "images" / split),
        }
        for split in ("train", "val")
    }
    return {
        "data": {**data, "workers": 0},
        "trunk": {"name": "tiny", "weights": None},
        "deepmask": {
            "patch_size": 96,
            "context": 32,
            "target_size": 48,
            "mask_size": 14,
            "reduction": 16,
            "embedding": 32,
            "score_hidden": 32,
            "optim": {
                "batch_size": 8,
                "batches_per_epoch": 2,
                "epochs": 1,
                "validation_batches": 2,
                "log_every": 1,
            },
        },
        "sharpmask": {
            "km": 16,
            "ks": 16,
            "optim": {
                "lr": 1.0e-5,  # more would switch every mask off: two steps teach nothing else
                "batch_size": 8,
                "batches_per_epoch": 2,
                "epochs": 1,
                "validation_batches": 2,
                "log_every": 1,
            },
        },
        "multipathnet": {
            "trunk": {"name": "tiny", "weights": None, "frozen_levels": 1},
            "width": 8,
            "pooled_size": 3,
            "features": 16,
            "sampling": {
                "short_side": 160,
                "long_side": 224,
                "rois_per_image": 16,
                "max_proposals": 100,  # making them takes most of the time
            },
            "optim": {
                "batch_size": 2,
                "batches_per_epoch": 2,
                "epochs": 1,
                "validation_batches": 2,
                "log_every": 1,
            },
        },
        "propose": {"num_proposals": 50, "log2_scales": [-1.0, 0.0, 0.5]},
        "detect": {"num_proposals": 50},
    }


@pytest.fixture(scope="session")
def tiny_config(tiny_recipe, tmp_path_factory) -> Path:
    """A recipe of one epoch of two minibatches; read it, do not change it."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe))
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_config, tmp_path_factory) -> Path:
    """The run directory of `tiny_config`; read it, do not change it."""
    output = tmp_path_factory.mktemp("run") / "deepmask"
    train("deepmask", load_config(tiny_config), output)
    return output


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_run) -> Path:
    """The trained network's checkpoint; read it, do not change it."""
    return tiny_run / "checkpoints" / "best.pt"


@pytest.fixture(scope="session")
def tiny_sharpmask(tiny_config, tiny_checkpoint, tmp_path_factory) -> Path:
    """The checkpoint of a SharpMask on `tiny_checkpoint`; read it, do not change it."""
    config = load_config(tiny_config, [f"init.deepmask={tiny_checkpoint}"])
    return train("sharpmask", config, tmp_path_factory.mktemp("run") / "sharpmask")


@pytest.fixture(scope="session")
def tiny_detector(tiny_config, tiny_sharpmask, tmp_path_factory) -> Path:
    """The checkpoint of a MultiPathNet, in a run directory with its proposals; as above."""
    config = load_config(tiny_config, [f"init.proposer={tiny_sharpmask}"])
    return train("multipathnet", config, tmp_path_factory.mktemp("run") / "multipathnet")


@pytest.fixture(scope="session")
def stores(tiny_detector) -> list[str]:
    """Overrides that name the proposals which `tiny_detector` was trained on."""
    folder = tiny_detector.parents[1] / "proposals"
    return [f"init.{split}_proposals={folder / split}" for split in ("train", "val")]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch) -> None:
    """What `--precision auto` chooses must not depend on how busy the machine is."""
    monkeypatch.setattr(precision, "has_units", lambda: False)


@pytest.fixture
def call_tool(monkeypatch) -> Callable[..., int]:
    """A tool as from the command line, but in this process: (name, *arguments) -> exit status."""

    def call(name: str, *arguments: object) -> int:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_tool(tool.main)
        return exit.value.code

    return call


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker of `tests/fuzzing.py`."""
    config.addinivalue_line("markers", "fuzz: many drawn inputs, more of them in `make fuzz`")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails if a test skipped for lack of real data that should be there."""
    if what_lacked(session.config) and DATA.is_dir() and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def what_lacked(config: pytest.Config) -> str:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    return say_what_lacked([str(report.longrepr) for report in skipped])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says what real data lacked, and in a campaign how many cases have run."""
    if line := what_lacked(terminalreporter.config):
        terminalreporter.write_line(line)
    if "MASKPATH_FUZZ_CASES" in os.environ:
        for name, count in sorted(RUN.items()):
            terminalreporter.write_line(f"{count:9,} cases of {name}")
        terminalreporter.write_line(f"{RUN.total():9,} fuzzed cases")
