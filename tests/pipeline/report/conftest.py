import pytest
from markupsafe import Markup

from pipeline.report import plots, sections
from tests.pipeline.report.small_run import (
    FOUND,
    STORE,
    make_dataset,
    write_detector,
    write_stage,
    write_summary,
)


@pytest.fixture
def dataset(tmp_path):
    """The annotations of a few images, and their folder."""
    return make_dataset(tmp_path / "data")


@pytest.fixture
def empty_plots(monkeypatch):
    """Drawing plots takes most of the time."""
    for module in (plots, sections):
        monkeypatch.setattr(
            module, "plot", lambda curves, *_, **__: Markup("<svg></svg>") if curves else None
        )


@pytest.fixture
def run(tmp_path, empty_plots):
    """A complete run of DeepMask and the detector, to be changed."""
    write_stage(tmp_path / "run" / "deepmask", STORE)
    write_detector(tmp_path / "run" / "multipathnet", FOUND)
    write_summary(tmp_path / "run", "deepmask")
    return tmp_path / "run"
