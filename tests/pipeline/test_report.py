"""The report of a run, on runs of a few small images that are made here."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from pycocotools import mask as coco_mask

from datasets.coco import CocoInstances
from pipeline import report
from pipeline.proposals import Proposals, ProposalStore
from pipeline.report import (
    FAINT,
    FULL,
    NUM_EXAMPLES,
    Mark,
    choose_examples,
    draw_marks,
    duration,
    number,
    plot_losses,
    read_examples,
    training_facts,
    write_report,
)

SIDE = 64  # px, of the images
SQUARE, ELSEWHERE, EVERYTHING = (8, 8, 24, 24), (40, 40, 56, 56), (0, 0, SIDE, SIDE)  # xyxy
NUM_WITH_OBJECTS = 3  # of the images of `dataset`
VOID_ELEMENTS = {"meta", "img", "br"}


# A dataset and a run.


def rle_of(box, height=SIDE, width=SIDE):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[box[1] : box[3], box[0] : box[2]] = 1
    return coco_mask.encode(mask)


def proposals_of(image_id, name, boxes):
    """Proposals of rectangles, with falling scores."""
    counts = [rle_of(box)["counts"] for box in boxes]
    scores = np.linspace(0.9, 0.5, len(boxes), dtype=np.float32)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Proposals(image_id, name, SIDE, SIDE, scores, boxes, counts)


def object_of(image_id, box, *, iscrowd=0):
    x1, y1, x2, y2 = box
    return {
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": iscrowd,
        "area": (x2 - x1) * (y2 - y1),
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
    }


def write_dataset(directory, names, objects):
    """Images with ids from 1 on and their annotations; returns the json and the images' folder."""
    images = [
        {"id": n, "file_name": name, "height": SIDE, "width": SIDE}
        for n, name in enumerate(names, start=1)
    ]
    annotations = [{"id": n} | annotation for n, annotation in enumerate(objects, start=1)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    directory.mkdir(exist_ok=True)
    for n, name in enumerate(names):
        cv2.imwrite(str(directory / name), np.full((SIDE, SIDE, 3), 40 * n + 40, np.uint8))
    path = directory / "instances.json"
    path.write_text(json.dumps(content))
    return path, directory


def write_store(directory, proposals):
    store = ProposalStore(directory)
    store.open_for({"num_proposals": 1000, "scales": [-2.5, 0.5, 0.5]})
    store.write_shard(proposals)


def metrics_of(start):
    """Different values for all metrics, so that each can be told apart on the page."""
    names = ("AR@10", "AR@100", "AR@1000", "AUC", "AR@1000/medium", "AR@1000/large")
    return {
        kind: {name: start + (10 * k + n) / 1000 for n, name in enumerate(names)}
        | {"AR@1000/small": None}
        for k, kind in enumerate(("box", "mask"))
    }


PATCHES = {
    "mean_iou": 0.761,
    "median_iou": 0.792,
    "iou_above_0.5": 0.873,
    "iou_above_0.7": 0.664,
    "score_accuracy": 0.915,
}
RECORDS = [
    {"split": "train", "step": 20, "epoch": 0.2, "loss": 0.7, "mask_loss": 0.711, "lr": 1e-3,
     "patches_per_second": 10.0},
    {"split": "val", "step": 100, "epoch": 1.0, **PATCHES},
    {"split": "train", "step": 110, "epoch": 1.1, "loss": 0.5, "score_loss": 0.402,
     "patches_per_second": 30.0},
    {"split": "train", "step": 1200, "epoch": 2.0, "mask_loss": 0.213, "patches_per_second": 40.0},
    {"split": "val", "step": 1200, "epoch": 2.0, **PATCHES, "iou_above_0.7": 0.6},
]  # fmt: skip
CURVES = {
    "iou_thresholds": [0.5, 0.75, 0.95], "counts": [1, 10, 100, 1000],
    **{kind: {"recall_by_iou": {k: [0.5, 0.3, None] for k in ("10", "100", "1000")},
              "ar_by_count": [0.1, 0.2, 0.3, None]} for kind in ("box", "mask")},
}  # fmt: skip


def write_stage(directory, proposals, *, start=0.1):
    (directory / "scores").mkdir(parents=True)
    (directory / "config.yaml").write_text("seed: 7\ntrunk: {name: tiny}\n")
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for name, content in (
        ("metrics", metrics_of(start)),
        ("perfect_ranking", metrics_of(start + 0.1)),
        ("curves", CURVES),
    ):
        (directory / "scores" / f"{name}.json").write_text(json.dumps(content))
    write_store(directory / "proposals", proposals)


def write_summary(run, *stages):
    summary = {name: {"patches": PATCHES} for name in stages}
    (run / "summary.json").write_text(json.dumps(summary | {"seconds": {"deepmask": 251.3}}))


def make_dataset(directory):
    """One object found exactly, one missed, one half found; a crowd alone; nothing at all."""
    names = ["found.png", "missed.png", "half.png", "crowd.png", "empty.png"]
    objects = [object_of(image_id, SQUARE) for image_id in (1, 2, 3)]
    return write_dataset(directory, names, [*objects, object_of(4, SQUARE, iscrowd=1)])


STORE = [
    proposals_of(1, "found.png", [EVERYTHING, SQUARE]),
    proposals_of(2, "missed.png", [ELSEWHERE]),
    proposals_of(3, "half.png", [(8, 8, 24, 16), ELSEWHERE]),
    proposals_of(4, "crowd.png", [SQUARE]),
    proposals_of(5, "empty.png", [SQUARE]),
]


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A complete run, to be changed; its plots are left empty, since they take most of the time."""
    monkeypatch.setattr(report, "_svg", lambda draw: Markup("<svg></svg>"))
    write_stage(tmp_path / "run" / "deepmask", STORE)
    write_summary(tmp_path / "run", "deepmask")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The page of a complete run, with its plots."""
    directory = tmp_path_factory.mktemp("whole")
    write_stage(directory / "deepmask", STORE)
    write_summary(directory, "deepmask")
    return page_of(directory, make_dataset(directory / "data"))


class Page(HTMLParser):
    """Elements with their attributes, the text, the rows of the tables, and the warning."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.rows, self.warning, self.text = html, [], [], "", ""
        self._open = []
        self.feed(html)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID_ELEMENTS:
            self._open.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data
        tags = [tag for tag, _ in self._open]
        if {"td", "th"} & set(tags):
            self.rows[-1][-1] += data
        if any(attributes.get("id") == "missing" for _, attributes in self._open):
            self.warning += data

    def all(self, tag, attribute):
        return [given[attribute] for name, given in self.elements if name == tag]


def page_of(run, dataset):
    annotations, images = dataset
    path = write_report(run, annotations=annotations, images=images)
    assert path == run / "report.html"
    assert [p.name for p in run.glob(".*")] == [], "a temporary file is left"
    return Page(path.read_text())


# The page of a whole run.


def test_tables_hold_the_numbers(whole):
    # AR@10, AR@100, AR@1000, AUC, small, medium, large
    assert [row[:3] + [" ".join(row[3:])] for row in whole.rows[1:5]] == [
        ["deepmask", "mask", "by score", "0.110 0.111 0.112 0.113 – 0.114 0.115"],
        ["deepmask", "mask", "perfect", "0.210 0.211 0.212 0.213 – 0.214 0.215"],
        ["deepmask", "box", "by score", "0.100 0.101 0.102 0.103 – 0.104 0.105"],
        ["deepmask", "box", "perfect", "0.200 0.201 0.202 0.203 – 0.204 0.205"],
    ]
    assert ["deepmask", "0.761", "0.792", "0.873", "0.664", "0.915"] in whole.rows
    losses = ["0.711 → 0.213", "0.402 → 0.402"]
    assert ["deepmask", "1,200", "2.0", *losses, "100", "30.0"] in whole.rows
    assert ["deepmask", "4 min 11 s"] in whole.rows
    assert "seed: 7" in whole.text and '"num_proposals": 1000' in whole.text
    assert "python tools/train_stage.py --stage deepmask" in whole.text


def test_complete_run_has_four_plots_and_no_warning(whole):
    assert whole.warning == ""
    assert len([tag for tag, _ in whole.elements if tag == "svg"]) == 4


def test_pictures_decode(whole):
    uris = whole.all("img", "src")
    assert len(uris) == 3 * NUM_WITH_OBJECTS
    for uri in uris:
        kind, data = uri.split(",")
        assert kind == "data:image/jpeg;base64"
        picture = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (SIDE, SIDE, 3)


def test_page_needs_nothing_else(whole):
    sources = [
        value
        for _, attributes in whole.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset")
    ]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in whole.elements}
    urls = re.findall(r"url\(([^)]{,80})", whole.html)
    assert urls and all(url.startswith("#") for url in urls)


def test_stages_stand_side_by_side_in_their_order(run, dataset):
    write_stage(run / "sharpmask", STORE, start=0.5)
    write_summary(run, "sharpmask", "deepmask")
    page = page_of(run, dataset)
    assert [row[0] for row in page.rows[1:9]] == ["deepmask"] * 4 + ["sharpmask"] * 4
    assert page.rows[5][1:4] == ["mask", "by score", "0.510"]
    assert page.warning == ""
    assert len(page.all("img", "src")) == 2 * 3 * NUM_WITH_OBJECTS


def test_text_from_files_is_escaped(tmp_path, run):
    name = "<i>&amp;.png"
    dataset = write_dataset(tmp_path / "odd", [name], [object_of(1, SQUARE)])
    shutil.rmtree(run / "deepmask" / "proposals")
    write_store(run / "deepmask" / "proposals", [proposals_of(1, name, [SQUARE])])
    (run / "deepmask" / "config.yaml").write_text("trunk: <script>alert(1)</script>\n")
    odd = run.rename(tmp_path / "<b>run")
    page = page_of(odd, dataset)
    assert not {"i", "script"} & {tag for tag, _ in page.elements}
    assert name in page.text and "<script>alert(1)</script>" in page.text
    assert f"Report of {odd}" in page.text


# Runs that are not whole.


@pytest.mark.parametrize(
    "part",
    [
        "metrics.jsonl",
        "config.yaml",
        "proposals",
        "proposals/settings.json",
        "scores/metrics.json",
        "scores/perfect_ranking.json",
        "scores/curves.json",
        "scores",
        "",
    ],
)
def test_missing_part_of_a_stage_is_named(run, dataset, part):
    path = run / "deepmask" / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    warning = page_of(run, dataset).warning
    assert f"deepmask/{part}" in warning and "not there" in warning
    if path.suffix:
        assert warning.count("deepmask/") == 1, "more is named than is missing"


def test_missing_summary_is_named(run, dataset):
    (run / "summary.json").unlink()
    page = page_of(run, dataset)
    assert "summary.json" in page.warning
    assert page.rows[1][3] == "0.110"
    write_summary(run)
    assert "deepmask.patches in summary.json" in page_of(run, dataset).warning


def test_empty_run_gives_a_page(tmp_path, dataset):
    (tmp_path / "run").mkdir()
    page = page_of(tmp_path / "run", dataset)
    for name in ("summary.json", "deepmask/metrics.jsonl", "deepmask/proposals"):
        assert name in page.warning
    assert "sharpmask" not in page.text


def test_missing_annotations_are_named(run, dataset, tmp_path):
    page = page_of(run, (tmp_path / "none.json", dataset[1]))
    assert "none.json" in page.warning
    assert page.all("img", "src") == []
    assert page.rows[1][4] == "0.111"


@pytest.mark.parametrize("name", ["scores/curves.json", "proposals/proposals-000-000000.parquet"])
def test_broken_file_is_named_with_the_reason(run, dataset, name):
    (run / "deepmask" / name).write_bytes(b'{"half')
    page = page_of(run, dataset)
    assert f"deepmask/{name.split('/proposals-')[0]}:" in page.warning
    assert "not there" not in page.warning
    assert page.rows[1][4] == "0.111"


def test_training_that_wrote_nothing_yet(run, dataset):
    (run / "deepmask" / "metrics.jsonl").write_text("")
    page = page_of(run, dataset)
    assert ["deepmask", "–", "–", "– → –", "– → –", "–", "–"] in page.rows
    assert "No training losses were written." in page.text


def test_unreadable_image_says_why_and_the_others_are_shown(run, dataset):
    (dataset[1] / "missed.png").write_bytes(b"")
    page = page_of(run, dataset)
    assert "missed.png: the file is empty" in page.text
    assert len(page.all("img", "src")) == 3 * (NUM_WITH_OBJECTS - 1)


# Which images are the best and the worst.


def examples_of(tmp_path, dataset, proposals):
    write_store(tmp_path / "store", proposals)
    annotations, images = dataset
    return read_examples(tmp_path / "store", coco=CocoInstances.load(annotations), images=images)


def test_found_is_best_and_missed_is_worst(tmp_path, dataset):
    examples = examples_of(tmp_path, dataset, STORE)
    assert [e.file_name for e in examples.best] == ["found.png", "half.png"]
    assert [e.file_name for e in examples.worst] == ["missed.png"]
    assert [e.quality for e in examples.best + examples.worst] == [1, 0.5, 0]
    assert [e.num_found for e in examples.best + examples.worst] == [1, 1, 0]
    assert examples.num_images == NUM_WITH_OBJECTS


def test_only_the_proposals_with_the_highest_scores_count(tmp_path, dataset):
    late = [ELSEWHERE] * 100 + [SQUARE]
    in_time = late[1:]
    proposals = [proposals_of(1, "found.png", in_time), proposals_of(2, "missed.png", late)]
    examples = examples_of(tmp_path, dataset, proposals)
    assert [examples.best[0].quality, examples.worst[0].quality] == [1, 0]
    assert examples.num_images == 2, "an image that is not in the store was not looked at"


def test_image_without_a_proposal_is_missed(tmp_path, dataset):
    proposals = [proposals_of(1, "found.png", [SQUARE]), proposals_of(2, "missed.png", [])]
    examples = examples_of(tmp_path, dataset, proposals)
    assert [e.file_name for e in examples.worst] == ["missed.png"]
    assert examples.worst[0].quality == 0
    assert len(examples.worst[0].pictures) == 3


def test_quality_is_the_mean_over_the_objects(tmp_path):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE), object_of(1, EVERYTHING, iscrowd=1)]
    dataset = write_dataset(tmp_path / "data", ["two.png"], objects)
    [example] = examples_of(tmp_path, dataset, [proposals_of(1, "two.png", [SQUARE])]).best
    assert sorted(example.ious) == [0, 1]
    assert example.quality == 0.5


@given(st.dictionaries(st.integers(0, 99), st.floats(0, 1)))
def test_choice_is_ordered_and_no_image_is_chosen_twice(qualities):
    best, worst = choose_examples(qualities)
    assert len(best) + len(worst) == min(len(qualities), 2 * NUM_EXAMPLES)
    assert 0 <= len(best) - len(worst) <= 1
    chosen = best + worst[::-1]
    assert len(set(chosen)) == len(chosen)
    values = [qualities[image] for image in chosen]
    assert values == sorted(values, reverse=True)
    left_out = [value for image, value in qualities.items() if image not in chosen]
    if left_out:
        assert qualities[worst[-1]] <= min(left_out) and max(left_out) <= qualities[best[-1]]


# Drawing.


def test_marks_are_drawn_where_their_masks_are_on_a_smaller_picture():
    image = np.full((100, 150, 3), 200, np.uint8)
    box = (60, 40, 200, 120)  # on 300 x 200
    picture = draw_marks(image, [Mark(rle_of(box, 200, 300), (255, 0, 0), FULL)])
    outside = picture.copy()
    outside[18:62, 28:102] = 200
    assert (outside == 200).all(), "something is drawn beside the mask and its outline"
    inside = picture[23:57, 33:97]
    assert (inside[..., 0] > 200).all() and (inside[..., 1:] < 200).all()
    assert (image == 200).all(), "the image itself was changed"


def test_label_stands_at_the_top_left_of_its_mask():
    image = np.full((200, 200, 3), 255, np.uint8)
    marks = [Mark(rle_of((160, 80, 400, 400), 400, 400), (9, 9, 9), 0, "0.12")]
    unlabelled = draw_marks(image, [Mark(marks[0].rle, marks[0].rgb, 0)])
    rows, columns = np.nonzero((draw_marks(image, marks) != unlabelled).any(axis=-1))
    assert (rows.max(), columns.min()) == pytest.approx((40, 80), abs=6)


def test_labels_of_masks_at_one_place_do_not_cover_each_other():
    image = np.full((200, 200, 3), 255, np.uint8)
    marks = [Mark(rle_of((0, 0, 200, 200), 200, 200), (9, 9, 9), FAINT, "0.12") for _ in range(4)]
    dark = [
        (draw_marks(image, marks[:n])[4:190, 4:190].sum(axis=-1) < 250).any(axis=1).sum()
        for n in (1, 2, 4)
    ]
    assert dark[1] == pytest.approx(2 * dark[0], abs=6)
    assert dark[2] == pytest.approx(4 * dark[0], abs=12)


def test_large_picture_is_scaled_down(tmp_path):
    path, images = write_dataset(tmp_path / "data", ["large.png"], [object_of(1, SQUARE)])
    cv2.imwrite(str(images / "large.png"), np.zeros((1000, 700, 3), np.uint8))
    [example] = examples_of(tmp_path, (path, images), [proposals_of(1, "large.png", [SQUARE])]).best
    data = np.frombuffer(base64.b64decode(example.pictures[0].split(",")[1]), np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (480, 336, 3)


# Numbers and plots.


def test_training_facts_of_an_interrupted_run():
    facts = training_facts(RECORDS[:1])
    assert facts["steps"] == 20 and facts["best_step"] is None
    assert "first_score_loss" not in facts


def test_plot_is_well_formed_and_takes_its_colours_from_the_page():
    svg = plot_losses(RECORDS)
    texts = [t.text for t in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"step", "mask loss", "score loss"} <= set(texts)
    assert "var(--ink)" in svg and "var(--series-1)" in svg and "#0a0b" not in svg
    assert plot_losses([]) is None


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.03333, 3, "0.033"),
        (0.0, 3, "0.000"),
        (None, 3, "–"),
        (float("nan"), 1, "–"),
        (12345, 0, "12,345"),
    ],
)
def test_number(value, digits, text):
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(9.87, "9.9 s"), (62.1, "1 min 02 s"), (3599, "59 min 59 s"), (7384, "2 h 3 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
