"""The part of the pretended GPU that is C++: what autograd asks of a device."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# Autograd asks CUDA's device guard for devices and streams, and CUDA's hooks whether a device is in
# use. These say that there is one device, in use, with one stream.
GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
constexpr auto CUDA = DeviceType::CUDA;

struct Guard final : impl::NoOpDeviceGuardImpl<CUDA> {
  Device getDevice() const override { return Device(CUDA, 0); }
  Stream getStream(Device) const noexcept override {
    return Stream(Stream::DEFAULT, Device(CUDA, 0));
  }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};

struct Hooks final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

// The table of an object's virtual methods.
void*& methods(const at::CUDAHooksInterface& hooks) {
  return *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&hooks));
}

extern "C" void pretend(bool on) {
  static Guard guard;
  static Hooks hooks;
  static auto* real_guard =
      impl::hasDeviceGuardImpl(CUDA) ? impl::getDeviceGuardImpl(CUDA) : nullptr;
  static void* real_methods = methods(at::detail::getCUDAHooks());
  impl::registerDeviceGuard(CUDA, on ? &guard : real_guard);
  methods(at::detail::getCUDAHooks()) = on ? methods(hooks) : real_methods;
}
"""


@functools.cache
def guard() -> ctypes.CDLL | None:
    """The compiled guard; None where there is a GPU, or no compiler for this PyTorch."""
    compiler, root = shutil.which("g++"), Path(torch.__file__).parent
    if torch.cuda.is_available() or compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = [compiler, "-x", "c++", "-std=c++20", "-shared", "-fPIC", "-o", str(library), "-"]
        command += [f"-I{root / 'include'}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        if subprocess.run(command, input=GUARD, text=True, capture_output=True).returncode:
            return None
        loaded = ctypes.CDLL(str(library))
    # Autograd starts its threads in the first backward pass, one for each device.
    loaded.pretend(True)
    torch.ones(1, requires_grad=True).backward()
    loaded.pretend(False)
    return loaded
