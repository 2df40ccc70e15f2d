"""Detection in images: perfect networks score 1, chunks and views agree, masks stay with boxes."""

import json
import shutil

import cv2
import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from pipeline.load import compress_checkpoint, load_detector
from torch import nn

from datasets.coco import CocoInstances
from datasets.images import read_image
from models.multipathnet import MultiPathNet
from pipeline.config import DetectConfig
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.inference.detect import Detector
from pipeline.inference.detect_run import detect_images
from pipeline.inference.proposals import Proposals, ProposalStore

CPU = torch.device("cpu")


def truth_as_proposals(coco: CocoInstances, image: int) -> Proposals:
    rows = [
        row
        for row in range(coco.image_starts[image], coco.image_starts[image + 1])
        if not coco.is_crowd[row]
    ]
    return Proposals(
        int(coco.image_ids[image]),
        coco.file_name(image),
        *coco.image_sizes[image].tolist(),
        scores=np.linspace(1, 0.5, len(rows), dtype=np.float32),
        boxes=coco.boxes[rows],
        counts=[coco.rle(row)["counts"] for row in rows],
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
    detector = Detector(
        model,
        categories,
        device=CPU,
        short_sides=[160],
        long_side=224,
        # At the published .3 an object is lost if one of its class overlaps it that much.
        options=DetectConfig(chunk=1000, nms=1.0),
    )
    results = []
    for image in range(len(coco)):
        rows = np.arange(coco.image_starts[image], coco.image_starts[image + 1])
        model.rows = rows[~coco.is_crowd[rows]]
        pixels = read_image(shapes_directory / "images" / "val" / coco.file_name(image))
        results += detector(pixels, truth_as_proposals(coco, image)).results()
    metrics = evaluate_detections(load_ground_truth(path), results).metrics()
    assert metrics["mask"]["AP"] == pytest.approx(1)
    assert metrics["box"]["AP"] == pytest.approx(1)


@pytest.fixture(scope="module")
def scene(shapes_directory):
    """An image with objects, and proposals for it: the objects."""
    coco = CocoInstances.load(shapes_directory / "annotations" / "instances_val.json")
    image = int(np.argmax(np.diff(coco.image_starts)))
    pixels = read_image(shapes_directory / "images" / "val" / coco.file_name(image))
    return pixels, truth_as_proposals(coco, image)


def assert_same(one, other, tolerance: float = 1e-3) -> None:
    assert len(one) == len(other) > 0
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    np.testing.assert_allclose(one.boxes, other.boxes, atol=tolerance)
    assert one.counts == other.counts and (one.labels == other.labels).all()


@pytest.fixture(scope="module")
def crowded(scene):
    """The same image with 61 proposals: the objects', moved about."""
    pixels, objects = scene
    height, width = pixels.shape[:2]
    rows = np.random.default_rng(0).integers(len(objects), size=61)
    boxes = objects.boxes[rows] + np.random.default_rng(1).normal(0, 6, (61, 4))
    boxes = boxes.clip(0, [width, height] * 2).astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    scores = np.linspace(1, 0.1, 61, dtype=np.float32)
    counts = [objects.counts[row] for row in rows]
    return pixels, Proposals(1, "crowded", height, width, scores, boxes, counts)


EVERY_OPTION = {"localizations": 1, "vote": 0.5, "flip": True, "short_sides": [160, 120]}


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
@pytest.mark.parametrize("chunk", [1, 7, 60, 61])
def test_chunks_of_any_size_give_the_same_detections(tiny_detector, crowded, chunk, options):
    whole = load_detector(tiny_detector, CPU, overrides=options | {"chunk": 1000})[0](*crowded)
    parts = load_detector(tiny_detector, CPU, overrides=options | {"chunk": chunk})[0](*crowded)
    assert_same(whole, parts)


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
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
    assert set(together[1].counts) == {crowded[1].counts[0]}  # the best one's mask only


def test_flipping_the_image_twice_changes_nothing(tiny_detector, scene):
    """Mirrored image and mirrored proposals: the mean over both views mirrors, too."""
    image, proposals = scene
    detector = load_detector(tiny_detector, CPU, overrides={"flip": True, "score_threshold": 0.0})[
        0
    ]
    width = image.shape[1]
    mirrored = Proposals(
        1, "m", *image.shape[:2], proposals.scores, proposals.boxes.copy(), proposals.counts
    )
    mirrored.boxes[:, [0, 2]] = width - mirrored.boxes[:, [2, 0]]
    there, back = detector(image, proposals), detector(image[:, ::-1].copy(), mirrored)
    order = [np.lexsort((d.boxes[:, 1], d.labels, -d.scores.round(4))) for d in (there, back)]
    boxes = back.boxes[order[1]]
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    np.testing.assert_allclose(np.sort(there.scores), np.sort(back.scores), atol=1e-4)
    np.testing.assert_allclose(
        np.sort(there.boxes[order[0]].sum(1)), np.sort(boxes.sum(1)), atol=0.5
    )


def test_every_detection_has_the_mask_of_its_proposal(tiny_detector, scene):
    image, proposals = scene
    found = load_detector(tiny_detector, CPU)[0](image, proposals)
    assert set(found.counts) <= set(proposals.counts) and len(found)
    again = load_detector(tiny_detector, CPU, overrides={"localizations": 2})[0](image, proposals)
    assert set(again.counts) <= set(proposals.counts) and len(again)
    assert coco_mask.decode(again.rle(0)).shape == image.shape[:2]


def test_boxes_lie_in_the_image_and_at_most_100(tiny_detector, scene):
    image, proposals = scene
    found = load_detector(tiny_detector, CPU, overrides={"vote": 0.5})[0](image, proposals)
    assert len(found) <= 100 and (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [*image.shape[1::-1], *image.shape[1::-1]]).all()


@pytest.mark.parametrize("options", [{}, EVERY_OPTION], ids=["plain", "every option"])
def test_an_image_without_proposals_has_no_detections(tiny_detector, scene, options):
    image, proposals = scene
    none = Proposals(1, "x", *image.shape[:2], proposals.scores[:0], proposals.boxes[:0], [])
    detector, _ = load_detector(tiny_detector, CPU, overrides=options)
    assert len(detector(image, none)) == 0
    assert [len(found) for found in detector.detect_by_count(image, none, [10, 400])] == [0, 0]


def test_full_rank_compression_changes_nothing_and_low_rank_is_smaller(
    tiny_detector, scene, tmp_path
):
    whole = load_detector(tiny_detector, CPU)[0](*scene)
    compress_checkpoint(tiny_detector, 7, tmp_path)
    small, _ = load_detector(tmp_path / "rank7.pt", CPU)
    sizes = [
        sum(p.numel() for p in d.model.parameters())
        for d in (small, load_detector(tiny_detector, CPU)[0])
    ]
    assert sizes[0] < sizes[1]
    found = small(*scene)
    assert len(found) and set(found.counts) <= set(whole.counts)


def test_one_bad_image_loses_no_other(tiny_detector, shapes_directory, tmp_path, capsys):
    """One too large for the memory, one unreadable, one that has been replaced by another."""
    images = tmp_path / "images"
    shutil.copytree(shapes_directory / "images" / "val", images)
    store = ProposalStore(tiny_detector.parents[1] / "proposals" / "val")
    large, torn, other, *names = store.images()
    (images / torn).write_bytes((images / torn).read_bytes()[:500])
    cv2.imwrite(str(images / other), np.zeros((20, 30, 3), np.uint8))
    detector, _ = load_detector(tiny_detector, CPU)
    detect = detector.detect_by_count

    def run_out_of_memory(image, proposals, counts):
        if proposals.file_name == large:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")
        return detect(image, proposals, counts)

    detector.detect_by_count = run_out_of_memory
    summary = detect_images(detector, store, images, tmp_path / "out", settings={})
    assert summary.images == len(names) > 0 and len(summary.broken) == 3
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {one["image_id"] for one in found} == {store.images()[name]["id"] for name in names}
    printed = capsys.readouterr().out
    reasons = ("out of memory", "truncated", "30x20")
    for message, name, reason in zip(
        sorted(summary.broken), (large, torn, other), reasons, strict=True
    ):
        assert name in message and reason in message and message in printed


def test_an_interrupted_run_goes_on_where_it_was(tiny_detector, shapes_directory, tmp_path):
    """To the same file; with other settings it starts anew."""
    images = shapes_directory / "images" / "val"
    whole = ProposalStore(tiny_detector.parents[1] / "proposals" / "val")
    store, output = ProposalStore(tmp_path / "store"), tmp_path / "out"
    store.directory.mkdir()
    for proposals in whole:  # one image a shard
        store.write_shard([proposals])
    detector, settings = load_detector(tiny_detector, CPU)
    assert "chunk" not in settings and settings["nms"] == 0.3
    detect, seen = detector.detect_by_count, []

    def noted(image, proposals, counts):
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(proposals.file_name)
        return detect(image, proposals, counts)

    detector.detect_by_count, stop = noted, 3
    with pytest.raises(KeyboardInterrupt):
        detect_images(detector, store, images, output, settings=settings)
    assert not (output / "detections.json").exists() and len(seen) == stop
    stop = -1
    detect_images(detector, store, images, output, settings=settings)
    assert len(seen) == len(set(seen)) == len(store.shards()) > 3
    detect_images(detector, whole, images, tmp_path / "at_once", settings=settings)
    first, second = (tmp_path / d / "detections.json" for d in ("out", "at_once"))
    assert first.read_text() == second.read_text() and not (output / "parts").exists()

    seen, stop = [], 2
    with pytest.raises(KeyboardInterrupt):
        detect_images(detector, store, images, output, settings=settings)
    assert first.read_text() == second.read_text()  # what there is stays until there is better
    stop = -1
    detect_images(detector, store, images, output, settings=settings | {"nms": 0.4})
    assert len(seen) == 2 + len(store.shards())


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
    scores = tmp_path / "scores"
    assert (
        call_tool(
            "score_coco",
            "detections",
            "--annotations",
            annotations,
            "--results",
            output / "detections.json",
            "--output",
            scores,
        )
        == 0
    )
    assert "AP50" in json.loads((scores / "metrics.json").read_text())["mask"]
