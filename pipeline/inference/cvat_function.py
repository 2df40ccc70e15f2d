"""Proposals or detections as an auto-annotation function of CVAT's SDK; see tools/cvat_function.py.

https://docs.cvat.ai/docs/api_sdk/sdk/auto-annotation
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkpoint import load_checkpoint
from pipeline.inference.detect import Detector, load_detector
from pipeline.inference.export.polygons import join_rings, trace_mask
from pipeline.inference.export.results import PROPOSAL, Region, regions, row_runs
from pipeline.inference.proposals import results_of
from pipeline.inference.propose import load_proposer
from pipeline.pretrained import pretrained_checkpoint

MIN_SCORE = 0.5  # where CVAT names no threshold
MAX_SHAPES = 100  # on an image: more are no help to whoever corrects them
NMS_IOU = 0.7


def create(
    checkpoint: str = "",
    proposer: str = "",
    device: str = "cpu",
    max_shapes: int = MAX_SHAPES,
    nms: float = NMS_IOU,
) -> "CvatFunction":
    """The function of a checkpoint; cvat-cli calls this with what its -p options give.

    Args:
        checkpoint: a DeepMask or SharpMask, whose proposals have the label "object" (default: the
            one in the box); or a MultiPathNet, whose detections have its categories as labels.
        proposer: for a MultiPathNet, the network to propose with (default: the one in the box).
        max_shapes: at most so many on an image, the best.
        nms: of two proposals whose masks have this IoU, the better one stays.

    Raises:
        FileNotFoundError, ValueError: no checkpoint; or the SDK is not installed.
    """
    _sdk()
    path: str | Path = checkpoint or pretrained_checkpoint("sharpmask")
    where, detector = torch.device(device), None
    if load_checkpoint(path)["stage"] == "multipathnet":
        detector, _ = load_detector(path, where)
        path = proposer or pretrained_checkpoint("sharpmask")
        count, nms_iou = detector.options.num_proposals, None
    else:
        count, nms_iou = None, nms
    proposes, _ = load_proposer(path, where, num_proposals=count, nms=nms_iou)
    return CvatFunction(proposes, detector, max_shapes)


class CvatFunction:
    """Implements `cvat_sdk.auto_annotation.DetectionFunction`: a mask for each object."""

    def __init__(self, proposer: Any, detector: Detector | None, max_shapes: int):
        """
        Args:
            proposer: a `Proposer`, or what else makes proposals of an image (H, W, 3) uint8 RGB.
            detector: classifies them; without one, all are of the label "object".
        """
        self.proposer, self.detector, self.max_shapes = proposer, detector, max_shapes
        self.labels = PROPOSAL if detector is None else detector.category_names

    @property
    def spec(self) -> Any:
        """The labels, a `DetectionFunctionSpec`."""
        sdk = _sdk()
        labels = [sdk.label_spec(name, i, type="mask") for i, name in self.labels.items()]
        return sdk.DetectionFunctionSpec(labels=labels)

    def detect(self, context: Any, image: Any) -> list:
        """The shapes of a PIL image, best first: masks, or polygons where `context` wants these.

        A polygon has lines to holes and parts, see `join_rings`.
        """
        pixels = np.array(image.convert("RGB"))  # a copy: PyTorch wants it writable
        found = self.proposer(pixels)
        if self.detector is not None:
            found = self.detector(pixels, found)
        least = MIN_SCORE if context.conf_threshold is None else context.conf_threshold
        results = [result for result in results_of(found) if result["score"] >= least]
        results = sorted(results, key=lambda result: -result["score"])[: self.max_shapes]
        size = {"height": pixels.shape[0], "width": pixels.shape[1]}
        shape = _polygon if context.conv_mask_to_poly else _mask
        return [shape(region) for region in regions(size, results)]


def _mask(region: Region) -> Any:
    assert region.mask is not None
    x0, y0, x1, y1 = region.box
    points = [*row_runs(region.mask).tolist(), x0, y0, x1 - 1, y1 - 1]
    return _sdk().mask(region.result["category_id"], points, score=region.result["score"])


def _polygon(region: Region) -> Any:
    assert region.mask is not None
    ring = join_rings(trace_mask(region.mask)) + region.box[:2]
    points = ring.ravel().astype(float).tolist()
    return _sdk().polygon(region.result["category_id"], points, score=region.result["score"])


def _sdk() -> Any:
    try:
        from cvat_sdk import auto_annotation
    except ImportError:
        raise ValueError("annotating in CVAT needs its SDK: pip install cvat-sdk") from None
    return auto_annotation
