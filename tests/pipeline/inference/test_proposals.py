"""The proposal store: what is written is read, and COCO's tools read it too."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from pipeline.inference.proposals import Proposals, ProposalStore


def random_proposals(image_id: int, count: int, rng: np.random.Generator) -> Proposals:
    """Random rectangles in an image of random size, best first."""
    height, width = rng.integers(2, 60, size=2).tolist()
    masks = np.zeros((height, width, count), np.uint8, order="F")
    for n in range(count):
        top, left = rng.integers(height), rng.integers(width)
        bottom, right = rng.integers(top + 1, height + 1), rng.integers(left + 1, width + 1)
        masks[top:bottom, left:right, n] = 1
    rles = coco_mask.encode(masks)
    xywh = np.array([coco_mask.toBbox(rle) for rle in rles], np.float32).reshape(-1, 4)
    return Proposals(
        image_id=image_id,
        file_name=f"folder/é {image_id}.jpg",
        height=height,
        width=width,
        scores=np.sort(rng.random(count, np.float32))[::-1],
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1),
        counts=[rle["counts"] for rle in rles],
    )


def as_coco_image(p: Proposals) -> dict:
    return {"id": p.image_id, "file_name": p.file_name, "height": p.height, "width": p.width}


def assert_same(found: Proposals, expected: Proposals) -> None:
    for name in ("image_id", "file_name", "height", "width", "counts"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("scores", "boxes"):
        value = getattr(found, name)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, getattr(expected, name))


# Shards of images, each with its number of proposals, and the process that writes the shard.
shards_of_counts = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2)), max_size=4
)


@settings(deadline=None, max_examples=40)
@given(shards=shards_of_counts, seed=st.integers(0, 1000))
def test_what_is_written_is_read(shards, seed):
    rng = np.random.default_rng(seed)
    ids = iter(rng.permutation(100).tolist())
    written = {}
    with TemporaryDirectory() as directory:
        store = ProposalStore(directory)
        store.open_for({"num_proposals": 5})
        for counts, writer in shards:
            images = [random_proposals(next(ids), count, rng) for count in counts]
            store.write_shard(images, writer=writer)
            written |= {proposals.file_name: proposals for proposals in images}
        found = list(ProposalStore(directory))
        covered = store.images()
        path, count = store.write_results()
        results = json.loads(path.read_text())
        listed = json.loads((Path(directory) / "images.json").read_text())["images"]

    assert len(found) == sum(len(p) > 0 for p in written.values())
    for proposals in found:
        assert_same(proposals, written[proposals.file_name])
        assert (np.diff(proposals.scores) <= 0).all()
    assert covered == {name: as_coco_image(p) for name, p in written.items()}  # the empty ones too
    assert listed == sorted(covered.values(), key=lambda image: image["id"])
    expected = [result for proposals in found for result in proposals.results()]
    assert results == expected and count == len(expected)


@pytest.fixture
def store(tmp_path) -> ProposalStore:
    """Two shards of three images and eight proposals."""
    rng = np.random.default_rng(0)
    store = ProposalStore(tmp_path / "store")
    store.open_for({"scales": [-1.0, 0.5, 0.5], "num_proposals": 5})
    store.write_shard([random_proposals(7, 3, rng), random_proposals(2, 0, rng)])
    store.write_shard([random_proposals(30, 5, rng)])
    return store


def test_results_are_coco_results(store):
    for proposals in store:
        for n, result in enumerate(proposals.results()):
            assert result["image_id"] == proposals.image_id and result["category_id"] == 1
            assert result["score"] == pytest.approx(proposals.scores[n], abs=1e-6)
            mask = coco_mask.decode(result["segmentation"])
            assert mask.shape == (proposals.height, proposals.width)
            assert result["bbox"] == coco_mask.toBbox(result["segmentation"]).tolist()
            assert result["segmentation"]["counts"].encode() == proposals.rle(n)["counts"]


def test_results_load_with_pycocotools(store, capsys):
    path, count = store.write_results()
    coco = COCO(str(store.directory / "images.json"))
    results = coco.loadRes(str(path))
    assert len(results.getAnnIds()) == count == 8
    assert coco.getImgIds() == [2, 7, 30]


def test_columns_can_be_read_alone(store):
    tables = list(store.read(("score", "box")))
    assert [table.column_names for table in tables] == [["score", "box"]] * 2
    scores = np.concatenate([table["score"].to_numpy() for table in tables])
    np.testing.assert_array_equal(scores, np.concatenate([p.scores for p in store]))
    boxes = [box for table in tables for box in table["box"].to_pylist()]
    np.testing.assert_array_equal(boxes, np.concatenate([p.boxes for p in store]))


def test_no_shard_is_written_over(store, tmp_path):
    before = {path: path.read_bytes() for path in store.shards()}
    rng = np.random.default_rng(1)
    ProposalStore(store.directory).write_shard([random_proposals(31, 1, rng)])
    store.write_shard([random_proposals(32, 1, rng)], writer=1)
    assert {path: path.read_bytes() for path in store.shards() if path in before} == before
    assert len(store.shards()) == 4
    assert sorted(p.image_id for p in store) == [7, 30, 31, 32]


def test_a_shard_that_fails_leaves_nothing(store):
    before = sorted(store.directory.iterdir())
    broken = random_proposals(40, 2, np.random.default_rng(0))
    broken.counts = [b"1", 5]
    with pytest.raises(Exception, match="(?i)bytes"):
        store.write_shard([broken])
    assert sorted(store.directory.iterdir()) == before


def test_a_store_keeps_to_its_settings(store):
    store.open_for({"scales": [-1.0, 0.5, 0.5], "num_proposals": 5})
    with pytest.raises(ValueError) as error:
        store.open_for({"scales": [-2.0, 0.5, 0.5], "num_proposals": 5})
    message = str(error.value)
    assert "scales [-1.0, 0.5, 0.5] -> [-2.0, 0.5, 0.5]" in message and "\n" not in message
    assert "num_proposals" not in message and str(store.directory) in message


def test_an_empty_store_is_valid(tmp_path):
    store = ProposalStore(tmp_path)
    assert list(store) == [] and store.images() == {} and store.shards() == []
    path, count = store.write_results()
    assert json.loads(path.read_text()) == [] and count == 0
