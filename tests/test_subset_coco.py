"""A small dataset out of a large one."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.coco import CocoInstances
from datasets.subset import choose_images, cut_subset


@pytest.fixture
def large(shapes_directory, tmp_path) -> tuple[Path, Path]:
    """Annotations and image folder, with what a subset has to carry over."""
    content = json.loads((shapes_directory / "annotations" / "instances_train.json").read_bytes())
    content["licenses"] = [{"id": 4, "name": "as is"}]
    content["categories"].append({"id": 90, "name": "never seen"})
    crowd = {"size": [10, 10], "counts": [0, 100]}  # of another size than the image: unusable
    unusable = {"iscrowd": 1, "segmentation": crowd, "area": 100, "bbox": [0, 0, 10, 10]}
    for image in content["images"]:
        ids = {"id": 1000 + image["id"], "image_id": image["id"], "category_id": 1}
        content["annotations"].append(ids | unusable)
    annotations = tmp_path / "large.json"
    annotations.write_text(json.dumps(content))
    images = tmp_path / "large"
    shutil.copytree(shapes_directory / "images" / "train", images)
    return annotations, images


def read(path: Path) -> dict:
    return json.loads(path.read_bytes())


def test_everything_about_the_chosen_images_is_kept(large, tmp_path):
    annotations, images = large
    path, broken = cut_subset(*large, tmp_path / "mini", num_images=7, split="small")
    assert path == tmp_path / "mini" / "annotations" / "instances_small.json" and broken == []
    whole, small = read(annotations), read(path)
    ids = {image["id"] for image in small["images"]}
    assert len(small["images"]) == len(ids) == 7
    for name in ("info", "licenses", "categories"):
        assert small[name] == whole[name]
    assert small["images"] == [image for image in whole["images"] if image["id"] in ids]
    assert small["annotations"] == [a for a in whole["annotations"] if a["image_id"] in ids]
    copies = sorted(p for p in (tmp_path / "mini" / "images" / "small").rglob("*") if p.is_file())
    assert [p.name for p in copies] == sorted(image["file_name"] for image in small["images"])
    assert all(p.read_bytes() == (images / p.name).read_bytes() for p in copies)


def test_the_choice_depends_on_the_seed_alone(large, tmp_path):
    def chosen(output: str, seed: int) -> list[dict]:
        return read(cut_subset(*large, tmp_path / output, num_images=6, seed=seed)[0])["images"]

    first = chosen("a", 0)
    assert chosen("b", 0) == first
    assert any(chosen(f"other{seed}", seed) != first for seed in (1, 2, 3))


def test_missing_and_broken_images_are_named_and_replaced(large, tmp_path):
    annotations, images = large
    files = sorted(images.iterdir())
    for file in files[:8]:
        file.unlink()
    for file in files[8:14]:
        file.write_bytes(file.read_bytes()[:500])
    path, broken = cut_subset(annotations, images, tmp_path / "mini", num_images=10)
    chosen = {image["file_name"] for image in read(path)["images"]}
    assert chosen == {file.name for file in files[14:]}  # the only ten that are left
    assert len(broken) == len(set(broken)) > 0
    assert all(any(f.name in message for f in files[:14]) for message in broken)
    with pytest.raises(ValueError, match="only 10 of the 11 images") as error:
        cut_subset(annotations, images, tmp_path / "more", num_images=11)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "more").rglob("*.json"))


@pytest.mark.parametrize("prefix", ["", "../large/", "C:\\data\\", "/mnt/", "./"])
def test_subfolders_are_kept_and_nothing_outside_of_the_output_is_written(large, tmp_path, prefix):
    annotations, images = large
    content = read(annotations)
    for i, image in enumerate(content["images"]):
        folder = f"part{i % 2}/deep"
        (images / folder).mkdir(parents=True, exist_ok=True)
        (images / image["file_name"]).rename(images / folder / image["file_name"])
        image["file_name"] = f"{prefix}{folder}/{image['file_name']}"
    annotations.write_text(json.dumps(content))
    path, broken = cut_subset(*large, tmp_path / "mini", num_images=5)
    assert broken == []
    for image in read(path)["images"]:
        assert image["file_name"].startswith("part")  # the name that the file has
        assert (tmp_path / "mini" / "images" / "train" / image["file_name"]).is_file()


def test_a_file_outside_of_the_folder_is_not_read(large, tmp_path):
    annotations, images = large
    content = read(annotations)
    for image in content["images"][1:]:
        (images / image["file_name"]).rename(tmp_path / image["file_name"])
        image["file_name"] = f"../{image['file_name']}"
    annotations.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="only 1 of the 2 images"):
        cut_subset(*large, tmp_path / "mini", num_images=2)


def test_a_json_that_is_there_is_kept(large, tmp_path):
    path, _ = cut_subset(*large, tmp_path / "mini", num_images=2)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="instances_train.json is there already"):
        cut_subset(*large, tmp_path / "mini", num_images=3)
    assert path.read_bytes() == before
    assert cut_subset(*large, tmp_path / "mini", num_images=3, split="val")[0].is_file()


@pytest.mark.parametrize(("num_images", "seed"), [(0, 0), (10**6, 0), (1, -1)])
def test_impossible_numbers(large, tmp_path, num_images, seed):
    with pytest.raises(ValueError, match="images were asked for|must not be negative"):
        cut_subset(*large, tmp_path / "mini", num_images=num_images, seed=seed)


def coco_of(shown: list[set[int]], categories: int) -> CocoInstances:
    """A dataset in which image i shows the categories `shown[i]`."""
    coco = CocoInstances()
    pairs = [(image, category) for image, found in enumerate(shown) for category in sorted(found)]
    coco.image_ids, coco.category_ids = np.arange(len(shown)), np.arange(categories)
    coco.image_index, coco.category_index = np.array(pairs, int).reshape(-1, 2).T
    coco.is_crowd = np.zeros(len(pairs), bool)
    return coco


@settings(deadline=None)
@given(
    shown=st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=30),
    fraction=st.floats(0, 1),
    refused=st.sets(st.integers(0, 29)),
    seed=st.integers(0, 99),
)
def test_as_many_images_as_can_be_had_and_none_twice(shown, fraction, refused, seed):
    wanted = max(1, round(fraction * len(shown)))
    asked = []

    def accept(row: int) -> bool:
        asked.append(row)
        return row not in refused

    rows = choose_images(coco_of(shown, 6), wanted, seed=seed, accept=accept)
    assert len(set(asked)) == len(asked)
    assert rows == sorted(set(asked) - refused)
    assert len(rows) == min(wanted, len(set(range(len(shown))) - refused))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000))
def test_rare_categories_are_covered(seed):
    """Nine of ten categories are in two of 500 images each; in 24 images chance finds one."""
    shown = [{1 + i // 2} if i < 18 else {0} for i in range(500)]
    rows = choose_images(coco_of(shown, 10), 24, seed=seed, accept=lambda row: True)
    found = Counter(category for row in rows for category in shown[row])
    assert set(found) == set(range(10))
    assert found[0] >= 8  # most of the half that is drawn from all


def test_images_of_ids_are_cut_in_the_order_of_the_json(large, tmp_path, call_tool):
    annotations, images = large
    (tmp_path / "ids.txt").write_text("7 3\n5\n3\n")
    common = ("--annotations", annotations, "--images", images, "--output", tmp_path / "mini")
    assert call_tool("subset_coco", *common, "--image-ids", tmp_path / "ids.txt") == 0
    small = read(tmp_path / "mini" / "annotations" / "instances_train.json")
    whole = [image["id"] for image in read(annotations)["images"]]
    assert [image["id"] for image in small["images"]] == [n for n in whole if n in (3, 5, 7)]
    assert {a["image_id"] for a in small["annotations"]} == {3, 5, 7}


def test_an_unreadable_image_of_the_ids_is_an_error(large, tmp_path):
    annotations, images = large
    file = images / read(annotations)["images"][2]["file_name"]
    ids = [image["id"] for image in read(annotations)["images"][:4]]
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=f"only 3 of the 4 images .*{file.name}"):
        cut_subset(annotations, images, tmp_path / "mini", image_ids=ids)
