"""Imports point one way (tools, pipeline, models and datasets); every tool starts from anywhere."""

import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
PACKAGES = {*ALLOWED, "tests"}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def imported(node: ast.AST) -> list[str]:
    """The top-level packages that a statement imports; "." for a relative import."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["."] if node.level else [node.module.split(".")[0]]
    return []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way_and_stand_at_the_top(path):
    tree = ast.parse(path.read_text())
    everywhere = {(name, node) for node in ast.walk(tree) for name in imported(node)}
    at_the_top = {(name, node) for node in tree.body for name in imported(node)}
    ours = {(name, node) for name, node in everywhere if name in PACKAGES or name == "."}
    assert {name for name, _ in ours} <= ALLOWED[path.relative_to(ROOT).parts[0]]
    assert ours <= at_the_top, "an import of ours within a function or a condition"


def test_the_files_were_found():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(ALLOWED)
    assert {"train_stage.py", "propose.py", "score_coco.py"} <= {path.name for path in TOOLS}


@pytest.fixture(scope="module")
def help_of(tmp_path_factory) -> dict[Path, subprocess.CompletedProcess]:
    """What each tool answers to --help, asked in a foreign folder."""

    def ask(tool: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, str(tool), "--help"]
        return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=300)

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TOOLS, pool.map(ask, TOOLS), strict=True))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_tool_answers_help_from_anywhere(help_of, tool):
    answer = help_of[tool]
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("usage:") and tool.name in answer.stdout


def test_no_tool_shadows_a_module():
    """tools/ is on sys.path when a tool runs: `import x` finds tools/x.py before any other x."""
    wanted = set(sys.stdlib_module_names) | PACKAGES
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        wanted |= {name for node in nodes for name in imported(node)}
    assert {tool.stem for tool in TOOLS}.isdisjoint(wanted)
