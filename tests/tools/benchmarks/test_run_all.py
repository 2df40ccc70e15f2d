"""The harness of the benchmarks: gathering, comparing, failures. Nothing here measures anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmarks import run_all
from tools.benchmarks.run_all import Benchmark, flatten, run, to_table

MACHINE = {"cpu": "made up", "cores": 2, "torch": "2.0", "date": "2016-01-01"}


def results_of(**figures):
    own = {"seconds": 4.0, "peak_mb": 100, "figures": figures}
    return {"machine": MACHINE, "quick": False, "benchmarks": {"patches": own}}


def cells(table):
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("| p")]
    return {cells[1].strip(): [cell.strip() for cell in cells[2:]] for cells in rows}


def test_numbers_are_found_at_any_depth():
    nested = {"a": {"b": 1, "c": [2, {"d": 3.5}]}, "name": "text", "none": None}
    assert flatten(nested) == {("a", "b"): 1, ("a", "c", "0"): 2, ("a", "c", "1", "d"): 3.5}


def test_a_table_has_every_figure_once():
    table = to_table(results_of(slow=2.0, fast={"mask": 8.0}))
    assert cells(table) == {
        "seconds": ["4"], "peak_mb": ["100"], "slow": ["2"], "fast, mask": ["8"]
    }  # fmt: skip
    assert "made up, 2 cores" in table


def test_ratios_to_an_earlier_run():
    table = to_table(results_of(slow=3.0, new=1.0, zero=1.0), results_of(slow=2.0, zero=0, gone=5))
    found = cells(table)
    assert found["slow"] == ["3", "2", "1.50"] and found["seconds"] == ["4", "4", "1.00"]
    assert found["new"] == ["1", "", ""] and found["zero"] == ["1", "0", ""]
    assert "gone" not in found
    assert len({line.count("|") for line in table.splitlines() if "|" in line}) == 1


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Made-up benchmarks: one that answers with its options, one that fails, one that is silent."""
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    answer = "import json, sys; json.dump({'options': len(sys.argv)}, open(sys.argv[-1], 'w'))"
    for name, text in {"good.py": answer, "bad.py": "raise SystemExit(3)", "mute.py": ""}.items():
        (folder / name).write_text(text)
    return tmp_path


def test_a_benchmark_runs_with_its_options(scripts, capfd):
    good = Benchmark("good.py", ("--a", "1"), ("--b",))
    assert run(good, quick=False)["figures"] == {"options": 5}
    quick = run(good, quick=True)
    assert quick["figures"] == {"options": 6} and quick["peak_mb"] > 0 and quick["seconds"] >= 0


def test_one_that_fails_does_not_stop_the_others(scripts, monkeypatch, capfd):
    listed = {name: Benchmark(f"{name}.py") for name in ("bad", "good", "mute")}
    monkeypatch.setattr(run_all, "BENCHMARKS", listed)
    output = scripts / "results.json"
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", *listed, "--output", str(output)])
    assert run_all.main() == 1
    assert "failed: bad, mute" in capfd.readouterr().err
    assert list(json.loads(output.read_text())["benchmarks"]) == ["good"]
    assert "| good | options |" in output.with_suffix(".md").read_text()


def test_every_benchmark_listed_takes_its_options():
    """Each script is there and knows --output and all options it is called with."""
    folder = Path(run_all.__file__).parent
    for benchmark in run_all.BENCHMARKS.values():
        script = folder / benchmark.script
        text = script.read_text()
        given = (*benchmark.options, *benchmark.quick)
        options = [option.partition("=")[0] for option in given if option.startswith("--")]
        assert all(f'"{option}"' in text for option in ("--output", *options)), script


def test_the_harness_is_light():
    """It imports no torch: its own memory would count as that of every benchmark."""
    code = "import sys, tools.benchmarks.run_all; print('torch' in sys.modules)"
    root = Path(run_all.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n"
