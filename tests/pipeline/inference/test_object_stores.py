"""Results in an object store: as in a folder, also after interruptions at any write."""

import json
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from datasets.files import write_atomically
from datasets.remote import RemotePath, list_files, remove_folder, to_path
from pipeline.inference.detect import load_detector
from pipeline.inference.detect_folders import detect_images
from pipeline.inference.proposal_store import ProposalStore
from tests.pipeline.inference.test_propose_folders import BoxProposer, propose, write_image

NAMES = [f"{n}.png" for n in range(7)]
CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path) -> Path:
    for n, name in enumerate(NAMES):
        write_image(tmp_path / "photos" / name, n)
    return tmp_path / "photos"


def content(output: str | Path) -> dict[str, bytes]:
    """The files of a folder, without the images' time and order."""
    folder = to_path(output)
    return {name: (folder / name).read_bytes() for name in list_files(folder)}


def rows(output: str | Path) -> list[dict]:
    return ProposalStore(output).read().sort_by("image_id").to_pylist()


# Paths.


@pytest.mark.parametrize("uri", ["s3://bucket/a b", "memory://store-{}", "{}"])
def test_a_path_is_as_one_of_this_machine(uri, bucket, tmp_path):
    folder = to_path(uri.format(uuid4() if ":" in uri else tmp_path / "folder"))
    assert list_files(folder) == {} and not folder.exists() and not folder.is_dir()
    begun = time.time()
    for name, data in (("b.x.json", b"[1]"), ("a", b""), ("b.x.json", b"[2, 3]")):
        write_atomically(folder / name, data)
    write_atomically(folder / "inner" / "c", "é".encode())
    found = list_files(folder)
    assert {name: size for name, (size, _) in found.items()} == {"a": 0, "b.x.json": 6}
    if "memory" not in uri:
        assert all(begun - 2 < ns / 1e9 < time.time() + 2 for _, ns in found.values())
    file = folder / "b.x.json"
    assert (file.name, file.stem, str(file.parent)) == ("b.x.json", "b.x", str(folder))
    assert str(file.with_suffix(".y")) == f"{folder}/b.x.y" == str(file.with_name("b.x.y"))
    assert file.read_bytes() == b"[2, 3]" and (folder / "inner" / "c").read_text() == "é"
    assert file.is_file() and file.exists() and not file.is_dir()
    assert folder.is_dir() and folder.exists() and not folder.is_file()
    with pytest.raises(FileNotFoundError):
        (folder / "none").read_bytes()
    remove_folder(folder)
    assert list_files(folder) == {} and not folder.exists()


def test_paths_and_uris_are_told_apart():
    assert to_path("s3://bucket/run/") == RemotePath("s3://bucket/run")
    assert to_path(RemotePath("s3://bucket")) == RemotePath("s3://bucket")
    assert to_path("runs/s3") == to_path(Path("runs/s3")) == Path("runs/s3")


def test_a_file_that_fails_is_not_there(bucket):
    with suppress(ZeroDivisionError):
        from datasets.files import atomic_path

        with atomic_path(to_path("s3://bucket/run/x")) as temporary:
            temporary.write_bytes(b"half")
            raise ZeroDivisionError
    assert list_files(to_path("s3://bucket/run")) == {}
    with pytest.raises(OSError, match="nowhere"):
        write_atomically(to_path("s3://nowhere/x"), b"")


# Proposals.


@pytest.mark.parametrize("uri", ["s3://bucket/run", "memory://run-{}"])
def test_a_store_is_as_one_in_a_folder(uri, bucket, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.inference.proposal_store.MIN_UNINDEXED", 1)
    uri, folder = uri.format(uuid4()), tmp_path / "folder"
    for source in (photos / "[0-3].png", photos):
        propose(BoxProposer(nothing_on=["2.png"]), source, folder)
        assert (
            propose(BoxProposer(nothing_on=["2.png"]), source, uri).found
            == 3 * (len(list(photos.glob("*"))) if source == photos else 4) - 3
        )
    one, other = content(folder), content(uri)
    assert one.keys() == other.keys() >= {"index.arrow", "proposals.json", "images.json"}
    for name in one.keys() - {"index.arrow"}:  # it has the shards' times
        assert one[name] == other[name], name
    assert rows(uri) == rows(folder)
    store, there = ProposalStore(uri), ProposalStore(folder)
    assert store.catalog().equals(there.catalog()) and store.images() == there.images()
    assert store.read(image_ids=[2, 5]) == there.read(image_ids=[2, 5])
    assert [p.rles for p in store] == [p.rles for p in there]
    shard = store.shards()[0]
    assert store.images_of(shard) == there.images_of(there.shards()[0])
    proposer = BoxProposer()
    assert propose(proposer, photos, uri).done_before == 7 and proposer.seen == []
    with pytest.raises(ValueError, match=f"{uri} holds results of other settings"):
        store.open_for({"num_proposals": 4})
