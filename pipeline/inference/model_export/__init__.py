"""Networks for other runtimes; see tools/export_model.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.inference.model_export.files import write_onnx, write_torch_export


class Format(NamedTuple):
    """A format: what its output's name ends in, and what writes it.

    The function takes a checkpoint, the output and arguments of `load_proposer`, and returns a line
    on what it wrote.
    """

    suffix: str
    write: Callable[[str | Path, Path, dict[str, Any]], str]


MODEL_FORMATS = {
    "onnx": Format(".onnx", write_onnx),
    "torch-export": Format(".pt2", write_torch_export),
}
