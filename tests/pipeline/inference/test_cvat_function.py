"""The auto-annotation function, checked as the driver of CVAT's SDK checks it."""

import importlib.util
import logging
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cvat_sdk.auto_annotation import DetectionFunctionSpec
from cvat_sdk.auto_annotation.driver import _AnnotationMapper, _DetectionFunctionContextImpl
from cvat_sdk.masks import decode_mask
from PIL import Image

from pipeline.inference.cvat_function import CvatFunction, create
from pipeline.inference.export.polygons import join_rings, trace_mask
from tests.conftest import ROOT
from tests.pipeline.inference.builders import proposals_of
from tests.pipeline.inference.test_export import RINGS


def annotate(function, image: Image.Image, **options) -> list:
    """The shapes that would be uploaded to a task with the function's labels, numbered from 100."""
    assert isinstance(function.spec, DetectionFunctionSpec)
    kind = "polygon" if options.get("conv_mask_to_poly") else "mask"
    names = [label.name for label in function.spec.labels]
    task = [
        SimpleNamespace(name=name, id=100 + i, type=kind, attributes=[], sublabels=[])
        for i, name in enumerate(names)
    ]
    mapper = _AnnotationMapper(
        logging.getLogger("test"),
        function.spec.labels,
        task,
        allow_unmatched_labels=False,
        conv_mask_to_poly=kind == "polygon",
    )
    context = _DetectionFunctionContextImpl(frame_name="a.png", **options)
    tags, shapes = mapper.validate_and_remap(function.detect(context, image), 4)
    assert not tags and all(shape.frame == 4 for shape in shapes)
    return shapes


@pytest.fixture
def drawn_function() -> CvatFunction:
    """One that finds the rings with a score of .9, a square with .6, another with .2."""
    squares = np.zeros((2, 12, 12), np.uint8)
    squares[:, 2:5, 8:11] = 1
    masks = np.stack([RINGS, *squares])
    proposals = proposals_of(masks, scores=np.array([0.9, 0.6, 0.2]))
    return CvatFunction(lambda image: proposals, None, 100)


def test_masks_are_equal_and_have_scores(drawn_function):
    rings, square = annotate(drawn_function, Image.new("L", (12, 12)))
    decoded = decode_mask(rings.points, image_width=12, image_height=12)
    assert np.array_equal(decoded, RINGS.astype(bool))
    assert [rings.score, square.score] == [0.9, 0.6] and rings.label_id == 100


def test_the_threshold_and_the_number_of_shapes(drawn_function):
    image = Image.new("RGBA", (12, 12))
    assert len(annotate(drawn_function, image, conf_threshold=0.2)) == 3
    assert len(annotate(drawn_function, image, conf_threshold=0.7)) == 1
    drawn_function.max_shapes = 1
    [best] = annotate(drawn_function, image, conf_threshold=0)
    assert best.score == 0.9


def test_polygons_on_request(drawn_function):
    rings, square = annotate(drawn_function, Image.new("RGB", (12, 12)), conv_mask_to_poly=True)
    assert rings.type.value == "polygon"
    corners = np.array(rings.points).reshape(-1, 2)
    assert np.array_equal(corners, join_rings(trace_mask(RINGS)))
    assert sorted(zip(square.points[::2], square.points[1::2], strict=True)) == [
        (8, 2),
        (8, 5),
        (11, 2),
        (11, 5),
    ]


def test_a_proposer_and_a_detector(tiny_sharpmask, tiny_detector, shapes_directory):
    image = Image.open(next((shapes_directory / "images" / "val").iterdir()))
    proposes = create(str(tiny_sharpmask), max_shapes=7)
    assert [label.name for label in proposes.spec.labels] == ["object"]
    shapes = annotate(proposes, image, conf_threshold=0)
    assert 0 < len(shapes) <= 7
    detects = create(str(tiny_detector), str(tiny_sharpmask))
    names = [label.name for label in detects.spec.labels]
    assert names == list(detects.detector.category_names.values())
    shapes = annotate(detects, image, conf_threshold=0)
    assert shapes and {shape.label_id for shape in shapes} <= set(range(100, 100 + len(names)))


def test_cvat_cli_finds_the_function(monkeypatch):
    """It loads the file under a name of its own, and calls `create`."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    file = ROOT / "tools" / "cvat_function.py"
    spec = importlib.util.spec_from_file_location("__cvat_function__", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.create is create


def test_without_the_sdk(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvat_sdk", None)
    with pytest.raises(ValueError, match="pip install cvat-sdk"):
        create()
