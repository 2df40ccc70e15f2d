"""Prints pip's constraints to the lowest version that pyproject.toml allows of each dependency."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
for requirement in sorted({*project["dependencies"], *(r for extra in extras for r in extra)}):
    if not requirement.startswith(project["name"]):  # the other extras
        name, version = re.fullmatch(r"([\w-]+)(?:\[.*])?>=([\w.]+)", requirement).groups()
        print(f"{name}=={version}")
