"""Results in an object store: as in a folder, also after interruptions at any write."""

import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from pyarrow import fs

from datasets.files import atomic_path, write_atomically
from datasets.remote import RemotePath, list_files, remove_folder, to_path
from pipeline.inference.detect import load_detector
from pipeline.inference.detect_folders import detect_images
from pipeline.inference.proposal_store import ProposalStore
from tests.pipeline.inference.test_propose_folders import BoxProposer, propose, write_images

NAMES = [f"{n}.png" for n in range(7)]
CPU = torch.device("cpu")


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", NAMES)


def content(output: str | Path) -> dict[str, bytes]:
    """The files of a folder, by name."""
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
    path = to_path("s3://bucket/run/x")
    with suppress(ZeroDivisionError), atomic_path(path) as temporary:
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


class Kill(BaseException):
    """Ends a process without a word: from then on nothing more is uploaded."""


def kill_at_upload(monkeypatch, number: int, *, after: bool) -> list[str]:
    """Kills the process before or after its upload of a number; returns what it uploads."""
    upload, uploaded = RemotePath.upload, []

    def counted(path: RemotePath, file: Path) -> None:
        if len(uploaded) >= number:
            raise Kill
        uploaded.append(path.name)
        if len(uploaded) < number or after:
            upload(path, file)
        if len(uploaded) == number:
            raise Kill

    monkeypatch.setattr(RemotePath, "upload", counted)
    return uploaded


def test_a_run_killed_at_any_upload_goes_on(bucket, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.inference.proposal_store.SHARD_BYTES", 1)  # an image a shard
    monkeypatch.setattr("pipeline.inference.proposal_store.MIN_UNINDEXED", 2)
    photos = photos / "[0-2].png"
    propose(BoxProposer(), photos, tmp_path / "whole")
    number, killed = 0, True
    while killed:
        number, uri = number + 1, f"s3://bucket/run{number + 1}"
        with monkeypatch.context() as patch:
            kill_at_upload(patch, number, after=number % 2 == 0)
            try:
                propose(BoxProposer(), photos, uri)
                killed = False
            except Kill:
                pass
        before = {name for name in content(uri) if name.startswith("proposals-")}
        proposer = BoxProposer()
        propose(proposer, photos, uri)
        assert len(proposer.seen) == 3 - len(before)
        assert rows(uri) == rows(tmp_path / "whole")
        assert content(uri)["proposals.json"] == content(tmp_path / "whole")["proposals.json"]
    assert number == 10  # settings, three shards, the index, two jsons, the report's two; one more


def test_shards_share_an_object_store(bucket, photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "one")
    seen: list[str] = []
    for part in (2, 1, 2):
        proposer = BoxProposer()
        propose(proposer, photos, "s3://bucket/run", shard=(part, 2))
        seen += proposer.seen
    assert sorted(seen) == NAMES and rows("s3://bucket/run") == rows(tmp_path / "one")
    assert {"metrics-1-of-2.json", "broken-2-of-2.json"} <= content("s3://bucket/run").keys()
    assert "proposals.json" not in content("s3://bucket/run")


# The tools.


@pytest.fixture
def uploaded(bucket, tiny_detector) -> str:
    """A store of proposals."""
    folder = tiny_detector.parents[1] / "proposals" / "val"
    fs.copy_files(str(folder), "bucket/val", destination_filesystem=bucket)
    return "s3://bucket/val"


def test_killed_detections_go_on(uploaded, tiny_detector, shapes_directory, tmp_path, monkeypatch):
    store = ProposalStore("s3://bucket/split")
    for proposals in ProposalStore(uploaded):  # one image a shard
        store.write_shard([proposals])
    images = shapes_directory / "images" / "val"
    detector, settings = load_detector(tiny_detector, CPU)
    output, whole = "s3://bucket/found", ProposalStore(uploaded)
    detect_images(detector, whole, images, tmp_path, settings=settings)
    with monkeypatch.context() as patch, pytest.raises(Kill):
        kill_at_upload(patch, 4, after=False)  # settings, then parts
        detect_images(detector, store, images, output, settings=settings)
    uploads = kill_at_upload(monkeypatch, 10**6, after=True)
    detect_images(detector, store, images, output, settings=settings)
    assert len([n for n in uploads if n.startswith("proposals-")]) == len(store.shards()) - 2
    assert content(output) == content(tmp_path) and list_files(to_path(output) / "parts") == {}


def test_the_tools_take_uris_for_folders(
    uploaded, tiny_checkpoint, tiny_detector, shapes_directory, tmp_path, call_tool
):
    local = tiny_detector.parents[1] / "proposals" / "val"
    images = shapes_directory / "images" / "val"
    annotations = shapes_directory / "annotations" / "instances_val.json"
    arguments = ["--checkpoint", tiny_checkpoint, "--images", images, "--device", "cpu"]
    for output in ("s3://bucket/run", tmp_path / "run"):
        assert call_tool("propose", *arguments, "--output", output) == 0
    assert rows("s3://bucket/run") == rows(tmp_path / "run")

    arguments = ["--checkpoint", tiny_detector, "--images", images, "--device", "cpu"]
    for output, store in (("s3://bucket/found", uploaded), (tmp_path / "found", local)):
        assert call_tool("detect", *arguments, "--proposals", store, "--output", output) == 0
    assert content("s3://bucket/found") == content(tmp_path / "found")

    places = (uploaded, "s3://bucket/found"), (local, tmp_path / "found")
    for kind in ("proposals", "detections"):
        written = []
        for n, (store, found) in enumerate(places):
            results = store if kind == "proposals" else f"{found}/detections.json"
            scores, labels = tmp_path / f"{kind}{n}", tmp_path / f"{kind}{n}.json"
            arguments = ["--annotations", annotations, "--results", results]
            assert call_tool("score_coco", kind, *arguments, "--output", scores) == 0
            assert call_tool("export_results", results, "--format", "coco", "--output", labels) == 0
            texts = content(scores)
            written.append([texts["metrics.json"], texts["scores.txt"], labels.read_bytes()])
        assert written[0] == written[1] and len(written[0][2]) > 100


def test_what_an_object_store_cannot_have_is_refused(bucket, photos, tmp_path):
    def refused(output: str, match: str, **options) -> None:
        with pytest.raises((ValueError, OSError), match=match) as error:
            propose(BoxProposer(interrupt_at=0), photos, output, **options)
        assert "\n" not in str(error.value)

    refused("s3://bucket/run", "--draw needs a folder of this machine", draw=1)
    refused("s3://bucket/run", "openvino-int8 needs a folder", backend="openvino-int8")
    refused("s3://nowhere/run", "bucket 'nowhere'.*NO_SUCH_BUCKET")
    refused("s3://", "expected s3://BUCKET/PATH")
    assert list_files(to_path("s3://bucket/run")) == {}
    bucket.create_dir("bucket/torn")
    with bucket.open_output_stream("bucket/torn/proposals-000-000000.parquet") as file:
        file.write(b"PAR1")
    with pytest.raises(ValueError, match="s3://bucket/torn/proposals-000-000000.parquet is not a"):
        ProposalStore("s3://bucket/torn").catalog()
