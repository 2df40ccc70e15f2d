"""DeepMask beside SharpMask: which masks belong together, which are shown, and the tables."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from datasets.coco import CocoInstances
from pipeline.report import plots as report_plots
from pipeline.report.comparison import (
    RefinedObject,
    choose_objects,
    find_objects,
    images_of_both,
    rows_of,
    same_proposals,
)
from pipeline.report.report import write_report
from tests.pipeline.report.small_run import (
    ELSEWHERE,
    EVERYTHING,
    SQUARE,
    STORE,
    make_dataset,
    metrics_of,
    object_of,
    proposals_of,
    write_dataset,
    write_stage,
    write_summary,
)

# The same proposals, after a refinement that is right on the half-found object.
REFINED = [
    proposals_of(1, "found.png", [EVERYTHING, SQUARE]),
    proposals_of(2, "missed.png", [ELSEWHERE]),
    proposals_of(3, "half.png", [SQUARE, ELSEWHERE]),
]


# Which masks belong together.


def scored(boxes, scores):
    return replace(proposals_of(1, "a.png", boxes), scores=np.array(scores, np.float32))


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 30)] * 2), min_size=1, max_size=12, unique=True),
    st.integers(0, 2**32 - 1),
)
def test_masks_of_a_cell_find_each_other(corners, seed):
    """Scores differ in the last bits, boxes by a pixel or two, and some masks have been left out.

    Pairs of cells have equal scores, so that only the boxes tell them apart.
    """
    rng = np.random.default_rng(seed)
    scores = 0.9 - np.arange(len(corners)) // 2 / 100
    boxes = [(16 * x, 16 * y, 16 * x + 14, 16 * y + 14) for x, y in corners]
    refined = np.array(boxes) + rng.integers(0, 3, (len(boxes), 4))
    cells = [np.flatnonzero(rng.random(len(boxes)) < 0.8) for _ in range(2)]
    pairs = same_proposals(
        scored([boxes[n] for n in cells[0]], scores[cells[0]]),
        scored(refined[cells[1]].tolist(), scores[cells[1]] + rng.uniform(-2e-6, 2e-6)),
    )
    found = {(cells[0][n], cells[1][m]) for n, m in pairs}
    assert found == {(n, n) for n in set(cells[0]) & set(cells[1])}


def test_equal_boxes_of_other_scores_and_equal_scores_of_other_boxes_are_no_pair():
    assert not len(same_proposals(scored([SQUARE], [0.9]), scored([SQUARE], [0.89])))
    assert not len(same_proposals(scored([SQUARE], [0.9]), scored([ELSEWHERE], [0.9])))
    assert not len(same_proposals(scored([], []), scored([SQUARE], [0.9])))


@given(st.permutations(range(1, 7)), st.permutations(range(3, 9)))
def test_images_of_two_stores_meet_in_any_order(first, second):
    stores = [[proposals_of(n, f"{n}.png", [SQUARE]) for n in ids] for ids in (first, second)]
    met = list(images_of_both(*stores))
    assert sorted(coarse.image_id for coarse, _ in met) == [3, 4, 5, 6]
    for coarse, refined in met:
        assert coarse.image_id == refined.image_id
        assert any(coarse is p for p in stores[0]) and any(refined is p for p in stores[1])


# Which objects are shown.


def objects_found(tmp_path, coarse, refined):
    objects = [object_of(1, SQUARE), object_of(1, ELSEWHERE)]
    coco = CocoInstances.load(write_dataset(tmp_path / "data", ["a.png"], objects)[0])
    pairs = same_proposals(coarse, refined)
    return find_objects(0, coarse, refined, pairs, coco, [0, 1])


def test_an_object_is_shown_with_the_pair_that_fits_best_on_average(tmp_path):
    """Neither the best coarse mask (16 x 15 px, then 16 x 8) nor the best refined one wins."""
    coarse = scored([(8, 8, 24, 23), (8, 8, 24, 22), (8, 8, 24, 16)], [0.9, 0.8, 0.7])
    refined = scored([(8, 8, 24, 16), (8, 8, 24, 22), (8, 8, 24, 23)], [0.9, 0.8, 0.7])
    for stores in ((coarse, refined), (refined, coarse)):
        [found] = objects_found(tmp_path, *stores)
        assert (found.annotation, found.image) == (0, 0)
        assert found.ious == (14 / 16, 14 / 16) and found.gain == 0


def test_an_object_that_only_one_stage_proposes_is_not_found(tmp_path):
    coarse, refined = scored([SQUARE, ELSEWHERE], [0.9, 0.8]), scored([SQUARE], [0.9])
    assert [o.annotation for o in objects_found(tmp_path, coarse, refined)] == [0]
    assert objects_found(tmp_path, coarse, scored([], [])) == []


def gains(values):
    return [RefinedObject(0, n, ({}, {}), (0, value)) for n, value in enumerate(values)]


def test_objects_stand_for_equal_parts():
    chosen = choose_objects(gains(np.random.default_rng(0).permutation(80)))
    assert [o.gain for o in chosen] == [5, 15, 25, 35, 45, 55, 65, 75]


@given(st.lists(st.floats(-1, 1), max_size=40))
def test_objects_are_ordered_and_none_is_shown_twice(values):
    chosen = choose_objects(gains(values))
    assert len({o.annotation for o in chosen}) == len(chosen) == min(8, len(values))
    assert [o.gain for o in chosen] == sorted(o.gain for o in chosen)


# Tables.


def test_difference_and_relative_difference():
    rows = rows_of({"a": 0.5, "b": 0.0, "c": None, "d": 0.2}, {"a": 0.6, "b": 0.1, "c": 0.3})
    assert list(rows) == ["DeepMask", "SharpMask", "difference", "relative"]
    assert rows["difference"] == pytest.approx({"a": 0.1, "b": 0.1})
    assert rows["relative"] == pytest.approx({"a": 0.2})
    assert rows_of(None, {"a": 1}) is rows_of({"a": 1}, None) is None


# The page.


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes the page of a run of both stages and gives its section; a part may be removed."""
    monkeypatch.setattr(report_plots, "_svg", lambda draw: Markup("<svg></svg>"))
    run, (annotations, images) = tmp_path / "run", make_dataset(tmp_path / "data")
    write_stage(run / "deepmask", STORE)
    write_stage(run / "sharpmask", REFINED, start=0.16)
    write_summary(run, "deepmask", "sharpmask")

    def write(*, without: str | None = None) -> str:
        if without:
            shutil.rmtree(run / without)
        html = write_report(run, annotations=annotations, images=images).read_text()
        return html.partition('<h2 id="comparison">')[2].partition("<h2 ")[0]

    return write


def test_section_shows_differences_and_objects(page):
    section = page()
    assert metrics_of(0.16)["mask"]["AR@10"] == 0.17
    for cell in ("0.110", "0.170", "+0.060", "+54.5 %"):
        assert f"<td>{cell}</td>" in section
    assert section.count('src="data:image/jpeg;base64,') == 4 and section.count("<svg>") == 2
    assert section.index("found.png") < section.index("half.png"), "ordered by gain"
    assert section.count("SharpMask <b>1.00</b>") == 2 and "DeepMask <b>0.50</b>" in section
    assert "5 of the 5 that were looked at" in section
    assert "2 objects have one" in section and "Of all 2, 1 (50 %) gained" in section


def test_section_says_what_is_not_there(page):
    assert "have not been scored" in page(without="sharpmask/scores")
    section = page(without="sharpmask/proposals")
    assert "there are not proposals of both stages" in section and "<img" not in section


def test_no_section_without_both_stages(page, tmp_path):
    write_summary(tmp_path / "run", "deepmask")
    assert page(without="sharpmask") == ""
