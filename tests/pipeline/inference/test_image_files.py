"""Image files for inference: their ids and names, however they are given; reading and memory."""

import pickle
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.images import ImageError
from pipeline.inference import image_files, memory
from pipeline.inference.image_files import (
    MAX_KEPT,
    NONE_KNOWN,
    ImageFile,
    ImageFiles,
    common_folder,
    find_images,
    process_images,
)
from tests.pipeline.inference.builders import listing


def ids(source: Path | str, annotations: Path | None = None, known: dict | None = None) -> dict:
    return {
        file.file_name: file.image_id
        for file in find_images(source, annotations, done(known or {}))
    }


def done(known: dict[int, str]) -> pa.Table:
    """What an earlier run has done, by id."""
    columns = {"image_id": list(known), "file_name": list(known.values())}
    return pa.table(columns, NONE_KNOWN.schema)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["000012.jpg", "000003.png"], {"000012.jpg": 12, "000003.png": 3}),
        (["a/7.jpg", "b/8.jpg"], {"a/7.jpg": 7, "b/8.jpg": 8}),
        (["x.jpg", "000003.jpg"], {"000003.jpg": 1, "x.jpg": 2}),
        (["3.jpg", "003.jpg"], {"003.jpg": 1, "3.jpg": 2}),  # the same number twice
        (["12345678901234567890.jpg"], {"12345678901234567890.jpg": 1}),  # more than 64 bits
        (["²3.jpg"], {"²3.jpg": 1}),  # a digit, but no number
    ],
)
def test_ids_come_from_numeric_names_or_count(tmp_path, names, expected):
    assert ids(touch(tmp_path, *names)) == expected


@pytest.mark.parametrize(
    ("source", "listed", "expected"),
    [
        ("b/6.jpg", None, {"6.jpg": 6}),
        ("*/*.jpg", None, {"a/5.jpg": 5, "b/6.jpg": 6}),
        ("b/*", None, {"6.jpg": 6, "7.png": 7}),
        ("", {"b/6": 40, "a/5": 7}, {"b/6.jpg": 40, "a/5.jpg": 7}),
        ("b/*", {"6": 40, "5": 7}, {"6.jpg": 40}),
        ("a/5.jpg", {"6": 40, "5": 7}, {"5.jpg": 7}),
    ],
)
def test_images_of_folders_files_and_globs(tmp_path, source, listed, expected):
    """With annotations, those that they list, with their ids."""
    touch(tmp_path, "a/5.jpg", "b/6.jpg", "b/7.png")
    annotations = listing(tmp_path / "instances.json", **listed) if listed else None
    assert ids(str(tmp_path / source), annotations) == expected


def test_files_of_one_name_in_several_folders_are_told_apart(tmp_path, monkeypatch):
    touch(tmp_path, "x/1.jpg", "y/1.jpg", "z/1.jpg")
    annotations = listing(tmp_path / "instances.json", **{"x/1": 5, "y/1": 6})
    assert ids(str(tmp_path / "*" / "1.jpg"), annotations) == {"x/1.jpg": 5, "y/1.jpg": 6}
    assert ids(tmp_path, annotations) == {"x/1.jpg": 5, "y/1.jpg": 6}
    monkeypatch.chdir(tmp_path / "y")
    assert ids("*.jpg", annotations) == {"y/1.jpg": 6}
    with pytest.raises(ValueError, match="x/1.jpg and .*y/1.jpg are both 1.jpg of"):
        ids(str(tmp_path / "*" / "1.jpg"), listing(tmp_path / "instances.json", **{"1": 1}))


names = st.sets(st.from_regex(r"[0-9]{1,3}|[a-c]{1,2}", fullmatch=True), min_size=1, max_size=6)


@settings(deadline=None, max_examples=50)
@given(before=names, later=names)
def test_ids_are_distinct_and_stay(tmp_path_factory, before, later):
    folder = tmp_path_factory.mktemp("photos")
    first = ids(touch(folder, *(f"{name}.jpg" for name in before)))
    second = ids(
        touch(folder, *(f"{name}.jpg" for name in later)),
        known={i: name for name, i in first.items()},
    )
    assert len(set(second.values())) == len(second) == len(before | later)
    assert first.items() <= second.items()


def test_the_folder_is_the_same_whatever_way_the_files_are_given(tmp_path, monkeypatch):
    photos = touch(tmp_path / "photos", "a.jpg", "inner/b.jpg")
    annotations = listing(tmp_path / "instances.json", **{"a": 1, "inner/b": 2})
    (tmp_path / "link").symlink_to(photos, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for source in (photos, "photos", "link", "photos/../photos"):
        assert common_folder(find_images(source, None)) == photos
        assert common_folder(find_images(source, annotations)) == photos
    for source in ("photos/a.jpg", "p*/*.jpg", "photos/*", str(photos / "**" / "*")):
        assert common_folder(find_images(source, annotations)) == photos
    assert common_folder(find_images("photos/inner/b.jpg", None)) == photos / "inner"


def name_of(file: ImageFile, image: np.ndarray) -> str:
    return file.file_name


def test_files_come_in_order_and_those_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    def read(path: Path) -> np.ndarray:
        if path.stem in errors:
            raise errors[path.stem]
        return np.full((1, 1, 3), int(path.stem), np.uint8)

    errors = {"broken": ImageError("broken.jpg: not an image"), "huge": MemoryError()}
    monkeypatch.setattr(image_files, "open_image", read)
    names, broken = ["1.jpg", "broken.jpg", "huge.jpg", "2.jpg"], []
    files = [ImageFile(n, name, tmp_path / name) for n, name in enumerate(names)]
    found = list(process_images(files, name_of, broken=broken, advice="buy more"))
    assert [(image.max(), name) for image, name in found] == [(1, "1.jpg"), (2, "2.jpg")]
    assert broken[0] == "broken.jpg: not an image"
    assert broken[1:] == [f"{tmp_path / 'huge.jpg'}: out of memory; buy more"]
    assert list(process_images([], name_of, broken=broken, advice="")) == []


def test_a_reader_given_up_does_not_wait_for_the_next_image(tmp_path, monkeypatch):
    files = [ImageFile(n, f"{n}.png", tmp_path / f"{n}.png") for n in range(3)]
    reading, finish, done = threading.Event(), threading.Event(), []

    def read_slowly(path):
        if path.name == "1.png":
            reading.set()
            finish.wait(5)
            done.append(path)
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(image_files, "open_image", read_slowly)
    images = process_images(files, name_of, broken=[], advice="")
    next(images)
    assert reading.wait(30)
    images.close()  # returns, though the second image is still being read
    assert not done
    finish.set()


@pytest.mark.parametrize(
    ("sides", "releases"),
    [
        ([4, 4, 5, 5, 4], [0, 0, 1, 1, 2]),
        ([4, None, 4], [0, 0]),  # an unreadable image is no other size
        ([4] * (2 * MAX_KEPT + 1), [*[0] * MAX_KEPT, *[1] * MAX_KEPT, 2]),  # now and then
    ],
)
def test_memory_is_given_back_before_another_size(monkeypatch, sides, releases):
    def read(path: Path) -> np.ndarray:
        if (side := sides[int(path.name)]) is None:
            raise ImageError("no image")
        return np.zeros((side, 8, 3), np.uint8)

    calls: list[str] = []
    monkeypatch.setattr(memory, "_call_libc", lambda name, *_: calls.append(name))
    monkeypatch.setattr(image_files, "open_image", read)
    files = [ImageFile(n, str(n), Path(str(n))) for n in range(len(sides))]
    images = process_images(files, lambda *_: calls.count("malloc_trim"), broken=[], advice="")
    assert [count for _, count in images] == releases


def test_some_of_many_images_are_pickled_alone():
    names = pa.array([f"{n:06d}.jpg" for n in range(10_000)])
    files = ImageFiles(np.arange(10_000), names, "photos")
    few = pickle.loads(content := pickle.dumps(files[5_000:5_008]))
    assert len(content) < 2_000 and [*few] == [*files[5_000:5_008]] and few[7].image_id == 5_007
