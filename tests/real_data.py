"""Where the tests find real images, weights and the originals' files; they skip without them.

That is the folder that MASKPATH_DATA names, else `shared/data` beside the checkout, else `data`.
`tests/conftest.py` counts the tests that skipped, and fails if the folder is there.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMED = os.environ.get("MASKPATH_DATA")
PLACES = [Path(NAMED)] if NAMED else [ROOT.parent / "shared" / "data", ROOT / "data"]
DATA = next((place for place in PLACES if place.is_dir()), PLACES[-1])
COCO_MINI = DATA / "coco-mini"
COCO_MINI_VAL = COCO_MINI / "annotations" / "instances_val.json"
TORCH7 = DATA / "torch7"
WEIGHTS = DATA / "weights"
LACKING = "lack of real data: "

if NAMED and not DATA.is_dir():
    raise FileNotFoundError(f"MASKPATH_DATA names {DATA}, which is no folder")


def needs(path: Path) -> pytest.MarkDecorator:
    """Skips tests without a file or folder of the data."""
    return pytest.mark.skipif(not path.exists(), reason=f"{LACKING}{path}")


def skip_without(path: Path) -> None:
    """The same, of the test or fixture that calls it."""
    if not path.exists():
        pytest.skip(f"{LACKING}{path}")


def say_what_lacked(reasons: list[str]) -> str:
    """A line on the tests that skipped, for these reasons."""
    lacking = sum(LACKING in reason for reason in reasons)
    if not lacking:
        return ""
    fault = ": it is there, so none should" if DATA.is_dir() else ", which is not there"
    return f"{lacking} tests skipped for lack of real data in {DATA}{fault}"
