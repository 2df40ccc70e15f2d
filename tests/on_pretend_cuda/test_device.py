"""The pretended GPU itself: what it refuses as CUDA does, and whose rules apply on it."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import nms, roi_align, roi_pool

from tests.pretend_cuda import CUDA

SAME_DEVICE = "Expected all tensors to be on the same device"
ROIS = [[0, 1.0, 1.0, 9.0, 9.0], [0, 0.0, 3.0, 15.0, 12.0]]

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.mark.parametrize(
    ("misuse", "error", "message"),
    [
        (lambda x: x + torch.ones(4, 4), RuntimeError, SAME_DEVICE),
        (lambda x: torch.ones(4, 4) + x, RuntimeError, SAME_DEVICE),
        (lambda x: torch.cat([x, x.cpu()]), RuntimeError, SAME_DEVICE),
        (lambda x: torch.cat([x[0, 0], torch.tensor(1.0)]), RuntimeError, "zero-dimensional|same"),
        (lambda x: nn.Linear(4, 4)(x), RuntimeError, SAME_DEVICE),
        (lambda x: nn.Linear(4, 4).to(CUDA)(x.cpu()), RuntimeError, SAME_DEVICE),
        (lambda x: torch.tensor(1.0).add_(x[0, 0]), RuntimeError, SAME_DEVICE),
        (lambda x: torch.add(x, 1, out=torch.empty(4, 4)), RuntimeError, SAME_DEVICE),
        (lambda x: x.where(torch.ones(4, 4) > 0, 0), RuntimeError, SAME_DEVICE),
        (lambda x: nms(x, torch.ones(4), 0.5), RuntimeError, SAME_DEVICE),
        (lambda x: torch.ones(4)[x.argmax(0)], RuntimeError, "indices should be either on cpu"),
        (lambda x: x.numpy(), TypeError, "can't convert cuda:0 device type tensor to numpy"),
        (lambda x: np.asarray(x), TypeError, "can't convert cuda:0 device type tensor to numpy"),
        (lambda x: torch.from_numpy(x.cpu().numpy()) @ x, RuntimeError, SAME_DEVICE),
        (lambda x: x.to("cuda:1"), RuntimeError, "invalid device ordinal"),
        (lambda x: x.pin_memory(), RuntimeError, "only dense CPU tensors can be pinned"),
        (lambda x: torch.histogram(x, 3), NotImplementedError, "Could not run 'aten::histogram"),
    ],
)
def test_what_cuda_refuses_is_refused(misuse, error, message):
    with pytest.raises(error, match=message):
        misuse(torch.rand(4, 4, device="cuda"))


def test_what_cuda_allows_is_allowed():
    x = torch.arange(6.0, device=CUDA).view(2, 3)
    rows = torch.tensor([1])
    assert x[rows].tolist() == x[rows.to(CUDA)].tolist() == [[3, 4, 5]]
    x[rows] = 0.0
    x[0, torch.tensor([True, False, False])] = torch.tensor(7.0)
    assert (x * torch.tensor(2.0)).tolist() == [[14, 2, 4], [0, 0, 0]]
    assert x.sum().item() == 10 and [int(i) for i in x[0]] == [7, 1, 2]
    assert x.new_zeros(2).device == torch.empty_like(x).device == CUDA
    assert torch.as_tensor(x, device="cpu").device.type == x.cpu().device.type == "cpu"
    assert x.is_cuda and not x.is_cpu and x.cpu().numpy().shape == (2, 3)


def test_a_module_keeps_its_parameters_when_it_moves():
    layer = nn.Conv2d(3, 4, 3)
    layer.register_buffer("scale", torch.ones(4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.to(CUDA).to(memory_format=torch.channels_last)
    assert {v.device for v in (*layer.parameters(), layer.scale)} == {CUDA}
    assert isinstance(layer.weight, nn.Parameter)
    assert optimizer.param_groups[0]["params"][0] is layer.weight
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_backward_runs_in_the_thread_of_the_device():
    threads = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            threads.append(threading.get_ident())
            return 2 * gradient

    for device in ("cpu", "cuda"):
        x = torch.ones(3, device=device, requires_grad=True)
        (Double.apply(x) * Double.apply(x)).sum().backward()
        assert x.grad.device.type == device and x.grad.tolist() == [8, 8, 8]
    assert set(threads[:2]) == {threading.get_ident()} and threading.get_ident() not in threads[2:]


def test_autocast_casts_as_on_cuda():
    x = torch.randn(2, 3, 16, 16, device=CUDA)
    rois = torch.tensor(ROIS, device=CUDA)
    weight = torch.randn(4, 3, 3, 3, device=CUDA, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = F.conv2d(x, weight)
        low, high = torch.bfloat16, torch.float32
        assert (y.dtype, (y + 1).dtype, (y + x[:, :1, 2:, 2:]).dtype) == (low, low, high)
        assert F.max_pool2d(y, 2).dtype == F.pad(y, (1,) * 4, mode="replicate").dtype == low
        high_only = F.softplus(y), y.softmax(1), y.sum(), F.interpolate(y, scale_factor=2)
        assert {each.dtype for each in high_only} == {high}
        assert F.linear(y.mean((2, 3)), torch.randn(5, 4, device=CUDA)).dtype == low
        # torchvision's casts to float32 and back.
        assert roi_align(y, rois.bfloat16(), 3).dtype == roi_pool(y, rois, 3).dtype == low
        with torch.autocast("cuda", enabled=False):
            assert F.conv2d(x, weight).dtype == high
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert F.conv2d(x, weight).dtype == torch.bfloat16


def test_torchvisions_autocast_makes_numbers_of_the_places_of_the_maxima():
    """So a backward pass of our own must call the operator with autocast off."""

    class Pool(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, rois):
            pooled, places = torch.ops.torchvision.roi_pool(x, rois, 1.0, 3, 3)
            ctx.save_for_backward(rois, places)
            return pooled

        @staticmethod
        def backward(ctx, gradient):
            rois, places = ctx.saved_tensors
            backward = torch.ops.torchvision._roi_pool_backward
            return backward(gradient, rois, places, 1.0, 3, 3, 1, 3, 16, 16), None

    x = torch.randn(1, 3, 16, 16, device=CUDA, requires_grad=True)
    rois = torch.tensor(ROIS, device=CUDA)
    Pool.apply(x, rois).sum().backward()
    with torch.autocast("cuda", torch.bfloat16):
        loss = Pool.apply(x, rois).sum()
    with pytest.raises(RuntimeError, match=r"expected scalar type \S*Int but found Float"):
        loss.backward()


def test_the_gpu_has_a_generator_of_its_own():
    torch.manual_seed(1)
    torch.rand(5)
    drawn = [torch.rand(3, device=CUDA).tolist() for _ in range(2)]
    assert drawn[0] != drawn[1]
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.rand(3, device=CUDA).tolist() == drawn[0]
    torch.random.set_rng_state(state)  # the CPU's
    assert torch.rand(3, device=CUDA).tolist() == drawn[1]


class _Rows(torch.utils.data.Dataset):
    def __init__(self, device):
        self.device = device

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return torch.full((2,), float(i)).to(self.device)


def test_workers_serve_pinned_memory_and_cannot_use_the_gpu():
    batches = list(DataLoader(_Rows("cpu"), num_workers=1, pin_memory=True))
    assert [batch.tolist() for batch in batches] == [[[i, i]] for i in (0.0, 1.0, 2.0)]
    assert all(batch.is_pinned() for batch in batches)
    with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
        next(iter(DataLoader(_Rows("cuda"), num_workers=1)))


def test_a_file_says_that_its_tensors_were_on_the_gpu(tmp_path):
    layer = nn.Linear(2, 2).to(CUDA)
    torch.save({"model": layer.state_dict(), "row": layer.weight.detach()[1]}, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", map_location="cpu", weights_only=True)
    assert loaded["model"]["weight"].tolist() == layer.weight.tolist()
    assert loaded["row"].tolist() == layer.weight[1].tolist() and loaded["row"].is_cpu
    with pytest.raises(NotImplementedError, match="map_location"):
        torch.load(tmp_path / "a.pt", weights_only=True)
