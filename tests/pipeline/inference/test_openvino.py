"""A network in 8 bits: its outputs agree, it is made once for a store, mistakes are named."""

import sys
from pathlib import Path

import pytest
import torch
from pipeline.load import load_proposer

from datasets.images import read_image
from pipeline.inference.openvino import QuantizedNetwork, quantize
from pipeline.inference.proposals import ProposalStore
from pipeline.inference.propose import Proposer
from pipeline.inference.propose_run import propose_images

CPU = torch.device("cpu")
INT8 = "openvino-int8"


@pytest.fixture
def photos(shapes_directory) -> Path:
    return shapes_directory / "images" / "val"


@pytest.fixture
def proposer(tiny_sharpmask) -> Proposer:
    return load_proposer(tiny_sharpmask, CPU, num_proposals=20)[0]


@pytest.fixture
def inputs(proposer, photos) -> list[torch.Tensor]:
    """Two images, each at two scales of the pyramid: four sizes."""
    images = [read_image(path) for path in sorted(photos.iterdir())[:2]]
    return [proposer.scale(image[n:], o)[0] for n, image in enumerate(images) for o in (-1.0, 0.5)]


def _assert_agree(outputs, expected, *, error: float) -> None:
    """Equal shapes; the error's norm is at most a share of each output's, its mean apart."""
    assert [each.shape for each in outputs] == [each.shape for each in expected]
    for own, each in zip(outputs, expected, strict=True):
        spread = (each - each.mean()).norm()
        assert spread > 0 and (own - each).norm() <= error * spread


def test_the_quantized_network_agrees_on_all_sizes(proposer, inputs, tmp_path):
    quantize(proposer.dense, inputs, tmp_path / "dense.xml")
    network = QuantizedNetwork(tmp_path / "dense.xml")
    with torch.inference_mode():
        for pixels in (*inputs, inputs[0][..., 16:, 8:]):
            expected = proposer.dense(pixels)
            _assert_agree(network(pixels), expected, error=0.25)
            for own, each in zip(network(pixels)[2:], expected[2:], strict=True):
                assert own.stride() == each.stride()  # maps are gathered from as they lie


def test_outputs_outlive_the_next_image(proposer, inputs, tmp_path):
    quantize(proposer.dense, inputs, tmp_path / "dense.xml")
    network = QuantizedNetwork(tmp_path / "dense.xml")
    first = network(inputs[0])
    before = [each.clone() for each in first]
    network(inputs[0].flip(-1))
    assert all(torch.equal(a, b) for a, b in zip(first, before, strict=True))


def test_a_quantized_run_is_calibrated_once_and_resumed(proposer, tiny_sharpmask, photos, tmp_path):
    settings = load_proposer(tiny_sharpmask, CPU, num_proposals=20)[1]
    out = tmp_path / "out"
    propose_images(proposer, photos, out, settings=settings, backend=INT8, max_images=3)
    network = out / "quantized" / "dense.xml"
    made = network.stat().st_mtime_ns
    again = load_proposer(tiny_sharpmask, CPU, num_proposals=20)[0]
    summary = propose_images(again, photos, out, settings=settings, backend=INT8)
    assert summary.done_before == 3 and summary.done == len(list(photos.iterdir())) - 3
    assert network.stat().st_mtime_ns == made
    assert len(ProposalStore(out).images()) == summary.done + 3
    with pytest.raises(ValueError, match="backend"):  # no store holds both kinds
        propose_images(again, photos, out, settings=settings)


def test_no_image_to_calibrate_on(proposer, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="no image could be read"):
        propose_images(proposer, tmp_path / "images", tmp_path / "out", settings={}, backend=INT8)


def test_openvino_that_is_not_installed(proposer, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ValueError, match="pip install openvino nncf"):
        propose_images(proposer, photos, tmp_path / "out", settings={}, backend=INT8)


def test_eight_bits_are_for_cpus(proposer, photos, tmp_path):
    proposer.device = torch.device("cuda")
    with pytest.raises(ValueError, match="for CPUs"):
        propose_images(proposer, photos, tmp_path / "out", settings={}, backend=INT8)


def test_scores_keep_full_precision_under_autocast(proposer, inputs):
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        embeddings, scores, *_ = proposer.dense(inputs[0])
    assert embeddings.dtype == torch.bfloat16 and scores.dtype == torch.float32
