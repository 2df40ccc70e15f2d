"""docs/faults.md names tests that exist."""

import ast
from pathlib import Path

from tests.test_user_errors import MISTAKES

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "faults.md"


def read_rows() -> list[list[str]]:
    """The cells of all tables' rows, without headings."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] != "event"]


def names_in(file: str) -> set[str]:
    """Tests in a file, with the rows of user_errors.txt if it reads them; none if it is absent."""
    path = TESTS / file
    if not path.is_file():
        return set()
    body = ast.parse(path.read_text()).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    rows = set(MISTAKES) if file == "test_user_errors.py" else set()
    return {name for name in names if name.startswith("test_")} | rows


def test_every_fault_names_a_test():
    rows = read_rows()
    assert len(rows) >= 60
    assert [row for row in rows if len(row) != 4 or not all(row)] == []
    named = [row[3].strip("`").partition("::") for row in rows]
    assert [(file, test) for file, _, test in named if test not in names_in(file)] == []
