"""The frame that annotations are in: by sizes that show it for certain, or by the setting."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets.images import ImageFolder
from pipeline.config import DataConfig
from pipeline.data import survey_split
from tests.coco_json import painted_patches, rectangle, write_coco

STORED, SHOWN, OTHER = (40, 60), (60, 40), (50, 50)


def write_image(path: Path, orientation: int, size: tuple[int, int] = STORED) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size[::-1]).save(path, exif=exif)


@pytest.mark.parametrize(
    ("orientations", "annotated", "exif", "frame", "words"),
    [
        ([1, 1], [STORED, STORED], "auto", "apply", None),
        ([6, 1], [SHOWN, STORED], "auto", "apply", "1 of 2 images .* as the annotated sizes show"),
        ([6, 8], [STORED, STORED], "auto", "ignore", "2 of 2 .* as the annotated sizes show"),
        ([6, 3], [STORED, STORED], "auto", "ignore", "2 of 2 .* as the annotated sizes show"),
        ([6, 8], [STORED, SHOWN], "auto", "apply", "set data.exif or --exif to ignore"),
        ([6, 8], [STORED, OTHER], "auto", "apply", "set data.exif or --exif to ignore"),
        ([3, 2], [STORED, STORED], "auto", "apply", "2 of 2 .* set data.exif or --exif to ignore"),
        ([3, 2], [STORED, STORED], "ignore", "ignore", "set data.exif or --exif to apply"),
        ([6, 6], [STORED, STORED], "apply", "apply", "but the annotated sizes say ignore"),
    ],
)
def test_frame(tmp_path, capsys, orientations, annotated, exif, frame, words):
    for n, orientation in enumerate(orientations, 1):
        write_image(tmp_path / f"{n}.png", orientation)
    sizes = dict(enumerate(annotated, 1))
    coco = write_coco(tmp_path / "a.json", sizes, [rectangle(1, 1, 1, 5, 5, 20, 20)], [1])
    found = survey_split(coco, tmp_path, DataConfig(exif=exif), "train")
    assert found == ImageFolder(tmp_path, frame)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (words is not None)
    if words:
        assert lines[0].startswith("train: ")
        assert re.search(words, lines[0])


def test_squares_show_nothing(tmp_path, capsys):
    write_image(tmp_path / "1.png", 6, OTHER)
    coco = write_coco(tmp_path / "a.json", {1: OTHER}, [rectangle(1, 1, 1, 5, 5, 20, 20)], [1])
    assert survey_split(coco, tmp_path, DataConfig(), "val").exif == "apply"
    assert "set data.exif or --exif to ignore" in capsys.readouterr().out


@pytest.mark.parametrize("x", [30, 45])  # the box is partly outside, or all of it
def test_annotations_beyond_the_annotated_size_contradict_it(tmp_path, capsys, x):
    """Annotated on the turned image, with the stored width and height, as Label Studio exports."""
    write_image(tmp_path / "1.png", 6, SHOWN)
    boxes = [rectangle(1, 1, 1, x, 5, 14, 14), rectangle(2, 1, 1, 5, 5, 20, 20)]
    coco = write_coco(tmp_path / "a.json", {1: SHOWN}, boxes, [1])
    assert survey_split(coco, tmp_path, DataConfig(), "train").exif == "apply"
    assert "exchange width and height in the annotations" in capsys.readouterr().out


def test_a_size_that_disagrees_names_the_orientation(tmp_path):
    data = painted_patches(tmp_path / "painted")
    for path in (tmp_path / "painted").glob("*.png"):
        write_image(path, 6, (120, 160))
    with pytest.raises(ValueError, match="is 120x160 .*orientation 6 turns it, stored .*160x120"):
        data.load("mask", 0, 0)
    data.images = ImageFolder(tmp_path / "painted", "ignore")
    data.load("mask", 0, 0)


def test_samples_of_more_bits_are_said_once(tmp_path, capsys):
    for n in (1, 2):
        pixels = np.full(STORED, 4000 // n, np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    coco = write_coco(tmp_path / "a.json", {1: STORED, 2: STORED}, [], [1])
    survey_split(coco, tmp_path, DataConfig(), "train")
    [line] = capsys.readouterr().out.splitlines()
    assert "2 of 2 images have samples of more than 8 bits, of which 12 are used" in line


@pytest.mark.parametrize("values", [{"exif": "turn"}, {"max_pixels": 0}, {"max_pixels": 2**30 + 1}])
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        DataConfig(**values)
