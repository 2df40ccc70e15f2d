"""The released RoI pooling against its kernel's loops in plain Python; Fast R-CNN's against
torchvision's.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_pool

from models import roi_pooling
from models.roi_pooling import roi_pool_caffe, roi_pool_lua

HEIGHT, WIDTH, CHANNELS = 7, 11, 3
fixed = [HealthCheck.function_scoped_fixture]  # `large` is the same for all examples
any_fixture = settings(max_examples=150, deadline=None, suppress_health_check=fixed)
coordinate = st.integers(-60, 260).map(lambda v: v / 2)  # halves of a pixel: edges at half cells
rois = st.tuples(st.integers(0, 1), *[coordinate] * 4)


def c_round(value: np.float32) -> int:
    return int(math.copysign(math.floor(abs(float(value)) + 0.5), float(value)))


def bins(first: float, last: float, size: int, limit: int, scale: float) -> list[tuple[int, int]]:
    start = c_round(np.float32(first) * np.float32(scale))
    end = c_round(np.float32(last) * np.float32(scale)) - 1
    step = np.float32(max(end - start + 1, 1)) / np.float32(size)
    edges = [c_round(np.float32(n) * step) + start for n in range(size + 1)]
    edges = [min(max(edge, 0), limit) for edge in edges]
    return list(zip(edges[:-1], edges[1:], strict=True))


def pool_slowly(features: np.ndarray, roi: tuple, size: int, scale: float) -> np.ndarray:
    pooled = np.zeros((features.shape[1], size, size), np.float32)
    row, x0, y0, x1, y1 = roi
    for i, (top, bottom) in enumerate(bins(y0, y1, size, features.shape[2], scale)):
        for j, (left, right) in enumerate(bins(x0, x1, size, features.shape[3], scale)):
            window = features[row, :, top:bottom, left:right]
            if window.size:
                pooled[:, i, j] = window.max(axis=(1, 2))
    return pooled


@pytest.fixture(params=[1, 1 << 19], ids=["by axes", "by torchvision"])
def large(request, monkeypatch) -> None:
    """From so many values on, features without a gradient are pooled by axes."""
    monkeypatch.setattr(roi_pooling, "LARGE", request.param)


@given(boxes=st.lists(rois, max_size=6), size=st.integers(1, 9), power=st.integers(1, 4))
@any_fixture
def test_lua_pooling_is_the_released_kernels(large, boxes, size, power):
    generator = torch.Generator().manual_seed(size)
    features = torch.randn(2, CHANNELS, HEIGHT, WIDTH, generator=generator)
    given_rois = torch.tensor(boxes, dtype=torch.float32).view(-1, 5)
    pooled = roi_pool_lua(features, given_rois, size, 1 / 2**power)
    assert pooled.shape == (len(boxes), CHANNELS, size, size)
    for ours, roi in zip(pooled.numpy(), boxes, strict=True):
        assert np.array_equal(ours, pool_slowly(features.numpy(), roi, size, 1 / 2**power))


def test_lua_gradient_reaches_the_largest_cell_alone():
    features = torch.tensor([[[[1.0, 5.0, 2.0], [0.0, 3.0, 4.0]]]], requires_grad=True)
    roi_pool_lua(features, torch.tensor([[0, 0.0, 0, 3.0, 2.0]]), 1, 1.0).sum().backward()
    assert features.grad[0, 0].tolist() == [[0, 1, 0], [0, 0, 0]]


def test_caffe_pooling_takes_the_features_of_autocast():
    features = torch.randn(1, CHANNELS, HEIGHT, WIDTH).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = roi_pool_caffe(features, torch.tensor([[0, 0, 0, 90, 50.0]]), 3, 1 / 16)
    pooled.sum().backward()
    assert features.grad.dtype == torch.bfloat16 and features.grad.any()


corner = st.floats(-60, 260, allow_nan=False)


@given(
    boxes=st.lists(st.tuples(corner, corner, corner, corner), max_size=8),
    size=st.integers(1, 9),
    power=st.integers(0, 4),
    channels_last=st.booleans(),
)
@any_fixture
def test_inference_pools_the_bins_of_torchvision(monkeypatch, boxes, size, power, channels_last):
    monkeypatch.setattr(roi_pooling, "LARGE", 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    features = torch.randn(2, 3, 200 >> power, 230 >> power).contiguous(memory_format=layout)
    given_rois = torch.tensor([(n % 2, *box) for n, box in enumerate(boxes)]).reshape(-1, 5)
    pooled = roi_pool_caffe(features, given_rois, size, 1 / 2**power)
    assert torch.equal(pooled, roi_pool(features, given_rois, size, 1 / 2**power))


def test_bins_of_every_length_are_torchvisions(monkeypatch):
    monkeypatch.setattr(roi_pooling, "LARGE", 1)
    features = torch.randn(1, 2, 1, 600)
    ends = torch.arange(600.0)
    given_rois = torch.stack([0 * ends, 0 * ends, 0 * ends, ends, 0 * ends], dim=1)
    for size in (3, 5, 7, 14):
        pooled = roi_pool_caffe(features, given_rois, size, 1.0)
        assert torch.equal(pooled, roi_pool(features, given_rois, size, 1.0))


def test_large_features_are_pooled_by_axes_where_no_gradient_is_asked_for(monkeypatch):
    features = torch.randn(1, 512, 32, 32)
    given_rois = torch.tensor([[0, 3.0, 5, 300, 200]])
    expected = roi_pool(features, given_rois, 7, 1 / 16)
    calls, by_axes = [], roi_pooling._pool_by_axes
    monkeypatch.setattr(
        roi_pooling, "_pool_by_axes", lambda *args: calls.append(args) or by_axes(*args)
    )
    assert torch.equal(roi_pool_caffe(features, given_rois, 7, 1 / 16), expected)
    assert len(calls) == 1
    features.requires_grad_()
    assert torch.equal(roi_pool_caffe(features, given_rois, 7, 1 / 16), expected)
    roi_pool_caffe(features[:, :8], given_rois, 7, 1 / 16).sum().backward()
    assert len(calls) == 1 and features.grad.abs().sum() > 0
