"""Files of the objects that somebody kept on the page, in any format of our exports."""

import io
import re
import tempfile
import zipfile
from pathlib import Path

import cv2
import msgspec
import numpy as np
from pycocotools import mask as coco_mask

from pipeline.inference.coco_json import check_results
from pipeline.inference.export import FORMATS, Format
from pipeline.inference.export.geojson import WGS84
from pipeline.inference.export.results import PROPOSAL, ListedResults, Results
from pipeline.inference.mask_crops import enlarge_mask

NAME = "maskpath"  # of the files
UNNAMED = PROPOSAL[1]
MAX_NAME = 100  # characters of a name


class KeptObject(msgspec.Struct, forbid_unknown_fields=True):
    """An object of an image of the page.

    Attributes:
        counts: its mask as compressed RLE.
        score: of the proposal or detection that it was.
        name: its category; may be empty.
    """

    counts: str
    score: float
    name: str = ""


class KeptImage(msgspec.Struct, forbid_unknown_fields=True):
    """An image and the objects in it.

    Attributes:
        file_name: of its file.
        size: height and width on the page, those of the masks.
        original_size: those of the file.
    """

    file_name: str
    size: tuple[int, int]
    original_size: tuple[int, int]
    objects: list[KeptObject]


def read_kept(body: bytes) -> list[KeptImage]:
    """The images in what a page has sent.

    Raises:
        ValueError: something else.
    """
    return msgspec.json.decode(body, type=list[KeptImage])  # its error is a ValueError


def results_of_kept(
    kept: list[KeptImage], categories: list[dict], *, max_pixels: int
) -> ListedResults:
    """The objects as results in their files' pixels.

    Names that are not among the categories become further ones.

    Args:
        categories: {"id", "name"}, the detector's.

    Raises:
        ValueError: sizes or masks that cannot be.
    """
    ids = {category["name"]: category["id"] for category in categories}
    used: dict[str, int] = {}
    images, results = {}, []
    for image_id, image in enumerate(kept, 1):
        height, width = image.original_size
        if min(*image.size, height, width) < 1 or height * width > max_pixels:
            raise ValueError(f"{image.file_name}: an image of {width} x {height} pixels")
        images[image_id] = {
            "id": image_id,
            "file_name": image.file_name,
            "height": height,
            "width": width,
        }
        found = []
        for each in image.objects:
            name = " ".join(each.name.split())[:MAX_NAME] or UNNAMED
            category_id = ids.setdefault(name, max(ids.values(), default=0) + 1)
            used[name] = category_id
            mask: dict = {"size": list(image.size), "counts": each.counts}
            found.append(
                {
                    "image_id": image_id,
                    "category_id": category_id,
                    "score": each.score,
                    "segmentation": mask,
                }
            )
        size = {"height": image.size[0], "width": image.size[1]}
        check_results(found, {image_id: size})
        for result in found:
            mask = result["segmentation"]
            if coco_mask.area(mask) == 0:
                raise ValueError(f"{image.file_name}: an empty mask")
            if image.original_size != image.size:
                mask = enlarge_mask(mask, image.original_size)
                mask |= {"counts": mask["counts"].decode("ascii")}
            result["segmentation"], result["bbox"] = mask, coco_mask.toBbox(mask).tolist()
        results += found
    names = {i: name for name, i in sorted(used.items(), key=lambda item: item[1])}
    return ListedResults(Path(NAME), images, names, results)


def write_masks(results: Results, path: Path, _crs: str) -> str:
    """Writes a zip of one PNG (0 and 255) for each object, in its image's size."""
    count = 0
    with zipfile.ZipFile(path, "w") as archive:
        for image, found in results:
            for number, result in enumerate(found, 1):
                mask = coco_mask.decode(result["segmentation"])
                ok, png = cv2.imencode(".png", mask * np.uint8(255))
                assert ok
                stem = re.sub(r"[^\w.-]+", "_", Path(image["file_name"]).stem)
                name = re.sub(r"\W+", "_", results.category(result))
                archive.writestr(f"{image['id']:03d}_{stem}_{number:03d}_{name}.png", png.tobytes())
                count += 1
    return f"{path}: {count:,} masks"


DOWNLOADS = {**FORMATS, "png-masks": Format(write_masks, ".zip")}


def write_download(results: Results, name: str) -> tuple[bytes, str]:
    """The content of a file in a format, and its name; a format that is a folder is zipped.

    Raises:
        ValueError: no such format, or the results have no place in it.
    """
    if name not in DOWNLOADS:
        raise ValueError(f"no format {name!r}; there are {', '.join(DOWNLOADS)}")
    format = DOWNLOADS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{NAME}{format.suffix}"
        format.write(results, path, WGS84)
        if path.is_dir():
            return _zip(path), f"{NAME}-{name}.zip"
        return path.read_bytes(), f"{NAME}-{name}{format.suffix}"


def _zip(folder: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder))
    return data.getvalue()
