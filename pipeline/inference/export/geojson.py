"""GeoJSON (RFC 7946): a polygon with holes for each result, on the map where the image is."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from datasets.files import atomic_path
from pipeline.inference.coco_json import box_of
from pipeline.inference.export.polygons import Ring, signed_area, trace_rle
from pipeline.inference.export.results import Results, mask_of, write_lines

WGS84, NATIVE = "wgs84", "native"
DEGREES_DECIMALS = 9  # a tenth of a millimeter


def write_geojson(results: Results, path: Path, crs: str) -> str:
    """Writes a FeatureCollection: a Feature for each result, as its MultiPolygon or Polygon.

    Images with a georeference are in longitude and latitude, or in their coordinates with
    `crs` "native", which the file then names (as GeoJSON did before RFC 7946). Those without are in
    pixels, y down.

    Raises:
        ValueError: native coordinates of several systems; or no rasterio, which converts them.
    """
    systems = {
        image["georeference"]["crs"] for image in results.images.values() if _is_placed(image)
    }
    head = ""
    if systems and crs == NATIVE:
        if len(systems) > 1:
            raise ValueError(
                f"{results.path}: its images have {len(systems)} coordinate systems "
                f"({', '.join(sorted(systems))[:200]}); leave out --crs native"
            )
        head = f'"crs": {json.dumps(_named_crs(*systems))}, '

    def features() -> Iterator[str]:
        for image, found in results:
            for result, geometry in zip(found, _geometries(image, found, crs), strict=True):
                properties = {
                    "score": result["score"],
                    "category": results.category(result),
                    "file_name": image["file_name"],
                }
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                yield json.dumps(feature, separators=(",", ":"), allow_nan=False)

    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.write(f'{{"type": "FeatureCollection", {head}"features": [')
        count = write_lines(file, features())
        file.write("\n]}\n")
    unplaced = sum(not _is_placed(image) for image in results.images.values())
    where = f"; {unplaced:,} of {len(results.images):,} images have no georeference: in pixels"
    return f"{path}: {count:,} features" + (where if unplaced else "")


def _is_placed(image: dict) -> bool:
    return isinstance(image.get("georeference"), dict)


def _named_crs(crs: str) -> dict:
    authority, _, code = crs.partition(":")
    name = f"urn:ogc:def:crs:{authority}::{code}" if code.isdecimal() else crs
    return {"type": "name", "properties": {"name": name}}


def _geometries(image: dict, found: list[dict], crs: str) -> list[dict | None]:
    """GeoJSON's geometries of an image's results; None where a mask is empty."""
    shapes = [_polygons(result) for result in found]
    rings = [ring for polygons in shapes for polygon in polygons for ring in polygon]
    if not rings:
        return [None] * len(found)
    # All at once: a conversion of coordinates is prepared for much longer than it takes.
    points = _placed(np.concatenate(rings).astype(np.float64), image, crs)
    ends = np.cumsum([len(ring) for ring in rings])[:-1]
    placed = iter(np.split(points, ends))
    return [_geometry([[next(placed) for _ in p] for p in polygons]) for polygons in shapes]


def _polygons(result: dict) -> list[list[Ring]]:
    """In pixels: of the mask, else of the box."""
    if (mask := mask_of(result)) is not None:
        return trace_rle(mask)
    x, y, w, h = box_of(result)
    return [[np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])]]


def _geometry(polygons: list[list[np.ndarray]]) -> dict | None:
    if not polygons:
        return None
    coordinates = [
        [_closed(ring, outer=index == 0) for index, ring in enumerate(polygon)]
        for polygon in polygons
    ]
    if len(coordinates) == 1:
        return {"type": "Polygon", "coordinates": coordinates[0]}
    return {"type": "MultiPolygon", "coordinates": coordinates}


def _closed(ring: np.ndarray, *, outer: bool) -> list:
    """A ring that ends where it begins: outer ones counterclockwise, holes clockwise."""
    if (signed_area(ring) > 0) != outer:
        ring = ring[::-1]
    points = ring.tolist()
    return [*points, points[0]]


def _placed(points: np.ndarray, image: dict, crs: str) -> np.ndarray:
    """Points (n, 2) of an image in the coordinates of the file."""
    if not _is_placed(image):
        return points.astype(np.int64) if (points == np.rint(points)).all() else points
    georeference = image["georeference"]
    a, b, c, d, e, f = georeference["transform"]
    on_map = points @ np.array([[a, d], [b, e]]) + (c, f)
    if crs == NATIVE:
        return on_map
    transform = _rasterio_transform()
    try:
        longitude, latitude = transform(georeference["crs"], "EPSG:4326", *on_map.T)
        if not (np.isfinite(longitude).all() and np.isfinite(latitude).all()):
            raise ValueError("points beyond its projection")
    except Exception as error:  # of GDAL, in many kinds
        reason = " ".join(str(error).split())
        raise ValueError(
            f"coordinates of an image cannot be converted ({reason}); give --crs native"
        ) from None
    return np.stack([longitude, latitude], axis=1).round(DEGREES_DECIMALS)


def _rasterio_transform() -> Any:
    try:
        from rasterio.warp import transform
    except ImportError:
        raise ValueError(
            "longitude and latitude need rasterio: pip install rasterio, or give --crs native"
        ) from None
    return transform
