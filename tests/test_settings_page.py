"""docs/settings.md is generated from the dataclasses: this test fails when it is stale.

`python tests/test_settings_page.py` writes it.
"""

import inspect
import re
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config import Config, ShapesConfig  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
HEAD = """# Settings

Generated from the dataclasses by `python tests/test_settings_page.py`. A recipe (`configs/*.yaml`)
holds only what it changes; `--set deepmask.optim.lr=1e-4` changes one setting. The defaults are the
published recipes.
"""
FIELD = re.compile(r"^    (\w+): [^=]+(?:=|$)")


def comments_of(schema: type) -> dict[str, str]:
    """The comment above or beside each field, its base classes' included."""
    comments = {}
    for base in reversed([c for c in schema.__mro__ if is_dataclass(c)]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            text = line.strip()
            if text.startswith("#"):
                above.append(text.lstrip("# "))
            elif match := FIELD.match(line):
                beside = text.partition("  # ")[2]
                comments[match[1]] = " ".join([*above, beside]).strip()
                above = []
            elif not text.startswith(("default_factory", "lambda", ")")):
                above = []
    return comments


def shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    text = str(list(value)) if isinstance(value, tuple) else str(value)
    return f"`{text}`" if text else "empty"


def section(config: Any, prefix: str, title: str, seen: dict[type, tuple]) -> list[str]:
    """A heading and a table of a dataclass, then those of the sections in it.

    A class that has been shown before is shown by the defaults that differ.
    """
    schema = type(config)
    comments, rows, below = comments_of(schema), [], []
    first_title, first = seen.setdefault(schema, (title, config))
    for field in fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        if name == "data.shapes":
            value = ShapesConfig()
        if is_dataclass(value):
            below += section(value, f"{name}.", name, seen)
        elif first is config or getattr(first, field.name) != value:
            meaning = comments[field.name].replace("|", "\\|")
            rows.append(f"| `{field.name}` | {shown(value)} | {meaning} |")
    about = inspect.cleandoc(schema.__doc__ or "").splitlines()
    if first is not config:
        about = [f"As `{first_title}`{', but:' if rows else '.'}"]
    table = ["", "| setting | default | meaning |", "|---|---|---|", *rows] if rows else []
    return ["", f"## {title}", "", *about, *table, *below]


def page() -> str:
    return HEAD + "\n".join(section(Config(), "", "The whole recipe", {})) + "\n"


def test_the_settings_page_is_up_to_date():
    assert PAGE.read_text() == page(), "stale: run python tests/test_settings_page.py"


def test_every_setting_says_what_it_is():
    assert re.findall(r"^\| `(\w+)` \| .* \|  \|$", page(), flags=re.M) == []


if __name__ == "__main__":
    PAGE.write_text(page())
