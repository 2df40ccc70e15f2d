#!/usr/bin/env python
r"""Pictures for docs/: photographs with proposals and detections, and the page that shows them.

    python tools/propose.py --images data/coco-mini/images/val --output runs/gallery \
        --annotations data/coco-mini/annotations/instances_val.json
    python tools/detect.py --proposals runs/gallery --output runs/gallery/detections
    python tools/benchmarks/gallery.py --proposals runs/gallery \
        --detections runs/gallery/detections/detections.json \
        --annotations data/coco-mini/annotations/instances_val.json \
        --images data/coco-mini/images/val --output docs

Which photographs are shown depends on the annotations alone, not on what was found in them.
"""

import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from datasets.coco_file import read_json
from datasets.files import write_atomically
from datasets.images import read_image
from pipeline.command import make_parser, run_tool
from pipeline.inference.coco_json import read_detections
from pipeline.inference.nms import mask_nms
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Detections, Proposals
from pipeline.inference.visualize import DUPLICATE_IOU, color, score_texts
from pipeline.report.drawing import Mark, draw_marks, scale_image
from pipeline.report.pictures import MIN_SCORE, first

NUM_PHOTOS, MIN_OBJECTS = 12, 3
README_OBJECTS = 8  # the README shows the first photograph with at most so many
NUM_PROPOSALS, NUM_DETECTIONS = 8, 12  # drawn at most
HEIGHT, GAP = 360, 6  # px of a picture, between the two
MAX_BYTES = 120_000
TINT = 0.3
# Licenses that allow pictures with something drawn on them, by the addresses in COCO's jsons.
LICENSES = {
    "http://creativecommons.org/licenses/by/2.0/": "CC BY 2.0",
    "http://creativecommons.org/licenses/by-sa/2.0/": "CC BY-SA 2.0",
    "http://flickr.com/commons/usage/": "no known copyright restrictions",
    "http://www.usa.gov/copyright.shtml": "United States government work",
}
PAGE = """\
# Gallery

{count} photographs of {total} in `{annotations}`: the first by image id of the {candidates} with at
least {min_objects} annotated objects and a license that allows changes. None was chosen by what was
found in it. The [README](../README.md) shows the first with at most {readme_objects} objects.

* Left: the {num_proposals} best proposals, without those that repeat a better one (mask IoU of
  {duplicate} or more).
* Right: detections that score {min_score} or more, at most {num_detections}.

`python tools/benchmarks/gallery.py` made the pictures and this page. Photographs are from Flickr,
where their pages name the authors; outlines, tints and labels were added. Each picture has the
license of its photograph.
"""
ENTRY = """
![Proposals and detections in {name}]({folder}/{name})

{name}: {license}, {source}
"""


def main() -> None:
    """Draws the pictures and writes the page."""
    parser = make_parser(__doc__)
    parser.add_argument("--annotations", required=True, type=Path, help="COCO instances json")
    parser.add_argument("--images", required=True, type=Path, help="the folder of its images")
    parser.add_argument("--proposals", required=True, type=Path, help="store of tools/propose.py")
    parser.add_argument("--detections", required=True, type=Path, help="json of tools/detect.py")
    parser.add_argument(
        "--output", required=True, type=Path, help="folder that gets gallery.md and gallery/"
    )
    args = parser.parse_args()

    content = read_json(args.annotations)
    candidates = find_candidates(content)
    chosen = candidates[:NUM_PHOTOS]
    names = {category["id"]: category["name"] for category in content["categories"]}
    proposals = {found.image_id: found for found in ProposalStore(args.proposals)}
    detections = {d.image_id: d for d in read_detections(args.detections, content["images"])}
    page = PAGE.format(
        count=len(chosen),
        total=len(content["images"]),
        annotations=args.annotations.name,
        candidates=len(candidates),
        min_objects=MIN_OBJECTS,
        readme_objects=README_OBJECTS,
        num_proposals=NUM_PROPOSALS,
        duplicate=DUPLICATE_IOU,
        min_score=MIN_SCORE,
        num_detections=NUM_DETECTIONS,
    )
    for image in chosen:
        if image["id"] not in proposals:
            raise ValueError(f"{args.proposals} has no proposals for {image['file_name']}")
        name = f"{Path(image['file_name']).stem}.jpg"
        pixels = read_image(args.images / image["file_name"])
        pixels = scale_image(pixels, HEIGHT / len(pixels))
        pair = [
            draw_marks(pixels, proposal_marks(proposals[image["id"]])),
            draw_marks(pixels, detection_marks(detections[image["id"]], names)),
        ]
        gap = np.full((HEIGHT, GAP, 3), 255, np.uint8)
        picture = np.concatenate([pair[0], gap, pair[1]], axis=1)
        write_atomically(args.output / "gallery" / name, encode(picture))
        page += ENTRY.format(
            name=name, folder="gallery", license=license_link(image), source=source_link(image)
        )
    write_atomically(args.output / "gallery.md", page.encode())
    print(f"{len(chosen)} photographs in {args.output / 'gallery.md'}")
    if few := [image["file_name"] for image in chosen if image["objects"] <= README_OBJECTS]:
        print(f"the README's: {few[0]}")


def find_candidates(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Images of a COCO json that may be shown, by id: with "objects" and the "license" itself.

    They have a license that allows changes, and at least `MIN_OBJECTS` objects; crowds are none.
    """
    licenses = {license["id"]: license for license in content.get("licenses", ())}
    objects = dict.fromkeys((image["id"] for image in content["images"]), 0)
    for annotation in content["annotations"]:
        objects[annotation["image_id"]] += not annotation.get("iscrowd")
    images = [
        image | {"objects": objects[image["id"]], "license": licenses.get(image.get("license"), {})}
        for image in content["images"]
    ]
    shown = [
        image
        for image in images
        if image["objects"] >= MIN_OBJECTS and image["license"].get("url") in LICENSES
    ]
    return sorted(shown, key=lambda image: image["id"])


def proposal_marks(found: Proposals) -> list[Mark]:
    """The best proposals that do not repeat each other, the best last: on top."""
    best = first(mask_nms(first(found, 20 * NUM_PROPOSALS), DUPLICATE_IOU), NUM_PROPOSALS)
    return [Mark(best.rle(i), color(i), TINT) for i in reversed(range(len(best)))]


def detection_marks(found: Detections, names: dict[int, str]) -> list[Mark]:
    """The best detections with names and scores, the best last."""
    if len(found) and not found.rles:
        raise ValueError(f"detections in {found.file_name} have no masks")
    best = first(found, min(NUM_DETECTIONS, int((found.scores >= MIN_SCORE).sum())))
    labels = zip(best.labels.tolist(), score_texts(best.scores), strict=True)
    marks = [
        Mark(best.rle(i), color(i), TINT, f"{names[label]} {score}".rstrip())
        for i, (label, score) in enumerate(labels)
    ]
    return marks[::-1]


def encode(picture: np.ndarray) -> bytes:
    """JPEG of (H, W, 3) uint8 RGB, as good as `MAX_BYTES` allow."""
    sampling = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    for quality in range(90, 0, -5):
        options = (cv2.IMWRITE_JPEG_QUALITY, quality, *sampling)
        _, data = cv2.imencode(".jpg", picture[..., ::-1], options)
        if len(data) <= MAX_BYTES:
            break
    return data.tobytes()


def license_link(image: dict[str, Any]) -> str:
    """The name and address of an image's license."""
    url = image["license"]["url"]
    return f"[{LICENSES[url]}]({url})"


def source_link(image: dict[str, Any]) -> str:
    """The photograph's page on Flickr, whose number is the first in the address of its file."""
    address = image.get("flickr_url", "")
    photo = re.search(r"/(\d+)_[^/]*$", address)
    if photo:
        return f"[Flickr](https://www.flickr.com/photo.gne?id={photo[1]})"
    return f"[COCO]({image.get('coco_url', address)})"


if __name__ == "__main__":
    run_tool(main)
