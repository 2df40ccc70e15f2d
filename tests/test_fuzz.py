"""Fuzzed recipes and run lengths: a right result or an error in one line, nothing else."""

import numpy as np
import pycocotools.mask as coco_mask
import yaml
from hypothesis import strategies as st

from datasets.segmentations import check_counts
from pipeline.config import Config
from pipeline.recipe import config_to_dict, load_config
from tests.fuzzing import fuzzed

KEYS: list[str] = []


def _collect(values: dict, prefix: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict) and all(isinstance(k, str) for k in value) and value:
            _collect(value, f"{prefix}{key}.")
        else:
            KEYS.append(f"{prefix}{key}")


_collect(config_to_dict(Config()))
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
        st.sampled_from(["${seed}", "${oc.env:HOME}", "???", "1e3", "[1, 2]", "-0", "inf"]),
    ),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@fuzzed(key=st.sampled_from(KEYS), value=VALUES, as_file=st.booleans())
def test_a_recipe_is_read_or_refused_in_a_line(tmp_path_factory, key, value, as_file):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    nested = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    path.write_text(yaml.safe_dump(nested if as_file else {"seed": 1}))
    try:
        config = load_config(path, [] if as_file else [f"{key}={value}"])
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert isinstance(config, Config)


@fuzzed(text=st.binary(max_size=12), damage=st.integers(0, 2**31), height=st.integers(1, 9),
        width=st.integers(1, 9))  # fmt: skip
def test_run_lengths_are_right_or_refused(text, damage, height, width):
    """Real ones with a changed byte, and any bytes: what passes, pycocotools decodes safely."""
    rng = np.random.default_rng(damage)
    mask = np.asfortranarray(rng.random((height, width)) < 0.5, np.uint8)
    real = bytearray(coco_mask.encode(mask)["counts"])
    if damage % 2 and real:
        real[damage % len(real)] = damage % 256
    for counts in (bytes(real), text):
        (valid,), (area,), _ = check_counts([counts], np.array([height * width]))
        if valid:
            decoded = coco_mask.decode({"size": [height, width], "counts": counts})
            assert decoded.shape == (height, width) and decoded.sum() == area
        assert valid or counts != coco_mask.encode(mask)["counts"]
