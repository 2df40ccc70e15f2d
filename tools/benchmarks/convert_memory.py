#!/usr/bin/env python
"""Peak memory of converting a Torch7 file of published size, beside the size of the file.

    python tools/benchmarks/convert_memory.py --networks caffenet vgg16

The file is a Fast R-CNN with the published layers and random weights, written in a temporary
folder: "aligned" so that its numbers can be used where they lie in the file, or by a byte "moved",
so that they have to be read. Peak: resident memory of a process that converts it, mapped pages of
the file included, above what it had after its imports.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pipeline")]

from torch7_writer import Function, Instance, Storage, Tensor, written

CONVERT = """
import re, sys
sys.path.insert(0, sys.argv[1])
from pipeline.torch7.convert import convert_file
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
convert_file(sys.argv[2], sys.argv[3])
print(peak() - before)
"""
HIDDEN, CLASSES = 4096, 20
# A number: a convolution's width with its kernel, stride and groups. "pool": with normalization.
CAFFENET = ((96, 11, 4, 1), "pool", (256, 5, 1, 2), "pool", (384, 3, 1, 1), (384, 3, 1, 2),
            (256, 3, 1, 2))  # fmt: skip
VGG16 = [(64, 3, 1, 1)] * 2
for width, depth in ((128, 2), (256, 3), (512, 3), (512, 3)):
    VGG16 += ["pool", *[(width, 3, 1, 1)] * depth]
NETWORKS = {"caffenet": (CAFFENET, 256, 6), "vgg16": (VGG16, 512, 7)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["caffenet"])
    args = parser.parse_args()
    print(f"{'network':10s}{'numbers':>9s}{'file MB':>9s}{'peak MB':>9s}{'ratio':>7s}")
    for name in args.networks:
        for position in ("aligned", "moved"):
            size, peak = measure(name, position)
            print(
                f"{name:10s}{position:>9s}{size / 1e6:9.0f}{peak / 1e6:9.0f}{peak / size:7.2f}",
                flush=True,
            )


def measure(name: str, position: str) -> tuple[int, int]:
    """Bytes of the file, and of memory to convert it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.t7"
        path.write_bytes(content(name, position))
        command = [sys.executable, "-c", CONVERT, ROOT, path, Path(folder) / "model.pt"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return path.stat().st_size, int(output)


def content(name: str, position: str) -> bytes:
    """A file with all its parameters in one storage, as the training leaves them."""
    wanted = 0 if position == "aligned" else 1
    for shift in range(4):
        data = written({"unpack": Function(b"x" * (1 + shift), {}), "model": network(name)})
        # The storage's numbers begin behind its class, "V 1", number and length.
        if (data.index(b"torch.FloatStorage") + len("torch.FloatStorage") + 8) % 4 == wanted:
            return data
    raise AssertionError("a shift by one byte moves the storage by one byte")


def network(name: str) -> Instance:
    """The modules of a Fast R-CNN."""
    layers, width, side = NETWORKS[name]
    flat = Flat()
    features = []
    for layer, inputs in zip(layers, input_widths(layers), strict=True):
        features += pool(name) if layer == "pool" else [flat.convolution(inputs, *layer), relu()]
    top = [
        flat.linear(width * side**2, HIDDEN), relu(), flat.linear(HIDDEN, HIDDEN), relu()
    ]  # fmt: skip
    outputs = [flat.linear(HIDDEN, CLASSES + 1), flat.linear(HIDDEN, 4 * (CLASSES + 1))]
    flat.fill()
    return module(
        "nn.Sequential",
        module("nn.ParallelTable", module("nn.Sequential", *features), module("nn.Identity")),
        module("inn.ROIPooling", W=side, H=side, spatial_scale=1 / 16),
        module("nn.View", numElements=-1),
        module("nn.Sequential", *top),
        module("nn.ConcatTable", *outputs),
    )


class Flat:
    """Gives modules views of one storage."""

    def __init__(self):
        self.storage, self.size = Storage("Float", []), 0

    def view(self, *sizes: int) -> Tensor:
        """The next numbers of the storage."""
        strides = np.cumprod([1, *sizes[:0:-1]])[::-1].tolist()
        offset = self.size + 1
        self.size += int(np.prod(sizes))
        return Tensor(self.storage, sizes, tuple(strides), offset)

    def fill(self) -> None:
        """Makes up the numbers."""
        self.storage.values = np.full(self.size, 0.01, np.float32)

    def convolution(self, inputs: int, width: int, size: int, stride: int, groups: int) -> Instance:
        sides = {"kW": size, "kH": size, "dW": stride, "dH": stride, "groups": groups}
        sides |= {"padW": size // 2, "padH": size // 2}
        sides |= {"nInputPlane": inputs, "nOutputPlane": width}
        weight = self.view(width, inputs // groups, size, size)
        return module("cudnn.SpatialConvolution", weight=weight, bias=self.view(width), **sides)

    def linear(self, inputs: int, width: int) -> Instance:
        return module("nn.Linear", weight=self.view(width, inputs), bias=self.view(width))


def input_widths(layers: tuple | list) -> list[int]:
    """Channels that come to each layer."""
    widths = [3]
    for layer in layers:
        widths.append(widths[-1] if layer == "pool" else layer[0])
    return widths[:-1]


def pool(name: str) -> list[Instance]:
    """Of CaffeNet with its normalization."""
    size, pad = (3, 1) if name == "caffenet" else (2, 0)
    sides = {"kW": size, "kH": size, "dW": 2, "dH": 2, "padW": pad, "padH": pad}
    maximum = module("cudnn.SpatialMaxPooling", ceil_mode=True, **sides)
    if name != "caffenet":
        return [maximum]
    numbers = {"size": 5, "alpha": 0.0001, "beta": 0.75, "k": 1}
    return [maximum, module("inn.SpatialCrossResponseNormalization", **numbers)]


def relu() -> Instance:
    return module("cudnn.ReLU", inplace=True)


def module(name: str, *modules: Instance, **fields) -> Instance:
    return Instance(name, fields | ({"modules": list(modules)} if modules else {}))


if __name__ == "__main__":
    main()
