"""Tiny networks for the page's server."""

import pytest

from pipeline.inference.detect import Detector
from pipeline.inference.propose import Proposer
from tests.pipeline.serve.builders import load_networks


@pytest.fixture(scope="session")
def networks(tiny_sharpmask, tiny_detector) -> tuple[Proposer, Detector]:
    return load_networks(tiny_sharpmask, tiny_detector)
