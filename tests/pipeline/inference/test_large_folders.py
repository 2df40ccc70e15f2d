"""Large files through proposals, detections, pictures and exports: as if they were decoded."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import rasterio
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from rasterio.transform import from_origin
from shapely.geometry import shape

from datasets import large_images
from datasets.resize import resize_sides
from pipeline.inference import detect
from pipeline.inference.detect import load_detector
from pipeline.inference.detect_folders import detect_images
from pipeline.inference.memory import free_memory, trunk_bytes
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import load_proposer
from pipeline.inference.propose_folders import propose_images
from tests.datasets.test_large_images import write_tiff

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
PLACE = {"crs": "EPSG:32633", "transform": from_origin(500_000, 5_300_000, 0.5, 0.5)}
GEOREFERENCE = {"crs": "EPSG:32633", "transform": [0.5, 0, 500_000, 0, -0.5, 5_300_000]}


@pytest.fixture
def maps(tmp_path, shapes_directory) -> Path:
    """A GeoTIFF of a picture of shapes, and a TIFF without a place."""
    pictures = sorted((shapes_directory / "images" / "val").iterdir())[:2]
    (tmp_path / "maps").mkdir()
    for name, picture, place in zip(("1.tif", "2.tif"), pictures, (PLACE, {}), strict=True):
        write_tiff(tmp_path / "maps" / name, cv2.imread(str(picture))[..., ::-1], **place)
    return tmp_path / "maps"


def run(maps: Path, output: Path, checkpoint: Path, detector_checkpoint: Path) -> ProposalStore:
    proposer, settings = load_proposer(checkpoint, CPU)
    propose_images(proposer, maps, output / "store", settings=settings, draw=2)
    store = ProposalStore(output / "store")
    detector, settings = load_detector(detector_checkpoint, CPU)
    detect_images(detector, store, maps, output / "found", settings=settings, draw=2)
    return store


def test_read_by_windows_or_decoded(
    maps, tmp_path, tiny_sharpmask, tiny_detector, monkeypatch, call_tool
):
    """The same proposals and detections, and the place of the image in all files."""
    decoded = list(run(maps, tmp_path / "decoded", tiny_sharpmask, tiny_detector))
    monkeypatch.setattr(large_images, "LARGE_PIXELS", 0)
    store = run(maps, tmp_path / "windows", tiny_sharpmask, tiny_detector)
    for one, other in zip(decoded, store, strict=True):
        assert (one.image_id, len(one)) == (other.image_id, len(other))
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-3)
        overlaps = [
            coco_mask.iou([one.rle(i)], [other.rle(i)], [0]).item()
            for i in range(len(one))
            if abs(one.scores[i] - other.scores[i]) < 1e-5
        ]
        assert overlaps and np.median(overlaps) > 0.99
    for files in ("decoded", "windows"):
        found = tmp_path / files / "found"
        for listing in (
            tmp_path / files / "store" / "images.json",
            found / "detections.images.json",
        ):
            first, second = json.loads(listing.read_text())["images"]
            assert first["georeference"] == GEOREFERENCE and "georeference" not in second
        coco = COCO(found / "detections.images.json")
        results = coco.loadRes(str(found / "detections.json"))
        assert len(results.anns) > 0 and len(coco.cats) > 0
        assert len(list((found / "drawn").iterdir())) == 2
        arguments = [found / "detections.json", "--format", "geojson", "--crs", "native"]
        assert call_tool("export_results", *arguments, "--output", tmp_path / "a.geojson") == 0
        features = json.loads((tmp_path / "a.geojson").read_text())["features"]
        placed = [f for f in features if f["properties"]["file_name"] == "1.tif"]
        assert placed and len(placed) < len(features) == len(results.anns)
        for feature in placed:
            x0, y0, x1, y1 = shape(feature["geometry"]).bounds
            assert 500_000 <= x0 < x1 < 501_000 and 5_299_000 < y0 < y1 <= 5_300_000


def test_a_file_that_breaks_off_loses_no_other(
    maps, tmp_path, tiny_checkpoint, monkeypatch, capsys
):
    monkeypatch.setattr(large_images, "LARGE_PIXELS", 0)
    path = maps / "1.tif"
    path.write_bytes(path.read_bytes()[:-3000])
    proposer, settings = load_proposer(tiny_checkpoint, CPU)
    summary = propose_images(proposer, maps, tmp_path / "store", settings=settings)
    assert summary.done == 1
    assert len(summary.broken) == 1 and "1.tif: broken or truncated" in summary.broken[0]


def test_a_detector_says_what_memory_it_needs(maps, tmp_path, tiny_checkpoint, tiny_detector):
    """Before it starts, and with the setting; what fits is not refused."""
    proposer, settings = load_proposer(tiny_checkpoint, CPU)
    propose_images(proposer, maps, tmp_path / "store", settings=settings)
    store = ProposalStore(tmp_path / "store")
    overrides = {"short_sides": (160, 320), "flip": True}
    detector, settings = load_detector(tiny_detector, CPU, overrides=overrides)
    kept, working = trunk_bytes(detector.model.trunk, torch.float32)
    channels, strides = detector.model.trunk.channels, detector.model.trunk.strides
    assert kept == sum(4 * c / s**2 for c, s in zip(channels, strides, strict=True))
    needed = 0
    for image in store.images().values():
        pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
        views = [
            resize_sides(pixels, short_side=side, long_side=224 * side // 160)[0]
            for side in (160, 320)
        ]
        areas = [view.size / 3 for view in views]
        total = 2 * sum(areas) * kept + areas[1] * (working + detect.INPUT_BYTES)
        needed = max(needed, total)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect, "free_memory", lambda device: needed * 0.9)
        with pytest.raises(
            ValueError, match=r"detect\.short_sides .* \[160, 320\] needs about"
        ) as e:
            detect_images(detector, store, maps, tmp_path / "found", settings=settings)
        assert re.search("for an image of .* px, and .* are free; .* --flip", str(e.value))
        assert not (tmp_path / "found" / "detections.json").exists()
        patch.setattr(detect, "free_memory", lambda device: needed * 1.1)
        detect_images(detector, store, maps, tmp_path / "found", settings=settings)
    assert (tmp_path / "found" / "detections.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="from Linux's files")
def test_free_memory():
    free = free_memory(CPU)
    assert 2**20 < free < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.slow
def test_ten_thousand_by_ten_thousand(tmp_path, tiny_checkpoint):
    """The whole way, with the tiny network: proposals in a bright square of a dark image."""
    path = tmp_path / "maps" / "large.tif"
    path.parent.mkdir()
    options = {"height": 10_001, "width": 10_000, "count": 3, "dtype": "uint8", **PLACE}
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 256, "SPARSE_OK": True}
    with rasterio.open(path, "w", driver="GTiff", **options, **layout) as file:
        file.write(np.full((3, 256, 512), 200, np.uint8), window=((5120, 5376), (5120, 5632)))
    command = [sys.executable, ROOT / "tools" / "propose.py", "--checkpoint", tiny_checkpoint]
    command += ["--images", path, "--output", tmp_path / "store", "--scales", -3, -2, 0.5]
    subprocess.run([*map(str, command), "--device", "cpu", "--draw", "3"], check=True)
    coco = COCO(tmp_path / "store" / "images.json")
    results = coco.loadRes(str(tmp_path / "store" / "proposals.json"))
    assert len(results.anns) > 0
    for annotation in results.anns.values():
        area = int(coco_mask.area(annotation["segmentation"]))
        assert annotation["area"] == area and 0 < area < 10**8
        box = coco_mask.toBbox(annotation["segmentation"])
        np.testing.assert_allclose(annotation["bbox"], box, atol=0.001)
    picture = cv2.imread(str(tmp_path / "store" / "drawn" / "large.tif.jpg"))
    assert picture.shape == (2000, 2000, 3)
