"""Exports that the other side's own library reads back: masks must be equal, to the pixel."""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import supervision as sv
import yaml
from cvat_sdk.masks import decode_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_studio_converter.brush import decode_rle
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.inference.export import FORMATS
from pipeline.inference.export import results as export_results
from pipeline.inference.export.labelstudio import encode_brush
from pipeline.inference.export.polygons import join_rings, trace_mask
from pipeline.inference.export.results import ListedResults, open_results, row_runs
from tests.pipeline.inference.test_export import MASKS, RINGS, results_folder

NAMES = {3: "Ring & <ö>", 5: "5"}
MASK_SETS = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 4), st.integers(1, 14), st.integers(1, 14)),
    elements=st.integers(0, 1),
)


def drawn(*strategies: st.SearchStrategy) -> Callable[[Callable], Callable]:
    """A test of 40 drawn inputs, however slow the machine is."""
    return lambda test: settings(max_examples=40, deadline=None)(given(*strategies)(test))


def as_rle(mask: np.ndarray) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": rle["counts"].decode()}


def results_of_masks(masks: np.ndarray, name: str = "a.png") -> ListedResults:
    height, width = masks.shape[1:]
    images = {7: {"id": 7, "file_name": name, "height": height, "width": width}}
    found = [
        {"image_id": 7, "category_id": 3 + 2 * (i % 2), "score": 0.9 - i / 10}
        | {"bbox": [0, 0, 1, 1], "segmentation": as_rle(mask)}
        for i, mask in enumerate(masks)
    ]
    return ListedResults(Path("x.json"), images, NAMES, found)


def written(results: ListedResults, name: str, folder: str) -> tuple[Path, str]:
    output = Path(folder) / f"out{FORMATS[name].suffix}"
    line = FORMATS[name].write(results, output, "wgs84")
    assert output.is_dir() == FORMATS[name].is_folder
    assert list(Path(folder).iterdir()) == [output]
    return output, line


def fill(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centers the ring goes around an odd number of times: exact, of our own."""
    mask = np.zeros((height, width), np.uint8)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        for row in range(math.ceil(min(y0, y1) - 0.5), math.ceil(max(y0, y1) - 0.5)):
            crossing = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            mask[row, math.ceil(crossing - 0.5) :] ^= 1
    return mask


def yolo_rings(file: Path, height: int, width: int) -> list[tuple[int, np.ndarray]]:
    lines = [line.split() for line in file.read_text().splitlines()]
    points = [np.array(line[1:], float).reshape(-1, 2) * (width, height) for line in lines]
    return [(int(line[0]), p) for line, p in zip(lines, points, strict=True)]


@drawn(MASKS)
def test_one_ring_fills_to_holes_and_parts(mask):
    if mask.any():
        ring = join_rings(trace_mask(mask))
        assert np.array_equal(fill(ring, *mask.shape), mask)
        assert np.array_equal(fill(ring[::-1], *mask.shape), mask)


@drawn(MASKS, st.integers(0, 3), st.integers(0, 3))
def test_runs_by_rows(mask, left, top):
    height, width = mask.shape[0] + top + 1, mask.shape[1] + left
    image = np.zeros((height, width), np.uint8)
    image[top : top + mask.shape[0], left:] = mask
    for runs, whole in ((row_runs(mask), mask), (row_runs(mask, (left, top), image.shape), image)):
        assert (runs[1:] > 0).all() and runs.sum() == whole.size
        assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), whole.ravel())


@drawn(MASK_SETS)
def test_yolo_polygons_fill_to_the_masks(masks):
    height, width = masks.shape[1:]
    with tempfile.TemporaryDirectory() as folder:
        output, line = written(results_of_masks(masks), "yolo-seg", folder)
        found = yolo_rings(output / "labels" / "a.txt", height, width)
        assert yaml.safe_load((output / "data.yaml").read_text())["names"] == {0: NAMES[3], 1: "5"}
    kept = [(i % 2, mask) for i, mask in enumerate(masks) if mask.any()]
    assert [label for label, _ in found] == [label for label, _ in kept]
    for (_, ring), (_, mask) in zip(found, kept, strict=True):
        assert np.array_equal(fill(ring.round(), height, width), mask)
    empty = len(masks) - len(kept)
    assert ("left out" in line) == bool(empty) and f"{len(kept)} results" in line


@drawn(MASK_SETS)
def test_supervision_reads_yolo(masks):
    """It paints polygons with their edge: a pixel more to the right and below, and the bridges."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "photos").mkdir()
        Image.fromarray(np.zeros((*masks.shape[1:], 3), np.uint8)).save(f"{folder}/photos/a.png")
        results = results_of_masks(masks)
        results.image_folder = Path(folder) / "photos"
        output = Path(folder) / "out"
        line = FORMATS["yolo-seg"].write(results, output, "wgs84")
        assert "not found" not in line
        dataset = sv.DetectionDataset.from_yolo(
            str(output / "images"), str(output / "labels"), str(output / "data.yaml")
        )
        [(_, _, detections)] = list(dataset)
    kept = [mask for mask in masks if mask.any()]
    assert dataset.classes == list(NAMES.values()) and len(detections) == len(kept)
    for mask, read in zip(kept, detections.mask if kept else [], strict=True):
        padded = np.pad(mask, ((1, 0), (1, 0)))
        edges_too = padded[1:, 1:] | padded[:-1, 1:] | padded[1:, :-1] | padded[:-1, :-1]
        assert (read >= edges_too).all()
        if len(trace_mask(mask)) == 1 and len(trace_mask(mask)[0]) == 1:
            assert np.array_equal(read, edges_too)


@drawn(MASK_SETS)
def test_supervision_reads_equal_masks(masks):
    with tempfile.TemporaryDirectory() as folder:
        output, _ = written(results_of_masks(masks), "supervision", folder)
        dataset = sv.DetectionDataset.from_coco(folder, str(output))
    [detections] = dataset.annotations.values()
    assert np.array_equal(detections.mask, masks)
    names = [dataset.classes[i] for i in detections.class_id]
    assert names == [NAMES[3 + 2 * (i % 2)] for i in range(len(masks))]
    assert detections.data["area"].tolist() == masks.sum(axis=(1, 2)).tolist()


@drawn(MASK_SETS)
def test_pycocotools_reads_equal_masks(masks):
    with tempfile.TemporaryDirectory() as folder:
        coco = COCO(written(results_of_masks(masks), "coco", folder)[0])
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    assert np.array_equal([coco.annToMask(a) for a in annotations], masks)
    assert [a["area"] for a in annotations] == masks.sum(axis=(1, 2)).tolist()
    assert not any(a["iscrowd"] for a in annotations)


@drawn(MASK_SETS)
def test_label_studio_reads_equal_masks(masks):
    with tempfile.TemporaryDirectory() as folder:
        output, _ = written(results_of_masks(masks, "süb/a b&#.png"), "labelstudio", folder)
        [task] = json.loads((output / "tasks.json").read_text())
        config = ElementTree.parse(output / "config.xml").getroot()
    assert task["data"] == {"image": "/data/local-files/?d=s%C3%BCb/a%20b%26%23.png"}
    kept = [(i, mask) for i, mask in enumerate(masks) if mask.any()]
    drawn = task["predictions"][0]["result"] if kept else []
    brushes = {tag.get("name"): tag for tag in config.iter("BrushLabels")}
    for region, (i, mask) in zip(drawn, kept, strict=True):
        pixels = decode_rle(region["value"]["rle"]).reshape(*mask.shape, 4)
        assert np.array_equal(pixels, np.repeat(mask[..., None] * 255, 4, axis=2))
        assert region["type"] == "brushlabels" and region["score"] == 0.9 - i / 10
        assert (region["original_width"], region["original_height"]) == mask.shape[::-1]
        labels = {label.get("value") for label in brushes[region["from_name"]]}
        assert set(region["value"]["brushlabels"]) <= labels == set(NAMES.values())
        assert brushes[region["from_name"]].get("toName") == region["to_name"] == "image"


def test_label_studios_long_runs():
    """Of several pieces, whose lengths are written in each of the four sizes."""
    runs = np.array([0, 2**14, 1, 2**14 + 1, 4, 5, 64, 65, 3, 2**15])
    values = np.repeat(np.repeat(np.arange(len(runs)) % 2 * 255, runs), 4)
    assert np.array_equal(decode_rle(encode_brush(runs)), values)


@drawn(MASK_SETS)
def test_cvat_reads_equal_masks(masks):
    height, width = masks.shape[1:]
    with tempfile.TemporaryDirectory() as folder:
        output, _ = written(results_of_masks(masks, "süb/\n&\x01.png"), "cvat", folder)
        root = ElementTree.parse(output).getroot()
    assert [name.text for name in root.findall("meta/task/labels/label/name")] == [*NAMES.values()]
    [image] = root.iter("image")
    assert image.get("name") == "süb/\n&\ufffd.png" and image.get("width") == str(width)
    kept = [(i, mask) for i, mask in enumerate(masks) if mask.any()]
    for shape, (i, mask) in zip(image, kept, strict=True):
        left, top, w, h = (int(shape.get(key)) for key in ("left", "top", "width", "height"))
        encoded = [*map(int, shape.get("rle").split(",")), left, top, left + w - 1, top + h - 1]
        decoded = decode_mask(encoded, image_width=width, image_height=height)
        assert np.array_equal(decoded, mask.astype(bool))
        assert shape.get("label") == NAMES[3 + 2 * (i % 2)]
        assert float(shape.find("attribute[@name='score']").text) == 0.9 - i / 10


def test_boxes_without_masks(tmp_path):
    """One within the image, one that ends beyond it, one outside."""
    results = results_of_masks(np.zeros((3, 10, 20), np.uint8))
    for result, box in zip(
        results.results, ([2, 3, 4.5, 5], [15, 5, 10, 10], [30, 1, 5, 5]), strict=True
    ):
        del result["segmentation"]
        result["bbox"] = box
    lines = {name: format.write(results, tmp_path / name, "") for name, format in FORMATS.items()}
    for name in ("yolo-seg", "labelstudio", "cvat"):
        assert "2 results; 1 empty ones left out" in lines[name]
    first, second = (p for _, p in yolo_rings(tmp_path / "yolo-seg" / "labels" / "a.txt", 10, 20))
    assert first == pytest.approx(np.array([[2, 3], [6.5, 3], [6.5, 8], [2, 8]]))
    assert second.max(axis=0).tolist() == [20, 10]
    [task] = json.loads((tmp_path / "labelstudio/tasks.json").read_text())
    values = [region["value"] for region in task["predictions"][0]["result"]]
    assert values[0].items() >= {"x": 10, "y": 30, "width": 22.5, "height": 50}.items()
    assert values[1]["rectanglelabels"] == ["5"]
    first, second = ElementTree.parse(tmp_path / "cvat").getroot().iter("box")
    assert [first.get(k) for k in ("xtl", "ytl", "xbr", "ybr")] == ["2.00", "3.00", "6.50", "8.00"]
    dataset = sv.DetectionDataset.from_coco(str(tmp_path), str(tmp_path / "supervision"))
    [detections] = dataset.annotations.values()
    assert detections.xyxy[0].tolist() == [2, 3, 6.5, 8] and detections.mask is None


def test_images_that_yolo_would_mix_up(tmp_path):
    """Of equal stems, in a folder called images, in subfolders, and outside of the folder."""
    names = ["a.jpg", "a.png", "ü/a.jpg", "train/images/b.jpg", "../c.jpg", "a-2.jpg", "/d.jpg"]
    for name in names[:4]:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(name.encode())
    (tmp_path / "c.jpg").write_bytes(b"")
    size = {"height": 4, "width": 4}
    images = {i: {"id": i, "file_name": name} | size for i, name in enumerate(names)}
    mask = as_rle(np.ones((4, 4)))
    found = [{"image_id": i, "category_id": 1, "score": 1, "segmentation": mask} for i in images]
    results = ListedResults(Path("x"), images, {1: "object"}, found[:-1])
    results.image_folder = tmp_path / "photos"
    output, line = written(results, "yolo-seg", str(tmp_path / "results"))
    assert "7 images, 6 results; 3 images were not found" in line
    listed = (output / "images.txt").read_text().splitlines()
    paths = [line.replace("./", f"{output}/") for line in listed]  # as Ultralytics does
    assert [Path(path).read_bytes().decode() for path in paths[:4]] == names[:4]
    labels = ["/labels/".join(path.rsplit("/images/", 1)).rsplit(".", 1)[0] for path in paths]
    assert len(set(labels)) == len(names)
    assert [Path(label + ".txt").is_file() for label in labels] == [True] * 6 + [False]
    assert {path.relative_to(output).parts[0] for path in output.rglob("*.txt")} == {
        "images.txt",
        "labels",
    }


def test_a_folder_that_holds_something_is_left_alone(tmp_path, call_tool, capsys):
    results_folder(tmp_path / "store")
    command = ["export_results", tmp_path / "store", "--format", "yolo-seg", "--output"]
    assert call_tool(*command, tmp_path / "store") == 2
    assert "store is not empty; choose another --output" in capsys.readouterr().err
    assert not (tmp_path / "store" / "labels").exists()
    (tmp_path / "new").mkdir()
    assert call_tool(*command, tmp_path / "new") == 0
    assert "1 images, 2 results; 1 images were not found" in capsys.readouterr().out
    rings = yolo_rings(tmp_path / "new" / "labels" / "a.txt", 12, 12)
    assert np.array_equal(fill(rings[0][1].round(), 12, 12), RINGS)


def test_a_failed_export_leaves_nothing(tmp_path):
    results = results_of_masks(np.ones((1, 3, 3), np.uint8))
    results.results[0]["score"] = float("nan")
    with pytest.raises(ValueError):
        FORMATS["labelstudio"].write(results, tmp_path / "out", "")
    assert list(tmp_path.iterdir()) == []


def test_image_addresses_of_label_studio(tmp_path, call_tool):
    """By the folder that is given, by a prefix, and of images without results."""
    results_folder(tmp_path / "store")
    listing = json.loads((tmp_path / "store" / "images.json").read_text())
    listing["images"].append(listing["images"][0] | {"id": 8, "file_name": "b.jpg"})
    (tmp_path / "two.json").write_text(json.dumps(listing))
    command = ["export_results", tmp_path / "store" / "proposals.json", "--format", "labelstudio"]
    command += ["--images-json", tmp_path / "two.json"]
    for number, (option, address) in enumerate(
        {
            ("--images", tmp_path / "store"): "/data/local-files/?d=store/a.tif",
            ("--image-prefix", "https://x.org/"): "https://x.org/a.tif",
        }.items()
    ):
        output = tmp_path / str(number)
        assert call_tool(*command, *option, "--output", output) == 0
        first, second = json.loads((output / "tasks.json").read_text())
        assert first["data"]["image"] == address and len(first["predictions"][0]["result"]) == 2
        assert second["predictions"] == []


def test_categories_of_one_name(tmp_path):
    """supervision finds categories by name."""
    results = results_of_masks(np.ones((2, 3, 3), np.uint8))
    results.categories = {3: "cell", 5: "cell"}
    FORMATS["supervision"].write(results, tmp_path / "x.json", "")
    dataset = sv.DetectionDataset.from_coco(str(tmp_path), str(tmp_path / "x.json"))
    assert dataset.classes == ["cell (3)", "cell (5)"]


def test_a_store_is_written_shard_by_shard(tmp_path, monkeypatch):
    """No more than one image's results are held, whatever the format."""
    store = results_folder(tmp_path / "store")
    [proposals] = store
    for image_id in range(20, 24):
        proposals.image_id, proposals.file_name = image_id, f"{image_id}.tif"
        store.write_shard([proposals])
    made = []
    original = export_results.results_of
    monkeypatch.setattr(export_results, "results_of", lambda p: made.append(0) or original(p))
    for image, _ in open_results(tmp_path / "store"):
        assert len(made) == 1 + max(0, image["id"] - 19)
    for name, format in FORMATS.items():
        line = format.write(open_results(tmp_path / "store"), tmp_path / name, "wgs84")
        assert "10 " in line


def test_edges_are_not_one_pixel_inside():
    """As OpenCV's contours would be: a square of 3 pixels is 3 wide, not 2."""
    mask = cv2.copyMakeBorder(np.ones((3, 3), np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    assert np.ptp(join_rings(trace_mask(mask)), axis=0).tolist() == [3, 3]


def test_the_best_of_every_image(tmp_path, call_tool):
    results_folder(tmp_path / "store")
    path = tmp_path / "store" / "proposals.json"
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))  # the best is the last
    for source in (path, tmp_path / "store"):
        command = ["export_results", source, "--format", "coco", "--top", 1, "--output"]
        assert call_tool(*command, tmp_path / "x.json") == 0
        [annotation] = json.loads((tmp_path / "x.json").read_text())["annotations"]
        assert annotation["area"] == RINGS.sum()
