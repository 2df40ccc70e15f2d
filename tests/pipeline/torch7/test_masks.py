"""Conversion of DeepMask and SharpMask: what is recognized, refused and accounted for."""

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.inference.proposals import ProposalStore
from pipeline.networks import load_network
from pipeline.torch7.convert import convert_file
from pipeline.torch7.masks import convert_masks
from pipeline.torch7.reader import Torch7Object, read_torch7
from tests.pipeline.torch7.torch7_writer import written
from tests.real_data import TORCH7

ROOT = Path(__file__).resolve().parents[3]
DATA = TORCH7 / "deepmask_sharpmask"
if not DATA.is_dir():
    pytest.skip(f"{DATA}, files of the original code, is not there", allow_module_level=True)

FILES = {"deepmask": convert_masks, "sharpmask": convert_masks}


@pytest.fixture(scope="module")
def originals() -> dict[str, dict]:
    """What the files hold; change only copies."""
    return {name: read_torch7(DATA / f"{name}.t7") for name in FILES}


@pytest.fixture
def deepmask(originals) -> Torch7Object:
    """The model of DeepMask's file, to be changed."""
    return copy.deepcopy(originals["deepmask"]["model"])


def objects(value: object, seen: set[int] | None = None) -> Iterator[Torch7Object]:
    """All modules in a tree, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Torch7Object):
        yield value
        value = value.fields
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list) else ():
        yield from objects(item, seen)


@pytest.mark.parametrize("name, used", [("deepmask", 139), ("sharpmask", 183)])
def test_every_parameter_is_used(name, used, originals, tmp_path):
    lines = convert_file(DATA / f"{name}.t7", tmp_path / "out.pt")
    modules = list(objects(originals[name]))
    parameters = [
        m.fields[k] for m in modules for k in ("weight", "bias", "a", "b") if k in m.fields
    ]
    assert len(parameters) == used
    assert lines[1] == f"{used} parameters used, each once; 0 not used"
    model, config, content = load_network(tmp_path / "out.pt")
    assert config.trunk.name == "resnet50" and config.trunk.width == 4
    assert content["converted_from"] == f"{name}.t7"
    # a and b of a batch norm are its weight and bias; mean and variance are 0 and 1
    state = {k: v for k, v in model.state_dict().items() if "running_" not in k}
    assert sum(p.numel() for p in state.values()) == sum(p.numel() for p in parameters)


def test_sizes_are_those_of_the_parameters_not_of_the_files_config(originals, tmp_path):
    assert originals["deepmask"]["config"]["km"] == 32  # of another file's network
    convert_file(DATA / "sharpmask.t7", tmp_path / "out.pt")
    _, config, _ = load_network(tmp_path / "out.pt")
    c, s = config.deepmask, config.sharpmask
    assert (c.patch_size, c.context, c.mask_size, c.target_size) == (160, 32, 56, 112)
    assert (c.reduction, c.embedding, c.score_hidden, c.dropout) == (16, 32, 64, 0.5)
    assert (s.km, s.ks, s.widths, s.merge, s.num_modules) == (16, 16, "halving", "sum", 4)
    assert tuple(s.horizontal_widths) == (16, 16, 16, 8)


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


def test_both_forms_of_frozen_batch_norm_and_legacy_names(deepmask):
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


def trunk_module(model: Torch7Object, index: int) -> Torch7Object:
    return model.fields["trunk"].fields["modules"][index - 1]


def first_block(model: Torch7Object, stage: int) -> list[Torch7Object]:
    """The modules of the main branch of a stage's first block."""
    block = trunk_module(model, stage).fields["modules"][0].fields["modules"]
    return block[0].fields["modules"][0].fields["modules"]


def wrong_shapes(model):
    hidden = model.fields["scoreBranch"].fields["modules"][1].fields
    hidden["weight"] = hidden["weight"][:, :-1]
    trunk_module(model, 9).fields["bias"] = torch.ones(5)


def stride_in_the_first_convolution(model):  # as in the original ResNet paper
    main = first_block(model, 6)
    main[0].fields |= {"dH": 2, "dW": 2}
    main[3].fields["modules"][1].fields |= {"dH": 1, "dW": 1}


def zeros_around(model):
    stem = trunk_module(model, 1).fields["modules"]
    stem[1].fields |= {"padH": 3, "padW": 3}
    model.fields["trunk"].fields["modules"][0] = stem[1]


def one_block_twice(model):
    blocks = trunk_module(model, 5).fields["modules"]
    blocks[2] = blocks[1]


def one_block_less(model):
    trunk_module(model, 6).fields["modules"].pop()


def not_finite(model):
    trunk_module(model, 12).fields["weight"][3, 4] = float("nan")


def itself(model):
    branch = model.fields["maskBranch"].fields["modules"]
    branch[0].fields["modules"].append(branch[0])


def no_module(model):
    model.fields["trunk"].fields["modules"][4] = []


@pytest.mark.parametrize(
    "change, reason",
    [
        (wrong_shapes, r"2 other shapes: tail.0.bias is \(5,\) instead of \(16,\), score_head.1"),
        (
            stride_in_the_first_convolution,
            r"1\]: stride 2 2 instead of 1 1; .*2\]: stride 1 1 instead of 2 2",
        ),
        (zeros_around, r"trunk.modules\[1\]: padding 3 zeros instead of 3 mirrored"),
        (one_block_twice, r"trunk.modules\[5\].modules\[3\].*weight: .* is in the network twice"),
        (one_block_less, r"stages of 3, 3, 6 blocks of 3 convolutions are of no known ResNet"),
        (not_finite, r"trunk.modules\[12\].weight: not all numbers are finite"),
        (itself, "nested deeper than 30"),
        (no_module, r"trunk.modules\[5\]: expected a module, got list"),
    ],
)
def test_what_does_not_fit_is_named(deepmask, change, reason):
    change(deepmask)
    with pytest.raises(ValueError, match=reason) as error:
        convert_masks({"model": deepmask}, set())
    assert "\n" not in str(error.value)


def test_refinement_of_other_nets_than_the_horizontal_ones_is_refused(originals):
    model = copy.deepcopy(originals["sharpmask"]["model"])
    model.fields["neths"][1] = copy.deepcopy(model.fields["neths"][1])
    with pytest.raises(ValueError, match=r"refs\[2\].*: expected neths\[2\]"):
        convert_masks({"model": model}, set())


def test_sharpmask_shares_its_modules(originals):
    model = originals["sharpmask"]["model"].fields
    assert model["refs"][0] is model["netvs"][0]
    weights = [m.fields["weight"] for m in objects(model["trunk"]) if "weight" in m.fields]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1  # views of one


JUNK = (None, 0, -1, 1.5, "word", [], {}, {1.5: 2}, Torch7Object("nn.Junk", {}))
JUNK += (torch.ones(3), torch.ones(2, 2, dtype=torch.int64))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.integers(0, 10**6), st.sampled_from(JUNK))
def test_any_other_field_converts_or_is_refused(originals, name, index, junk):
    model = originals[name]["model"]
    fields = [(m, key) for m in objects(model) for key in m.fields if not key.startswith("grad")]
    module, key = fields[index % len(fields)]
    before = module.fields[key]
    module.fields[key] = junk
    try:
        FILES[name]({"model": model}, set())
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


def test_describe_prints_the_tree(call_tool, capsys):
    assert call_tool("convert_t7", DATA / "deepmask.t7", "--describe") == 0
    assert "nn.SpatialSymmetricPadding (pad_b=3" in capsys.readouterr().out


def test_converted_checkpoints_propose(call_tool, tmp_path, capsys):
    assert call_tool("convert_t7", DATA / "sharpmask.t7", "--output", tmp_path / "mask.pt") == 0
    assert "183 parameters used" in capsys.readouterr().out
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 140, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "1.png"), pixels)
    options = ("--images", tmp_path / "images", "--output", tmp_path / "out", "--device", "cpu")
    assert call_tool("propose", "--checkpoint", tmp_path / "mask.pt", *options) == 0
    assert len(list(ProposalStore(tmp_path / "out"))) == 1


MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pipeline.torch7.convert import convert_file
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
convert_file(sys.argv[4], sys.argv[3])  # what libraries take once
before = peak()
convert_file(sys.argv[2], sys.argv[3])
print(peak() - before)
"""


def test_conversion_takes_less_than_twice_the_files_size(originals, tmp_path):
    file = copy.deepcopy(originals["deepmask"])
    _, hidden, _, _, score = file["model"].fields["scoreBranch"].fields["modules"]
    units = 300_000
    for name in ("weight", "gradWeight"):
        hidden.fields[name] = torch.ones(units, 32)
        score.fields[name] = torch.ones(1, units)
    hidden.fields["bias"] = torch.ones(units)
    (tmp_path / "large.t7").write_bytes(written(file))
    size = (tmp_path / "large.t7").stat().st_size
    assert size > 75e6
    paths = [ROOT, tmp_path / "large.t7", tmp_path / "out.pt", DATA / "deepmask.t7"]
    command = [sys.executable, "-c", MEMORY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * size
