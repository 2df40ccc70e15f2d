"""Results for other programs: polygons that are exactly the masks, GeoJSON, COCO."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from shapely.geometry import MultiPolygon, Polygon, shape

from pipeline.inference.export.polygons import signed_area, trace_mask, trace_rle
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Detections, results_of, write_results
from tests.pipeline.inference.builders import proposals_of

SIZES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=14)
MASKS = hnp.arrays(np.uint8, SIZES, elements=st.integers(0, 1))
# Two rings of pixels that meet at corners, with a hole each, and one within a hole.
RINGS = np.zeros((12, 12), np.uint8)
RINGS[:7, :7] = RINGS[7:, 7:] = 1
RINGS[1:6, 1:6] = RINGS[8:11, 8:11] = 0
RINGS[3, 3] = 1
UTM = {"crs": "EPSG:32633", "transform": [0.5, 0, 500_000, 0, -0.5, 5_300_000]}


def pixels_as_shape(mask: np.ndarray):
    return shapely.union_all([shapely.box(x, y, x + 1, y + 1) for y, x in np.argwhere(mask)])


@given(MASKS)
def test_polygons_are_exactly_the_pixels(mask):
    polygons = trace_mask(mask)
    traced = MultiPolygon([Polygon(outer, holes) for outer, *holes in polygons])
    assert traced.is_valid
    assert traced.area == mask.sum()
    assert traced.symmetric_difference(pixels_as_shape(mask)).area == 0
    for outer, *holes in polygons:
        assert signed_area(outer) > 0 and all(signed_area(hole) < 0 for hole in holes)
        for ring in (outer, *holes):  # corners only
            assert len(set(map(tuple, ring.tolist()))) == len(ring)
            steps = np.diff(ring, axis=0, append=ring[:1])
            assert ((steps == 0).sum(axis=1) == 1).all()


def test_holes_and_islands_and_corners_that_touch():
    polygons = trace_mask(RINGS)
    assert sorted(len(polygon) for polygon in polygons) == [1, 2, 2]
    assert sum(signed_area(ring) for polygon in polygons for ring in polygon) == RINGS.sum()


def test_a_small_mask_in_a_huge_image_is_traced_within_its_box():
    """Half of the 2^29 pixels that masks can have: 256 MB, if they were made."""
    height, width = 2**14, 2**14
    counts = [height * 9000 + 5000, 3, height - 3, 3]
    counts.append(height * width - sum(counts))
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    [[ring]] = trace_rle(rle)
    assert sorted(map(tuple, ring.tolist())) == [
        (9000, 5000),
        (9000, 5003),
        (9002, 5000),
        (9002, 5003),
    ]


def results_folder(folder: Path, **image) -> ProposalStore:
    """A store of one image's two proposals, the rings and a square, with its jsons."""
    square = np.zeros_like(RINGS)
    square[2:5, 8:11] = 1
    proposals = proposals_of(np.stack([RINGS, square]), image_id=7, file_name="a.tif")
    proposals.georeference = image.get("georeference")
    store = ProposalStore(folder)
    store.open_for({})
    store.write_shard([proposals])
    store.write_json()
    detections = Detections(**vars(proposals), labels=np.array([3, 5]))
    write_results(folder / "detections.json", results_of(detections))
    store.write_images(folder / "detections.images.json", [{"id": 3, "name": "ring"}])
    return store


@pytest.fixture
def export(tmp_path, call_tool, capsys):
    def run(source, kind: str, *options) -> dict:
        output = tmp_path / "exported" / f"out.{kind}"
        arguments = [tmp_path / source, "--format", kind, "--output", output, *options]
        assert call_tool("export_results", *arguments) == 0, capsys.readouterr().err
        run.line = capsys.readouterr().out
        return json.loads(output.read_text())

    return run


@pytest.mark.parametrize("source", ["store", "store/proposals.json", "store/detections.json"])
def test_geojson_in_pixels(tmp_path, export, source):
    results_folder(tmp_path / "store")
    collection = export(source, "geojson")
    assert collection.keys() == {"type", "features"}
    first, second = collection["features"]
    assert shape(first["geometry"]).equals(pixels_as_shape(RINGS))
    assert first["geometry"]["type"] == "MultiPolygon"
    assert second["geometry"]["type"] == "Polygon"
    assert first["geometry"]["coordinates"][0][0][0][0].__class__ is int
    names = ("ring", "5") if "detections" in source else ("object", "object")
    properties = [feature["properties"] for feature in (first, second)]
    assert properties == [
        {"score": score, "category": name, "file_name": "a.tif"}
        for score, name in zip((1.0, 0.0), names, strict=True)
    ]
    assert "2 features; 1 of 1 images have no georeference: in pixels" in export.line


def test_geojson_on_the_map(tmp_path, export):
    """In longitude and latitude, and in the file's coordinates: areas in square meters."""
    results_folder(tmp_path / "store", georeference=UTM)
    for source in ("store", "store/proposals.json", "store/detections.json"):
        collection = export(source, "geojson", "--crs", "native")
        assert collection["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
        first, second = (shape(feature["geometry"]) for feature in collection["features"])
        assert first.is_valid and first.area == RINGS.sum() / 4
        assert second.bounds == (500_004, 5_299_997.5, 500_005.5, 5_299_999)
    collection = export("store", "geojson")
    assert "crs" not in collection and "no georeference" not in export.line
    for feature in collection["features"]:
        placed = shape(feature["geometry"])
        assert placed.is_valid
        # The meridian of zone 33 is 15 degrees east; 5,300,000 m are 47.8533 degrees north.
        assert placed.bounds == pytest.approx((15, 47.8533, 15, 47.8533), abs=1e-4)
        for polygon in getattr(placed, "geoms", [placed]):
            assert polygon.exterior.is_ccw
            assert not any(hole.is_ccw for hole in polygon.interiors)


def test_coordinates_that_cannot_be_converted(tmp_path, call_tool, capsys):
    """A system of a building site; GDAL's errors are of many kinds."""
    local = 'LOCAL_CS["site",LOCAL_DATUM["site",0],UNIT["metre",1],AXIS["X",EAST],AXIS["Y",NORTH]]'
    results_folder(tmp_path / "store", georeference=UTM | {"crs": local})
    out = tmp_path / "out.json"
    arguments = [tmp_path / "store", "--format", "geojson", "--output", out]
    assert call_tool("export_results", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be converted" in error and error.endswith("give --crs native")
    assert call_tool("export_results", *arguments, "--crs", "native") == 0 and out.exists()


def test_coordinate_systems_that_differ(tmp_path, call_tool, capsys):
    results_folder(tmp_path / "store", georeference=UTM)
    listing = json.loads((tmp_path / "store" / "images.json").read_text())
    other = listing["images"][0] | {"id": 8, "georeference": UTM | {"crs": "EPSG:32634"}}
    listing["images"].append(other)
    (tmp_path / "two.json").write_text(json.dumps(listing))
    arguments = [tmp_path / "store" / "proposals.json", "--images-json", tmp_path / "two.json"]
    arguments += ["--format", "geojson", "--crs", "native", "--output", tmp_path / "out.json"]
    assert call_tool("export_results", *arguments) == 2
    assert "2 coordinate systems (EPSG:32633, EPSG:32634); leave out" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("source", ["store", "store/proposals.json", "store/detections.json"])
def test_coco_is_read_by_pycocotools(tmp_path, export, source):
    results_folder(tmp_path / "store", georeference=UTM)
    export(source, "coco")
    coco = COCO(tmp_path / "exported" / "out.coco")
    first, second = coco.loadAnns(coco.getAnnIds(imgIds=[7]))
    assert np.array_equal(coco.annToMask(first), RINGS)
    assert [first["area"], second["area"]] == [RINGS.sum(), 9] and first["score"] == 1
    assert second["bbox"] == [8, 2, 3, 3] and second["iscrowd"] == 0
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    assert names == ({3: "ring", 5: "5"} if "detections" in source else {1: "object"})
    assert coco.imgs[7]["georeference"] == UTM


@pytest.mark.parametrize("kind", ["geojson", "coco"])
def test_boxes_without_masks(tmp_path, export, kind):
    results_folder(tmp_path / "store")
    path = tmp_path / "store" / "detections.json"
    boxes = [
        {k: v for k, v in r.items() if k != "segmentation"} for r in json.loads(path.read_text())
    ]
    path.write_text(json.dumps(boxes))
    content = export("store/detections.json", kind)
    if kind == "coco":
        assert [a["area"] for a in content["annotations"]] == [144, 9]
    else:
        assert shape(content["features"][1]["geometry"]).bounds == (8, 2, 11, 5)


def test_an_empty_mask_has_no_geometry(tmp_path, export):
    results_folder(tmp_path / "store")
    path = tmp_path / "store" / "proposals.json"
    results = json.loads(path.read_text())
    empty = coco_mask.encode(np.zeros((12, 12), np.uint8, order="F"))["counts"].decode()
    results[0]["segmentation"]["counts"] = empty
    path.write_text(json.dumps(results))
    first, second = export("store/proposals.json", "geojson")["features"]
    assert first["geometry"] is None and second["geometry"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: (folder / "images.json").unlink(),
            "no images.json beside it; give --images",
        ),
        (lambda folder: (folder / "images.json").write_text("[]"), "is not COCO: images need"),
        (lambda folder: (folder / "proposals.json").write_text("{}"), "must be a list, not dict"),
        (lambda folder: (folder / "proposals.json").unlink(), "do not exist"),
    ],
)
def test_what_cannot_be_exported_is_one_line(tmp_path, call_tool, capsys, change, words):
    results_folder(tmp_path / "store")
    change(tmp_path / "store")
    arguments = [tmp_path / "store" / "proposals.json", "--format", "geojson"]
    assert call_tool("export_results", *arguments, "--output", tmp_path / "out.json") == 2
    line = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", line) and words in line
