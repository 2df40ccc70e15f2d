"""Files of the proposal graph: ONNX, and PyTorch's own format without our code.

Both are read back and compared with the network, on an image of another size than it was traced on.
"""

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from datasets.files import atomic_path
from datasets.resize import GRAY, MEAN, STD
from pipeline.inference.model_export.graph import Outputs, ProposalGraph
from pipeline.inference.propose import load_proposer

TOLERANCE = 1e-4
TRACED, CHECKED = (96, 128), (131, 75)  # sizes of images
TRIED = "2.14"  # PyTorch; earlier ones trace fewer of the sizes that are known late
SETTINGS = "settings.json"  # within a .pt2 file


def write_onnx(checkpoint: str | Path, output: Path, options: dict[str, Any]) -> str:
    """Writes the graph of a checkpoint as ONNX, its settings in `metadata_props`.

    Args:
        options: arguments of `load_proposer`.

    Returns:
        A line on what was written, and how far it was checked.

    Raises:
        ValueError: a checkpoint that cannot be exported, a package is missing, or the file computes
            something else than PyTorch; then there is no file.
    """
    try:
        from onnxscript import ir
    except ImportError as error:
        raise ValueError("--format onnx needs onnxscript: pip install onnx onnxscript") from error
    graph, settings = _load(checkpoint, options)
    with _exporting():
        program = torch.onnx.export(
            _trace(graph),
            dynamo=True,
            input_names=["image"],
            output_names=list(Outputs._fields),
            external_data=False,
            verbose=False,
        )
    assert program is not None
    program.model.graph.inputs[0].shape = ir.Shape(["height", "width", 3])
    for value in program.model.graph.outputs:  # else a formula of height and width
        value.shape = ir.Shape(["proposals", *tuple(value.shape or ())[1:]])
    program.model.metadata_props.update({k: json.dumps(v) for k, v in settings.items()})
    with atomic_path(output) as temporary:
        program.save(temporary, external_data=False)
        found = _check_onnx(graph, temporary)
    return f"wrote {output}; {found}"


def write_torch_export(checkpoint: str | Path, output: Path, options: dict[str, Any]) -> str:
    """Writes the graph of a checkpoint for `torch.export.load`; as `write_onnx`."""
    graph, settings = _load(checkpoint, options)
    with atomic_path(output) as temporary:
        with _exporting():
            content = io.BytesIO()  # a path must end in .pt2
            extra = {SETTINGS: json.dumps(settings)}
            torch.export.save(_trace(graph), content, extra_files=extra)
            temporary.write_bytes(content.getbuffer())
            content.seek(0)
            program = torch.export.load(content).module()
        found = check_outputs(graph, lambda image: Outputs(*program(image)))
    return f"wrote {output}; {_agreement(found, 'torch.export.load')}"


def _load(checkpoint: str | Path, options: dict[str, Any]) -> tuple[ProposalGraph, dict[str, Any]]:
    """The graph of a checkpoint, and what the file says of it."""
    proposer, settings = load_proposer(checkpoint, torch.device("cpu"), precision="fp32", **options)
    try:
        graph = ProposalGraph(proposer)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}") from None
    del settings["align_corners"], settings["per_megapixel"]
    settings |= {"patch_size": proposer.deepmask.patch_size, "mean": MEAN, "std": STD, "gray": GRAY}
    return graph, settings


def _trace(graph: ProposalGraph) -> torch.export.ExportedProgram:
    any_side = torch.export.Dim.DYNAMIC
    sides = {"image": {0: any_side, 1: any_side}}
    return torch.export.export(graph, (_sample(TRACED),), dynamic_shapes=sides, strict=False)


def _check_onnx(graph: ProposalGraph, path: Path) -> str:
    try:
        import onnxruntime
    except ImportError:
        return "not checked, since onnxruntime is not installed"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Outputs:
        return Outputs(*map(torch.from_numpy, session.run(None, {"image": image.numpy()})))

    return _agreement(check_outputs(graph, run), "ONNX Runtime")


def check_outputs(graph: ProposalGraph, run: Callable[[Tensor], Outputs]) -> float:
    """The largest difference of another runtime's outputs for an image, see `difference`.

    Raises:
        ValueError: it is above 1e-4.
    """
    image = _sample(CHECKED)
    with torch.inference_mode():
        found = difference(Outputs(*graph(image)), run(image))
    if not found <= TOLERANCE:
        raise ValueError(f"the exported graph differs from PyTorch by {found:.1e}")
    return found


def difference(expected: Outputs, found: Outputs) -> float:
    """The largest difference of scores and of mask logits, of large logits in proportion.

    Patches tell which proposals are the same: nearly equal scores may have changed places. One
    that only one side has counts by how much it scores above the other side's last.
    """
    if any(a.shape != b.shape for a, b in zip(expected, found, strict=True)):
        return math.inf
    rows = {patch.tobytes(): row for row, patch in enumerate(found.patches.numpy())}
    keys = [patch.tobytes() for patch in expected.patches.numpy()]
    ours = [row for row, key in enumerate(keys) if key in rows]
    theirs = [rows[keys[row]] for row in ours]
    if not ours:
        return math.inf
    differences = [
        (expected.scores[ours] - found.scores[theirs]).abs(),
        _relative(expected.mask_logits[ours], found.mask_logits[theirs]),
    ]
    for side, shared in ((expected, ours), (found, theirs)):
        is_alone = torch.ones(len(side.scores), dtype=torch.bool)
        is_alone[shared] = False
        differences.append(side.scores[is_alone] - side.scores[-1])
    return float(torch.cat([each.flatten() for each in differences]).max())  # also if one is NaN


def _relative(expected: Tensor, found: Tensor) -> Tensor:
    return (found - expected).abs() / expected.abs().clamp(min=1)


def _sample(size: tuple[int, int]) -> Tensor:
    """An image (height, width, 3) uint8 of soft spots."""
    spots = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return torch.from_numpy(cv2.resize(spots, size[::-1], interpolation=cv2.INTER_CUBIC))


def _agreement(found: float, reader: str) -> str:
    return f"{reader} differs from PyTorch by {found:.1e}"


@contextlib.contextmanager
def _exporting() -> Iterator[None]:
    """Without the exporters' notes, which are for their developers; a failure is a ValueError."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except RuntimeError as error:
        raise ValueError(
            f"PyTorch {torch.__version__} cannot export this network (exports were tried with "
            f"{TRIED}): {str(error).splitlines()[0]}"
        ) from error
    finally:
        logging.disable(level)
