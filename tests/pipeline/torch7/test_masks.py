"""Conversion of DeepMask and SharpMask: what is recognized, refused and accounted for."""

import copy
import shutil

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.proposal_store import ProposalStore
from pipeline.networks import load_network
from pipeline.torch7.convert import convert_file
from pipeline.torch7.masks import convert_masks
from pipeline.torch7.reader import Torch7Object, read_torch7, walk
from tests.pipeline.torch7.lua_networks import change
from tests.pipeline.torch7.torch7_writer import memory, written
from tests.real_data import TORCH7, needs

DATA = TORCH7 / "deepmask_sharpmask"
pytestmark = needs(DATA)  # files of the original code

FILES = ("deepmask", "sharpmask")


@pytest.fixture(scope="module")
def originals() -> dict[str, dict]:
    """What the files hold; change only copies."""
    return {name: read_torch7(DATA / f"{name}.t7") for name in FILES}


def objects(value: object) -> list[Torch7Object]:
    """All modules in a tree, each once."""
    return [item for _, item in walk(value) if isinstance(item, Torch7Object)]


@pytest.mark.parametrize("name, used", [("deepmask", 139), ("sharpmask", 183)])
def test_every_parameter_is_used_and_shows_the_sizes(name, used, originals, tmp_path):
    lines = convert_file(DATA / f"{name}.t7", tmp_path / "out.pt")
    modules, names = objects(originals[name]), ("weight", "bias", "a", "b")
    parameters = [m.fields[k] for m in modules for k in names if k in m.fields]
    assert len(parameters) == used
    assert lines[1] == f"{used} parameters used, each once; 0 not used"
    model, config, content = load_network(tmp_path / "out.pt")
    assert content["converted_from"] == f"{name}.t7"
    # a and b of a batch norm are its weight and bias; mean and variance are 0 and 1
    state = {k: v for k, v in model.state_dict().items() if "running_" not in k}
    assert sum(p.numel() for p in state.values()) == sum(p.numel() for p in parameters)
    c, s = config.deepmask, config.sharpmask
    assert (config.trunk.name, config.trunk.width) == ("resnet50", 4)
    assert (c.patch_size, c.context, c.mask_size, c.target_size) == (160, 32, 56, 112)
    assert (c.reduction, c.embedding, c.score_hidden, c.dropout) == (16, 32, 64, 0.5)
    if name == "sharpmask":
        assert (s.km, s.ks, s.widths, s.merge, s.num_modules) == (16, 16, "halving", "sum", 4)
        assert tuple(s.horizontal_widths) == (16, 16, 16, 8)
    else:
        assert originals[name]["config"]["km"] == 32  # the file's own config is another network's


def test_a_parameter_that_nothing_uses_is_named(originals, tmp_path):
    file = copy.deepcopy(originals["deepmask"])
    extra = Torch7Object("nn.Linear", {"weight": torch.ones(2, 3), "gradWeight": torch.ones(2, 3)})
    file["model"].fields["extra"] = extra
    (tmp_path / "file.t7").write_bytes(written(file))
    lines = convert_file(tmp_path / "file.t7", tmp_path / "out.pt")
    assert lines[1:3] == [
        "139 parameters used, each once; 1 not used",
        "  not used: model.extra.weight 2x3",
    ]


def test_both_forms_of_frozen_batch_norm_and_legacy_names(originals):
    deepmask = copy.deepcopy(originals["deepmask"]["model"])
    before = convert_masks({"model": deepmask}, set())[1]["model"]
    for module in objects(deepmask):
        if module.typename == "nn.SpatialConstDiagonal":
            module.typename = "inn.ConstAffine"
            module.fields |= {k: module.fields[k].flatten() for k in "ab"}
        elif module.typename == "cudnn.SpatialConvolution":
            module.typename = "nn.SpatialConvolutionMM"
            module.fields["weight"] = module.fields["weight"].flatten(1)
        elif module.typename == "cudnn.ReLU":
            module.typename = "nn.ReLU"
    after = convert_masks({"model": deepmask}, set())[1]["model"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


TRUNK = "trunk.modules"
BLOCK = f"{TRUNK}[6].modules[1].modules[1].modules[1]"  # a first block's main branch
LOOP = Torch7Object("nn.Sequential", {})
LOOP.fields["modules"] = [LOOP]
NO_MIRROR = {f"pad_{side}": 0 for side in "lrtb"}
MISFITS = [
    (
        {
            "scoreBranch.modules[2]": {"weight": torch.ones(64, 31)},
            f"{TRUNK}[9]": {"bias": torch.ones(5)},
        },
        r"2 other shapes: deepmask.tail.0.bias is \(5,\) instead of \(16,\), deepmask.score_head.1",
    ),
    (  # as in the original ResNet paper
        {
            f"{BLOCK}.modules[1]": {"dH": 2, "dW": 2},
            f"{BLOCK}.modules[4].modules[2]": {"dH": 1, "dW": 1},
        },
        r"1\]: stride 2 2 instead of 1 1; .*2\]: stride 1 1 instead of 2 2",
    ),
    (
        {f"{TRUNK}[1].modules[1]": NO_MIRROR, f"{TRUNK}[1].modules[2]": {"padH": 3, "padW": 3}},
        r"trunk.modules\[1\].*: padding 3 zeros instead of 3 mirrored",
    ),
    ({f"{TRUNK}[1].modules[1]": {"pad_l": 2}}, r"1\].*: padding that is not the same on all"),
    (
        {f"{TRUNK}[5]": {"modules": lambda blocks: [*blocks[:2], blocks[1]]}},
        r"trunk.modules\[5\].modules\[3\].*weight: .* is in the network twice",
    ),
    (
        {f"{TRUNK}[6]": {"modules": lambda blocks: blocks[:-1]}},
        r"stages of 3, 3, 6 blocks of 3 convolutions are of no known ResNet",
    ),
    (
        {BLOCK: {"modules": lambda m: m[::-1]}},
        r"6\].*: expected .padding. conv .*, got SpatialConst",
    ),
    (
        {f"{TRUNK}[12]": {"weight": lambda weight: weight * float("nan")}},
        r"trunk.modules\[12\].weight: not all numbers are finite",
    ),
    ({"maskBranchDM": {"modules": [LOOP]}}, "nested deeper than 30"),
    ({"trunk": {"modules": lambda m: [*m[:4], []]}}, r"5\]: expected a module, got list"),
    ({f"{TRUNK}[8]": {"pad_l": 1}}, r"8\]: expected a crop that is the same on all sides"),
    ({"": {"neths": copy.deepcopy}}, r"refs\[1\].*: expected neths\[1\]"),
    ({"": {"skpos": [8, 6]}}, "skpos and neths: expected"),
    ({"scoreBranch.modules[1]": {"v2": False}}, r"1\]: a Dropout of the old kind"),
    ({"scoreBranch.modules[3]": {"val": 0.5}}, r"3\]: a Threshold that is no ReLU"),
    ({"": {"fSz": -1}}, "fSz must be a number >= 0, got -1"),
    ({"scoreBranch.modules[2]": {"weight": None}}, "weight: the parameter is missing"),
    ({f"{TRUNK}[12]": {"weight": lambda weight: weight[:, :-1]}}, "inputs, no multiple of 100"),
]


@pytest.mark.parametrize("edits, reason", MISFITS)
def test_what_does_not_fit_is_named(originals, edits, reason):
    model = copy.deepcopy(originals["sharpmask"]["model"])
    change(model, edits)
    with pytest.raises(ValueError, match=reason) as error:
        convert_masks({"model": model}, set())
    assert "\n" not in str(error.value)


JUNK = (None, 0, -1, 1.5, "word", [], {}, {1.5: 2}, Torch7Object("nn.Junk", {}))
JUNK += (torch.ones(3), torch.ones(2, 2, dtype=torch.int64))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.sampled_from(JUNK))
def test_any_other_field_converts_or_is_refused(originals, name, index, junk):
    model = originals[name]["model"]
    fields = [(m, key) for m in objects(model) for key in m.fields if not key.startswith("grad")]
    module, key = fields[index % len(fields)]
    before = module.fields[key]
    module.fields[key] = junk
    try:
        convert_masks({"model": model}, set())
    except ValueError as error:
        assert str(error)
    finally:
        module.fields[key] = before


def test_unknown_content_is_refused_in_one_line(call_tool, tmp_path, capsys):
    file = tmp_path / "file.t7"
    file.write_bytes(written({"model": Torch7Object("nn.Other", {})}))
    assert call_tool("convert_t7", file, "--output", tmp_path / "out.pt") == 2
    error = capsys.readouterr().err
    assert "file.t7: expected DeepMask, SharpMask, an ImageNet ResNet" in error
    assert "--describe" in error
    assert error.count("\n") == 1 and not (tmp_path / "out.pt").exists()
    assert call_tool("convert_t7", file, "--output", file) == 2
    assert "is the file to convert" in capsys.readouterr().err


def test_tool_describes_and_converts_to_checkpoints_that_propose(call_tool, tmp_path, capsys):
    assert call_tool("convert_t7", DATA / "deepmask.t7", "--describe") == 0
    assert "nn.SpatialSymmetricPadding (pad_b=3" in capsys.readouterr().out
    assert call_tool("convert_t7", DATA / "sharpmask.t7", "--output", tmp_path / "mask.pt") == 0
    assert "183 parameters used" in capsys.readouterr().out
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 140, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "1.png"), pixels)
    options = ("--images", tmp_path / "images", "--output", tmp_path / "out", "--device", "cpu")
    assert call_tool("propose", "--checkpoint", tmp_path / "mask.pt", *options) == 0
    assert len(list(ProposalStore(tmp_path / "out"))) == 1


def test_conversion_takes_less_than_twice_the_files_size(originals, tmp_path):
    file = copy.deepcopy(originals["deepmask"])
    _, hidden, _, _, score = file["model"].fields["scoreBranch"].fields["modules"]
    units = 300_000
    for name in ("weight", "gradWeight"):
        hidden.fields[name] = torch.ones(units, 32)
        score.fields[name] = torch.ones(1, units)
    hidden.fields["bias"] = torch.ones(units)
    large = tmp_path / "large.t7"
    large.write_bytes(written(file))
    assert large.stat().st_size > 75e6
    _, peak = memory(
        "convert_file(path, path + '.pt')", shutil.copy(DATA / "deepmask.t7", tmp_path), large
    )
    assert peak < 2 * large.stat().st_size
