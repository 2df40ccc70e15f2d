"""Images by lists and in object stores, and processes that share them by shards."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import cv2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from datasets.image_lists import list_named_images
from pipeline.inference import proposal_store
from pipeline.inference.detect_folders import detect_in_part, image_folder
from pipeline.inference.image_files import find_images
from pipeline.inference.proposal_store import ProposalStore
from pipeline.run_lock import locked_directory
from tests.pipeline.inference.older_stores import write_older_shard
from tests.pipeline.inference.test_propose_folders import (
    BoxProposer,
    propose,
    write_image,
    write_images,
)

NAMES = ["a.png", "b.png", "inner/c.png", "inner/d.png", "e e%20.png"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", NAMES)


def rows(output: Path) -> list[dict]:
    """What a store holds of each image, by name; each once."""
    table = ProposalStore(output).read().sort_by("file_name").to_pylist()
    assert len({row["file_name"] for row in table}) == len(table)
    return table


def without_ids(output: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "image_id"} for row in rows(output)]


# Lists.


def test_a_list_is_as_the_folder(photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "folder")
    text = "# a comment\n\n" + "\n".join(reversed(NAMES)) + "\n  ./a.png \r\n"
    (photos / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pq.write_table(pa.table({"n": [1] * 5, "path": NAMES}), photos / "list.parquet")
    absolute = tmp_path / "lists" / "elsewhere.txt"
    absolute.parent.mkdir()
    absolute.write_text("\n".join(str(photos / name) for name in NAMES))
    for source in (photos / "list.txt", photos / "list.parquet", absolute):
        output = tmp_path / f"{source.name}.out"
        summary = propose(BoxProposer(), source, output, write_json=False)
        assert (summary.done, summary.broken) == (5, []), source
        assert without_ids(output) == without_ids(tmp_path / "folder")
        assert not (output / "proposals.json").exists() and not (output / "images.json").exists()
        assert ProposalStore(output).settings()["image_folder"] == str(photos)
    found = find_images(photos / "list.txt", None)
    assert [file.image_id for file in found] == [1, 2, 3, 4, 5]
    assert found[0].path == photos / NAMES[-1] and len(found[1:3]) == 2


def test_a_listed_image_that_is_missing_is_named_like_any_unreadable_one(photos, tmp_path):
    (photos / "list.txt").write_text("a.png\nnowhere.png\ninner\n")
    summary = propose(BoxProposer(), photos / "list.txt", tmp_path / "out")
    assert summary.done == 1
    missing, folder = sorted(summary.broken, key=len, reverse=True)
    assert missing == f"{photos / 'nowhere.png'}: No such file or directory"
    assert folder.startswith(f"{photos / 'inner'}: ")


def test_lines_end_where_files_end_them(tmp_path):
    """Not where Python's text does, as at the line separator, which a name may have."""
    (tmp_path / "list.txt").write_bytes("a\u2028b.png\r\nc\x0cd.png\re.png\nc\x0cd.png".encode())
    listed = list_named_images(tmp_path / "list.txt")
    assert listed.names == ["a\u2028b.png", "c\x0cd.png", "e.png"]


def test_lists_that_cannot_be(tmp_path):
    def refused(name: str, data: bytes, match: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=match) as error:
            list_named_images(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)

    refused("empty.txt", b"# nothing\n\n", "names no image")
    refused("mixed.txt", b"a.png\ns3://b/c.png\n", "local files and URIs")
    refused("latin.txt", "é.png".encode("latin-1"), "UTF-8")
    refused("torn.parquet", b"PAR1", "no Parquet file")
    pq.write_table(pa.table({"score": [0.5]}), tmp_path / "table.parquet")
    refused("table.parquet", (tmp_path / "table.parquet").read_bytes(), "none of .* but score")
    for uri in ("s3://", "s3://bucket/../x", "nothing9://a/b.png"):
        with pytest.raises(ValueError, match=uri):
            list_named_images(uri)


# Object stores.


@pytest.fixture
def stored(bucket, photos):
    """The images in a bucket, and others."""
    fs.copy_files(str(photos), "bucket/photos", destination_filesystem=bucket)
    for name in ("photos/.hidden.png", "photos/notes.md", "other/x.png"):
        with bucket.open_output_stream(f"bucket/{name}") as file:
            file.write(b"")
    return bucket


def test_images_in_an_object_store_are_as_in_a_folder(stored, photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "folder")
    local = tmp_path / "uris.txt"
    local.write_text("\n".join(f"s3://bucket/photos/{name}" for name in sorted(NAMES)))
    with stored.open_output_stream("bucket/photos/list.txt") as file:
        file.write("\n".join(sorted(NAMES)).encode())
    for source in (
        "s3://bucket/photos",
        "s3://bucket/photos/",
        local,
        "s3://bucket/photos/list.txt",
    ):
        output = tmp_path / f"out{hash(source)}"
        summary = propose(BoxProposer(), source, output)
        assert (summary.done, summary.broken) == (5, []), source
        assert rows(output) == rows(tmp_path / "folder")
        store = ProposalStore(output)
        assert store.settings()["image_folder"] == "s3://bucket/photos"
        if source == "s3://bucket/photos":
            assert summary.passed_over == {".md": 1, ".txt": 1}
    # A detector finds them there, too.
    found = [
        (proposals, image.shape)
        for part in store.parts()
        for image, proposals in detect_in_part(
            lambda _, p: p.file_name, store, part, image_folder(store, None), []
        )
    ]
    sizes = {name: cv2.imread(str(photos / name)).shape for name in NAMES}
    assert dict(found) == sizes
    annotations = tmp_path / "instances.json"
    annotations.write_text('{"images": [{"id": 9, "file_name": "inner/c.png"}]}')
    [file] = find_images("s3://bucket/photos", annotations)
    assert (file.image_id, file.path) == (9, "s3://bucket/photos/inner/c.png")


def test_what_is_not_in_an_object_store_is_named(stored, tmp_path):
    (tmp_path / "uris.txt").write_text("s3://bucket/photos/a.png\ns3://bucket/photos/gone.png\n")
    summary = propose(BoxProposer(), tmp_path / "uris.txt", tmp_path / "out")
    [message] = summary.broken
    assert summary.done == 1 and "s3://bucket/photos/gone.png: " in message
    for uri in ("s3://bucket/nothing", "s3://nowhere/x"):
        with pytest.raises(ValueError, match=uri):
            find_images(uri, None)


# Shards of the images.


@pytest.mark.parametrize("count", [2, 3])
def test_shards_do_what_one_process_does(photos, tmp_path, count):
    propose(BoxProposer(), photos, tmp_path / "one")
    seen: list[str] = []
    for part in range(1, count + 1):
        proposer = BoxProposer()
        propose(proposer, photos, tmp_path / "out", shard=(part, count))
        seen += proposer.seen
        assert (tmp_path / "out" / f"metrics-{part}-of-{count}.json").exists()
    assert sorted(seen) == sorted(NAMES) and rows(tmp_path / "out") == rows(tmp_path / "one")
    assert not (tmp_path / "out" / "proposals.json").exists()
    proposer = BoxProposer()
    assert propose(proposer, photos, tmp_path / "out").done_before == 5 and proposer.seen == []
    names = ("proposals.json", "images.json", "metrics.json")
    for name in names:
        one, other = (sorted((tmp_path / f / name).read_text().split()) for f in ("one", "out"))
        assert len(one) == len(other), name


def test_ids_of_shards_that_start_late_are_not_given_twice(photos, tmp_path):
    """New images come before known ones, whose ids are their places: new ids have to be found."""
    output = tmp_path / "out"
    propose(BoxProposer(), photos, output)
    for n in range(8):
        write_image(photos / f"0{n}.png", n)
    for part in (2, 1, 3):  # each knows what the others have done before it
        propose(BoxProposer(), photos, output, shard=(part, 3))
    ids = [row["image_id"] for row in rows(output)]
    assert len(ids) == len(set(ids)) == 13


def hold(directory, shard, ready, done):
    with locked_directory(directory, shard=shard):
        ready.put(None)
        done.get()


def test_shards_share_a_folder_and_two_of_one_do_not(photos, tmp_path):
    output = tmp_path / "out"
    propose(BoxProposer(), photos / "a.png", output, shard=(2, 2))
    ready, done = FORK.SimpleQueue(), FORK.SimpleQueue()
    other = FORK.Process(target=hold, args=(output, (1, 2), ready, done))
    other.start()
    ready.get()
    try:
        for shard in ((1, 2), None, (2, 3)):
            with pytest.raises(ValueError, match="is in use"):
                propose(BoxProposer(), photos, output, shard=shard)
        with pytest.raises(ValueError, match="shard 1/2 is at work on other images"):
            propose(BoxProposer(), photos / "*.png", output, shard=(2, 2))
        propose(BoxProposer(), photos / "a.png", output, shard=(2, 2))
    finally:
        done.put(None)
        other.join()
    propose(BoxProposer(), photos, output)
    assert not list(output.glob(".lock*")) and len(rows(output)) == 5


# Kills.


def propose_slowly(photos: Path, output: Path, shard: tuple[int, int], ready) -> None:
    proposal_store.SHARD_SECONDS, proposal_store.MIN_UNINDEXED = 0.01, 2
    slow = {path.name: lambda: time.sleep(0.004) for path in photos.iterdir()}
    ready.put(None)
    propose(BoxProposer(errors=slow), photos, output, shard=shard)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_moment_do_nothing_twice_and_lose_nothing(tmp_path, seed):
    photos, output, rng = tmp_path / "photos", tmp_path / "out", random.Random(seed)
    for n in range(24):
        write_image(photos / f"x{n:02}.png", n)
    propose(BoxProposer(), photos, tmp_path / "whole")
    killed = 0
    for _ in range(4):
        processes = []
        for part in (1, 2):
            ready = FORK.SimpleQueue()
            arguments = (photos, output, (part, 2), ready)
            processes.append(FORK.Process(target=propose_slowly, args=arguments))
            processes[-1].start()
            ready.get()
        for process in processes:
            process.join(rng.uniform(0, 0.05))
            process.kill()
        for process in processes:
            process.join(30)
            killed += process.exitcode == -signal.SIGKILL
    for part in (1, 2):
        propose(BoxProposer(), photos, output, shard=(part, 2))
    propose(BoxProposer(), photos, output)
    assert killed and rows(output) == rows(tmp_path / "whole")
    assert not [path.name for path in output.iterdir() if path.suffix in (".tmp", ".part")]


def test_an_older_store_is_continued(photos, tmp_path):
    output = tmp_path / "out"
    propose(BoxProposer(), photos, tmp_path / "whole")
    propose(BoxProposer(), photos / "*.png", output)
    [shard] = ProposalStore(output).shards()
    older = list(ProposalStore(output))
    shard.unlink()
    write_older_shard(shard, older)
    proposer = BoxProposer()
    assert propose(proposer, photos, output).done_before == 3
    assert proposer.seen == ["inner/c.png", "inner/d.png"]
    assert without_ids(output) == without_ids(tmp_path / "whole")
