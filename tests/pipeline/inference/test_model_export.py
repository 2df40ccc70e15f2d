"""The graph of `tools/export_model.py` computes what `tools/propose.py` does, in other runtimes."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from datasets.resize import resize_image
from models.build import build_deepmask, build_sharpmask
from models.inference import optimize_for_inference
from models.trunk import TrunkConfig
from pipeline.inference.cells import best_cells, place_patches
from pipeline.inference.model_export import MODEL_FORMATS, Format, files
from pipeline.inference.model_export.files import check_outputs, difference
from pipeline.inference.model_export.graph import Outputs, ProposalGraph
from pipeline.inference.model_export.resizing import resize_with_border, scaled_side
from pipeline.inference.propose import Proposer
from pipeline.pretrained import pretrained_checkpoint

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "propose_with_onnx.py"
DEEPMASK = {
    "patch_size": 64,
    "context": 32,
    "mask_size": 12,
    "reduction": 8,
    "embedding": 16,
    "score_hidden": 16,
}
NETWORKS = {
    "tiny": {},
    "resnet18": {"trunk": {"width": 8}},
    "resnet50 of Caffe": {"trunk": {"width": 8, "style": "caffe", "ceil_pooling": True}},
    "mobilenet_v2": {},
    "vgg11": {},
    "densenet121": {},
    "tiny as in the paper": {"merge": "concat", "widths": "constant", "num_modules": 3},
    "tiny with separate heads": {"deepmask": {"separate_heads": True}},
    "tiny without refinement": {},
}


def make_proposer(name: str, **options) -> Proposer:
    """A proposer with random weights."""
    torch.manual_seed(0)
    values = dict(NETWORKS[name])
    trunk = TrunkConfig(name=name.split()[0], weights=None, **values.pop("trunk", {}))
    deepmask = DEEPMASK | values.pop("deepmask", {})
    if "without" in name:
        model = build_deepmask(trunk, **deepmask)
    else:
        model = build_sharpmask(trunk, deepmask=deepmask, km=16, ks=16, **values)
    if "Caffe" in name:  # weights for pixels from 0 to 255, as trained networks have them
        next(model.parameters()).data /= 58
    optimize_for_inference(model)
    defaults = {"num_proposals": 40, "log2_scales": (-1.0, 0.5, 0.5)}
    return Proposer(model, device=CPU, **(defaults | options))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(pixels, (0, 0), 1)


@torch.inference_mode()
def proposed(proposer: Proposer, image: np.ndarray) -> Outputs:
    """What the graph has to give, by the steps of `Proposer`."""
    scales = [proposer.run_scale(image, log2_scale) for log2_scale in proposer.log2_scales]
    logits, cells = best_cells([s.score_logits for s in scales], proposer.options.num_proposals)
    index, *row_column = cells.numpy().T
    scale_xy = np.array([scale.scale_xy for scale in scales])[index]
    size = proposer.deepmask.patch_size
    places = place_patches(np.stack(row_column, axis=1), scale_xy, size)
    # In the order of maps, as `decode` takes them.
    order = torch.sort(cells[:, 0], stable=True).indices
    masks = proposer.decode(scales, cells[order])[order.argsort()]
    return Outputs(logits.sigmoid(), torch.from_numpy(places).float(), masks)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_graph_gives_what_the_proposer_gives(name):
    proposer = make_proposer(name)
    image = noise(52, 92)  # multiples of 4, whose scaled pixels are OpenCV's to the bit
    with torch.inference_mode():
        found = Outputs(*ProposalGraph(proposer)(torch.from_numpy(image)))
    assert len(found.scores) == 40
    assert difference(proposed(proposer, image), found) < 1e-5


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90))
def test_images_of_all_sizes_down_to_a_pixel(height, width):
    """Of fewer cells than proposals, too. A pixel in 1,000 may be rounded otherwise."""
    proposer, image = make_proposer("tiny", log2_scales=(-2.5, 1.0, 3.5)), noise(height, width)
    with torch.inference_mode():
        found = Outputs(*ProposalGraph(proposer)(torch.from_numpy(image)))
    expected = proposed(proposer, image)
    assert found.mask_logits.shape == expected.mask_logits.shape
    assert difference(expected, found) < 0.02


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.sampled_from([-2.5, -2.0, -1.5, -1.0, -0.3, 0.0, 0.5, 1.0, 1.2]),
)
def test_resizing_is_opencvs_but_for_a_few_roundings(size, log2_scale):
    image = noise(*size)
    expected = resize_image(image, 2.0**log2_scale).astype(int)
    padded, *sides = resize_with_border(torch.from_numpy(image), 2.0**log2_scale, 3)
    assert tuple(sides) == expected.shape[:2]
    found = padded.numpy()[3:-3, 3:-3] * 255
    differences = abs(found - expected)
    assert differences.max() < 1.01
    # Small images have many means that lie between two whole numbers.
    assert (differences > 0.01).sum() <= 5 + expected.size * 0.01
    padded[3:-3, 3:-3] = 0.5
    assert (padded == 0.5).all()


def test_sides_are_rounded_as_python_rounds_them():
    sides = [*range(1, 3000), *range(65_000, 66_000), *range(130_000, 131_072)]
    for log2_scale in (-4, -2.5, -2, -1.5, -1, -0.5, 0, 0.3, 0.5, 1, 2):
        scale = 2.0**log2_scale
        assert [scaled_side(n, scale) for n in sides] == [max(1, round(n * scale)) for n in sides]


# --- the check of what was written ----------------------------------------------------------------


@pytest.fixture(scope="module")
def graph() -> ProposalGraph:
    return ProposalGraph(make_proposer("tiny"))


@pytest.fixture
def outputs(graph) -> Outputs:
    return Outputs(*graph(torch.from_numpy(noise(50, 60))))


def changed(outputs: Outputs, name: str, row: int, by: float) -> Outputs:
    values = getattr(outputs, name).clone()
    values[row] += by
    return outputs._replace(**{name: values})


def test_differences_are_found_wherever_they_are(outputs):
    assert difference(outputs, outputs) == 0
    assert difference(outputs, changed(outputs, "scores", 3, 1e-3)) == pytest.approx(1e-3, rel=0.1)
    assert difference(outputs, changed(outputs, "mask_logits", 30, -1e-3)) > 1e-4
    assert np.isnan(difference(outputs, changed(outputs, "mask_logits", 9, np.nan)))
    assert difference(outputs, Outputs(*(each[:-1] for each in outputs))) > 1
    assert difference(outputs, changed(outputs, "patches", slice(None), 1)) > 1


def test_places_of_equal_scores_may_change_but_not_what_is_there(outputs):
    order = torch.arange(len(outputs.scores))
    order[[4, 5]] = order[[5, 4]]
    assert difference(outputs, Outputs(*(each[order] for each in outputs))) == 0
    better = outputs._replace(scores=torch.linspace(1, 0.5, len(order)))
    assert difference(better, changed(better, "patches", 0, 1)) == pytest.approx(0.5)
    assert difference(better, changed(better, "patches", -1, 1)) == 0  # at the limit


def test_a_runtime_that_computes_something_else_is_an_error(graph):
    def run(image: torch.Tensor) -> Outputs:
        return changed(Outputs(*graph(image)), "scores", 0, 1e-3)

    with pytest.raises(ValueError, match="differs from PyTorch by 1.0e-03"):
        check_outputs(graph, run)
    with pytest.raises(ValueError, match="differs from PyTorch by nan"):
        check_outputs(graph, lambda image: changed(run(image), "mask_logits", 0, np.nan))


def test_a_pytorch_that_cannot_is_named(graph, tmp_path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Could not guard on u0\nand 50 lines more")

    monkeypatch.setattr(files, "_load", lambda *_: (graph, {}))
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ValueError, match=r"tried with 2\.14\): Could not guard on u0$"):
        files.write_torch_export("", tmp_path / "x.pt2", {})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tiny_checkpoint, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="propose.align_corners"):
        ProposalGraph(make_proposer("tiny", align_corners=True))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        files.write_onnx(tiny_checkpoint, tmp_path / "x.onnx", {})
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_the_tool_says_that_nothing_was_checked(graph, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is not installed" in files._check_onnx(graph, tmp_path / "x.onnx")


# --- the files ------------------------------------------------------------------------------------


def skip_before_torch_2_14() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14):
        pytest.skip("graphs of unknown sizes were tried with PyTorch 2.14")


@pytest.fixture(scope="module")
def checkpoint(tiny_sharpmask, tmp_path_factory) -> Path:
    """A SharpMask whose proposals have no near duplicates; of one scale, which exports fast."""
    content = torch.load(tiny_sharpmask, weights_only=True)
    options = content["config"]["propose"]
    options |= {"nms": 0.8, "log2_scales": [-0.5, -0.5, 1.0]}
    path = tmp_path_factory.mktemp("export") / "sharpmask.pt"
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def onnx_file(checkpoint) -> Path:
    pytest.importorskip("onnxscript")
    skip_before_torch_2_14()
    path = checkpoint.with_suffix(".onnx")
    options = {"num_proposals": 40}
    assert "ONNX Runtime differs from PyTorch by" in files.write_onnx(checkpoint, path, options)
    return path


def test_the_tool_passes_on_what_it_was_given(tmp_path, call_tool, monkeypatch, capsys):
    calls = []
    format_ = Format(".onnx", lambda *given: calls.append(given) or "wrote it")
    monkeypatch.setitem(MODEL_FORMATS, "onnx", format_)
    assert call_tool("export_model", "--format", "onnx") == 0
    given = {"num_proposals": None, "log2_scales": None, "refine": True}
    output = Path("runs", "models", "sharpmask.onnx")
    assert calls.pop() == (pretrained_checkpoint("sharpmask"), output, given)
    options = ["--num-proposals", 7, "--scales", "-1", "0", "0.5", "--no-refine"]
    assert call_tool("export_model", "x.pt", "--format", "onnx", "--output", "y", *options) == 0
    given = {"num_proposals": 7, "log2_scales": (-1, 0, 0.5), "refine": False}
    assert calls.pop() == ("x.pt", Path("y"), given)
    assert capsys.readouterr().out == "wrote it\n" * 2


# Runs a script with the arguments that follow, without the packages named first.
WITHOUT = """
import runpy, sys
forbidden, sys.argv[:] = sys.argv[1].split(","), sys.argv[2:]
sys.modules.update(dict.fromkeys(forbidden))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OTHERS = "torch,torchvision,pycocotools,models,datasets,pipeline,PIL,onnx,onnxscript"


@pytest.mark.parametrize("soft", [False, True])
def test_the_example_proposes_what_propose_does(onnx_file, checkpoint, tmp_path, call_tool, soft):
    """Scores within 1e-4 and masks with an IoU of .99, for at least 19 of 20 proposals.

    A pixel that is rounded otherwise can change a mask at its edge, and so which ones are
    duplicates.
    """
    assert len(EXAMPLE.read_text().splitlines()) < 60
    photo, out = tmp_path / "photo.png", tmp_path / "out.json"
    image = noise(117, 141)
    cv2.imwrite(str(photo), image)
    if soft:
        onnx = pytest.importorskip("onnx")
        model = onnx.load(onnx_file)
        [said] = [each for each in model.metadata_props if each.key == "soft_nms"]
        said.value, onnx_file = "true", tmp_path / "soft.onnx"
        onnx.save(model, onnx_file)
    names = [str(path) for path in (onnx_file, photo, out, tmp_path / "drawn.png")]
    command = [sys.executable, "-c", WITHOUT, OTHERS, str(EXAMPLE), *names]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    found = json.loads(out.read_text())
    store = ["--images", photo, "--output", tmp_path / "store", "--num-proposals", 40]
    options = ["--checkpoint", checkpoint, "--device", "cpu", "--precision", "fp32"]
    options += ["--soft-nms"] * soft
    assert call_tool("propose", *store, *options) == 0
    expected = json.loads((tmp_path / "store" / "proposals.json").read_text())
    assert len(expected) == 40 if soft else 5 < len(expected) < 40, "without duplicates"
    assert abs(len(found) - len(expected)) <= len(expected) / 20
    for each in found:
        rle = coco_mask.frPyObjects(each["segmentation"], *image.shape[:2])
        assert coco_mask.toBbox(rle).tolist() == each["bbox"]
        each["segmentation"] = rle
    masks = [[each["segmentation"] for each in some] for some in (expected, found)]
    ious = coco_mask.iou(*masks, [0] * len(found))
    scores = [np.array([each["score"] for each in some]) for some in (expected, found)]
    same = (abs(scores[0][:, None] - scores[1]) <= 1e-4) & (ious >= 0.99)
    assert same.any(axis=1).mean() >= 0.95 and same.any(axis=0).mean() >= 0.95
    drawn = cv2.imread(str(tmp_path / "drawn.png"))
    assert drawn.shape == image.shape and (drawn != image).any()


def test_the_onnx_file_says_what_it_is(onnx_file):
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx_file)
    [image], outputs = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type) == ("image", "tensor(uint8)")
    assert image.shape == ["height", "width", 3]
    shapes = {"scores": [], "patches": [4], "mask_logits": [96, 96]}
    assert {each.name: each.shape for each in outputs} == {
        name: ["proposals", *sides] for name, sides in shapes.items()
    }
    metadata = session.get_modelmeta().custom_metadata_map
    said = {key: json.loads(value) for key, value in metadata.items()}
    assert said["mask_threshold"] == 0.2 and said["nms"] == 0.8 and said["patch_size"] == 96
    assert said["log2_scales"] == [-0.5] and said["num_proposals"] == 40
    assert len(said["checkpoint_sha256"]) == 64 and said["gray"] == 0.5 and len(said["mean"]) == 3


def test_the_onnx_file_takes_images_down_to_a_pixel(onnx_file):
    session = pytest.importorskip("onnxruntime").InferenceSession(onnx_file)
    for size in ((1, 1), (2, 70), (70, 1), (64, 96)):
        scores, patches, logits = session.run(None, {"image": noise(*size)})
        assert len(scores) == len(patches) == len(logits) > 0
        assert np.isfinite(logits).all() and (np.diff(scores) <= 0).all()


LOAD = """
import json, sys, torch
extra = {"settings.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
outputs = program(torch.zeros(201, 133, 3, dtype=torch.uint8))
print(json.loads(extra["settings.json"])["log2_scales"], *(tuple(each.shape) for each in outputs))
"""


@pytest.mark.slow
def test_torch_export_needs_no_code_of_ours(checkpoint, tmp_path, call_tool, capsys):
    skip_before_torch_2_14()
    path = tmp_path / "x.pt2"
    arguments = [checkpoint, "--format", "torch-export", "--output", path, "--no-refine"]
    arguments += ["--num-proposals", 30, "--scales", "-1", "0.5", "1.5"]
    assert call_tool("export_model", *arguments) == 0
    assert f"wrote {path}; torch.export.load differs from PyTorch by" in capsys.readouterr().out
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    command = [sys.executable, "-c", WITHOUT, "models,datasets,pipeline", str(script), str(path)]
    printed = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    assert printed.stdout.strip() == "[-1.0, 0.5] (30,) (30, 4) (30, 14, 14)"


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_in_both_formats(name, tmp_path, monkeypatch):
    skip_before_torch_2_14()
    monkeypatch.setattr(files, "_load", lambda *_: (ProposalGraph(make_proposer(name)), {}))
    for suffix, write in ((".onnx", files.write_onnx), (".pt2", files.write_torch_export)):
        assert "differs from PyTorch by" in write("", tmp_path / f"x{suffix}", {})
