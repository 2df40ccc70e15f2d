"""What runs a mask network on whole images beside PyTorch: OpenVINO, in 8 bits.

Called as `DenseNetwork` is, it returns the same, nearly; README.md has what was measured.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from models.sharpmask import DenseNetwork
from pipeline.inference.memory import NUM_PRIMITIVES

BACKENDS = ("torch", "openvino-int8")


def quantize(network: DenseNetwork, samples: Iterable[Tensor], path: Path) -> None:
    """Writes the network with 8-bit weights and activations, in OpenVINO's format.

    Args:
        samples: (1, 3, H, W) images of the kind that it is for, from which the ranges of the
            activations are taken.
        path: of the .xml file; the weights lie beside it in a .bin file.

    Raises:
        ValueError: OpenVINO is not installed, or there are no samples.
    """
    openvino, nncf = _import_openvino()
    samples = [pixels.permute(0, 2, 3, 1).contiguous() for pixels in samples]  # (1, H, W, 3)
    if not samples:
        raise ValueError("no image could be read that the network in 8 bits is calibrated on")
    nncf.set_log_level(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(None),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # tracing warns of what is constant here
        model = openvino.convert_model(
            network, example_input=samples[0].permute(0, 3, 1, 2), input=[(1, 3, -1, -1)]
        )
        model = _channels_last(openvino, model)
        model = nncf.quantize(
            model,
            nncf.Dataset([each.numpy() for each in samples]),
            preset=nncf.QuantizationPreset.MIXED,  # activations need not lie around zero
            subset_size=len(samples),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.xml")
        openvino.save_model(model, temporary)
    temporary.with_suffix(".bin").replace(path.with_suffix(".bin"))
    temporary.replace(path)  # last: where it is, the whole network is


class QuantizedNetwork:
    """A network that `quantize` has written."""

    def __init__(self, path: Path):
        openvino, _ = _import_openvino()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",  # all threads for one image
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "CPU_RUNTIME_CACHE_CAPACITY": NUM_PRIMITIVES,  # else it keeps 5000, of ever other sizes
        }
        self._request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def __call__(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """As `DenseNetwork.forward`."""
        image = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        outputs = self._request.infer([image], share_inputs=True).values()
        return tuple(
            torch.from_numpy(each).permute(0, 3, 1, 2) if each.ndim == 4 else torch.from_numpy(each)
            for each in outputs
        )


def _channels_last(openvino, model):
    """The model with images and maps in channels-last order, as PyTorch's are here."""
    steps = openvino.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_layout(openvino.Layout("NHWC"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    for number, output in enumerate(model.outputs):
        if len(output.partial_shape) == 4:
            steps.output(number).model().set_layout(openvino.Layout("NCHW"))
            steps.output(number).tensor().set_layout(openvino.Layout("NHWC"))
    return steps.build()


def _import_openvino():
    # Both would report their use to their makers; without this package they do not.
    sys.modules.setdefault("openvino_telemetry", None)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "no CUDA"
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise ValueError(
            "the backend openvino-int8 needs OpenVINO: pip install openvino nncf"
        ) from error
    return openvino, nncf
