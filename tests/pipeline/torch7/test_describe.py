"""The tree of text: classes, shapes and plain fields, each object once."""

import pytest
import torch

from pipeline.torch7.describe import describe
from pipeline.torch7.reader import LuaFunction, Torch7Object, read_torch7
from tests.real_data import TORCH7, needs


def test_classes_shapes_and_cycles():
    fields = {"weight": torch.zeros(2, 3), "train": False, "_type": "torch.FloatTensor"}
    linear = Torch7Object("nn.Linear", fields | {"gradInput": torch.empty(0), "bias": {}})
    model = Torch7Object("nn.Sequential", {"modules": [linear, linear]})
    linear.fields["parent"] = model
    table = {"model": model, "mean": [1, 2.5], "f": LuaFunction(3), 0: "x" * 1000}
    assert describe(table).splitlines() == [
        "table of 4",
        f"  [0]: '{'x' * 56}...",
        "  f: Lua function, 3 bytes",
        "  mean: list of 2: [1, 2.5]",
        "  model: nn.Sequential",
        "    modules: list of 2",
        "      [1]: nn.Linear (train=False)",
        "        parent: same as model",
        "        weight: float32 2x3",
        "      [2]: same as model.modules[1]",
    ]


def test_long_content_is_cut():
    doubled = ["leaf"]
    for _ in range(50):  # 2^50 paths
        doubled = [doubled, doubled]
    assert len(describe(doubled).splitlines()) == 101
    assert describe([[n, {}] for n in range(500)]).endswith("\n  ... 400 more")
    assert len(describe(list(range(10_000)))) < 100
    assert len(describe(Torch7Object("a.B", {f"field{n}": n for n in range(1000)}))) < 1000


@needs(TORCH7)
@pytest.mark.parametrize(
    "file", ["deepmask_sharpmask/deepmask", "deepmask_sharpmask/sharpmask", "multipathnet/model"]
)
def test_trees_are_those_of_an_independent_reader(file):
    tree = (TORCH7 / f"{file.replace('/', '/tree_')}.txt").read_text().splitlines()
    described = describe(read_torch7(TORCH7 / f"{file}.t7")).splitlines()
    classes = [line.split(" [V")[0].split()[-1] for line in tree if " [V " in line]
    headings = [line.split(": ", 1)[-1].split(" (")[0] for line in described]
    found = [heading for heading in headings if heading.startswith(("nn.", "cudnn.", "inn."))]
    assert sorted(found) == sorted(classes)
    weights = [line for line in tree if line.strip().startswith("weight =")]
    sizes = [line.split("size=[")[1].split("]")[0].replace(", ", "x") for line in weights]
    words = [line.split() for line in described]
    assert sorted(line[-1] for line in words if line[0] == "weight:") == sorted(sizes)
