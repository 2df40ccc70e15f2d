#!/usr/bin/env python
r"""Writes proposals or detections in the format of another program.

    python tools/export_results.py runs/photos --format geojson --output photos.geojson
    python tools/export_results.py runs/photos/detections.json --format coco --output labels.json
    python tools/export_results.py runs/photos --format yolo-seg --output yolo

Takes a proposal store, its proposals.json, or a detections.json. A json needs the list of its
images: the one that our tools write beside it, or --images-json. docs/data.md says what opens which
format.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.command import local_path, make_parser, run_tool
from pipeline.inference.export import FORMATS
from pipeline.inference.export.geojson import NATIVE, WGS84
from pipeline.inference.export.results import open_results


def main() -> None:
    """Exports the results."""
    parser = make_parser(__doc__)
    parser.add_argument("results", metavar="RESULTS", help="proposal store or COCO results json")
    parser.add_argument("--format", required=True, choices=sorted(FORMATS))
    parser.add_argument(
        "--output", required=True, type=local_path, help="file, or folder, to write"
    )
    parser.add_argument(
        "--images-json", metavar="COCO.json", help="lists the images (default: beside RESULTS)"
    )
    parser.add_argument(
        "--top", type=int, metavar="K", help="only the best K of every image (default: all)"
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="the folder that the images' names are relative to (default: as the store knows it)",
    )
    parser.add_argument(
        "--image-prefix",
        metavar="ADDRESS",
        help="labelstudio: what stands before the images' names "
        "(default: /data/local-files/?d=DIR/, with the name of their folder)",
    )
    parser.add_argument(
        "--crs",
        choices=(WGS84, NATIVE),
        default=WGS84,
        help="coordinates of georeferenced images in geojson: longitude and latitude, as "
        "GeoJSON has them, or those of the files (default: wgs84)",
    )
    args = parser.parse_args()
    results = open_results(
        args.results,
        args.images_json,
        image_folder=args.images,
        image_prefix=args.image_prefix,
        top=args.top,
    )
    print(FORMATS[args.format].write(results, args.output, args.crs))


if __name__ == "__main__":
    run_tool(main)
