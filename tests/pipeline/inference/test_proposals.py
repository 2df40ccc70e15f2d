"""The proposal store: what is written is read, nothing is written over, settings are kept to."""

import json
from dataclasses import replace
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.proposal_store import ProposalStore, ResumableDirectory, ShardWriter
from pipeline.inference.proposals import Proposals, logits_of, results_of
from pipeline.inference.shards import num_bytes, to_rows
from tests.pipeline.inference.builders import proposals_of
from tests.pipeline.inference.older_stores import write_older_shard

SETTINGS = {"log2_scales": (-1.0, 0.5, 0.5), "num_proposals": 5}


def random_proposals(image_id: int, count: int, rng: np.random.Generator) -> Proposals:
    """Random masks in an image of random size, best first."""
    masks = rng.random((count, *rng.integers(2, 60, size=2))) < 0.1
    masks[:, 0, 0] = True
    name, scores = f"folder/é {image_id}.jpg", np.sort(rng.random(count, np.float32))[::-1]
    proposals = proposals_of(masks, image_id=image_id, file_name=name, scores=scores)
    return replace(proposals, num_cut_off=count // 2)


# Shards of images, each with its number of proposals, and the process that writes the shard.
shards = st.tuples(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 2))


@settings(deadline=None, max_examples=40)
@given(shards=st.lists(shards, max_size=4), seed=st.integers(0, 1000))
def test_what_is_written_is_read(shards, seed):
    rng = np.random.default_rng(seed)
    ids = iter(rng.permutation(100).tolist())
    written = {}
    with TemporaryDirectory() as directory:
        store = ProposalStore(directory)
        store.open_for(SETTINGS)
        for counts, writer in shards:
            images = [random_proposals(next(ids), count, rng) for count in counts]
            store.write_shard(images, writer=writer)
            written |= {proposals.file_name: proposals for proposals in images}
        found, covered, count = list(ProposalStore(directory)), store.images(), store.count()
        cut_off = store.cut_off()
        results = json.loads(store.write_json().read_text())
        listed = json.loads((store.directory / "images.json").read_text())["images"]
    assert len(found) == sum(len(p) > 0 for p in written.values())
    for proposals in found:
        for name, value in vars(written[proposals.file_name]).items():
            np.testing.assert_array_equal(getattr(proposals, name), value)
        assert proposals.logits.dtype == proposals.boxes.dtype == np.float32
    assert covered == {  # also those without a proposal
        p.image_id: {"id": p.image_id, "file_name": name, "height": p.height, "width": p.width}
        for name, p in written.items()
    }
    assert listed == sorted(covered.values(), key=lambda image: image["id"])
    assert results == [result for proposals in found for result in results_of(proposals)]
    assert count == len(results)
    assert cut_off == {p.image_id: p.num_cut_off for p in found if p.num_cut_off}


@pytest.fixture
def store(tmp_path) -> ProposalStore:
    """Two shards of three images and eight proposals."""
    rng = np.random.default_rng(0)
    store = ProposalStore(tmp_path / "store")
    store.open_for(SETTINGS)
    store.write_shard([random_proposals(7, 3, rng), random_proposals(2, 0, rng)])
    store.write_shard([random_proposals(30, 5, rng)])
    return store


@pytest.mark.parametrize("logits", [False, True])
def test_older_stores_are_read_and_added_to(store, logits):
    rng = np.random.default_rng(3)
    place = {"crs": "EPSG:32632", "transform": [1, 0, 0, 0, -1, 0]}
    older = [random_proposals(n, count, rng) for n, count in ((50, 0), (40, 3), (60, 1), (41, 2))]
    older[1] = replace(older[1], georeference=place)
    path = store.directory / "proposals-000-000000.parquet"
    before = {p.image_id: p for p in store}
    rest = [before[30]]
    path.unlink()
    write_older_shard(path, older, logits=logits)
    after = list(store)
    expected = [p for p in older if len(p)] + rest
    assert [p.image_id for p in after] == [p.image_id for p in expected] == [40, 60, 41, 30]
    for new, old in zip(after, expected, strict=True):
        np.testing.assert_allclose(new.logits, old.logits, atol=1e-4)
        np.testing.assert_allclose(new.scores, old.scores, atol=1e-7)
        np.testing.assert_array_equal(new.boxes, old.boxes)
        assert new.rles == old.rles and (np.diff(new.logits) <= 0).all()
        if logits:
            assert new.num_cut_off == old.num_cut_off
    assert store.cut_off().keys() == ({40, 41, 30} if logits else {30})
    assert store.images().keys() == {50, 40, 60, 41, 30} and store.count() == 11
    assert store.images()[40]["georeference"] == place
    rows = [np.concatenate(columns) for columns in zip(*store.box_rows(), strict=True)]
    np.testing.assert_array_equal(rows[0], np.repeat([40, 60, 41, 30], [3, 1, 2, 5]))
    np.testing.assert_array_equal(rows[1], np.concatenate([p.boxes for p in expected]))
    assert [image["id"] for part in store.parts() for image in store.images_of(part)] == [
        *(50, 40, 60, 41), 30
    ]  # fmt: skip
    chosen = store.read(image_ids=[41, 30, 50], columns=["file_name", "counts"])
    assert chosen.to_pylist() == [
        {"file_name": p.file_name, "counts": p.rles} for p in (older[0], older[3], *rest)
    ]


@given(st.lists(st.floats(-100, 100, width=32) | st.floats(15, 18, width=32), max_size=30))
@settings(max_examples=300)
def test_different_logits_are_different_scores_in_the_json(logits):
    logits = np.sort(np.float32(logits))[::-1]
    proposals = Proposals(1, "x", 9, 9, logits, np.zeros((len(logits), 4), "f4"), [])
    scores = [result["score"] for result in json.loads(json.dumps(results_of(proposals)))]
    assert all(0 <= score <= 1 for score in scores)
    assert (np.sign(np.diff(scores)) == np.sign(np.diff(logits))).all()
    np.testing.assert_allclose(scores, proposals.scores, atol=1e-4)


def test_scores_have_no_more_digits_than_their_order_needs():
    def written(*logits: float) -> list[str]:
        proposals = Proposals(1, "x", 9, 9, np.float32(logits), np.zeros((len(logits), 4)), [])
        return [repr(result["score"]) for result in results_of(proposals)]

    assert written(17, 2, -9) == ["0.9999999586", "0.8808", "0.0001234"]
    assert written(17, 16.99999, -9) == ["0.999999958601", "0.9999999586", "0.00012339"]


def test_scores_that_are_none_are_taken_for_logits():
    assert logits_of(np.float32([0.5, 0, 1])).tolist() == [0, -np.inf, np.inf]
    assert logits_of(np.float32([3, 0.5, -2])).tolist() == [3, 0.5, -2]


def test_box_rows_are_those_of_all_images(store):
    rows = [np.concatenate(columns) for columns in zip(*store.box_rows(), strict=True)]
    found = [np.concatenate(columns) for columns in zip(
        *((np.full(len(p), p.image_id), p.boxes, p.logits) for p in store), strict=True
    )]  # fmt: skip
    for column, expected in zip(rows, found, strict=True):
        np.testing.assert_array_equal(column, expected)


def test_the_index_never_says_what_the_shards_do_not(store, monkeypatch):
    """Deleted, replaced, new shards; an index that is torn."""
    monkeypatch.setattr("pipeline.inference.proposal_store.MIN_UNINDEXED", 1)
    rng, index = np.random.default_rng(2), store.directory / "index.arrow"

    def check(*ids: int) -> None:
        for opened in (store, ProposalStore(store.directory)):
            assert list(opened.images()) == list(ids)
            assert opened.count() == sum(map(len, opened))
        store.write_index()

    check(7, 2, 30)
    assert index.exists()
    store.shards()[0].unlink()
    check(30)
    ProposalStore(store.directory).write_shard([random_proposals(8, 2, rng)], writer=1)
    ProposalStore(store.directory).write_shard([random_proposals(9, 1, rng)])
    check(30, 9, 8)
    replaced = store.shards()[0]
    replaced.unlink()
    other = ProposalStore(store.directory / "other")
    other.write_shard([random_proposals(31, 2, rng)])
    other.shards()[0].rename(replaced)
    check(31, 9, 8)
    index.write_bytes(index.read_bytes()[:-20])
    check(31, 9, 8)


def test_shards_are_written_by_bytes_and_by_seconds(store, monkeypatch):
    now, module = [0.0], "pipeline.inference.proposal_store"
    monkeypatch.setattr(f"{module}.time.monotonic", lambda: now[0])
    image = random_proposals(100, 3, np.random.default_rng(3))
    monkeypatch.setattr(f"{module}.SHARD_BYTES", 2 * num_bytes(to_rows([image])))
    with ShardWriter(store, 4) as shards:
        for n, seconds in enumerate((1, 2, 61, 62, 63)):  # two by bytes, one by a minute, two left
            now[0] = seconds if n < 2 else seconds + 1
            shards.add(replace(image, image_id=n))
    new = [path for path in store.shards() if path.name.startswith("proposals-004")]
    found = [[listed["id"] for listed in store.images_of(path)] for path in new]
    assert found == [[0, 1], [2], [3, 4]]


def test_no_shard_is_written_over(store):
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
    broken.rles = [b"1", 5]
    with pytest.raises(Exception, match="(?i)bytes"):
        store.write_shard([broken])
    assert sorted(store.directory.iterdir()) == before


def test_a_store_keeps_to_its_settings(store):
    store.open_for(SETTINGS)
    with pytest.raises(ValueError) as error:
        store.open_for(SETTINGS | {"log2_scales": (-2.0, 0.5, 0.5)})
    message = str(error.value)
    assert "log2_scales [-1.0, 0.5, 0.5] -> [-2.0, 0.5, 0.5]" in message and "\n" not in message
    assert "num_proposals" not in message and str(store.directory) in message
    (store.directory / "settings.json").unlink()
    with pytest.raises(ValueError, match="no settings.json"):
        store.open_for(SETTINGS)


def test_a_directory_may_be_discarded_with_its_settings(tmp_path):
    directory = ResumableDirectory(tmp_path / "parts")
    directory.open_for({"nms": 0.3})
    (directory.directory / "part").touch()
    directory.open_for({"nms": 0.3}, discard=True)
    assert (directory.directory / "part").exists()
    directory.open_for({"nms": 0.4}, discard=True)
    assert not (directory.directory / "part").exists() and directory.settings() == {"nms": 0.4}


def test_an_empty_store_is_valid(tmp_path):
    store = ProposalStore(tmp_path)
    assert list(store) == [] and store.images() == {} and store.shards() == []
    assert json.loads(store.write_json().read_text()) == [] and store.count() == 0


@pytest.mark.parametrize("content", ["photo.jpg", "folder/photo.jpg", "settings.json"])
def test_a_directory_of_somebody_else_is_not_discarded(tmp_path, content):
    """Detection deletes its parts at the end, and photographs may lie in a folder of that name."""
    file = tmp_path / "parts" / content
    file.parent.mkdir(parents=True)
    file.write_text('{"editor": "vim"}')
    with pytest.raises(ValueError, match="parts holds other files"):
        ResumableDirectory(tmp_path / "parts").open_for({"nms": 0.3}, discard=True)
    assert file.read_text() == '{"editor": "vim"}'


def test_a_directory_whose_first_file_was_not_finished_is_opened(tmp_path):
    (tmp_path / ".settings.json.host.123.tmp").touch()
    directory = ResumableDirectory(tmp_path)
    directory.open_for({"nms": 0.3}, discard=True)
    assert directory.settings() == {"nms": 0.3}
