"""The page of a whole run: its tables, pictures, commands and links."""

import json
import re
import shutil
from functools import partial

import pytest

from pipeline.report.report import decimal, duration, gain
from tests.pipeline.report.report_page import decode_uri, page_of
from tests.pipeline.report.small_run import (
    NUM_WITH_OBJECTS,
    SIDE,
    SQUARE,
    STORE,
    make_dataset,
    object_of,
    proposals_of,
    write_dataset,
    write_run,
    write_stage,
    write_store,
    write_summary,
)

DETECTOR = "multipathnet"
relative = partial(gain, relative=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of a complete run of DeepMask and the detector, with its plots."""
    directory = tmp_path_factory.mktemp("whole")
    return page_of(write_run(directory), make_dataset(directory / "data"))


def assert_tables(page, *tables):
    """Their rows follow each other on the page."""
    for table in tables:
        start = page.rows.index(table[0])
        assert page.rows[start : start + len(table)] == table


def test_scores_of_proposals_and_training(whole):
    def rows(iou_type, scored, perfect):
        """AR@10, AR@100, AR@1000, AUC, small, medium, large."""
        for ranking, start in (("by score", scored), ("perfect", perfect)):
            values = [f"0.{start + i}" for i in range(6)]
            yield ["deepmask", iou_type, ranking, *values[:4], "–", *values[4:]]

    assert_tables(
        whole,
        [*rows("mask", 110, 210), *rows("box", 100, 200)],
        [["stage", "mean IoU", "median IoU", "IoU > 0.5", "IoU > 0.7", "score accuracy"],
         ["deepmask", "0.761", "0.792", "0.873", "0.664", "0.915"]],
        [["deepmask", "1,200", "2.0", "0.711 → 0.213", "0.402 → 0.402", "100", "30.0"]],
    )  # fmt: skip


def test_scores_of_detections(whole):
    shown = ["0.301", "0.302", "0.303", "0.304", "0.305", "0.306", "0.307", "0.308"]
    assert_tables(
        whole,
        [[DETECTOR, "box", "0.300", *shown],
         [DETECTOR, "mask", "0.200", *(v.replace("0.3", "0.2") for v in shown)]],
        [[DETECTOR, "200", "2.0", "1.510 → 0.520", "0.410 → 0.220", "100", "8.0"]],
        [["IoU at least", "0.50", "0.75", "0.95"],
         ["box AP", "0.610", "0.310", "0.010"],
         ["mask AP", "0.520", "0.220", "–"]],
        [["proposals per image", "10", "400"],
         ["box AP", "0.151", "0.300"],
         ["mask AP", "0.142", "0.200"]],
        [["category", "annotations", "detections", "box AP", "mask AP"],
         ["<i>ring", "12", "1,234", "0.410", "0.320"],
         ["bar", "3", "5", "0.230", "0.110"],
         ["none", "0", "1", "–", "–"],
         ["sum, mean", "15", "1,240", "0.320", "0.215"]],
    )  # fmt: skip
    assert "2 of the 3 categories have annotated objects" in whole.text
    assert "1 of them has fewer than 10" in whole.text
    assert "saturates near 400 proposals" in whole.text


def test_whole_run_has_all_plots_and_pictures_and_no_warning(whole):
    assert whole.warning == ""
    assert len([tag for tag, _ in whole.elements if tag == "svg"]) == 4 + 4
    uris, alts = whole.all("img", "src"), whole.all("img", "alt")
    assert len(uris) == (3 + 2) * NUM_WITH_OBJECTS
    assert len([alt for alt in alts if "annotated objects" in alt]) == 2 * NUM_WITH_OBJECTS
    sizes = {decode_uri(uri).shape for uri in uris}
    assert sizes == {(SIDE, SIDE, 3), (2 * SIDE, 2 * SIDE, 3)}
    assert "1 of 1 object found" in whole.text and "0 of 1 object found" in whole.text
    assert "score of 0.3 or more: 4 of all 6" in whole.text
    assert "the 3 images with objects were ordered" in whole.text


def test_page_needs_nothing_else_and_its_links_lead_somewhere(whole):
    attributes = [item for _, given in whole.elements for item in given.items()]
    sources = [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset")]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in whole.elements}
    urls = re.findall(r"url\(([^)]{,80})", whole.html)
    assert urls and all(url.startswith("#") for url in urls)
    ids = {f"#{v}" for k, v in attributes if k == "id"}
    links = set(whole.all("a", "href"))
    assert f"#{DETECTOR}" in links and links <= ids


def test_seconds_settings_and_software(run, dataset):
    summary = json.loads((run / "summary.json").read_text())
    summary["seconds"][DETECTOR] = 62.1
    (run / "summary.json").write_text(json.dumps(summary))
    page = page_of(run, dataset)
    assert_tables(
        page, [["deepmask", "4 min 11 s"], [DETECTOR, "1 min 02 s"], ["together", "5 min 13 s"]]
    )
    assert "seed: 7" in page.text and "seed: 9" in page.text
    assert '"num_proposals": 1000' in page.text
    assert {"Python", "torch", "machine"} <= {row[0] for row in page.rows if row}


def test_commands_repeat_the_steps(tmp_path, run, dataset):
    run = run.rename(tmp_path / "a run")
    page, (annotations, images) = page_of(run, dataset), dataset
    mask, at = f"'{run}/deepmask'", f"'{run}/{DETECTOR}'"
    truth = f"--annotations {annotations}"
    for line in (
        f"train_stage.py --stage deepmask --config {mask}/config.yaml --output {mask}",
        f"score_coco.py patches --checkpoint {mask}/checkpoints/best.pt {truth} --images {images} "
        f"--output {mask}/patches",
        f"propose.py --checkpoint {mask}/checkpoints/best.pt {truth} --images {images} "
        f"--output {mask}/proposals",
        f"score_coco.py proposals {truth} --results {mask}/proposals --output {mask}/scores",
        f"train_stage.py --stage {DETECTOR} --config {at}/config.yaml --output {at}",
        f"detect.py --checkpoint {at}/checkpoints/best.pt --proposals '{run}/deepmask/proposals' "
        f"--images {images} --output {at}",
        f"score_coco.py detections {truth} --results {at}/detections.json --output {at}/scores",
    ):
        assert f"python tools/{line}\n" in page.text
    (run / "sharpmask" / "proposals").mkdir(parents=True)
    assert f"--proposals '{run}/sharpmask/proposals'" in page_of(run, dataset).text


def test_stages_stand_side_by_side_in_their_order(run, dataset):
    shutil.rmtree(run / DETECTOR)
    write_stage(run / "sharpmask", STORE, start=0.5)
    write_summary(run, "sharpmask", "deepmask")
    page = page_of(run, dataset)
    assert [row[0] for row in page.rows[1:9]] == ["deepmask"] * 4 + ["sharpmask"] * 4
    assert page.rows[5][1:4] == ["mask", "by score", "0.510"]
    assert DETECTOR not in page.text and "Detections" not in page.text and page.warning == ""
    assert len(page.all("img", "alt")) == 2 * 3 * NUM_WITH_OBJECTS + 4  # two found by both


def test_text_from_files_is_escaped(tmp_path, run):
    name = "<i>&amp;.png"
    dataset = write_dataset(tmp_path / "odd", [name], [object_of(1, SQUARE)])
    shutil.rmtree(run / "deepmask" / "proposals")
    write_store(run / "deepmask" / "proposals", [proposals_of(1, name, [SQUARE])])
    (run / "deepmask" / "config.yaml").write_text("trunk: <script>alert(1)</script>\n")
    (run / DETECTOR / "detections.json").unlink()  # of other images
    odd = run.rename(tmp_path / "<b>run")
    page = page_of(odd, dataset)
    assert not {"i", "script"} & {tag for tag, _ in page.elements}
    assert name in page.text and "<script>alert(1)</script>" in page.text
    assert f"Report of {odd}" in page.text


@pytest.mark.parametrize(
    ("function", "given", "text"),
    [(decimal, (0.03333,), "0.033"), (decimal, (0.0,), "0.000"), (decimal, (None,), "–"),
     (decimal, (float("nan"), 1), "–"), (decimal, (12345, 0), "12,345"),
     (duration, (9.87,), "9.9 s"), (duration, (62.1,), "1 min 02 s"),
     (duration, (3599,), "59 min 59 s"), (duration, (7384,), "2 h 3 min"),
     (gain, (0.5, 0.6), "+0.100"), (gain, (0.5, 0.4), "−0.100"), (gain, (0.0, 0.1), "+0.100"),
     (gain, (None, 0.1), "–"), (gain, (0.1, None), "–"), (relative, (0.5, 0.6), "+20.0 %"),
     (relative, (0.5, 0.4), "−20.0 %"), (relative, (0.0, 0.1), "–"), (relative, (0.1, None), "–")],
)  # fmt: skip
def test_numbers_as_text(function, given, text):
    assert function(*given) == text
