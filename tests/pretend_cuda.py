"""A pretended `cuda:0`, for machines without a GPU: CUDA's rules, the CPU's arithmetic.

A `CudaTensor` says that it is on cuda:0, and wraps the CPU tensor that holds its values. PyTorch
treats it as a CUDA tensor until the kernel would start: autocast's CUDA rules, torchvision's
included, autograd with the device's thread, and every check of Python and C++ on a tensor's device
are the real ones. From there on `PretendedCuda` takes over. It refuses what CUDA refuses: tensors
of several devices, operators without a CUDA kernel. Then it runs the operator on the CPU tensors.

It cannot show: types that a CUDA kernel does not have, what depends on streams and their order,
CUDA's rounding and its random numbers, memory, speed, and several GPUs.

Import this before the first backward pass of the process, as pytest does when it collects: autograd
starts its threads then, one for each device.
"""

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from tests.pretend_guard import guard

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten


class CudaTensor(Tensor):
    """A tensor that says it is on cuda:0; `_cpu` has its values."""

    _cpu: Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, cpu: Tensor) -> "CudaTensor":
        # In inference mode, a view of another tensor is like that one.
        with torch.inference_mode(cpu.is_inference()):
            made = Tensor._make_wrapper_subclass(
                cls,
                cpu.size(),
                strides=cpu.stride(),
                storage_offset=cpu.storage_offset(),
                dtype=cpu.dtype,
                layout=cpu.layout,
                device=CUDA,
            )
        made._cpu = cpu
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ANN206
        return _current().run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"{self._cpu!r} on {CUDA}"

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(
                f"can't convert {CUDA} device type tensor to numpy. "
                "Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return self._cpu.numpy(force=True)

    def tolist(self) -> Any:
        return self._cpu.tolist()

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """As a CUDA tensor is saved: the bytes of its storage, which says where it was."""
        cpu = self._cpu
        cpu.untyped_storage().is_pretended = True
        storage = torch.storage.TypedStorage(
            wrap_storage=cpu.untyped_storage(), dtype=cpu.dtype, _internal=True
        )
        where = cpu.storage_offset(), tuple(cpu.size()), cpu.stride()
        state = (storage, *where, self.requires_grad, OrderedDict())
        return torch._utils._rebuild_tensor_v2, state


def _current() -> "PretendedCuda":
    if _active is None:
        raise RuntimeError("a tensor of the pretended GPU is used after the pretense has ended")
    return _active


_active: "PretendedCuda | None" = None

# Operators whose tensors may be on several devices; `_check_indices` is for those of the last line.
ANY_DEVICES = {
    aten._to_copy.default, aten.copy_.default, aten.copy.default, aten._foreach_copy_.default,
    aten.lift_fresh.default,
    aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
    aten._index_put_impl_.default,
}  # fmt: skip
# Operators that take a number in a CPU tensor beside CUDA tensors, apart from pointwise ones.
NUMBERS_ON_CPU = {
    aten.fill_.Tensor, aten.masked_fill_.Tensor, aten.masked_fill.Tensor,
    aten.smooth_l1_loss.default, aten.mse_loss.default,
    aten._fused_adamw_.tensor_lr, aten._fused_adam_.tensor_lr,
}  # fmt: skip


class PretendedCuda(TorchDispatchMode):
    """Runs operators of CUDA tensors, and those that make some.

    Attributes:
        calls: names of the operators that ran on the pretended GPU, and in which types.
    """

    def __init__(self) -> None:
        super().__init__()
        self.process, self.calls = os.getpid(), set[tuple[str, tuple[torch.dtype, ...]]]()
        self.generator = torch.Generator()  # the GPU's
        self.random = threading.Lock()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else it would be imported, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN206
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """An operator, on whatever device."""
        leaves = list(_leaves((*args, *kwargs.values())))
        on_cuda = any(type(leaf) is CudaTensor for leaf in leaves)
        device = next((leaf for leaf in leaves if type(leaf) is torch.device), None)
        if not on_cuda and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if device is not None and device.type == "cuda" and device.index:
            raise RuntimeError("CUDA error: invalid device ordinal")
        if os.getpid() != self.process:
            raise RuntimeError(
                "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, "
                "you must use the 'spawn' start method"
            )
        if _is_composite(func):
            with self:  # in inference mode they come whole
                return func.decompose(*args, **kwargs)
        _check_kernel(func)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _check_devices(func, tensors, args, kwargs)
        self.calls.add((func.name(), tuple(tensor.dtype for tensor in tensors)))
        inner = _mapped(_on_cpu, args), {k: _mapped(_on_cpu, v) for k, v in kwargs.items()}
        random = torch.Tag.nondeterministic_seeded in func.tags
        with self.cuda_generator() if random else contextlib.nullcontext():
            results = _call(func, *inner)
        on_cuda = device.type == "cuda" if device is not None else on_cuda
        return _outer_results(func, args, kwargs, results, on_cuda)

    @contextlib.contextmanager
    def cuda_generator(self) -> Iterator[None]:
        """Draws from the GPU's generator instead of the CPU's."""
        with self.random:
            cpu = torch.default_generator.get_state()
            torch.default_generator.set_state(self.generator.get_state())
            try:
                yield
            finally:
                self.generator.set_state(torch.default_generator.get_state())
                torch.default_generator.set_state(cpu)


def _leaves(values: Any) -> Iterator[Any]:
    """Tensors and devices among an operator's arguments, which are nested lists at most."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _leaves(value)
        elif isinstance(value, Tensor | torch.device):
            yield value


def _mapped(function: Any, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)([_mapped(function, each) for each in value])
    return function(value) if isinstance(value, Tensor | torch.device) else value


@functools.cache
def _is_composite(func: Any) -> bool:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _check_kernel(func: Any) -> None:
    name, has_kernel = func.name(), torch._C._dispatch_has_computed_kernel_for_dispatch_key
    if torch.backends.cuda.is_built() and not has_kernel(name, "CUDA"):
        raise NotImplementedError(
            f"Could not run '{name}' with arguments from the 'CUDA' backend. This could be because "
            "the operator doesn't exist for this backend"
        )


def _check_devices(func: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> None:
    """As CUDA's kernels do before they start."""
    if func in ANY_DEVICES:
        if "index" in func.name():
            _check_indices(args[0], args[1])
        return
    others = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    if len(others) == len(tensors):
        return  # that is to be made on the GPU
    written = _leaves(_argument(args, kwargs, *place) for place in _written(func).values())
    pointwise = torch.Tag.pointwise in func.tags or func in NUMBERS_ON_CPU
    if any(tensor.dim() > 0 or not pointwise for tensor in others) or not all(
        isinstance(tensor, CudaTensor) for tensor in written
    ):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{CUDA} and cpu! ({func.name()})"
        )


def _check_indices(indexed: Tensor, indices: list[Tensor | None]) -> None:
    if not isinstance(indexed, CudaTensor) and any(isinstance(i, CudaTensor) for i in indices):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu)"
        )


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    try:
        return func(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        # PyTorch's CUDA operators have bfloat16; torchvision's have not.
        if func.namespace != "aten" or "not implemented for 'BFloat16'" not in str(error):
            raise
    assert not func._schema.is_mutable, func
    args = _with_type(args, torch.bfloat16, torch.float32)
    return _with_type(func(*args, **kwargs), torch.float32, torch.bfloat16)


def _with_type(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    def with_type(x: Any) -> Any:
        return x.to(new) if isinstance(x, Tensor) and x.dtype == old else x

    return _mapped(with_type, value)


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return CPU
    return leaf._cpu if isinstance(leaf, CudaTensor) else leaf


@functools.cache
def _written(func: Any) -> dict[frozenset, tuple[int, str]]:
    """Index and name of the arguments that an operator changes, by the letter of their schema."""
    return {
        frozenset(argument.alias_info.before_set): (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def _argument(args: tuple, kwargs: dict, index: int, name: str) -> Any:
    return args[index] if index < len(args) else kwargs[name]


def _outer_results(func: Any, args: tuple, kwargs: dict, results: Any, on_cuda: bool) -> Any:
    """The results of a CPU operator as those of the CUDA operator."""
    several = isinstance(results, tuple)
    wrap = CudaTensor if on_cuda else lambda x: x
    outer = []
    for result, returned in zip(
        results if several else (results,), func._schema.returns, strict=False
    ):
        letters = returned.alias_info.before_set if returned.alias_info is not None else ()
        place = _written(func).get(frozenset(letters))
        if place is None:
            outer.append(_mapped(wrap, result))
        else:
            outer.append(_argument(args, kwargs, *place))
            _check_same_layout(outer[-1])
    if not outer:
        return results
    return type(results)(outer) if several else outer[0]


def _check_same_layout(tensor: Any) -> None:
    if isinstance(tensor, CudaTensor):
        cpu = tensor._cpu
        now, was = (tensor.size(), tensor.stride()), (cpu.size(), cpu.stride())
        assert now == was, f"a tensor of the pretended GPU changed its layout: {now}, {was}"


# --- around the operators ------------------------------------------------------------------------


def _pin_memory(tensor: Tensor, device: object = None) -> Tensor:
    if tensor.device.type != "cpu":
        raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
    pinned = tensor.clone()
    pinned.untyped_storage().is_pretended_pinned = True
    return pinned


def _is_pinned(tensor: Tensor, device: object = None) -> bool:
    return getattr(tensor.untyped_storage(), "is_pretended_pinned", False)


def _tag(storage: Any) -> str | None:
    return "cuda:0" if getattr(storage, "is_pretended", False) else None


def _restore(storage: Any, location: str) -> None:
    if location.startswith("cuda"):
        raise NotImplementedError("the pretended GPU reads files with map_location only")


@contextlib.contextmanager
def pretended_cuda() -> Iterator[PretendedCuda]:
    """Within it, `torch.device("cuda")` can be used; one at a time."""
    global _active
    library, mode = guard(), PretendedCuda()
    assert library is not None and _active is None
    apply = torch.nn.Module._apply

    def apply_in_place(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        # A parameter stays the same object when it moves to the GPU.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return apply(module, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "mem_get_info", lambda device=None: (1 << 33, 1 << 34)),
        (torch.cuda, "memory_reserved", lambda device=None: 0),
        (torch.cuda, "memory_allocated", lambda device=None: 0),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "manual_seed", mode.generator.manual_seed),
        (torch.cuda, "manual_seed_all", mode.generator.manual_seed),
        (torch.cuda, "get_rng_state", lambda device=None: mode.generator.get_state()),
        (torch.cuda, "set_rng_state", lambda state, device=None: mode.generator.set_state(state)),
        (torch.accelerator, "is_available", lambda: True),
        (torch.accelerator, "current_device_index", lambda: 0),
        (torch.accelerator, "set_device_index", lambda device: None),
        (Tensor, "pin_memory", _pin_memory),
        (Tensor, "is_pinned", _is_pinned),
        (torch.nn.Module, "_apply", apply_in_place),
        (optimizer, "_foreach_supported_types", [*optimizer._foreach_supported_types, CudaTensor]),
        (
            torch.utils._foreach_utils,
            "_foreach_supported_types",
            [Tensor, torch.nn.Parameter, CudaTensor],
        ),
        (
            torch.serialization,
            "_package_registry",
            [(0, _tag, _restore), *torch.serialization._package_registry],
        ),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        library.pretend(True)
        stack.callback(library.pretend, False)
        # torch.tensor(..., device="cuda") makes it on the CPU, and has the mode move it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        _active = mode
        try:
            with mode:
                yield mode
        finally:
            _active = None


guard()  # starts autograd's threads, see above
