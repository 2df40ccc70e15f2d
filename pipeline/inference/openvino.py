"""Runs a mask network on whole images by OpenVINO, in 8 bits, instead of by PyTorch.

Called as `DenseNetwork` is, it returns nearly the same.
"""

import contextlib
import copy
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets.images import Image, ImageError, open_image
from models.sharpmask import DenseNetwork
from pipeline import distributed
from pipeline.inference.memory import NUM_PRIMITIVES
from pipeline.inference.propose import Proposer

BACKENDS = ("torch", "openvino-int8")
# More images do not change AR measurably; larger ones only cost memory.
CALIBRATION_IMAGES, CALIBRATION_PIXELS = 64, 1 << 21


def run_in_8_bits(
    proposer: Proposer,
    images: Sequence[str | Path],
    path: Path,
    read: Callable[[str | Path], Image] = open_image,
) -> None:
    """Has a proposer run its network in 8 bits, kept in an .xml file for later runs.

    It is calibrated on some of the images, spread evenly, each at a random scale. What masks are
    decoded with stays as it is, in full or half precision.

    Raises:
        ValueError: not on a CPU, OpenVINO is not installed, or no image can be read.
    """
    if proposer.device.type != "cpu":
        raise ValueError("the backend openvino-int8 is for CPUs; use --device cpu or another one")
    if distributed.is_main() and not path.exists():
        count = min(CALIBRATION_IMAGES, len(images))
        print(f"calibrating the network in 8 bits on {count} images", flush=True)
        assert isinstance(proposer.dense, DenseNetwork)
        quantize(proposer.dense, _calibration_samples(proposer, images, read), path)
    distributed.barrier()
    proposer.dense = QuantizedNetwork(path)


def _calibration_samples(
    proposer: Proposer, images: Sequence[str | Path], read: Callable[[str | Path], Image]
) -> Iterator[Tensor]:
    rng = np.random.default_rng(0)
    for index in np.linspace(0, len(images) - 1, CALIBRATION_IMAGES).astype(int):
        log2_scale = float(rng.choice(proposer.log2_scales))
        with contextlib.suppress(ImageError):
            image = read(images[index])
            largest = math.log2(CALIBRATION_PIXELS / (image.shape[0] * image.shape[1])) / 2
            yield proposer.scale(image, min(log2_scale, largest))[0]


def quantize(network: nn.Module, samples: Iterable[Tensor], path: Path) -> None:
    """Writes the network with 8-bit weights and activations: an .xml file, a .bin file beside it.

    The samples (1, 3, H, W) give the ranges of the activations. The network may be in bfloat16.

    Raises:
        ValueError: OpenVINO is not installed, or there are no samples.
    """
    images = [_to_rows(pixels) for pixels in samples]
    network = copy.deepcopy(network).float()
    if not images:
        raise ValueError("no image could be read that the network in 8 bits is calibrated on")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.xml")
    with (
        _openvino() as (openvino, nncf),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(None),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        nncf.set_log_level(logging.ERROR)
        warnings.simplefilter("ignore")  # tracing warns of what is constant here
        model = openvino.convert_model(
            network, example_input=images[0].permute(0, 3, 1, 2), input=[(1, 3, -1, -1)]
        )
        model = nncf.quantize(
            _channels_last(openvino, model),
            nncf.Dataset([pixels.numpy() for pixels in images]),
            preset=nncf.QuantizationPreset.MIXED,  # activations need not lie around zero
            subset_size=len(images),
            # Depthwise convolutions gain nothing in 8 bits, and crash at some sizes (2026.4, AMX).
            ignored_scope=nncf.IgnoredScope(types=["GroupConvolution"], validate=False),
        )
        openvino.save_model(model, temporary)
    temporary.with_suffix(".bin").replace(path.with_suffix(".bin"))
    temporary.replace(path)  # last: if it is there, the whole network is


class QuantizedNetwork:
    """A network that `quantize` has written."""

    def __init__(self, path: Path):
        settings = {
            "PERFORMANCE_HINT": "LATENCY",  # all threads for one image
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "CPU_RUNTIME_CACHE_CAPACITY": NUM_PRIMITIVES,  # else 5000, one for every size it meets
        }
        with _openvino() as (openvino, _):
            network = openvino.Core().compile_model(path, "CPU", settings)
        self._request = network.create_infer_request()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """As `DenseNetwork.forward`, maps in the type of the pixels."""
        image = _to_rows(pixels).numpy()
        outputs = map(torch.from_numpy, self._request.infer([image], share_inputs=True).values())
        return tuple(
            map_.permute(0, 3, 1, 2).to(pixels.dtype) if map_.ndim == 4 else map_
            for map_ in outputs
        )


def _to_rows(pixels: Tensor) -> Tensor:
    """(1, 3, H, W) to (1, H, W, 3) float32."""
    return pixels.permute(0, 2, 3, 1).float().contiguous()


def _channels_last(openvino: Any, model: Any) -> Any:
    """The model with images and maps in channels-last order, as PyTorch's are here."""
    steps = openvino.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    for index, output in enumerate(model.outputs):
        if len(output.partial_shape) == 4:
            steps.output(index).model().set_layout(openvino.Layout("NCHW"))
            steps.output(index).tensor().set_layout(openvino.Layout("NHWC"))
    return steps.build()


@contextlib.contextmanager
def _openvino() -> Iterator[tuple[Any, Any]]:
    """OpenVINO and NNCF, which in the block neither report their use nor warn of a missing CUDA.

    They report through another package, and do without it where it cannot be imported.
    """
    modules: dict[str, Any] = sys.modules
    hidden = "openvino_telemetry" not in modules
    if hidden:
        modules["openvino_telemetry"] = None  # now its import fails
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        try:
            import nncf
            import openvino
        except ImportError as error:
            raise ValueError(
                "the backend openvino-int8 needs OpenVINO: pip install openvino nncf"
            ) from error
        yield openvino, nncf
    finally:
        logger.setLevel(level)
        if hidden:
            del modules["openvino_telemetry"]
