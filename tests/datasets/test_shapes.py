"""The synthetic dataset: the same bytes from the same seed, and annotations true to the pixels."""

import json
import re
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets import shapes
from datasets.shapes import CATEGORY_IDS, SceneConfig, annotate, render, write_shapes


@pytest.fixture(scope="module")
def rendered():
    """Per image, the masks of its objects and their annotations."""
    images = (render(np.random.default_rng([7, i]))[1] for i in range(300))
    return [[(shape[1], annotate(*shape)) for shape in image] for image in images]


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def decode(annotation: dict, shape: tuple[int, int]) -> np.ndarray:
    rle = coco_mask.frPyObjects(annotation["segmentation"], *shape)
    return coco_mask.decode(coco_mask.merge(rle) if isinstance(rle, list) else rle).astype(bool)


# Files


def test_an_image_depends_on_seed_split_and_index_and_on_nothing_else(tmp_path):
    for seed, split in ((3, "train"), (3, "val"), (4, "train")):
        write_shapes(tmp_path / f"{seed}", num_images=2, seed=seed, split=split)
    images = [path.read_bytes() for path in tmp_path.rglob("*.jpg")]
    assert len(set(images)) == len(images) == 6
    write_shapes(tmp_path / "again", num_images=2, seed=4)
    write_shapes(tmp_path / "more", num_images=3, seed=4)
    assert contents(tmp_path / "again") == contents(tmp_path / "4")
    more = contents(tmp_path / "more")
    for name in ("images/train/000001.jpg", "images/train/000002.jpg"):
        assert more[name] == contents(tmp_path / "4")[name]


def test_loads_with_pycocotools(tmp_path):
    coco = COCO(str(write_shapes(tmp_path, num_images=6, seed=0, split="val")))
    assert sorted(coco.imgs) == [1, 2, 3, 4, 5, 6]
    assert {c["name"]: c["id"] for c in coco.loadCats(coco.getCatIds())} == CATEGORY_IDS
    for image in coco.imgs.values():
        assert (tmp_path / "images/val" / image["file_name"]).is_file()
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        assert coco.annToMask(annotation).shape == (image["height"], image["width"])


@pytest.mark.parametrize("other", [{"num_images": 1, "seed": 0}, {"num_images": 3, "seed": 1}])
def test_the_same_parameters_keep_the_files_and_others_rewrite_them(tmp_path, other):
    path = write_shapes(tmp_path / "both", num_images=2, seed=0)
    image = tmp_path / "both/images/train/000001.jpg"
    image.write_bytes(b"left alone")
    assert write_shapes(tmp_path / "both", num_images=2, seed=0) == path
    assert image.read_bytes() == b"left alone"
    write_shapes(tmp_path / "both", **other)
    write_shapes(tmp_path / "fresh", **other)
    assert contents(tmp_path / "both") == contents(tmp_path / "fresh")


def test_interrupted_write_is_redone(tmp_path):
    """Over an older dataset at that: its json must not describe a mixture of images."""
    path = write_shapes(tmp_path / "cut", num_images=3, seed=0)
    two = [render(np.random.default_rng(i)) for i in range(2)]
    stop = patch.object(shapes, "render", side_effect=[*two, KeyboardInterrupt])
    with stop, pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path / "cut", num_images=3, seed=1)
    assert not path.exists()
    write_shapes(tmp_path / "cut", num_images=3, seed=1)
    write_shapes(tmp_path / "fresh", num_images=3, seed=1)
    assert contents(tmp_path / "cut") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("text", ['{"info": {"description": "COCO 2017"}}', "[]", '{"images": ['])
def test_a_foreign_json_is_kept(tmp_path, text):
    path = tmp_path / "annotations/instances_train.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path.name}: not made by write_shapes"):
        write_shapes(tmp_path, num_images=2, seed=0)
    assert path.read_text() == text


# Annotations


def test_segmentation_box_and_area_agree_with_the_painted_mask(rendered):
    for mask, annotation in (pair for image in rendered for pair in image):
        decoded = decode(annotation, mask.shape)
        agreement = np.sum(decoded & mask) / np.sum(decoded | mask)
        assert agreement >= (1 if isinstance(annotation["segmentation"], dict) else 0.95)
        box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(decoded)))
        np.testing.assert_allclose(annotation["bbox"], box, atol=1)
        assert annotation["area"] == pytest.approx(np.count_nonzero(decoded), rel=0.04)


@settings(max_examples=200, deadline=None)
@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_any_mask_is_annotated(mask):
    """Specks, diagonal contacts, holes, one-pixel lines: never a polygon pycocotools refuses."""
    mask[mask.shape[0] // 2, mask.shape[1] // 2] = True
    annotation = annotate("disk", mask)
    decoded = decode(annotation, mask.shape)
    if isinstance(annotation["segmentation"], dict):
        assert np.array_equal(decoded, mask)
    else:
        assert all(len(polygon) >= 6 for polygon in annotation["segmentation"])
        assert decoded.shape == mask.shape


def test_a_rectangle_is_one_polygon_along_pixel_edges_cut_it_is_two_with_a_hole_it_is_rle():
    mask = np.zeros((40, 50), bool)
    mask[10:30, 5:45] = True
    (polygon,) = annotate("square", mask)["segmentation"]
    x, y = np.reshape(polygon, (-1, 2)).T
    assert (x.min(), y.min(), x.max(), y.max()) == (5, 10, 45, 30)
    assert np.array_equal(decode(annotate("square", mask), mask.shape), mask)
    cut, hole = mask.copy(), mask.copy()
    cut[:, 20:30] = False
    hole[15:20, 20:30] = False
    assert len(annotate("square", cut)["segmentation"]) == 2
    assert set(annotate("square", hole)["segmentation"]) == {"counts", "size"}


# What there is to learn from


def test_all_categories_sizes_crowds_and_segmentations_occur(rendered):
    annotations = [annotation for image in rendered for _, annotation in image]
    assert {a["category_id"] for a in annotations} == set(CATEGORY_IDS.values())
    assert max(CATEGORY_IDS.values()) > len(CATEGORY_IDS) == len(set(CATEGORY_IDS.values()))
    longest = np.array([max(a["bbox"][2:]) for a in annotations])
    assert longest.max() > 250
    assert np.mean(longest < 32) > 0.05 and np.mean(longest > 96) > 0.25
    crowds = [a["segmentation"] for a in annotations if a["iscrowd"]]
    single = [a["segmentation"] for a in annotations if not a["iscrowd"]]
    assert 0.03 < np.mean([not image for image in rendered]) < 0.15  # empty images
    assert 3 <= len(crowds) <= 30 and all("counts" in segmentation for segmentation in crowds)
    assert any(isinstance(segmentation, dict) for segmentation in single)
    assert any(len(segmentation) > 1 for segmentation in single if isinstance(segmentation, list))


def test_masks_are_disjoint_and_well_visible_and_some_are_cut_by_the_border(rendered):
    cut = []
    for image in rendered:
        masks = [mask for mask, _ in image]
        assert np.sum(masks, axis=0).max() <= 1
        assert all(np.count_nonzero(mask) >= 60 for mask in masks)
        cut += [m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any() for m in masks]
    assert 0.1 < np.mean(cut) < 0.4


def test_a_scene_of_many_small_objects():
    scene = SceneConfig(
        long_side=(400, 420), short_side=(400, 400), objects=(300, 300), object_sides=(8, 12, 20)
    )
    image, objects = render(np.random.default_rng(1), scene)
    masks = np.stack([mask for _, mask, iscrowd in objects if not iscrowd])
    assert 400 <= image.shape[1] <= 420 and image.shape[0] == 400
    assert len(masks) > 255  # more than a byte counts
    assert masks.sum(axis=0).max() == 1
    sides = [max(annotate("disk", mask)["bbox"][2:]) for mask in masks]
    assert min(sides) < 9 and max(sides) <= 21


@pytest.mark.parametrize("side", [16, 100])
def test_images_smaller_than_a_spot_of_their_background(side):
    scene = SceneConfig((side, side + 20), (side, side), (1, 2), (5.0, 7.0, 9.0))
    for seed in range(20):
        image, _ = render(np.random.default_rng(seed), scene)
        assert min(image.shape[:2]) == side and image.std() > 1


def test_another_scene_replaces_the_dataset(tmp_path):
    usual = write_shapes(tmp_path, num_images=1, seed=0)
    text = usual.read_text()
    assert "objects" not in json.loads(text)["info"]  # as before there were settings
    write_shapes(tmp_path, num_images=1, seed=0, scene=SceneConfig(objects=(20, 20)))
    info = json.loads(usual.read_text())["info"]
    assert info["objects"] == [20, 20] and "object_sides" not in info
    write_shapes(tmp_path, num_images=1, seed=0, scene=SceneConfig())
    assert usual.read_text() == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objects": (9, 3)}, "objects must be ascending and at least 1, got (9, 3)"),
        ({"object_sides": (0.0, 5.0, 9.0)}, "object_sides must be ascending and at least 1"),
        ({"object_sides": (9.0, 9.0, 9.0)}, "object_sides must be a range"),
    ],
)
def test_a_scene_that_cannot_be_drawn_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SceneConfig(**settings)


@pytest.mark.parametrize("axis", [0, 1])
def test_masks_end_where_the_image_changes(axis):
    """Half a pixel of shift, or of growth, would make the steps beside an edge unequal."""
    beside = {-1: [], 0: [], 1: []}  # mean step of brightness, by distance outward from the edge
    for i in range(25):
        image, objects = render(np.random.default_rng([8, i]))
        steps = np.abs(np.diff(image.sum(axis=2, dtype=float), axis=axis))
        for _, mask, _ in objects:
            edge = np.diff(mask.astype(int), axis=axis)
            for distance, found in beside.items():
                entering = np.roll(edge > 0, -distance, axis)
                leaving = np.roll(edge < 0, distance, axis)
                found.append(np.concatenate([steps[entering], steps[leaving]]).mean())
    inner, center, outer = (np.mean(found) for found in beside.values())
    assert center > 1.7 * max(inner, outer)
    assert inner == pytest.approx(outer, rel=0.2)
