"""Results in the formats of other programs; see tools/export_results.py."""

from collections.abc import Callable
from pathlib import Path

from pipeline.inference.export.coco import write_coco
from pipeline.inference.export.geojson import write_geojson
from pipeline.inference.export.results import Results

# A format's function takes results, the path of the output and --crs, and returns a line on what
# it wrote.
FORMATS: dict[str, Callable[[Results, Path, str], str]] = {
    "coco": write_coco,
    "geojson": write_geojson,
}
