"""docs/example.ipynb runs, and shows what it gives when it runs."""

import copy
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "example.ipynb"
MAX_KILOBYTES = 300


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def shown(notebook) -> list[list[str]]:
    """The kinds of outputs of each cell of code, and their texts without digits."""
    kinds = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            kinds.append([])
            for output in cell.outputs:
                data = output.get("data", {"text": output.get("text")})
                text = data.get("text/plain", data.get("text"))
                words = "" if "image/jpeg" in data else re.sub(r"[\d. ]+", "#", text)
                kinds[-1].append(f"{output.output_type} {sorted(data)} {words}")
    return kinds


def test_it_runs_and_its_outputs_are_of_its_code(stored, monkeypatch):
    client = pytest.importorskip("nbclient").NotebookClient
    pytest.importorskip("ipykernel")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    again = nbformat.from_dict(copy.deepcopy(stored))
    client(again, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert shown(again) == shown(stored)


def test_it_is_short_and_was_run_from_top_to_bottom(stored):
    assert NOTEBOOK.stat().st_size <= MAX_KILOBYTES * 1000
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert len(code) <= 10
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/jpeg" in kind for kinds in shown(stored) for kind in kinds) >= 3
    assert str(NOTEBOOK.parents[1]) not in NOTEBOOK.read_text()
