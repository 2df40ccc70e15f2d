"""What was kept on a page, in files that other programs read."""

import io
import json
import zipfile

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.serve.downloads import DOWNLOADS, read_kept, results_of_kept, write_download

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
SIZE = (40, 60)


def rectangle(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    return mask


MASKS = [rectangle(2, 3, 20, 10), rectangle(0, 30, 40, 30), rectangle(39, 59, 1, 1)]
NAMES = ["toothbrush", "my  cup ", ""]


def body(**changes) -> bytes:
    objects = [
        {"counts": coco_mask.encode(mask)["counts"].decode(), "score": 0.75, "name": name}
        for mask, name in zip(MASKS, NAMES, strict=True)
    ]
    image = {"file_name": "a b.jpg", "size": SIZE, "original_size": SIZE, "objects": objects}
    second = image | {"file_name": "c.jpg", "objects": objects[:1]}
    return json.dumps([image | changes, second]).encode()


def download(format: str, **changes) -> tuple[bytes, str]:
    results = results_of_kept(read_kept(body(**changes)), CATEGORIES, max_pixels=10**6)
    return write_download(results, format)


def test_coco_loads_in_pycocotools_with_the_same_masks_and_names(tmp_path):
    data, name = download("coco")
    path = tmp_path / name
    path.write_bytes(data)
    coco = COCO(path)
    assert [image["file_name"] for image in coco.imgs.values()] == ["a b.jpg", "c.jpg"]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    names = [coco.cats[each["category_id"]]["name"] for each in annotations]
    assert names == ["toothbrush", "my cup", "object"]
    assert annotations[0]["category_id"] == 90 and {each["score"] for each in annotations} == {0.75}
    for annotation, mask in zip(annotations, MASKS, strict=True):
        assert np.array_equal(coco.annToMask(annotation), mask)
        assert (
            annotation["bbox"] == list(cv2.boundingRect(mask)) and annotation["area"] == mask.sum()
        )


def test_masks_are_as_large_as_the_file():
    """The page had the image at half its size."""
    results = results_of_kept(
        read_kept(body(original_size=(80, 120))), CATEGORIES, max_pixels=10**6
    )
    for result, mask in zip(results.results, MASKS, strict=False):
        large = coco_mask.decode(result["segmentation"])
        expected = cv2.resize(mask, (120, 80), interpolation=cv2.INTER_NEAREST)
        assert large.shape == (80, 120) == tuple(result["segmentation"]["size"])
        assert (large != expected).sum() <= 4  # corners may be rounded
    assert results.images[1]["height"] == 80


def test_masks_as_png():
    data, name = download("png-masks")
    assert name.endswith(".zip")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        assert names[:3] == [
            "001_a_b_001_toothbrush.png", "001_a_b_002_my_cup.png", "001_a_b_003_object.png",
        ]  # fmt: skip
        assert names[3:] == ["002_c_001_toothbrush.png"]
        for file, mask in zip(names, MASKS, strict=False):
            png = np.frombuffer(archive.read(file), np.uint8)
            assert np.array_equal(cv2.imdecode(png, cv2.IMREAD_UNCHANGED), mask * 255)


@pytest.mark.parametrize("format", DOWNLOADS)
def test_every_format_is_a_file_or_a_zip_of_a_folder(format):
    data, name = download(format)
    assert name.startswith(f"maskpath-{format}.")
    if DOWNLOADS[format].is_folder or name.endswith(".zip"):
        assert zipfile.ZipFile(io.BytesIO(data)).namelist()
    elif name.endswith("json"):
        assert json.loads(data)
    else:
        assert data


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objects": [{"counts": "0", "score": 0.5}]}, "do not fill the image"),
        ({"objects": [{"counts": "n" * 50, "score": 0.5}]}, "do not fill the image"),
        ({"objects": [{"counts": "PK2", "score": 0.5}]}, "an empty mask"),
        ({"objects": [{"counts": "PK2", "score": "high"}]}, "score"),
        ({"objects": [{"score": 0.5}]}, "counts"),
        ({"size": [0, 5]}, "an image of"),
        ({"original_size": [10**6, 10**6]}, "an image of 1000000 x 1000000"),
        ({"more": 1}, "more"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    if "PK2" in str(changes):
        empty = coco_mask.encode(np.zeros(SIZE, np.uint8, order="F"))["counts"].decode()
        changes["objects"][0]["counts"] = empty
    with pytest.raises(ValueError, match=words):
        download("coco", **changes)


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="'word'; there are coco"):
        download("word")
