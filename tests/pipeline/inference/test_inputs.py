"""Which files are input: each real one once, nothing of a run's own, and what is not is said."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from datasets.images import list_images
from pipeline.evaluation.scores import score_proposals
from pipeline.inference.image_files import find_images
from pipeline.inference.proposal_store import ProposalStore
from tests.coco_json import rectangle
from tests.pipeline.inference.test_propose_folders import (
    BoxProposer,
    listing,
    propose,
    write_image,
    write_images,
)
from tests.pipeline.test_image_frames import write_image as write_turned


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", ("a.png", "b.png", "inner/c.png"))


def names(source, **options) -> list[str]:
    return sorted(file.file_name for file in find_images(source, None, **options))


ALL = ["a.png", "b.png", "inner/c.png"]


@pytest.mark.parametrize(
    "links",
    [
        {"all": "."},
        {"a_first": ".", "z_last": "."},  # as a tree, 2^40 paths
        {"inner/up": ".."},
        {"0": "inner"},  # a link before the folder's own name
        {"one": "two", "two": "one"},
        {"inner/loop": "loop"},
    ],
)
@pytest.mark.parametrize("pattern", ["", "**/*", "**/*.png", "**"])
def test_a_folder_is_visited_once(photos, links, pattern):
    for name, target in links.items():
        (photos / name).symlink_to(target)
    assert names(str(photos / pattern)) == ALL


def test_a_glob_through_a_link_finds_a_file_by_its_own_name(photos):
    (photos / "0").symlink_to("inner")
    assert [path.name for path in list_images(str(photos / "*" / "*.png"))] == ["c.png"]
    assert list_images(str(photos / "*" / "*.png")) == [photos / "inner" / "c.png"]


def test_a_folder_that_only_a_link_leads_to_is_visited(photos, tmp_path):
    shutil.move(photos / "inner", tmp_path / "elsewhere")
    (photos / "inner").symlink_to(tmp_path / "elsewhere")
    assert names(photos) == ALL


@pytest.mark.parametrize("output", ["out", "inner/out", "../photos/out"])
def test_what_a_run_writes_is_no_input_of_the_next(photos, output):
    for _ in range(3):
        proposer = BoxProposer()
        assert propose(proposer, photos, photos / output, draw=2).found == 9
    assert proposer.seen == []


def test_two_images_of_one_file_are_both_proposed_for_and_scored(photos, tmp_path):
    names = {5: "a.png", 9: "a.png", 2: "b.png"}
    sizes = {"a.png": (40, 30), "b.png": (41, 31)}
    content = {
        "images": [
            {"id": i, "file_name": name, "height": sizes[name][0], "width": sizes[name][1]}
            for i, name in names.items()
        ],
        # The left half, which is proposed; on the second of the two images something else.
        "annotations": [
            rectangle(1, 5, 1, 0, 0, 15, 40),
            rectangle(2, 9, 1, 20, 3, 9, 30),
            rectangle(3, 2, 1, 0, 0, 15, 41),
        ],
        "categories": [{"id": 1, "name": "c1"}],
    }
    annotations = tmp_path / "two.json"
    annotations.write_text(json.dumps(content))
    assert propose(BoxProposer(), photos, tmp_path / "out", annotations=annotations).found == 9
    assert ProposalStore(tmp_path / "out").images().keys() == names.keys()
    for results in (tmp_path / "out", tmp_path / "out" / "proposals.json"):
        metrics = score_proposals(annotations, results, tmp_path / "scores")
        assert metrics["mask"]["AR@10"] == pytest.approx(2 / 3)


def test_results_beside_the_images(photos):
    for _ in range(2):
        assert propose(BoxProposer(), photos, photos, draw=2).found == 9


def test_results_of_a_detector_that_proposes(photos):
    drawn = photos / "out" / "drawn" / "a.png.jpg"
    write_image(drawn)
    summary = propose(
        BoxProposer(), photos, photos / "out" / "proposals", above_output=photos / "out"
    )
    assert summary.done == 3


def test_files_that_are_passed_over_are_counted(photos, tmp_path, capsys):
    for name in ("1.HEIC", "2.heic", "3.DNG", "labels.txt", "no_suffix", ".hidden"):
        (photos / name).touch()
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "linked.png").symlink_to("a.png")
    summary = propose(BoxProposer(), photos, tmp_path / "out")
    assert summary.done == 4
    assert summary.passed_over == Counter(
        {".heic": 2, ".dng": 1, ".txt": 1, "without a suffix": 1, "dangling link": 1}
    )
    assert "passed over 6 other files: 2 .heic, " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["passed_over"] == 6


def test_a_name_that_is_not_utf8_is_named_and_nothing_else_lost(photos, tmp_path, capsys):
    os.rename(os.fsencode(photos / "b.png"), os.fsencode(photos) + b"/caf\xe9.png")
    summary = propose(BoxProposer(), photos, tmp_path / "out", draw=1)
    assert summary.done == 2 and summary.found == 6
    [message] = summary.broken
    assert "caf\\udce9.png: its name is not UTF-8; rename it" in message
    assert message in capsys.readouterr().out
    assert propose(BoxProposer(), photos, tmp_path / "out").done_before == 2
    with pytest.raises(ValueError, match=r"caf\\udce9.png: its name is not UTF-8"):
        names(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"))


@pytest.mark.parametrize("name", ["a\nb.png", "[x]*?.png", "ü 图.png", "-x.png", "'\".png"])
def test_odd_names(photos, tmp_path, name):
    shutil.move(photos / "a.png", photos / name)
    assert name in names(photos)
    assert propose(BoxProposer(), photos, tmp_path / "out", draw=1).done == 3
    assert propose(BoxProposer(), [photos / name], tmp_path / "one").done == 1


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["a.png"], ["a.png"]),
        (["a.png", "b.png"], ["a.png", "b.png"]),
        (["a.png", "./a.png", "*.png"], ["a.png", "b.png"]),
        (["a.png", "inner"], ["a.png", "inner/c.png"]),
        (["inner", "*.png"], ALL),
        ([".", "inner"], ALL),
    ],
)
def test_several_paths(photos, monkeypatch, sources, expected):
    monkeypatch.chdir(photos)
    assert names(sources) == expected
    assert names([str(photos / source) for source in sources]) == expected
    mixed = [sources[0], *(str(photos / source) for source in sources[1:])]
    assert names(mixed) == expected


def test_several_paths_with_annotations(photos, tmp_path):
    annotations = tmp_path / "a.json"
    images = [{"id": 7, "file_name": "b.png"}, {"id": 8, "file_name": "inner/c.png"}]
    annotations.write_text(json.dumps({"images": images}))
    found = find_images([photos / "b.png", photos / "inner"], annotations)
    assert {file.file_name: file.image_id for file in found} == {"b.png": 7, "inner/c.png": 8}


@pytest.mark.parametrize("sources", [["a.png", "nowhere.png"], ["a.png", "*.bmp"]])
def test_one_of_several_paths_is_not_there(photos, monkeypatch, sources):
    monkeypatch.chdir(photos)
    with pytest.raises(ValueError, match="nowhere.png: no such file|bmp: no image files"):
        find_images(sources, None)


def test_proposals_json_is_written_only_for_something_new(photos, tmp_path):
    output, path = tmp_path / "out", tmp_path / "out" / "proposals.json"
    propose(BoxProposer(), photos, output)
    os.utime(path, ns=(2**62, 2**62))
    propose(BoxProposer(), photos, output)
    assert path.stat().st_mtime_ns == 2**62
    write_image(photos / "d.png")
    assert propose(BoxProposer(), photos, output).found == len(json.loads(path.read_text())) == 12
    for stale in (lambda: path.unlink(), lambda: os.utime(path, (0, 0))):  # a run was killed
        stale()
        propose(BoxProposer(), photos, output)
        assert path.stat().st_mtime > 0 and len(json.loads(path.read_text())) == 12


def test_a_store_keeps_its_frame(tmp_path):
    photos, annotations = tmp_path / "photos", listing(tmp_path / "a.json", a=1)
    photos.mkdir()
    write_turned(photos / "a.jpg", 6)
    content = json.loads(annotations.read_text())
    content["images"][0] |= {"height": 40, "width": 60}
    annotations.write_text(json.dumps(content))
    for exif, height in (("auto", 40), ("ignore", 40), ("apply", 60)):
        output = tmp_path / exif
        propose(BoxProposer(), photos, output, annotations=annotations, exif=exif)
        images = json.loads((output / "images.json").read_text())["images"]
        assert [image["height"] for image in images] == [height]
        assert propose(BoxProposer(), photos, output).done_before == 1
    with pytest.raises(ValueError, match="exif 'ignore' -> None"):
        propose(BoxProposer(), photos, tmp_path / "ignore", exif="apply")
