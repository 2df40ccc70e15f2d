"""Imports point one way, files are short, and every tool starts from anywhere."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What the files of a package may import of ours.
ALLOWED = {
    "datasets": {"datasets"},
    "models": {"models"},
    "pipeline": {"pipeline", "models", "datasets"},
    "tools": {"tools", "pipeline", "models", "datasets"},
}
# The rooms of pipeline/: its files and folders. Each may import itself and those named here.
SHARED = {
    "config", "recipe", "networks", "precision", "checkpoint", "data", "distributed", "command",
    "run_lock", "sizes", "pretrained", "hub", "hub_model",
}  # fmt: skip
ROOMS = {
    "shared": set(),
    "inference": {"shared"},
    "torch7": {"shared", "inference"},
    "evaluation": {"shared", "inference"},
    "serve": {"shared", "inference"},
    "training": {"shared", "inference", "evaluation"},
    "report": {"shared", "inference", "evaluation", "training"},
    "full_run": {"shared", "inference", "evaluation", "training", "report"},
}
PACKAGES = {*ALLOWED, "tests"}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
MAX_LINES = 400


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports, with the names from them; "." for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        return ["."] if node.level else names
    return []


def packages(nodes: Iterable[ast.AST]) -> set[str]:
    """The top-level packages that statements import; "" for a relative import."""
    return {name.split(".")[0] for node in nodes for name in imported(node)}


def room_of(module: str) -> str:
    """The room of a module or of a name in it: `pipeline.data.load_split` is in "shared"."""
    part = module.split(".")[1]
    return "shared" if part in SHARED else part


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_one_way_and_stand_at_the_top(path):
    tree = ast.parse(path.read_text())
    ours = {*PACKAGES, ""}
    package = path.relative_to(ROOT).parts[0]
    assert packages(ast.walk(tree)) & ours <= ALLOWED[package]
    below_the_top = [inner for node in tree.body for inner in ast.walk(node) if inner is not node]
    assert not packages(below_the_top) & ours, "an import of ours within a function or a condition"


@pytest.mark.parametrize("path", sorted((ROOT / "pipeline").rglob("*.py")), ids=name_of)
def test_the_rooms_of_the_pipeline_import_in_one_direction(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)]
    rooms = {room_of(name) for name in names if name.startswith("pipeline.")}
    if parts == ("pipeline", "__init__"):
        assert not rooms
    else:
        room = room_of(".".join(parts))
        assert rooms <= {room, *ROOMS[room]}


def test_the_shared_files_of_the_pipeline_import_each_other_without_a_circle():
    graph = {}
    for name in SHARED:
        nodes = ast.walk(ast.parse((ROOT / "pipeline" / f"{name}.py").read_text()))
        names = [module for node in nodes for module in imported(node)]
        graph[name] = {module.split(".")[1] for module in names if module.startswith("pipeline.")}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_file_is_long():
    files = [ROOT / "hubconf.py", *FILES, *sorted((ROOT / "tests").rglob("*.py"))]
    lines = {name_of(path): len(path.read_text().splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def test_the_files_were_found():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ALLOWED)
    assert {"train_stage.py", "propose.py", "score_coco.py"} <= {path.name for path in TOOLS}


ASK_EACH = """
import os, runpy, sys
# Once, they take seconds.
import cv2, hotcoco, jinja2, matplotlib.pyplot, msgspec, omegaconf, PIL.Image, pyarrow.parquet
import torch, torch.nn.parallel, torch.utils.data, torch.utils.tensorboard, torchvision
for tool in sys.argv[1:]:
    if os.fork() == 0:
        sys.argv[:], sys.path[0] = [tool, "--help"], os.path.dirname(tool)
        runpy.run_path(tool, run_name="__main__")
        sys.exit("no help")
    if status := os.wait()[1]:
        sys.exit(f"{tool}: status {status}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="all tools in one process need fork")
def test_every_tool_answers_help_from_anywhere(tmp_path):
    command = [sys.executable, "-c", ASK_EACH, *map(str, TOOLS)]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    usages = [line for line in answer.stdout.splitlines() if line.startswith("usage: ")]
    assert [line.split()[1] for line in usages] == [tool.name for tool in TOOLS]


@pytest.mark.parametrize("folder", ["tools", "tools/benchmarks"])
def test_no_script_shadows_a_module(folder):
    """A script's folder is on sys.path: `import x` finds its x.py before any other x."""
    wanted = set(sys.stdlib_module_names) | PACKAGES
    for path in FILES:
        wanted |= packages(ast.walk(ast.parse(path.read_text())))
    assert {script.stem for script in (ROOT / folder).glob("*.py")}.isdisjoint(wanted)
