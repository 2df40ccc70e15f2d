"""Proposals for a folder: broken files, interruptions, ids, and files that COCO's tools read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pipeline.load import load_proposer
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from datasets.images import read_image
from pipeline.inference.proposals import Proposals, ProposalStore
from pipeline.inference.propose_run import propose_images

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {"num_proposals": 3}


class BoxProposer:
    """Stands in for a network: three boxes whose sizes and scores follow from the image.

    Args:
        interrupt_at: raise KeyboardInterrupt at this image, counted from 0. nothing_on: file names
            without proposals.
    """

    def __init__(self, *, interrupt_at: int | None = None, nothing_on: tuple[str, ...] = ()):
        self.interrupt_at, self.nothing_on, self.seen = interrupt_at, nothing_on, []

    def __call__(self, image: np.ndarray, *, image_id: int, file_name: str) -> Proposals:
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        self.seen.append(file_name)
        height, width = image.shape[:2]
        count = 0 if file_name in self.nothing_on else 3
        masks = np.zeros((height, width, count), np.uint8, order="F")
        for n in range(count):
            masks[: height - n, : width // 2 + n, n] = 1
        boxes = [[0, 0, width // 2 + n, height - n] for n in range(count)]
        scores = np.float32(image.mean() / 256) - np.arange(count, dtype=np.float32) / 8
        counts = [rle["counts"] for rle in coco_mask.encode(masks)]
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        return Proposals(image_id, file_name, height, width, scores, boxes, counts)


def write_image(path: Path, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = rng.integers(0, 256, (20 + seed % 7, 30 + seed % 5, 3), np.uint8)
    assert cv2.imwrite(str(path), image)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Five images, one in a folder of its own, and four files that only look like images."""
    folder = tmp_path / "photos"
    for number, name in enumerate(["a.jpg", "c.png", "e.jpg", "inner/b.jpg", "k.jpg"]):
        write_image(folder / name, number)
    (folder / "b_empty.jpg").touch()
    (folder / "d_text.jpg").write_text("this is no image")
    half(folder / "f_half.jpg")
    half(folder / "g_half.png")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def half(path: Path) -> None:
    write_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


GOOD = ["a.jpg", "c.png", "e.jpg", "inner/b.jpg", "k.jpg"]
BROKEN = ["b_empty.jpg", "d_text.jpg", "f_half.jpg", "g_half.png"]


def results(output: Path) -> set[str]:
    """The results in proposals.json, in any order."""
    found = json.loads((output / "proposals.json").read_text())
    texts = {json.dumps(result, sort_keys=True) for result in found}
    assert len(texts) == len(found)
    return texts


def propose(proposer: BoxProposer, source: Path, output: Path, **options):
    return propose_images(proposer, source, output, settings=SETTINGS, **options)


# Broken files -------------------------------------------------------------------------------------


def test_broken_files_are_named_and_the_others_done(photos, tmp_path, capsys):
    proposer, output = BoxProposer(), tmp_path / "out"
    summary = propose(proposer, photos, output)
    assert proposer.seen == GOOD
    assert (summary.done, summary.done_before, summary.proposals) == (5, 0, 15)
    assert not summary.none_readable
    printed = capsys.readouterr().out.splitlines()
    for name in BROKEN:
        assert sum(str(photos / name) in message for message in summary.broken) == 1
        assert any("left out" in line and str(photos / name) in line for line in printed)
    assert len(summary.broken) == 4
    assert json.loads((output / "broken.json").read_text()) == summary.broken
    assert json.loads((output / "metrics.json").read_text()) == {
        "images": 5,
        "broken": 4,
        "proposals": 15,
    }


def test_a_file_that_was_broken_is_done_once_it_can_be_read(photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "out")
    write_image(photos / "d_text.jpg", 9)
    proposer = BoxProposer()
    summary = propose(proposer, photos, tmp_path / "out")
    assert proposer.seen == ["d_text.jpg"]
    assert (summary.done, summary.done_before, summary.proposals) == (1, 5, 18)
    assert len(summary.broken) == 3


def fails_on(name: str, error: Exception) -> BoxProposer:
    class Failing(BoxProposer):
        def __call__(self, image: np.ndarray, *, image_id: int, file_name: str) -> Proposals:
            if file_name == name:
                raise error
            return super().__call__(image, image_id=image_id, file_name=file_name)

    return Failing()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("shapes do\n not fit"), "RuntimeError: shapes do not fit"),
    ],
)
def test_an_image_that_the_network_fails_on_is_named_and_the_others_done(
    photos, tmp_path, error, reason
):
    summary = propose(fails_on("e.jpg", error), photos, tmp_path / "out")
    [message] = [m for m in summary.broken if m.startswith(f"{photos / 'e.jpg'}: ")]
    assert reason in message and "\n" not in message
    assert ("32 x 22 px" in message) == (reason == "out of memory")
    assert summary.done == 4 and len(summary.broken) == 5
    proposer = BoxProposer()
    propose(proposer, photos, tmp_path / "out")
    assert proposer.seen == ["e.jpg"], "what failed is not taken as done"


def test_memory_runs_out_in_pytorch_itself(photos, tmp_path):
    class Greedy(BoxProposer):
        def __call__(self, image: np.ndarray, **names) -> Proposals:
            torch.empty(2**50)
            raise AssertionError("there is memory for four petabytes")

    summary = propose(Greedy(), photos / "a.jpg", tmp_path / "out")
    assert summary.none_readable and "a.jpg: out of memory at 30 x 20 px" in summary.broken[0]


def test_a_mistake_of_ours_is_no_broken_file(photos, tmp_path):
    with pytest.raises(TypeError):
        propose(fails_on("e.jpg", TypeError("a bug")), photos, tmp_path / "out")
    assert set(ProposalStore(tmp_path / "out").images()) == {"a.jpg", "c.png"}


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


# Interruptions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [1, 2, 16])
@pytest.mark.parametrize("stops", [[0], [3], [2, 1], [4, 0]])
def test_an_interrupted_run_goes_on_where_it_stopped(photos, tmp_path, monkeypatch, shard, stops):
    monkeypatch.setattr("pipeline.inference.propose_run.MAX_IMAGES_IN_SHARD", shard)
    propose(BoxProposer(), photos, tmp_path / "whole")
    left, output = list(GOOD), tmp_path / "out"
    for stop in stops:
        proposer = BoxProposer(interrupt_at=stop)
        with pytest.raises(KeyboardInterrupt):
            propose(proposer, photos, output)
        assert proposer.seen == left[:stop]
        left = left[stop:]
    proposer = BoxProposer()
    summary = propose(proposer, photos, output)
    assert proposer.seen == left
    assert (summary.done, summary.done_before) == (len(left), 5 - len(left))
    assert results(output) == results(tmp_path / "whole")
    assert (output / "images.json").read_text() == (tmp_path / "whole" / "images.json").read_text()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
import pipeline.inference.propose_run as run
from test_propose_run import BoxProposer, propose

class Killed(BoxProposer):
    def __call__(self, image, **names):
        if len(self.seen) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(image, **names)

run.MAX_IMAGES_IN_SHARD = 2
propose(Killed(), Path({source!r}), Path({output!r}))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_loses_no_finished_shard(tmp_path):
    source, output = tmp_path / "photos", tmp_path / "out"
    names = [f"{chr(ord('a') + n)}.png" for n in range(8)]
    for n, name in enumerate(names):
        write_image(source / name, n)
    places = {"root": ROOT, "here": Path(__file__).parent, "source": source, "output": output}
    script = KILLED.format(**{name: str(path) for name, path in places.items()})
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == -9
    assert not (output / "proposals.json").exists()

    proposer = BoxProposer()
    summary = propose(proposer, source, output)
    assert proposer.seen == names[4:]  # two shards of two images were whole
    assert summary.done_before == 4
    propose(BoxProposer(), source, tmp_path / "whole")
    assert results(output) == results(tmp_path / "whole")


def test_nothing_left_to_do(photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "out")
    before, proposer = results(tmp_path / "out"), BoxProposer()
    summary = propose(proposer, photos, tmp_path / "out")
    assert proposer.seen == [] and summary.done_before == 5 and not summary.none_readable
    assert results(tmp_path / "out") == before


@pytest.mark.parametrize("nothing_on", [("c.png",), tuple(GOOD)])
def test_images_without_proposals_are_done(photos, tmp_path, nothing_on):
    summary = propose(BoxProposer(nothing_on=nothing_on), photos, tmp_path / "out")
    assert summary.done == 5 and summary.proposals == 15 - 3 * len(nothing_on)
    listed = json.loads((tmp_path / "out" / "images.json").read_text())["images"]
    assert sorted(image["file_name"] for image in listed) == GOOD
    proposer = BoxProposer()
    assert propose(proposer, photos, tmp_path / "out").done_before == 5
    assert proposer.seen == []


def test_a_store_of_other_settings_is_refused_before_any_work(photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "out")
    before, proposer = results(tmp_path / "out"), BoxProposer()
    with pytest.raises(ValueError, match="num_proposals 3 -> 4"):
        propose_images(proposer, photos, tmp_path / "out", settings={"num_proposals": 4})
    assert proposer.seen == [] and results(tmp_path / "out") == before


# Ids and folders ---------------------------------------------------------------------------------


def listing(path: Path, **ids_of: int) -> Path:
    images = [{"id": n, "file_name": f"{name}.jpg"} for name, n in ids_of.items()]
    path.write_text(json.dumps({"images": images}))
    return path


def test_an_annotated_image_that_is_not_there_is_named(tmp_path):
    write_image(tmp_path / "photos" / "a.jpg")
    annotations = listing(tmp_path / "instances.json", a=3, gone=4)
    summary = propose(BoxProposer(), tmp_path / "photos", tmp_path / "out", annotations=annotations)
    assert summary.done == 1 and len(summary.broken) == 1 and "gone.jpg" in summary.broken[0]


def test_other_ids_than_before_are_refused(tmp_path):
    write_image(tmp_path / "photos" / "a.jpg")
    first, second = listing(tmp_path / "1.json", a=3), listing(tmp_path / "2.json", a=4)
    propose(BoxProposer(), tmp_path / "photos", tmp_path / "out", annotations=first)
    with pytest.raises(ValueError, match="a.jpg has the id 4 in .*2.json.* under 3"):
        propose(BoxProposer(), tmp_path / "photos", tmp_path / "out", annotations=second)


def test_an_image_that_comes_later_gets_an_id_of_its_own(photos, tmp_path):
    propose(BoxProposer(), photos, tmp_path / "out")
    write_image(photos / "0_first.jpg")  # counting again would give it the id of a.jpg
    propose(BoxProposer(), photos, tmp_path / "out")
    images = ProposalStore(tmp_path / "out").images()
    assert len({image["id"] for image in images.values()}) == len(images) == 6
    COCO(str(tmp_path / "out" / "images.json")).loadRes(str(tmp_path / "out" / "proposals.json"))


def test_another_folder_with_files_of_the_same_names_is_refused(photos, tmp_path, monkeypatch):
    propose(BoxProposer(), photos, tmp_path / "out")
    before, proposer = results(tmp_path / "out"), BoxProposer()
    for n, name in enumerate(GOOD):
        write_image(tmp_path / "others" / name, 5 + n)
    for source in (tmp_path / "others", tmp_path / "others" / "a.jpg"):
        with pytest.raises(ValueError, match="image_folder '.*photos' -> '.*others'.*--output"):
            propose(proposer, source, tmp_path / "out")
    assert proposer.seen == [] and results(tmp_path / "out") == before

    monkeypatch.chdir(tmp_path)  # the same folder under other names
    for source in ("photos", "photos/../photos/*.jpg", "photos/a.jpg"):
        assert propose(proposer, source, tmp_path / "out").done == 0


# Results ------------------------------------------------------------------------------------------


def test_results_of_a_network_fit_the_annotations(shapes_directory, tiny_checkpoint, tmp_path):
    annotations = shapes_directory / "annotations" / "instances_val.json"
    images, output = shapes_directory / "images" / "val", tmp_path / "out"
    proposer, settings = load_proposer(tiny_checkpoint, torch.device("cpu"), num_proposals=20)
    summary = propose_images(proposer, images, output, settings=settings, annotations=annotations)
    assert summary.done == 8 and 0 < summary.proposals <= 8 * 20

    for listing in (annotations, output / "images.json"):
        coco = COCO(str(listing))
        found = coco.loadRes(str(output / "proposals.json"))
        assert len(found.anns) == summary.proposals
        for result in found.anns.values():
            image = coco.imgs[result["image_id"]]
            assert coco_mask.decode(result["segmentation"]).shape == (
                image["height"],
                image["width"],
            )
            assert result["bbox"] == coco_mask.toBbox(result["segmentation"]).tolist()
            assert 0 <= result["score"] <= 1
    for proposals in ProposalStore(output):
        assert (np.diff(proposals.scores) <= 0).all() and len(proposals) <= 20


def test_pictures_are_drawn_of_all_images_with_proposals(photos, tmp_path):
    output = tmp_path / "out"
    propose(BoxProposer(nothing_on=("c.png",)), photos, output)
    assert not (output / "drawn").exists()
    propose(BoxProposer(), photos, output, draw=2)  # nothing is left to propose, all to draw
    drawn = sorted(
        p.relative_to(output / "drawn").as_posix() for p in output.rglob("drawn/**/*.jpg")
    )
    assert drawn == [f"{name}.jpg" for name in GOOD if name != "c.png"]
    original = read_image(photos / "a.jpg")
    picture = read_image(output / "drawn" / "a.jpg.jpg")
    assert picture.shape == original.shape
    change = np.abs(picture.astype(int) - original)[-2:].mean(axis=(0, 2))  # below the label
    assert change[:15].min() > 20 and change[-3:].max() < 20  # the boxes are the left half
