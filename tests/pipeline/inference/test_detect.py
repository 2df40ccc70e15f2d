"""Detection in images: perfect networks score 1, chunks and views agree, masks stay with boxes."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from datasets.coco import CocoInstances
from datasets.images import read_image
from datasets.roi_sampler import RoiSamplingConfig
from models.multipathnet import MultiPathNet
from pipeline.checkpoint import find_proposer_beside, run_of
from pipeline.config import DetectConfig, MultiPathNetStageConfig
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.inference import detect_folders
from pipeline.inference.detect import Detector, compress_checkpoint, load_detector, select_boxes
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Proposals, results_of

CPU = torch.device("cpu")


def truth_as_proposals(coco: CocoInstances, image: int) -> Proposals:
    rows = np.arange(coco.image_starts[image], coco.image_starts[image + 1])
    rows = rows[~coco.is_crowd[rows]]
    return Proposals(
        int(coco.image_ids[image]),
        coco.file_name(image),
        *coco.image_sizes[image].tolist(),
        logits=np.linspace(1, 0, len(rows), dtype=np.float32),
        boxes=coco.boxes[rows],
        rles=[coco.rle(row)["counts"] for row in rows],
    )


class PerfectClasses(nn.Module):
    """Knows the class of every ground-truth box, and that its place is right already."""

    def __init__(self, coco: CocoInstances):
        super().__init__()
        self.coco, self.rows = coco, np.zeros(0, int)

    def layers(self, _):
        return {}

    def classify_rois(self, _, rois):
        classes = torch.from_numpy(self.coco.category_index[self.rows]).long() + 1
        logits = torch.zeros(len(rois), 1, len(self.coco.category_ids) + 1)
        logits[torch.arange(len(rois)), 0, classes] = 50
        return {"class_logits": logits, "deltas": torch.zeros(*logits.shape[::2], 4)}

    delta_mean, delta_std = torch.zeros(4), torch.ones(4)
    decode = MultiPathNet.decode


def test_perfect_proposals_and_classes_score_1(shapes_directory):
    path = shapes_directory / "annotations" / "instances_val.json"
    coco = CocoInstances.load(path)
    model = PerfectClasses(coco)
    categories = [{"id": int(i), "name": ""} for i in coco.category_ids]
    # At the published NMS of .3 an object is lost if one of its class overlaps it that much.
    options = DetectConfig(chunk=1000, nms=1.0)
    config = MultiPathNetStageConfig(sampling=RoiSamplingConfig(short_side=160, long_side=224))
    detector = Detector(model, categories, device=CPU, config=config, options=options)
    results = []
    for image in range(len(coco)):
        rows = np.arange(coco.image_starts[image], coco.image_starts[image + 1])
        model.rows = rows[~coco.is_crowd[rows]]
        pixels = read_image(shapes_directory / "images" / "val" / coco.file_name(image))
        results += results_of(detector(pixels, truth_as_proposals(coco, image)))
    metrics = evaluate_detections(load_ground_truth(path), results).metrics()
    assert [metrics[kind]["AP"] for kind in ("box", "mask")] == pytest.approx([1, 1])


@pytest.fixture(scope="module")
def scene(shapes_directory):
    """An image with objects, and proposals for it: the objects."""
    coco = CocoInstances.load(shapes_directory / "annotations" / "instances_val.json")
    image = int(np.argmax(np.diff(coco.image_starts)))
    pixels = read_image(shapes_directory / "images" / "val" / coco.file_name(image))
    return pixels, truth_as_proposals(coco, image)


def assert_same(one, other) -> None:
    assert len(one) == len(other) > 0
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
    assert one.rles == other.rles and (one.labels == other.labels).all()


@pytest.fixture(scope="module")
def crowded(scene):
    """The same image with 61 proposals: the objects', moved about."""
    pixels, objects = scene
    height, width = pixels.shape[:2]
    rows = np.random.default_rng(0).integers(len(objects), size=61)
    boxes = objects.boxes[rows] + np.random.default_rng(1).normal(0, 6, (61, 4))
    boxes = boxes.clip(0, [width, height] * 2).astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    logits = np.linspace(1, -1, 61, dtype=np.float32)
    rles = [objects.rles[row] for row in rows]
    return pixels, Proposals(1, "crowded", height, width, logits, boxes, rles)


OPTIONS = {"box_refinement_iters": 1, "box_voting_iou": 0.5, "short_sides": (160, 120)}
every = pytest.param(OPTIONS | {"flip": True}, id="every option")
with_options = pytest.mark.parametrize("options", [pytest.param({}, id="plain"), every])


@with_options
@pytest.mark.parametrize("chunk", [1, 7, 60, 61])
def test_chunks_of_any_size_give_the_same_detections(tiny_detector, crowded, chunk, options):
    whole = load_detector(tiny_detector, CPU, overrides=options | {"chunk": 1000})[0](*crowded)
    parts = load_detector(tiny_detector, CPU, overrides=options | {"chunk": chunk})[0](*crowded)
    assert_same(whole, parts)


@with_options
def test_one_pass_gives_what_each_number_of_proposals_gives(tiny_detector, crowded, options):
    counts = [40, 1, 61, 8, 1000]
    detector, _ = load_detector(tiny_detector, CPU, overrides=options)
    looks, layers = [], detector.model.layers
    detector.model.__dict__["layers"] = lambda planes: looks.append(planes) or layers(planes)
    together = detector.detect_by_count(*crowded, counts)
    assert len(looks) == (4 if options else 1)  # two scales, mirrored and not
    for count, found in zip(counts, together, strict=True):
        overrides = options | {"num_proposals": count}
        assert_same(found, load_detector(tiny_detector, CPU, overrides=overrides)[0](*crowded))
    assert set(together[1].rles) == {crowded[1].rles[0]}  # the best one's mask only


def test_flipping_the_image_twice_changes_nothing(tiny_detector, scene):
    """Mirrored image and mirrored proposals: the mean over both views mirrors, too."""
    image, proposals = scene
    width, overrides = image.shape[1], {"flip": True, "score_threshold": 0.0}
    detector, _ = load_detector(tiny_detector, CPU, overrides=overrides)
    boxes = proposals.boxes.copy()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    there = detector(image, proposals)
    back = detector(image[:, ::-1].copy(), replace(proposals, boxes=boxes))
    back.boxes[:, [0, 2]] = width - back.boxes[:, [2, 0]]
    np.testing.assert_allclose(np.sort(there.scores), np.sort(back.scores), atol=1e-4)
    np.testing.assert_allclose(np.sort(there.boxes.sum(1)), np.sort(back.boxes.sum(1)), atol=0.5)


@with_options
def test_detections_are_in_the_image_with_the_masks_of_proposals(tiny_detector, crowded, options):
    image, proposals = crowded
    found = load_detector(tiny_detector, CPU, overrides=options)[0](image, proposals)
    assert 0 < len(found) <= 100 and (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all() and (found.boxes <= [*image.shape[1::-1]] * 2).all()
    assert set(found.rles) <= set(proposals.rles)
    assert coco_mask.decode(found.rle(0)).shape == image.shape[:2]


@with_options
def test_an_image_without_proposals_has_no_detections(tiny_detector, scene, options):
    image, proposals = scene
    none = Proposals(1, "x", *image.shape[:2], proposals.logits[:0], proposals.boxes[:0], [])
    detector, _ = load_detector(tiny_detector, CPU, overrides=options)
    assert len(detector(image, none)) == 0
    assert [len(found) for found in detector.detect_by_count(image, none, [10, 400])] == [0, 0]


def test_a_compressed_detector_is_smaller_and_detects(tiny_detector, scene, tmp_path, monkeypatch):
    whole, _ = load_detector(tiny_detector, CPU)
    compress_checkpoint(tiny_detector, 7, tmp_path / "small.pt")
    # The decomposition is in the file: reading it makes none, which would take minutes.
    monkeypatch.delattr(torch.linalg, "svd")
    small, _ = load_detector(tmp_path / "small.pt", CPU)
    sizes = [sum(p.numel() for p in detector.model.parameters()) for detector in (small, whole)]
    assert sizes[0] < sizes[1]
    found = small(*scene)
    assert len(found) and set(found.rles) <= set(scene[1].rles)


def test_a_detector_of_ones_own_takes_the_proposer_of_the_run_beside_it(
    tiny_detector, tiny_sharpmask, shapes_directory, tmp_path, call_tool, capsys
):
    """As its training did; the networks of the project only where there is none."""
    for name, checkpoint in (("multipathnet", tiny_detector), ("sharpmask", tiny_sharpmask)):
        shutil.copytree(checkpoint.parent, tmp_path / "runs" / name / "checkpoints")
    image = next((shapes_directory / "images" / "val").iterdir())
    run = tmp_path / "runs" / "multipathnet"
    common = ("--images", image, "--device", "cpu", "--checkpoint", run)
    assert call_tool("detect", *common, "--output", tmp_path / "found") == 0
    beside = tmp_path / "runs" / "sharpmask" / "checkpoints" / "best.pt"
    assert f"proposals by {beside}" in capsys.readouterr().out
    for file in ("multipathnet/model.safetensors", "multipathnet.pt"):  # for the hub, and packed
        places = (run_of(tmp_path / "runs" / folder / file) for folder in ("", "x"))
        assert [find_proposer_beside(place) for place in places] == [beside, None]


@pytest.mark.parametrize("height", [1, 9, 31])
def test_an_image_may_be_thinner_than_a_trunk_can_see(tiny_detector, height):
    """It is padded as in training: nothing changes where the image ends."""
    detector, _ = load_detector(tiny_detector, CPU, overrides={"score_threshold": 0.0})
    detector.config = replace(
        detector.config,
        sampling=replace(detector.config.sampling, short_side=height, long_side=200),
    )
    image = np.random.default_rng(0).integers(0, 256, (height, 200, 3), np.uint8)
    boxes = np.array([[10, 0, 90, height]], np.float32)
    proposals = Proposals(1, "thin", height, 200, np.ones(1, np.float32), boxes, [b"0"])
    found = detector(image, proposals)
    assert len(found) and (found.boxes <= [200, height] * 2).all()


def test_sides_of_several_scales_do_not_depend_on_their_order(tiny_detector):
    """The longer side may be as long as in training, and longer with a longer shorter one."""
    sampling = load_detector(tiny_detector, CPU)[0].config.sampling
    assert (sampling.short_side, sampling.long_side) == (160, 224)

    def sides(*short_sides: int) -> dict[int, int]:
        detector, _ = load_detector(tiny_detector, CPU, overrides={"short_sides": short_sides})
        return {each["short_side"]: each["long_side"] for each in detector._sides()}

    assert sides() == {160: 224}
    assert sides(160, 320, 80) == sides(80, 320, 160) == {80: 224, 160: 224, 320: 448}
    assert sides(320) == {320: 448}


def test_a_box_votes_for_itself_whatever_the_limit_is(tiny_detector, crowded):
    options = {"box_voting_iou": 1.0}
    voted = load_detector(tiny_detector, CPU, overrides=options)[0](*crowded)
    assert_same(voted, load_detector(tiny_detector, CPU)[0](*crowded))


def test_tool_goes_from_images_to_scored_detections(
    tiny_detector, tiny_sharpmask, shapes_directory, tmp_path, call_tool
):
    annotations = shapes_directory / "annotations" / "instances_val.json"
    common = ("--images", shapes_directory / "images" / "val", "--device", "cpu")
    both = ("--proposal-checkpoint", tiny_sharpmask, "--annotations", annotations, *common)
    output = tmp_path / "one_call"
    assert call_tool("detect", "--checkpoint", tiny_detector, "--output", output, *both) == 0
    assert len(json.loads((output / "detections.json").read_text())) > 0
    from_store = ("--proposals", output / "proposals", "--draw", 3, *common)
    second = tmp_path / "from_store"
    assert call_tool("detect", "--checkpoint", tiny_detector, "--output", second, *from_store) == 0
    assert (output / "detections.json").read_text() == (second / "detections.json").read_text()
    assert len(list((second / "drawn").iterdir())) == 8
    scored = ("--annotations", annotations, "--results", output / "detections.json")
    assert call_tool("score_coco", "detections", *scored, "--output", tmp_path / "scores") == 0
    assert "AP50" in json.loads((tmp_path / "scores" / "metrics.json").read_text())["mask"]


def test_tool_proposes_and_detects_as_it_is_told(
    tiny_detector, tiny_sharpmask, shapes_directory, tmp_path, call_tool, monkeypatch
):
    checkpoint = torch.load(tiny_detector, weights_only=True)
    checkpoint["config"]["detect"]["flip"] = True
    torch.save(checkpoint, tmp_path / "mirrors.pt")
    used, detect_images = {}, detect_folders.detect_images
    monkeypatch.setattr(
        detect_folders,
        "detect_images",
        lambda *args, settings, **more: (
            used.update(settings) or detect_images(*args, settings=settings, **more)
        ),
    )
    [image, *_] = sorted((shapes_directory / "images" / "val").iterdir())
    output = tmp_path / "out"
    arguments = ["--proposal-checkpoint", tiny_sharpmask, "--images", image, "--output", output]
    arguments += ["--num-proposals", 3, "--per-megapixel", 2000, "--scales", -1, 0, 1, "--zoom"]
    arguments += ["--no-refine", "--nms", 0.9, "--memory", 0.5, "--no-flip"]
    assert call_tool("detect", "--checkpoint", tmp_path / "mirrors.pt", *arguments) == 0
    assert used["flip"] is False and used["per_megapixel"] == 2000
    store = ProposalStore(output / "proposals")
    made = {"log2_scales": [-1, 0, 1], "refine": False, "nms": 0.9, "per_megapixel": 2000}
    assert made.items() <= store.settings().items()


def test_larger_images_have_more_of_their_proposals_detected(tiny_detector, crowded):
    height, width = crowded[0].shape[:2]
    few = {"num_proposals": 8, "score_threshold": 0.0, "nms": 1.0}
    for density, count in (
        (None, 8),
        (7.5e6 / (height * width), 8),
        (40.5e6 / (height * width), 40),
    ):
        overrides = few | {"per_megapixel": density}
        found = load_detector(tiny_detector, CPU, overrides=overrides)[0](*crowded)
        assert set(found.rles) == set(crowded[1].rles[:count])


# Selection: NMS within classes and box voting, against slow loops over pairs of boxes.


def iou(a, b):
    """In float32, step by step as torchvision computes it: overlaps may lie on the limit."""
    a, b = np.float32(a), np.float32(b)
    width = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
    height = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
    inter = width * height
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(inter / (areas[0] + areas[1] - inter))


def slow_selection(probabilities, boxes, options):
    """[(score, label, box, roi)] by the definition: one box and one class after another."""
    found = []
    for label in range(boxes.shape[1]):
        scores, places = probabilities[:, label + 1], boxes[:, label]
        rows = [
            roi
            for roi, (x1, y1, x2, y2) in enumerate(places)
            if scores[roi] > options.score_threshold and x2 > x1 and y2 > y1
        ]
        waiting = sorted(rows, key=lambda roi: (-scores[roi], roi))
        while waiting:
            best, *others = waiting
            waiting = [roi for roi in others if iou(places[best], places[roi]) <= options.nms]
            voted = slow_vote(best, rows, scores, places, options.box_voting_iou)
            found.append((scores[best], label, voted, best))
    found.sort(key=lambda item: -item[0])  # stable: class, then RoI
    return found[: options.max_detections]


def slow_vote(best, rows, scores, places, vote_iou):
    if vote_iou is None:
        return places[best]
    # PyTorch compares in float32, torchvision's NMS in float64: 3 / 10 is above .3 there only.
    limit = float(np.float32(vote_iou))
    voters = [roi for roi in rows if iou(places[best], places[roi]) > limit]
    return np.average(places[voters].astype(float), axis=0, weights=scores[voters].astype(float))


@st.composite
def scenes(draw):
    """Few places, sizes and scores, so that equal scores and overlaps on the limit occur.

    Some boxes are empty, as after clipping.
    """

    def arrays(shape, elements):  # each element drawn, not most of them the same
        return hnp.arrays(np.float32, shape, elements=elements, fill=st.nothing())

    rois, classes = draw(st.integers(0, 10)), draw(st.integers(1, 3))
    shape = (rois, classes, 2)
    corners = draw(arrays(shape, st.sampled_from([0, 1, 2, 20])))
    sides = draw(arrays(shape, st.sampled_from([0, 2, 4, 5, 6, 8, 10])))
    boxes = np.concatenate([corners, corners + sides], axis=2)
    scores = st.sampled_from(np.float32([0, 0.05, 0.1, 0.25, 0.5, 0.9]).tolist())
    pixel = np.float32(draw(st.sampled_from([1, 0.1, 97.3])))
    return draw(arrays((rois, classes + 1), scores)), boxes * pixel


@settings(max_examples=150, deadline=None)
@given(
    scenes(),
    st.builds(
        DetectConfig,
        score_threshold=st.sampled_from([0.0, 0.05, 0.2]),
        nms=st.sampled_from([1e-9, 0.3, 0.5, 0.7]),
        box_voting_iou=st.sampled_from([None, 0.3, 0.5]),
        max_detections=st.sampled_from([1, 5, 100]),
    ),
)
def test_equals_slow_loops(scene, options):
    expected = slow_selection(*scene, options)
    scores, labels, boxes, rois = select_boxes(*map(torch.tensor, scene), options)
    assert scores.tolist() == [item[0] for item in expected]
    assert labels.tolist() == [item[1] for item in expected]
    assert rois.tolist() == [item[3] for item in expected]
    assert labels.dtype == rois.dtype == torch.int64
    expected_boxes = np.array([item[2] for item in expected], np.float32).reshape(-1, 4)
    np.testing.assert_allclose(boxes.numpy(), expected_boxes, rtol=1e-6)


def test_the_class_does_not_blur_the_boxes():
    """Moved by 79 times 1001 pixels, in float32, these two would overlap by .3004, not .2999."""
    probabilities, boxes = torch.zeros(3, 81), torch.zeros(3, 80, 4)
    boxes[:, 79] = torch.tensor([[0, 0, 10, 10], [5.386, 0, 15.386, 10], [900, 900, 1000, 1000]])
    probabilities[:, 80] = torch.tensor([0.9, 0.8, 0.7])
    _, labels, _, rois = select_boxes(probabilities, boxes, DetectConfig())
    assert rois.tolist() == [0, 1, 2] and labels.tolist() == [79] * 3


def test_voting_never_leaves_the_image():
    """Clipped boxes share a border; their mean, rounded, must not lie beyond it."""
    rng = np.random.default_rng(0)
    boxes = np.zeros((50, 1, 4), np.float32)
    boxes[:, 0, :2], boxes[:, 0, 2:] = rng.uniform(0, 20, (50, 2)), (333.1, 499.7)
    scores = rng.uniform(0.1, 1, (50, 1)).astype(np.float32)
    probabilities = torch.tensor(np.concatenate([1 - scores, scores], axis=1))
    _, _, selected, _ = select_boxes(
        probabilities, torch.tensor(boxes), DetectConfig(box_voting_iou=0.5)
    )
    assert len(selected) == 1
    assert torch.equal(selected[0, 2:], torch.tensor([333.1, 499.7]))
