"""Networks for other runtimes; see tools/export_model.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.hub import write_hub_folder
from pipeline.inference.model_export.files import write_onnx, write_torch_export


def write_safetensors(checkpoint: str | Path, output: Path, options: dict[str, Any]) -> str:
    """Writes a folder of safetensors, see `write_hub_folder`.

    Raises:
        ValueError: options of how to propose, which a checkpoint's recipe has.
    """
    if options["num_proposals"] is not None or options["log2_scales"] or not options["refine"]:
        raise ValueError("--format safetensors takes no --num-proposals, --scales or --no-refine")
    return write_hub_folder(checkpoint, output)


class Format(NamedTuple):
    """A format: what its output's name ends in, and what writes it.

    The function takes a checkpoint, the output and arguments of `load_proposer`, and returns a line
    on what it wrote.
    """

    suffix: str
    write: Callable[[str | Path, Path, dict[str, Any]], str]


MODEL_FORMATS = {
    "onnx": Format(".onnx", write_onnx),
    "safetensors": Format("", write_safetensors),
    "torch-export": Format(".pt2", write_torch_export),
}
