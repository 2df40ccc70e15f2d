"""A network in 8 bits: its outputs agree, it is made once for a store, mistakes are named."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from datasets.images import read_image
from models.deepmask import DeepMask
from models.trunk import build_trunk
from pipeline.inference.image_files import find_images
from pipeline.inference.openvino import QuantizedNetwork, quantize
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.inference.propose_folders import propose_each, propose_images

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
INT8 = {"settings": {}, "backend": "openvino-int8"}


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
    return [proposer.scale(image[n:], s)[0] for n, image in enumerate(images) for s in (-1.0, 0.5)]


def test_the_quantized_network_agrees_on_all_sizes(proposer, inputs, tmp_path):
    quantize(proposer.dense, inputs, tmp_path / "dense.xml")
    assert "openvino_telemetry" not in sys.modules
    network = QuantizedNetwork(tmp_path / "dense.xml")
    with torch.inference_mode():
        for pixels in (*inputs, inputs[0][..., 16:, 8:]):
            expected, outputs = proposer.dense(pixels), network(pixels)
            assert [each.shape for each in outputs] == [each.shape for each in expected]
            for found, each in zip(outputs, expected, strict=True):
                spread = (each - each.mean()).norm()
                assert spread > 0 and (found - each).norm() <= 0.25 * spread
            for found, each in zip(outputs[2:], expected[2:], strict=True):
                assert found.stride() == each.stride()  # maps are gathered from as they lie
        outputs = network(inputs[0])
        before = [each.clone() for each in outputs]
        network(inputs[0].flip(-1))
        for found, each in zip(outputs, before, strict=True):
            assert torch.equal(found, each), "outputs outlive the next image"


def test_maps_of_a_network_in_half_precision_stay_in_it(tiny_sharpmask, inputs, tmp_path):
    """Its 8 bits are those of the network in full precision, scores in full precision, too."""
    half, _ = load_proposer(tiny_sharpmask, CPU, precision="bf16")
    quantize(half.dense, [pixels.bfloat16() for pixels in inputs], tmp_path / "dense.xml")
    network = QuantizedNetwork(tmp_path / "dense.xml")
    with torch.inference_mode():
        outputs, expected = (f(inputs[0].bfloat16()) for f in (network, half.dense))
    assert [each.dtype for each in outputs] == [each.dtype for each in expected]
    for found, each in zip(outputs, expected, strict=True):
        found, each = found.float(), each.float()
        assert (found - each).norm() <= 0.25 * (each - each.mean()).norm()


def test_depthwise_convolutions_run_at_any_size(tmp_path):
    """In 8 bits, OpenVINO 2026.4 ends the process at some sizes, so they stay as they are."""
    trunk = build_trunk("mobilenet_v2")
    deepmask = DeepMask(trunk, patch_size=32, reduction=8, embedding=8, score_hidden=8)
    proposer, path = Proposer(deepmask, device=CPU), tmp_path / "dense.xml"
    quantize(proposer.dense, [torch.rand(1, 3, 96, 96)], path)
    run = (
        "import sys, pathlib, torch; from pipeline.inference.openvino import QuantizedNetwork;"
        "network = QuantizedNetwork(pathlib.Path(sys.argv[1]));"
        "[network(torch.zeros(1, 3, h, w)) for h, w in ((330, 386), (499, 612), (245, 273))]"
    )
    subprocess.run([sys.executable, "-c", run, path], check=True, cwd=ROOT, timeout=120)


def test_a_quantized_run_is_calibrated_once_and_resumed(proposer, tiny_sharpmask, photos, tmp_path):
    output = tmp_path / "out"
    propose_images(proposer, photos, output, **INT8, max_images=3)
    network = output / "quantized" / "dense.xml"
    made = network.stat().st_mtime_ns
    again = load_proposer(tiny_sharpmask, CPU, num_proposals=20)[0]
    summary = propose_images(again, photos, output, **INT8)
    assert summary.done_before == 3 and summary.done == len(list(photos.iterdir())) - 3
    assert network.stat().st_mtime_ns == made
    assert len(ProposalStore(output).images()) == summary.done + 3
    # A worker of another process takes the network as it is.
    other = load_proposer(tiny_sharpmask, CPU, num_proposals=20)[0]
    [file, *_] = find_images(photos, None)
    work = propose_each(other, [file], [], read=read_image, turned=True, quantized=network)
    assert next(work).equals(ProposalStore(output).read(image_ids=[file.image_id]))
    with pytest.raises(ValueError, match="backend"):  # no store holds both kinds
        propose_images(again, photos, output, settings={})


def test_what_eight_bits_need(proposer, photos, tmp_path, monkeypatch):
    """An image to calibrate on, OpenVINO and a CPU."""

    def refused(images: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            propose_images(proposer, images, tmp_path / message, **INT8)

    (tmp_path / "broken.jpg").write_bytes(b"no image")
    refused(tmp_path / "broken.jpg", "no image could be read")
    monkeypatch.setitem(sys.modules, "nncf", None)
    refused(photos, "pip install openvino nncf")
    proposer.device = torch.device("cuda")
    refused(photos, "for CPUs")
