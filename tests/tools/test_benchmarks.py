"""The benchmarks start, count right and are gathered; what they measure is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.networks import make_sharpmask
from pipeline.recipe import load_config
from tools.benchmarks import (
    ablation,
    classic_worker,
    data_curve,
    gallery,
    nms,
    pyramids,
    run_all,
    scoring,
    speed,
)
from tools.benchmarks.timing import format_table, interleave, median_ratio

FOLDER = Path(run_all.__file__).parent
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if "__main__" in path.read_text()]
SMALL = (
    "--config configs/shapes.yaml --num-proposals 5 --megapixels .02 --rois 4 --batch 4 --rounds 1 "
    "--set propose.log2_scales=[-1,0,1] multipathnet.sampling.short_side=96 "
    "multipathnet.sampling.long_side=128"
)


def run_here(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
    return main()


ASK_FOR_HELP = """
import runpy, sys
path = sys.path[1:]
for script in sys.argv[1:]:
    sys.path[:] = [script.rpartition("/")[0], *path]  # as Python sets it for a script
    for name in list(sys.modules):
        if name.split(".")[0] in ("tools", "pipeline", "models", "datasets"):
            del sys.modules[name]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as answer:
        assert not answer.code, script
"""


def test_every_script_answers_help_from_anywhere(tmp_path):
    """In one process, since each would import PyTorch again."""
    command = [sys.executable, "-c", ASK_FOR_HELP, *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *answers = done.stdout.split("usage: ")
    assert [answer.split()[0] for answer in answers] == [script.name for script in SCRIPTS]
    help_of = {answer.split()[0]: answer for answer in answers}
    for command in run_all.BENCHMARKS.values():
        script, *words = " ".join(command).split()
        options = {word for word in words if word.startswith("--")} | {"--output"}
        assert all(option in help_of[script] for option in options), script


def test_operations_of_a_small_network_are_counted():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
    linear = nn.Linear(8 * 36, 4)
    with torch.inference_mode():
        count = speed.count_operations(lambda: linear(network(torch.zeros(1, 3, 10, 10))))
    assert count == 2 * (64 * 27 * 8 + 36 * 72 * 8 + 8 * 36 * 4)


def test_alternatives_take_turns_and_the_first_round_is_not_timed():
    ticks, called = iter(range(100)), []
    functions = {"a": lambda: called.append("a"), "b": lambda: called.append("b")}
    seconds = interleave(functions, rounds=2, clock=lambda: float(next(ticks)))
    assert called == ["a", "b"] * 3 and seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert median_ratio([1.0, 6.0, 9.0], [1.0, 2.0, 1.0]) == 3


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """The tables that a benchmark writes."""

    def call(main, options):
        run_here(monkeypatch, main, *options.split(), "--output", tmp_path / "figures.json")
        return json.loads((tmp_path / "figures.json").read_text())

    return call


def test_recall_and_seconds_of_pyramids(measure, tiny_sharpmask, shapes_directory):
    data = f"--annotations {shapes_directory / 'annotations' / 'instances_val.json'} "
    data += f"--images {shapes_directory / 'images' / 'val'} --checkpoint {tiny_sharpmask}"
    (table,) = measure(pyramids.main, f"{data} --precisions fp32 --num-timed 1").values()
    assert list(table) == pyramids.PYRAMIDS
    for row in table.values():
        assert row.pop("fp32, s") > 0
        assert len(row) == 6 and all(0 <= value <= 100 for value in row.values())


def test_speed_at_a_tiny_size(measure, capsys):
    tables = measure(speed.main, SMALL)
    rows = {name: row for table in tables.values() for name, row in table.items()}
    assert list(rows) == [
        "DeepMask, 5 proposals, 0.02 Mpx, fp32", "SharpMask, 5 proposals, 0.02 Mpx, fp32",
        "MultiPathNet, 4 RoIs, fp32", "DeepMask, 4 patches, fp32", "SharpMask, 4 patches, fp32",
    ]  # fmt: skip
    for row in rows.values():  # of one round: both are of the same measurement
        assert row["seconds"] > 0
        assert row["times the floor"] == pytest.approx(row["seconds"] / row["floor"])
    deepmask, sharpmask, *_ = (row["GFLOP"] for row in rows.values())
    assert sharpmask > deepmask
    assert "MultiPathNet, 4 RoIs, fp32" in capsys.readouterr().out


def test_pycocotools_is_asked_for_the_same_metrics(measure, monkeypatch):
    """Its recall at 10, 100 and 1000 proposals; the tests of AP ask for all figures."""
    found = {"pycocotools": [], "ours": []}

    def keep(calls, *, rounds):
        for name, call in calls.items():
            found[name].append(call())
        return {"pycocotools": {"seconds": 1.0}}

    monkeypatch.setattr(scoring, "compare", keep)
    tables = measure(scoring.main, "--images 2 --num-proposals 20")
    assert list(tables) == ["AR, box", "AR, mask", "AP, box and mask"]
    *recalls, precision = zip(*found.values(), strict=True)
    for theirs, ours in recalls:
        [values] = ours.metrics().values()
        assert list(values.values())[:3] == pytest.approx(theirs.stats[6:9])
    for theirs, ours in zip(precision[0], precision[1].metrics().values(), strict=True):
        assert list(ours.values())[:3] == pytest.approx(theirs.stats[:3]) and 0 < ours["AP"] < 1


def test_nms_at_constant_density(measure):
    [rows] = measure(nms.main, "--num-proposals 50 2000 --nms .5 --rounds 1").values()
    assert list(rows) == ["50 on 640x480", "2000 on 905x679"]
    columns = ("kept by NMS", "NMS: seconds", "Soft-NMS: seconds")
    assert all(row[column] > 0 for row in rows.values() for column in columns)


@pytest.mark.parametrize("name", ablation.CHANGES)
def test_changed_refinements_still_learn(name, tiny_config):
    config = load_config(tiny_config)
    model = make_sharpmask(config)
    with torch.no_grad():
        changed = ablation.CHANGES[name](model, config)
    size = config.deepmask.patch_size
    logits = changed(torch.randn(2, 3, size, size), head="mask")["mask_logits"]
    logits.square().sum().backward()
    trained = {n: p for n, p in changed.named_parameters() if p.requires_grad}
    assert logits.shape == (2, size, size)
    assert all(p.grad is not None for p in trained.values())
    part = {"no horizontal nets": ".horizontal.", "no vertical nets": ".vertical."}[name]
    assert trained and not any(part in parameter for parameter in trained)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Made-up benchmarks: one that answers with its options, one that fails, one that is silent."""
    answer = "import json, sys; json.dump({'t': {'n': len(sys.argv)}}, open(sys.argv[-1], 'w'))"
    for name, text in {"good": answer, "bad": "raise SystemExit(3)", "mute": ""}.items():
        (tmp_path / f"{name}.py").write_text(text)
    benchmarks = {name: (f"{name}.py --a 1", "--b") for name in ("bad", "good", "mute")}
    monkeypatch.setattr(run_all, "SCRIPTS", tmp_path)
    monkeypatch.setattr(run_all, "BENCHMARKS", benchmarks)
    return tmp_path


def test_one_that_fails_does_not_stop_the_others(scripts, monkeypatch, capfd):
    output = scripts / "results.json"
    assert run_here(monkeypatch, run_all.main, "--output", output) == 1
    assert "failed: bad, mute" in capfd.readouterr().err
    (good,) = json.loads(output.read_text())["benchmarks"].values()
    assert good["figures"] == {"t": {"n": 5}} and good["peak_mb"] > 0
    # Once more, with the options of a smoke run, beside the first.
    again = scripts / "again.json"
    options = ("--only", "good", "--quick", "--compare", output, "--output", again)
    assert run_here(monkeypatch, run_all.main, *options) == 0
    (row,) = (line for line in capfd.readouterr().out.splitlines() if "good: figures" in line)
    assert row.split() == ["good:", "figures:", "t:", "n", "6", "5", "1.2"]


def test_ratios_exist_where_both_figures_do():
    now = {"speed": {"seconds": 3.0, "figures": {"new": 1.0, "zero": 1.0}}}
    earlier = {"speed": {"seconds": 2.0, "figures": {"zero": 0, "gone": 5.0}}}
    rows = run_all.compare(now, earlier)
    assert rows == {
        "speed: seconds": {"now": 3.0, "earlier": 2.0, "ratio": 1.5},
        "speed: figures: new": {"now": 1.0},
        "speed: figures: zero": {"now": 1.0, "earlier": 0},
    }
    lines = format_table("figure", rows).splitlines()
    assert lines[0].split() == ["figure", "now", "earlier", "ratio"]
    assert len({len(line) for line in lines}) == 1


def test_the_runner_imports_no_torch():
    """Its own memory would count as that of every benchmark."""
    code = "import sys, tools.benchmarks.run_all; print('torch' in sys.modules)"
    root = FOLDER.parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n"


def coco_json(**objects_by_license):
    """Images with ids from 1 on, by names like by_3: the license, and how many objects."""
    urls = {"by": "by/2.0/", "sa": "by-sa/2.0/", "nc": "by-nc/2.0/"}
    images, annotations = [], []
    for image_id, (name, license_name) in enumerate(objects_by_license.items(), start=1):
        images.append({"id": image_id, "license": list(urls).index(license_name)})
        annotations += [{"image_id": image_id, "iscrowd": 0}] * int(name[-1])
        annotations.append({"image_id": image_id, "iscrowd": 1})
    address = "http://creativecommons.org/licenses/"
    licenses = [{"id": i, "url": address + url} for i, url in enumerate(urls.values())]
    return {"images": images[::-1], "annotations": annotations, "licenses": licenses}


def test_photographs_are_chosen_by_license_and_number_of_objects():
    content = coco_json(a3="by", b2="by", c4="nc", d9="sa")
    content["images"].append({"id": 0})  # of no known license
    found = gallery.find_candidates(content)
    assert [(image["id"], image["objects"]) for image in found] == [(1, 3), (4, 9)]
    assert gallery.license_link(found[1]).startswith("[CC BY-SA 2.0](http://creativecommons")
    photo = {"flickr_url": "http://farm6.staticflickr.com/5298/5457068434_0929d78491_z.jpg"}
    assert gallery.source_link(photo).endswith("id=5457068434)")


def test_smaller_training_sets_are_part_of_larger_ones():
    content = coco_json(**{f"{letter}1": "by" for letter in "abcdefgh"})
    chosen = {}
    for seed in (0, 1):
        subsets = [data_curve.cut(content, count, seed=seed) for count in (2, 4, 8)]
        ids = [{image["id"] for image in subset["images"]} for subset in subsets]
        assert ids[0] < ids[1] < ids[2] and list(map(len, ids)) == [2, 4, 8]
        assert ids == [{a["image_id"] for a in subset["annotations"]} for subset in subsets]
        chosen[seed] = ids[1]
    assert chosen[0] != chosen[1]
    with pytest.raises(ValueError, match="--images 9: the training split has 8"):
        data_curve.cut(content, 9, seed=0)


def test_selective_search_merges_the_most_similar_neighbors():
    """Colors of segments are their similarity; that of a merged one is the mean by its pixels."""

    class Colors:
        def setImage(self, image, labels, sizes, image_id):
            self.colors, self.sizes = image.copy(), sizes

        def get(self, i, j):
            return -abs(self.colors[i] - self.colors[j])

        def merge(self, i, j):
            total = self.colors[[i, j]] @ self.sizes[[i, j], 0]
            self.colors[[i, j]] = total / self.sizes[[i, j]].sum()

    labels = np.array([[0, 0, 0, 1, 2, 2, 3]] * 3, np.int32)
    regions = classic_worker.group(Colors(), np.array([0.0, 5, 8, 1]), labels, 0)
    # 1 and 2 are next to each other and nearest; their mean, 7, is then 6 from 3 and 7 from 0.
    assert [sorted(region) for region in regions[4:]] == [[1, 2], [1, 2, 3], [0, 1, 2, 3]]


def test_edges_are_thin_and_know_what_is_across():
    image = np.zeros((20, 30, 3), np.uint8)
    image[:, 15:] = 255
    edges, across = classic_worker.find_edges(image)
    rows, columns = np.nonzero(edges > 0.5)
    assert set(rows) == set(range(20)) and set(columns) <= {14, 15}
    assert np.abs(np.sin(across[rows, columns])).max() < 0.01
