import pytest
from markupsafe import Markup

from pipeline.report import plots
from tests.pipeline.report.small_run import make_dataset, write_run


@pytest.fixture
def dataset(tmp_path):
    """The annotations of a few images, and their folder."""
    return make_dataset(tmp_path / "data")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A complete run of DeepMask and the detector, to be changed.

    Its plots are empty: drawing them takes most of the time.
    """
    monkeypatch.setattr(
        plots, "plot", lambda curves, *_, **__: Markup("<svg></svg>") if curves else None
    )
    return write_run(tmp_path / "run")
