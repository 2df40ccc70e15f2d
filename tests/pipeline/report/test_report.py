"""The page of a whole run: its tables, pictures, commands and links; and of runs with gaps."""

import json
import re
import shutil
from functools import partial

import pytest
from markupsafe import Markup

from pipeline.report import plots
from pipeline.report.report import decimal, duration, gain
from tests.pipeline.report.report_page import Page, decode_uri
from tests.pipeline.report.small_run import (
    DETECTION_METRICS,
    HALF,
    RECORDS,
    SIDE,
    SUMMARY,
    make_dataset,
    write_run,
)

DETECTOR = "multipathnet"
SCORES = f"{DETECTOR}/scores"
NUM_WITH_OBJECTS = 3  # of the images
relative = partial(gain, relative=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A run, and its images in `data`; read it, do not change it."""
    directory = tmp_path_factory.mktemp("whole")
    make_dataset(directory / "data")
    write_run(directory / "a <b>run")
    return directory


@pytest.fixture(scope="module")
def dataset(directory):
    return directory / "data" / "truth.json", directory / "data"


@pytest.fixture(scope="module")
def whole(directory, dataset):
    """The page of a complete run, with its plots."""
    return Page(directory / "a <b>run", dataset)


# A complete run.


def ar_rows(stage, iou_type, scored):
    """AR@10, AR@100, AR@1000, AUC, small, medium, large: by score, and perfectly ranked."""
    for ranking, start in (("by score", scored), ("perfect", scored + 100)):
        values = [f"0.{start + i}" for i in range(6)]
        yield [stage, iou_type, ranking, *values[:4], "–", *values[4:]]


def patch_rows(*names):
    return [[name, "0.761", "0.792", "0.873", "0.664", "0.915"] for name in names]


def training_rows(*names):
    row = ["1,200", "2.0", "0.711 → 0.213", "0.402 → 0.402", "100", "30.0"]
    return [[name, *row] for name in names]


STAGES = ("deepmask", "sharpmask")
AP = ["0.301", "0.302", "0.303", "0.304", "0.305", "0.306", "0.307", "0.308"]
TABLES = {
    "detections": [[DETECTOR, "box", "0.300", *AP],
                   [DETECTOR, "mask", "0.200", *(v.replace("0.3", "0.2") for v in AP)]],
    "proposals": [*ar_rows("deepmask", "mask", 110), *ar_rows("deepmask", "box", 100),
                  *ar_rows("sharpmask", "mask", 170), *ar_rows("sharpmask", "box", 160)],
    "patches": [["stage", "mean IoU", "median IoU", "IoU > 0.5", "IoU > 0.7", "score accuracy"],
                *patch_rows(*STAGES)],
    "training": training_rows(*STAGES),
    "training of the detector": [
        [DETECTOR, "200", "2.0", "1.510 → 0.520", "0.410 → 0.220", "100", "8.0"]],
    "compared": [["DeepMask", "0.110", "0.111", "0.112", "0.113", "–", "0.114", "0.115"],
                 ["SharpMask", "0.170", "0.171", "0.172", "0.173", "–", "0.174", "0.175"],
                 ["difference", *["+0.060"] * 4, "–", *["+0.060"] * 2],
                 ["relative", "+54.5 %", "+54.1 %", "+53.6 %", "+53.1 %", "–", "+52.6 %",
                  "+52.2 %"]],
    "AP by IoU": [["IoU at least", "0.50", "0.75", "0.95"],
                  ["box AP", "0.610", "0.310", "0.010"],
                  ["mask AP", "0.520", "0.220", "–"]],
    "AP by proposals": [["proposals per image", "10", "400"],
                        ["box AP", "0.151", "0.300"],
                        ["mask AP", "0.142", "0.200"]],
    "categories": [["category", "annotations", "detections", "box AP", "mask AP"],
                   ["<i>ring", "12", "1,234", "0.410", "0.320"],
                   ["bar", "3", "5", "0.230", "0.110"],
                   ["none", "0", "1", "–", "–"],
                   ["sum, mean", "15", "1,240", "0.320", "0.215"]],
    "seconds": [["deepmask", "4 min 11 s"], [DETECTOR, "1 min 02 s"], ["together", "5 min 13 s"]],
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rows_follow_each_other(whole, table):
    start = whole.rows.index(table[0])
    assert whole.rows[start : start + len(table)] == table


@pytest.mark.parametrize(
    "text",
    [
        "2 of the 3 categories have annotated objects",
        "1 of them has fewer than 10",
        "saturates near 400 proposals",
        "1 of 1 object found",
        "0 of 1 object found",
        "score of 0.3 or more: 4 of all 6",
        "the 3 images with objects were ordered",
        "<script>deepmask</script>",
        "<script>multipathnet</script>",
        '"num_proposals": 1000',
        "IoU 1.00 → 1.00, +0.00",
        "IoU 0.50 → 1.00, +0.50",
        "Of the 5 that were looked at",
        "5 are in both stores",
        "2 objects have one",
        "Of all 2, 1 (50 %) gained",
        f"{HALF}\n",
    ],
)
def test_texts(whole, text):
    assert text in whole.text


def test_nothing_is_missing_and_text_from_files_is_escaped(whole):
    assert whole.missing == [] and "/a <b>run" in whole.text
    assert not {"i", "script", "link", "iframe"} & {tag for tag, _ in whole.elements}
    assert {"Python", "torch", "machine"} <= {row[0] for row in whole.rows if row}


def test_plots_and_pictures(whole):
    assert len([tag for tag, _ in whole.elements if tag == "svg"]) == 5 + 5 + 2 + 4
    uris, alts = whole.all("img", "src"), whole.all("img", "alt")
    num_compared = 2 * 2  # two objects that both stages found
    assert len(uris) == (3 + 3 + 2) * NUM_WITH_OBJECTS + num_compared
    assert len([alt for alt in alts if "annotated objects" in alt]) == 3 * NUM_WITH_OBJECTS
    shapes = {decode_uri(uri).shape for uri in uris}
    assert shapes == {(SIDE, SIDE, 3), (2 * SIDE, 2 * SIDE, 3), (288, 288, 3)}
    compared = whole.html.partition('<h2 id="comparison">')[2].partition("<h2 ")[0]
    assert compared.index("found.png") < compared.index("half"), "ordered by gain"


def test_page_needs_nothing_else_and_its_links_lead_somewhere(whole):
    attributes = [item for _, given in whole.elements for item in given.items()]
    sources = [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset")]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    urls = re.findall(r"url\(([^)]{,80})", whole.html)
    assert urls and all(url.startswith("#") for url in urls)
    ids = {f"#{v}" for k, v in attributes if k == "id"}
    links = set(whole.all("a", "href"))
    assert f"#{DETECTOR}" in links and links <= ids


def test_commands_repeat_the_steps(whole, directory, dataset):
    run, truth, images = directory / "a <b>run", *dataset
    at, truth, images = f"'{run}/{DETECTOR}'", f"--annotations {truth}", f"--images {images}"
    lines = [f"train_stage.py --stage {DETECTOR} --config {at}/config.yaml --output {at}",
             f"detect.py --checkpoint {at}/checkpoints/best.pt "
             f"--proposals '{run}/sharpmask/proposals' {images} --output {at}",
             f"score_coco.py detections {truth} --results {at}/detections.json "
             f"--output {at}/scores"]  # fmt: skip
    for stage in STAGES:
        at = f"'{run}/{stage}'"
        best = f"--checkpoint {at}/checkpoints/best.pt {truth} {images} --output {at}"
        lines += [f"train_stage.py --stage {stage} --config {at}/config.yaml --output {at}",
                  f"score_coco.py patches {best}/patches", f"propose.py {best}/proposals",
                  f"score_coco.py proposals {truth} --results {at}/proposals "
                  f"--output {at}/scores"]  # fmt: skip
    assert all(f"python tools/{line}\n" in whole.text for line in lines)


# A run with gaps.

EMPTY = {}  # stands for a folder
NO_LOSSES = "No training losses were written."
NOT_SCORED = "The detections were not scored."
# Of each change, by file what becomes of it: how many parts are then missing, texts and rows that
# are shown, and others that are not.
CHANGES = {
    "losses": ({"deepmask/metrics.jsonl": None}, 1, [NO_LOSSES], []),
    "config": ({"deepmask/config.yaml": None}, 1, [], ["<script>deepmask"]),
    "proposals": (
        {"deepmask/proposals": None}, 2,
        ["there are no proposals for images with annotated objects",
         "both stages need proposals for images"], ["IoU 0.50 → 1.00"]),
    "settings": ({"deepmask/proposals/settings.json": None}, 1, [], []),
    "AR": ({"deepmask/scores/metrics.json": None}, 1,
           ["The proposals of both stages have not been scored.",
            ["deepmask", "box", "by score", "–"]], ["+54.5 %"]),
    "perfect ranking": ({"deepmask/scores/perfect_ranking.json": None}, 1, [], []),
    "AR curves": ({"deepmask/scores/curves.json": None}, 1, ["The proposals were not scored."], []),
    "class losses": ({f"{DETECTOR}/metrics.jsonl": None}, 1, [NO_LOSSES], []),
    "detector's config": ({f"{DETECTOR}/config.yaml": None}, 1, [], ["<script>multipathnet"]),
    "detections": ({f"{DETECTOR}/detections.json": None}, 1,
                   ["there are no detections for images with annotated"], []),
    "AP": ({f"{SCORES}/metrics.json": None}, 1, [[DETECTOR, "box", *["–"] * 9]], []),
    "AP curves": ({f"{SCORES}/curves.json": None}, 1, [NOT_SCORED], [["IoU at least"]]),
    "AP by proposals": ({f"{SCORES}/by_proposals.json": None}, 1, ["It was not measured"], []),
    "categories": ({f"{SCORES}/categories.json": None}, 1, [NOT_SCORED], []),
    "summary": ({"summary.json": None}, 1, [["deepmask", *["–"] * 5]], [["together"]]),
    "patches": ({"summary.json": {"sharpmask": SUMMARY["sharpmask"]}}, 1,
                ["deepmask.patches in summary.json", ["deepmask", *["–"] * 5]], []),
    "no step": ({"deepmask/metrics.jsonl": ""}, 0,
                [["deepmask", "–", "–", "– → –", "– → –", "–", "–"], NO_LOSSES], []),
    "one step": ({"deepmask/metrics.jsonl": json.dumps(RECORDS[0])}, 0,
                 [["deepmask", "20", "0.2", "0.711 → 0.711", "– → –", "–", "10.0"]], [NO_LOSSES]),
    "AP of nothing": ({f"{SCORES}/by_proposals.json": {"counts": [7], "box": [None]}}, 0,
                      ["It was not measured"], [["proposals per image", "7"]]),
    "boxes alone": (
        {f"{SCORES}/curves.json": {"iou_thresholds": [0.5], "box": {"ap_by_iou": [0.4]}},
         f"{SCORES}/by_proposals.json": {"counts": [10], "box": [0.3], "mask": [None]}}, 0,
        [["box AP", "0.400"], ["box AP", "0.300"]], [["mask AP"]]),
    "metrics in the summary": (
        {DETECTOR: None, "summary.json": SUMMARY | {DETECTOR: {"detections": DETECTION_METRICS}}},
        7, [[DETECTOR, "mask", "0.200", "0.201"]], []),
    "no detector": ({DETECTOR: None}, 0, [], ["Detections on whole images", f"{DETECTOR}:"]),
    "no SharpMask": ({"sharpmask": None, "summary.json": {"deepmask": SUMMARY["deepmask"]}}, 0,
                     ["deepmask/proposals' --images"], ["compared", "sharpmask"]),
    "the detector alone": (  # trained on a store from elsewhere
        {"deepmask": None, "sharpmask": None, "summary.json": {"seconds": {}}}, 0,
        [f"{DETECTOR}/proposals/val' --images"], ["deepmask", "Proposals on whole images"]),
    "nothing of DeepMask": ({"deepmask": EMPTY}, 7, [], []),
    "nothing of the detector": ({DETECTOR: EMPTY}, 7, [[DETECTOR, "box", *["–"] * 9]], []),
    "nothing": ({"deepmask": None, "sharpmask": None, DETECTOR: None, "summary.json": None}, 8,
                ["summary.json", "deepmask/metrics.jsonl", "deepmask/proposals"], ["sharpmask"]),
}  # fmt: skip


@pytest.fixture
def run(tmp_path, directory, monkeypatch):
    """A copy of the run, to be changed; its plots are empty, since drawing them takes long."""
    svg = Markup("<svg></svg>")
    monkeypatch.setattr(plots, "plot", lambda curves, *_, **__: svg if curves else None)
    return shutil.copytree(directory / "a <b>run", tmp_path / "a run")


@pytest.mark.parametrize(
    ("changes", "num_missing", "shown", "hidden"), CHANGES.values(), ids=CHANGES
)
def test_page_shows_what_there_is_and_names_what_is_missing(
    run, dataset, changes, num_missing, shown, hidden
):
    for name, content in changes.items():
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if content == EMPTY:
            path.mkdir()
        elif content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    page = Page(run, dataset)
    assert len(page.missing) == num_missing
    lost = [name for name in changes if not (run / name).exists()]
    if 0 < num_missing < 3:
        assert all(any(name in line for line in page.missing) for name in lost)
    assert [e for e in shown if not page.shows(e)] == []
    assert [e for e in hidden if page.shows(e)] == []


def test_unreadable_image_says_why_and_the_others_are_shown(run, dataset, tmp_path):
    images = shutil.copytree(dataset[1], tmp_path / "images")
    (images / "missed.png").write_bytes(b"")
    page = Page(run, (dataset[0], images))
    assert page.text.count("missed.png: the file is empty") == 3
    assert len(page.all("img", "src")) == (3 + 3 + 2) * (NUM_WITH_OBJECTS - 1) + 2 * 2


# Numbers.


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
