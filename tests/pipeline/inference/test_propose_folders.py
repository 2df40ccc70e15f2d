"""Folders of images: broken files, interruptions, ids, and files that COCO's tools read."""

import json
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets.images import read_image
from pipeline.inference import proposal_store
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import Proposals
from pipeline.inference.propose import load_proposer
from pipeline.inference.propose_folders import propose_images
from tests.pipeline.inference.builders import listing, proposals_of

CPU = torch.device("cpu")
SETTINGS = {"num_proposals": 3}
GOOD = ["a.jpg", "c.png", "e.jpg", "inner/b.jpg", "k.jpg"]
BROKEN = ["b_empty.jpg", "d_text.jpg", "f_half.jpg", "g_half.png"]


class BoxProposer:
    """Stands in for a network: three boxes whose sizes and scores follow from the image.

    Args:
        errors: what to raise, or to call, by file name.
        interrupt_at: raise KeyboardInterrupt at this image, counted from 0.
        nothing_on: file names without proposals.
        cut_off: confident proposals beyond the limit, by file name.
    """

    def __init__(
        self, *, errors=None, interrupt_at: int | None = None, nothing_on=(), cut_off=None
    ):
        self.cut_off = cut_off or {}
        self.errors, self.interrupt_at, self.nothing_on = errors or {}, interrupt_at, nothing_on
        self.seen: list[str] = []

    def __call__(self, image: np.ndarray, *, image_id: int, file_name: str) -> Proposals:
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(file_name)
        error = self.errors.get(file_name)
        if callable(error):
            error()
        elif error:
            raise error
        height, width = image.shape[:2]
        masks = np.zeros((0 if file_name in self.nothing_on else 3, height, width), bool)
        for n, mask in enumerate(masks):
            mask[: height - n, : width // 2 + n] = True
        scores = np.float32(image.mean() / 256) - np.arange(len(masks), dtype=np.float32) / 8
        found = proposals_of(masks, image_id=image_id, file_name=file_name, scores=scores)
        return replace(found, num_cut_off=self.cut_off.get(file_name, 0))


def propose(proposer: BoxProposer, source: Path, output: Path, **options):
    return propose_images(proposer, source, output, settings=SETTINGS, **options)


def write_image(path: Path, seed: int = 0, share: float = 1) -> None:
    """An image, of whose file only a share is written."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = rng.integers(0, 256, (40 + seed % 7, 30 + seed % 5, 3), np.uint8)
    data = cv2.imencode(path.suffix, image)[1].tobytes()
    path.write_bytes(data[: round(share * len(data))])


def write_images(folder: Path, names: Iterable[str]) -> Path:
    """The folder, with an image by each name."""
    for n, name in enumerate(names):
        write_image(folder / name, n)
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five images, one in a folder of its own, and four files that only look like images."""
    folder = write_images(tmp_path / "photos", GOOD)
    for name, share in zip(BROKEN, (0, 0, 0.5, 0.5), strict=True):
        write_image(folder / name, share=share)
    (folder / "d_text.jpg").write_text("this is no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def results(output: Path) -> set[str]:
    """The results in proposals.json, in any order."""
    found = json.loads((output / "proposals.json").read_text())
    texts = {json.dumps(result, sort_keys=True) for result in found}
    assert len(texts) == len(found)
    return texts


# Broken files.


def test_broken_files_are_named_and_done_once_they_can_be_read(photos, tmp_path, capsys):
    proposer, output = BoxProposer(), tmp_path / "out"
    summary = propose(proposer, photos, output)
    assert proposer.seen == GOOD
    assert (summary.done, summary.done_before, summary.found) == (5, 0, 15)
    assert not summary.none_readable and len(summary.broken) == len(BROKEN)
    printed = capsys.readouterr().out.splitlines()
    for name, message in zip(BROKEN, sorted(summary.broken), strict=True):
        assert str(photos / name) in message and f"  left out: {message}" in printed
    assert json.loads((output / "broken.json").read_text()) == summary.broken
    counts = {"images": 5, "broken": 4, "passed_over": 1, "proposals": 15}
    assert json.loads((output / "metrics.json").read_text()) == counts

    write_image(photos / "d_text.jpg", 9)
    proposer = BoxProposer()
    summary = propose(proposer, photos, output)
    assert proposer.seen == ["d_text.jpg"] and len(summary.broken) == 3
    assert (summary.done, summary.done_before, summary.found) == (1, 5, 18)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "out of memory"),
        (lambda: torch.empty(2**50), "out of memory"),  # PyTorch's own error
        (MemoryError(), "out of memory"),
        (RuntimeError("shapes do\n not fit"), "RuntimeError: shapes do not fit"),
    ],
)
def test_an_image_that_the_network_fails_on_is_named(photos, tmp_path, error, reason):
    summary = propose(BoxProposer(errors={"e.jpg": error}), photos, tmp_path / "out")
    [message] = [m for m in summary.broken if m.startswith(f"{photos / 'e.jpg'}: ")]
    assert reason in message and "\n" not in message
    assert ("32 x 42 px" in message) == (reason == "out of memory")
    assert summary.done == 4 and len(summary.broken) == 5
    proposer = BoxProposer()
    propose(proposer, photos, tmp_path / "out")
    assert proposer.seen == ["e.jpg"], "what failed is not taken as done"


def test_a_mistake_of_ours_is_no_broken_file(photos, tmp_path):
    with pytest.raises(TypeError):
        propose(BoxProposer(errors={"e.jpg": TypeError("a bug")}), photos, tmp_path / "out")
    images = ProposalStore(tmp_path / "out").images().values()
    assert {image["file_name"] for image in images} == {"a.jpg", "c.png"}


def test_exit_status(photos, tiny_checkpoint, tmp_path, call_tool, capsys):
    """0 with a summary when some files are broken, 2 when all are."""
    tool = ["propose", "--device", "cpu", "--checkpoint", tiny_checkpoint, "--images", photos]
    assert call_tool(*tool, "--output", tmp_path / "some") == 0
    printed = capsys.readouterr().out
    assert "5 images" in printed and "4 files could not be used" in printed
    assert all(name in printed for name in BROKEN)

    for name in GOOD:
        (photos / name).write_text("broken too")
    assert call_tool(*tool, "--output", tmp_path / "none") == 2
    assert "9 files could not be used" in capsys.readouterr().out


# Interruptions.


@pytest.mark.parametrize("shard", [1, 150, 10**9])
@pytest.mark.parametrize("stops", [[], [0], [3], [2, 1], [4, 0]])
def test_an_interrupted_run_goes_on_where_it_stopped(photos, tmp_path, monkeypatch, shard, stops):
    monkeypatch.setattr("pipeline.inference.proposal_store.SHARD_BYTES", shard)
    propose(BoxProposer(), photos, tmp_path / "whole")
    todo, output = list(GOOD), tmp_path / "out"
    for stop in stops:
        proposer = BoxProposer(interrupt_at=stop)
        with pytest.raises(KeyboardInterrupt):
            propose(proposer, photos, output)
        assert proposer.seen == todo[:stop]
        todo = todo[stop:]
    for left in (todo, []):  # the second time nothing is left to do
        proposer = BoxProposer()
        summary = propose(proposer, photos, output)
        assert proposer.seen == left and not summary.none_readable
        assert (summary.done, summary.done_before) == (len(left), 5 - len(left))
        assert results(output) == results(tmp_path / "whole")
        listings = ((out / "images.json").read_text() for out in (output, tmp_path / "whole"))
        assert next(listings) == next(listings)


def propose_until_killed(source: Path, output: Path) -> None:
    """For two shards of two images, and one more image."""
    proposal_store.SHARD_BYTES = 200  # of which an image has about 155
    errors = {"f.png": lambda: os.kill(os.getpid(), signal.SIGKILL)}
    propose(BoxProposer(errors=errors), source, output)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_loses_no_finished_shard(tmp_path):
    source, output = tmp_path / "photos", tmp_path / "out"
    names = [f"{letter}.png" for letter in "abcdefgh"]
    for n, name in enumerate(names):
        write_image(source / name, n)
    process = get_context("spawn").Process(target=propose_until_killed, args=(source, output))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL and not (output / "proposals.json").exists()
    proposer = BoxProposer()
    assert propose(proposer, source, output).done_before == 4 and proposer.seen == names[4:]
    propose(BoxProposer(), source, tmp_path / "whole")
    assert results(output) == results(tmp_path / "whole")


@pytest.mark.parametrize("nothing_on", [("c.png",), tuple(GOOD)])
def test_images_without_proposals_are_done(photos, tmp_path, nothing_on):
    summary = propose(BoxProposer(nothing_on=nothing_on), photos, tmp_path / "out")
    assert summary.done == 5 and summary.found == 15 - 3 * len(nothing_on)
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert sorted(image["file_name"] for image in listed) == GOOD
    proposer = BoxProposer()
    assert propose(proposer, photos, tmp_path / "out").done_before == 5
    assert proposer.seen == []


# Another run than before.


def test_another_run_is_refused_before_any_work(photos, tmp_path, monkeypatch):
    """With other settings, other ids, or files of the same names in another folder."""
    output, proposer = tmp_path / "out", BoxProposer()
    propose(BoxProposer(), photos, output)
    before = results(output)
    with pytest.raises(ValueError, match="num_proposals 3 -> 4"):
        propose_images(proposer, photos, output, settings={"num_proposals": 4})
    annotations = listing(tmp_path / "instances.json", a=9)
    with pytest.raises(ValueError, match="a.jpg has the id 9 in .*instances.json.* under 1"):
        propose(proposer, photos, output, annotations=annotations)
    for n, name in enumerate(GOOD):
        write_image(tmp_path / "others" / name, 5 + n)
    for source in (tmp_path / "others", tmp_path / "others" / "a.jpg"):
        with pytest.raises(ValueError, match="image_folder '.*photos' -> '.*others'.*--output"):
            propose(proposer, source, output)
    assert proposer.seen == [] and results(output) == before

    monkeypatch.chdir(tmp_path)  # the same folder under other names
    for source in ("photos", "photos/../photos/*.jpg", "photos/a.jpg"):
        assert propose(proposer, source, output).done == 0


def test_an_annotated_image_that_is_not_there_is_named(photos, tmp_path):
    annotations = listing(tmp_path / "instances.json", a=3, gone=4)
    summary = propose(BoxProposer(), photos, tmp_path / "out", annotations=annotations)
    assert summary.done == 1 and len(summary.broken) == 1 and "gone.jpg" in summary.broken[0]


def test_an_image_that_comes_later_gets_a_new_id(photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "out")
    write_image(photos / "0_first.jpg")  # counting again would give it the id of a.jpg
    propose(BoxProposer(), photos, tmp_path / "out")
    images = ProposalStore(tmp_path / "out").images()
    assert len({image["id"] for image in images.values()}) == len(images) == 6
    COCO(str(tmp_path / "out" / "images.json")).loadRes(str(tmp_path / "out" / "proposals.json"))


# What is written.


def test_results_of_a_network_fit_the_annotations(shapes_directory, tiny_checkpoint, tmp_path):
    annotations = shapes_directory / "annotations" / "instances_val.json"
    images, output = shapes_directory / "images" / "val", tmp_path / "out"
    proposer, settings = load_proposer(tiny_checkpoint, CPU, num_proposals=20)
    summary = propose_images(proposer, images, output, settings=settings, annotations=annotations)
    assert summary.done == 8 and 0 < summary.found <= 8 * 20
    for path in (annotations, output / "images.json"):
        coco = COCO(str(path))
        found = coco.loadRes(str(output / "proposals.json"))
        assert len(found.anns) == summary.found
        for result in found.anns.values():
            image = coco.imgs[result["image_id"]]
            assert result["segmentation"]["size"] == [image["height"], image["width"]]
            assert result["bbox"] == coco_mask.toBbox(result["segmentation"]).tolist()
            assert 0 <= result["score"] <= 1 and result["category_id"] == 1
    for proposals in ProposalStore(output):
        assert (np.diff(proposals.scores) <= 0).all() and len(proposals) <= 20
        listed = found.loadAnns(found.getAnnIds(imgIds=[proposals.image_id]))
        assert [r["segmentation"]["counts"].encode() for r in listed] == proposals.rles
        np.testing.assert_allclose([r["score"] for r in listed], proposals.scores, rtol=1e-3)


def test_what_the_limit_cut_off_is_told_once_also_by_a_run_that_goes_on(photos, tmp_path, capsys):
    cut_off, output = {"a.jpg": 7, "e.jpg": 2310}, tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        propose(BoxProposer(cut_off=cut_off, interrupt_at=3), photos, output)
    capsys.readouterr()
    line = (
        "the limit of 3 cut off proposals above .5 in 2 of 5 images (2,310 in the worst): "
        "--num-proposals or --per-megapixel"
    )
    for _ in range(2):  # the second one has nothing left to do
        propose(BoxProposer(), photos, output)
        assert capsys.readouterr().out.count(line) == 1
    propose(BoxProposer(), photos, tmp_path / "all")
    assert "the limit of" not in capsys.readouterr().out


def test_json_and_pictures_are_written_if_asked_for(photos, tmp_path):
    output = tmp_path / "out"
    summary = propose(BoxProposer(nothing_on=("c.png",)), photos, output, write_json=False)
    assert summary.found == 12
    assert not (output / "proposals.json").exists() and not (output / "drawn").exists()
    propose(BoxProposer(), photos, output, draw=2)  # nothing is left to propose, all to draw
    assert len(results(output)) == 12
    drawn = {p.relative_to(output / "drawn").as_posix() for p in output.rglob("drawn/**/*.jpg")}
    assert drawn == {f"{name}.jpg" for name in GOOD if name != "c.png"}
    original = read_image(photos / "a.jpg")
    picture = read_image(output / "drawn" / "a.jpg.jpg")
    assert picture.shape == original.shape
    change = np.abs(picture.astype(int) - original)[-2:].mean(axis=(0, 2))  # below the label
    assert change[:15].min() > 20 and change[-3:].max() < 20  # the boxes are the left half


# Detections.


def test_a_photograph_that_was_replaced_is_named_and_not_drawn_on(tmp_path, capsys):
    """Its proposals are of the old one, and stay; of another size they cannot be drawn."""
    photo, store = tmp_path / "photo.png", tmp_path / "store"
    cv2.imwrite(str(photo), np.zeros((20, 30, 3), np.uint8))
    propose_images(BoxProposer(), photo, store, settings=SETTINGS, draw=2)
    assert "newer" not in capsys.readouterr().out
    picture = (store / "drawn" / "photo.png.jpg").read_bytes()
    cv2.imwrite(str(photo), np.zeros((9, 8, 3), np.uint8))
    os.utime(photo, (time.time() + 9, time.time() + 9))
    propose_images(BoxProposer(), photo, store, settings=SETTINGS, draw=2)
    out = capsys.readouterr().out
    assert "1 images are newer than their proposals, such as photo.png" in out
    assert "not drawn: photo.png has another size than its proposals" in out
    assert (store / "drawn" / "photo.png.jpg").read_bytes() == picture
