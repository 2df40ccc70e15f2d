"""Bands of rows give what the whole image gives: every layer, cell, score and mask."""

import itertools

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models.build import build_sharpmask
from models.inference import optimize_for_inference
from models.sharpmask import DenseNetwork, SharpMask
from models.trunk import SymmetricConv2d, TrunkConfig
from pipeline.inference import memory
from pipeline.inference.bands import BandedNetwork
from pipeline.inference.propose import Proposer

CPU = torch.device("cpu")
SIZES = {"mask_size": 14, "reduction": 8, "embedding": 16, "score_hidden": 8, "patch_size": 64}
TRUNKS = [
    {"name": "tiny"},
    {"name": "tiny", "padding": "zero", "ceil_pooling": True},
    {"name": "resnet18"},
    {"name": "resnet50", "width": 8, "padding": "zero"},
    {"name": "resnet18", "width": 16, "ceil_pooling": True},
    {"name": "vgg11", "padding": "zero", "ceil_pooling": True},
    {"name": "densenet121"},
    {"name": "mobilenet_v2"},
    {"name": "resnet50", "width": 8, "style": "caffe"},
]


def build(trunk: dict, **settings) -> SharpMask:
    torch.manual_seed(0)
    config = TrunkConfig(**trunk, weights=None)
    return optimize_for_inference(build_sharpmask(config, deepmask=SIZES | settings).eval())


def split(pixels: Tensor, heights: list[int]):
    """Bands of these heights, over and over."""
    end, start = pixels.shape[-2], 0
    for height in itertools.cycle(heights):
        yield pixels[..., start : start + height, :], start + height >= end
        start += height
        if start >= end:
            return


def in_bands(network: nn.Module, pixels: Tensor, heights: list[int]) -> list[Tensor]:
    outputs = list(BandedNetwork(network)(split(pixels, heights)))
    return [
        torch.cat([rows for rows in each if rows is not None], -2)
        for each in zip(*outputs, strict=True)
    ]


@pytest.mark.parametrize("trunk", TRUNKS, ids=str)
@torch.inference_mode()
def test_a_network_in_bands_equals_the_whole(trunk):
    model = build(trunk, separate_heads=trunk["name"] == "vgg11")
    network = DenseNetwork(model.deepmask, model)
    pixels = torch.randn(1, 3, 64 + 171, 64 + 37).to(memory_format=torch.channels_last)
    expected = network(pixels)
    for heights in ([16], [48, 16], [1000]):
        found = in_bands(network, pixels, heights)
        for one, other in zip(expected, found, strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


class _Layers(nn.Module):
    """Some windows, with a way round one of them."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.first, self.second, self.third = layers
        self.around = nn.Conv2d(4, 4, 1, stride=self.second.stride)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.first(x)
        y = self.second(x)
        y += self.around(x)
        return (self.third(y),)


def windows(channels: int):
    """Convolutions of all paddings and pools, of which rows of output come as from `around`."""

    def conv(size: int, stride: int, kind: str) -> nn.Module:
        padding = size // 2
        if kind == "symmetric":
            return SymmetricConv2d(channels, 4, size, stride, padding)
        return nn.Conv2d(channels, 4, size, stride, padding)

    sizes, strides = st.sampled_from([3, 5, 7]), st.sampled_from([1, 2])
    return st.builds(conv, sizes, strides, st.sampled_from(["symmetric", "zero"]))


pools = st.builds(
    lambda padding, is_ceil: nn.MaxPool2d(3, 2, padding, ceil_mode=is_ceil),
    st.sampled_from([0, 1]),
    st.booleans(),
)


@given(
    windows(3),
    windows(4),
    st.one_of(windows(4), pools, st.just(nn.AvgPool2d(2, 2))),
    st.integers(33, 90),
    st.lists(st.integers(8, 40), min_size=1, max_size=3),
)
@settings(max_examples=40, deadline=None)
@torch.inference_mode()
def test_any_arrangement_of_windows(first, second, third, rows, heights):
    network = _Layers([first, second, third]).eval()
    pixels = torch.randn(1, 3, rows, 41)
    (expected,), (found,) = network(pixels), in_bands(network, pixels, heights)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="cannot be run in bands"):
        BandedNetwork(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)))
    with pytest.raises(ValueError, match="cannot be run in bands"):
        BandedNetwork(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")))


@pytest.mark.parametrize("name", ["tiny", "resnet18"])
def test_a_row_comes_with_the_last_row_that_its_gradient_reaches(name):
    """The rows that a band has to wait for are the receptive field's, no more."""
    model = build({"name": name, "width": 16} if name == "resnet18" else {"name": name})
    for parameter in model.parameters():  # some layers begin with zeros, which hide what they see
        nn.init.normal_(parameter, std=0.1)
    network = DenseNetwork(model.deepmask, model)
    pixels = torch.randn(1, 3, 512, 64, requires_grad=True)
    cell = 3
    _, scores, *horizontal = network(pixels)
    for output, row, values in ((1, cell, scores), (5, 8 * cell, horizontal[-1])):
        (gradient,) = torch.autograd.grad(values[..., row, :].sum(), pixels, retain_graph=True)
        reached = int(gradient.abs().sum((0, 1, 3)).nonzero().max())
        with torch.inference_mode():
            news = [new[output] for new in BandedNetwork(network)(split(pixels, [1]))]
        known = np.cumsum([0 if new is None else new.shape[-2] for new in news])
        assert np.searchsorted(known, row + 1) == reached


@torch.inference_mode()
def test_bands_of_two_images_cannot_be_mixed():
    banded = BandedNetwork(DenseNetwork(build({"name": "tiny"}).deepmask, None))
    first, other = (banded(split(torch.zeros(1, 3, 160, 160), [32])) for _ in range(2))
    next(first)
    next(other)
    with pytest.raises(RuntimeError, match="another image"):
        next(first)
    assert len(list(other)) == 4


@pytest.mark.parametrize("trunk", [TRUNKS[0], TRUNKS[2], TRUNKS[4]], ids=str)
@pytest.mark.parametrize("refine", [False, True])
def test_proposals_in_bands_equal_those_of_the_whole(trunk, refine):
    model = build(trunk)
    model = model if refine else model.deepmask
    image = np.random.default_rng(0).integers(0, 256, (171, 230, 3), dtype=np.uint8)
    image = np.kron(image[::8, ::8], np.ones((8, 8, 1), np.uint8))
    options = {"device": CPU, "num_proposals": 150, "log2_scales": (-1.0, 0.5, 0.5)}
    whole = Proposer(model, **options)
    expected = whole(image)
    # The smallest bands, and no map is kept.
    banded = Proposer(model, **options, memory=1e-6)
    assert banded.band_pixels < image.size
    assert len(list(banded.run_bands(image, 0.5))) > 5
    found = banded(image)
    assert len(found) == len(expected)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    for i in range(len(found)):
        (iou,) = coco_mask.iou([found.rle(i)], [expected.rle(i)], [0])[0]
        assert iou >= 0.999


def test_equal_scores_are_chosen_as_in_the_whole():
    """A gray image scores the same nearly everywhere: the first cells of the smallest scale."""
    model = build({"name": "tiny"})
    image = np.full((200, 180, 3), 128, np.uint8)
    options = {"device": CPU, "num_proposals": 30, "log2_scales": (-0.5, 0.5, 0.5)}
    found = [Proposer(model, **options, memory=memory)(image) for memory in (None, 1e-6)]
    assert found[0].rles == found[1].rles


def test_another_backend_takes_whole_images():
    """Also when the network was asked before it was exchanged, as calibration does."""
    proposer = Proposer(build({"name": "tiny"}), device=CPU, memory=1e-6)
    image, network = np.zeros((90, 120, 3), np.uint8), proposer.dense
    assert len(list(proposer.run_bands(image, 0.5))) > 1
    calls: list[Tensor] = []
    proposer.dense = lambda pixels: calls.append(pixels) or network(pixels)
    assert len(list(proposer.run_bands(image, 0.5))) == len(calls) == 1


@torch.inference_mode()
def test_memory_is_set_by_the_band_and_not_by_the_image():
    model = build({"name": "tiny"})
    network = BandedNetwork(DenseNetwork(model.deepmask, model))
    peaks = []
    for rows in (512, 2048):
        for _ in network(split(torch.zeros(1, 3, rows, 128), [64])):
            peaks.append(network.peak_bytes)
    assert max(peaks[: 512 // 64]) == max(peaks[512 // 64 :])


@pytest.mark.parametrize(
    ("free", "limit"), [(1 << 40, 400_000_000), (400, 100), (None, 400_000_000)]
)
def test_the_limit_of_memory(free, limit, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    assert memory.memory_limit(CPU, 2.5) == 2_500_000_000
    assert memory.memory_limit(CPU, None) == limit
