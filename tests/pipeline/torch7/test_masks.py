"""Conversion of DeepMask, SharpMask and ResNets: what is recognized, refused and accounted for."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline.load import load_mask_network

from models.trunk import build_trunk, load_backbone
from pipeline.torch7.convert import convert_file
from pipeline.torch7.imagenet import imagenet_state
from pipeline.torch7.masks import convert_deepmask, convert_sharpmask
from pipeline.torch7.modules import Module, Taken
from pipeline.torch7.objects import Torch7Object
from pipeline.torch7.reader import read_torch7
from tests.pipeline.torch7.torch7_writer import Instance, Storage, Tensor, written
from tests.real_data import TORCH7

ROOT = Path(__file__).resolve().parents[3]
DATA = TORCH7 / "deepmask_sharpmask"
if not DATA.is_dir():
    pytest.skip("data/torch7, files of the original code, is not here", allow_module_level=True)

FILES = {"deepmask": convert_deepmask, "sharpmask": convert_sharpmask}


@pytest.fixture(scope="module")
def originals() -> dict[str, dict]:
    """What the files hold; change only copies."""
    return {name: read_torch7(DATA / f"{name}.t7") for name in FILES}


@pytest.fixture
def deepmask(originals) -> Torch7Object:
    """The model of DeepMask's file, to be changed."""
    return copy.deepcopy(originals["deepmask"]["model"])


def convert(model: Torch7Object, converter: Callable = convert_deepmask) -> dict:
    return converter(Module(model, "", Taken(model)))[1]


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


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name, used", [("deepmask", 139), ("sharpmask", 183)])
def test_every_parameter_is_used_and_the_rest_is_named(name, used, originals, tmp_path):
    lines = convert_file(DATA / f"{name}.t7", tmp_path / "out.pt")
    modules = list(objects(originals[name]))
    names = ("weight", "bias", "a", "b")
    parameters = [m.fields[n] for m in modules for n in names if n in m.fields]
    assert len(parameters) == used
    assert lines[1] == f"{used} parameters used, each once; 0 not used"
    assert "gradWeight" in lines[2] and "gradBias" in lines[2] and "weight," not in lines[2]
    model, config = load_mask_network(tmp_path / "out.pt")
    assert config.trunk.name == "resnet50" and config.trunk.width == 4
    # scale and shift of a batch norm are a and b; everything else is a parameter of the model
    assert sum(p.numel() for p in model.state_dict().values()) == sum(p.numel() for p in parameters)


def test_sizes_are_those_of_the_parameters_not_of_the_files_config(originals, tmp_path):
    assert originals["deepmask"]["config"]["km"] == 32  # of another file's network
    convert_file(DATA / "sharpmask.t7", tmp_path / "out.pt")
    model, config = load_mask_network(tmp_path / "out.pt")
    c, s = config.deepmask, config.sharpmask
    assert (c.patch_size, c.context, c.mask_size, c.target_size) == (160, 32, 56, 112)
    assert (c.reduction, c.embedding, c.score_hidden, c.dropout) == (16, 32, 64, 0.5)
    assert (s.km, s.ks, s.widths, s.merge, s.num_modules) == (16, 16, "halving", "sum", 4)
    assert tuple(s.horizontal_widths) == (16, 16, 16, 8)


def test_a_parameter_that_nothing_uses_is_named(originals, tmp_path):
    file = copy.deepcopy(originals["deepmask"])
    extra = Torch7Object("nn.Linear", {"weight": torch.ones(2, 3), "gradWeight": torch.ones(2, 3)})
    file["model"].fields["extra"] = extra
    (tmp_path / "file.t7").write_bytes(written(lua(file)))
    lines = convert_file(tmp_path / "file.t7", tmp_path / "out.pt")
    assert "139 parameters used, each once; 1 not used" in lines
    assert "  not used: model.extra.weight 2x3" in lines


def test_both_forms_of_frozen_batch_norm_and_legacy_names(deepmask):
    before = convert(deepmask)["model"]
    for module in objects(deepmask):
        if module.typename == "nn.SpatialConstDiagonal":
            module.typename = "inn.ConstAffine"
            module.fields |= {k: module.fields[k].flatten() for k in "ab"}
        elif module.typename == "cudnn.SpatialConvolution":
            module.typename = "nn.SpatialConvolutionMM"
            module.fields["weight"] = module.fields["weight"].flatten(1)
        elif module.typename == "cudnn.ReLU":
            module.typename = "nn.ReLU"
    assert same(convert(deepmask)["model"], before)


def test_live_batch_norm_is_what_the_original_froze():
    """The ImageNet network that the reference DeepMask is made from, without its epsilon."""
    network = read_torch7(DATA / "resnet-50_narrow.t7")
    words, state = imagenet_state(Module(network, "", Taken(network)))
    assert words == "ImageNet ResNet-50 of width 4"
    deepmask = convert(read_torch7(DATA / "deepmask.t7")["model"])["model"]
    own = load_backbone("resnet50", width=4)
    assert not own.load_state_dict(state, strict=False).unexpected_keys
    for name, layer in own.named_modules():
        if isinstance(layer, torch.nn.BatchNorm2d) and not name.startswith("layer4"):
            scale = layer.weight * layer.running_var.rsqrt()
            shift = layer.bias - layer.running_mean * scale
            conv = name.replace("bn", "conv").replace("downsample.1", "downsample.0")
            key = next(k for k in deepmask if k.startswith("trunk") and k.endswith(f"{conv}.scale"))
            torch.testing.assert_close(deepmask[key], scale, rtol=1e-6, atol=1e-6)
            key = key.replace("scale", "shift")
            torch.testing.assert_close(deepmask[key], shift, rtol=1e-6, atol=1e-6)


def test_resnet_is_weights_of_a_trunk(tmp_path):
    lines = convert_file(DATA / "resnet-50_narrow.t7", tmp_path / "resnet.pth")
    assert "267 parameters used, each once; 0 not used" in lines
    trunk = build_trunk("resnet50", weights=tmp_path / "resnet.pth", width=4)
    assert trunk.channels == (4, 16, 32, 64)
    state = torch.load(tmp_path / "resnet.pth", weights_only=True)
    assert torch.equal(trunk.levels[3].layer3[5].conv3.weight, state["layer3.5.conv3.weight"])
    whole = load_backbone("resnet50", weights=tmp_path / "resnet.pth", whole=True, width=4)
    assert torch.equal(whole.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet101"])
def test_other_resnets_in_either_form_of_batch_norm(name):
    torch.manual_seed(0)
    own = load_backbone(name, width=2).eval()
    for norm in (m for m in own.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.2, 0.5)
        norm.running_var.uniform_(0.5, 2)
        for values in (norm.bias.data, norm.running_mean):
            values.uniform_(-0.1, 0.1)
    x = torch.randn(1, 3, 64, 64)
    for frozen in (False, True):
        network = lua_resnet(own, frozen=frozen)
        taken = Taken(network)
        words, state = imagenet_state(Module(network, "", taken))
        assert words.startswith(f"ImageNet {name.replace('resnet', 'ResNet-')} ")
        assert not taken.unused()
        other = load_backbone(name, width=2).eval()
        other.load_state_dict(state, strict=False)
        with torch.no_grad():
            torch.testing.assert_close(other(x), own(x), rtol=1e-4, atol=1e-4)


def lua_resnet(own: torchvision.models.ResNet, *, frozen: bool) -> Torch7Object:
    """A network of torchvision as fb.resnet.torch saves it."""

    def module(typename: str, **fields: object) -> Torch7Object:
        return Torch7Object(typename, fields)

    def sequence(*modules: Torch7Object) -> Torch7Object:
        return module("nn.Sequential", modules=list(modules))

    def conv(layer: torch.nn.Conv2d) -> Torch7Object:
        sizes = {"nInputPlane": layer.in_channels, "nOutputPlane": layer.out_channels}
        for name, values in (("k", layer.kernel_size), ("d", layer.stride)):
            sizes |= {f"{name}H": values[0], f"{name}W": values[1]}
        sizes |= {"padH": layer.padding[0], "padW": layer.padding[1]}
        return module("cudnn.SpatialConvolution", weight=layer.weight.detach(), **sizes)

    def norm(layer: torch.nn.BatchNorm2d) -> Torch7Object:
        live = {k: v.detach() for k, v in layer.state_dict().items() if v.dim()}
        if not frozen:
            return module("nn.SpatialBatchNormalization", eps=1e-5, **live)
        scale = live["weight"] / (live["running_var"] + 1e-5).sqrt()
        return module("inn.ConstAffine", a=scale, b=live["bias"] - live["running_mean"] * scale)

    def block(layer: torch.nn.Module) -> Torch7Object:
        main, number = [], 1
        while hasattr(layer, f"conv{number}"):
            main += [module("cudnn.ReLU")] if number > 1 else []
            main += [conv(getattr(layer, f"conv{number}")), norm(getattr(layer, f"bn{number}"))]
            number += 1
        down = layer.downsample
        shortcut = sequence(conv(down[0]), norm(down[1])) if down else module("nn.Identity")
        table = module("nn.ConcatTable", modules=[sequence(*main), shortcut])
        return sequence(table, module("nn.CAddTable"), module("cudnn.ReLU"))

    pool = {"kH": 3, "kW": 3, "dH": 2, "dW": 2, "padH": 1, "padW": 1}
    stages = [getattr(own, f"layer{n}") for n in range(1, 5)]
    fc = {k: v.detach() for k, v in own.fc.state_dict().items()}
    return sequence(
        *(conv(own.conv1), norm(own.bn1), module("cudnn.ReLU")),
        module("nn.SpatialMaxPooling", **pool),
        *(sequence(*map(block, stage)) for stage in stages),
        *(module("cudnn.SpatialAveragePooling"), module("nn.View"), module("nn.Linear", **fc)),
    )


def trunk_module(model: Torch7Object, number: int) -> Torch7Object:
    return model.fields["trunk"].fields["modules"][number - 1]


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


@pytest.mark.parametrize(
    "change, reason",
    [
        (wrong_shapes, r"2 other shapes: tail.0.bias is \(5,\) instead of \(16,\), score_head.1"),
        (stride_in_the_first_convolution, r"2\]: stride 2 2 instead of 1 1|stride 1 1 instead"),
        (zeros_around, r"trunk.modules\[1\]: padding 3 zeros instead of 3 mirrored"),
        (one_block_twice, r"trunk.modules\[5\].modules\[3\].*weight: .* is in the network twice"),
        (one_block_less, r"stages of 3, 3, 6 blocks of 3 convolutions are of no ResNet known here"),
        (not_finite, r"trunk.modules\[12\].weight: not all numbers are finite"),
        (itself, "nested deeper than 30"),
    ],
)
def test_what_does_not_fit_is_named(deepmask, change, reason):
    change(deepmask)
    with pytest.raises(ValueError, match=reason) as error:
        convert(deepmask)
    assert "\n" not in str(error.value)


def test_refinement_of_other_nets_than_the_horizontal_ones_is_refused(originals):
    model = copy.deepcopy(originals["sharpmask"]["model"])
    model.fields["neths"][1] = copy.deepcopy(model.fields["neths"][1])
    with pytest.raises(ValueError, match=r"refs\[2\].*it is not neths\[2\]"):
        convert(model, convert_sharpmask)


JUNK = (
    None,
    0,
    -1,
    1.5,
    "word",
    [],
    {},
    {1.5: 2},
    torch.ones(3),
    torch.ones(2, 2, dtype=torch.int64),
)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(FILES)), st.integers(0, 10**6), st.integers(0, len(JUNK)))
def test_any_other_field_converts_or_is_refused(originals, name, number, junk):
    model = originals[name]["model"]
    fields = [(m, key) for m in objects(model) for key in m.fields if not key.startswith("grad")]
    module, key = fields[number % len(fields)]
    before = module.fields[key]
    module.fields[key] = Torch7Object("nn.Junk", {}) if junk == len(JUNK) else JUNK[junk]
    try:
        convert(model, FILES[name])
    except ValueError as error:
        assert str(error)
    finally:
        module.fields[key] = before


def test_unknown_content_is_refused_in_one_line(call_tool, tmp_path, capsys):
    (tmp_path / "file.t7").write_bytes(written({"model": Instance("nn.Other", {})}))
    assert call_tool("convert_t7", tmp_path / "file.t7", "--output", tmp_path / "out.pt") == 2
    error = capsys.readouterr().err
    assert "file.t7: nothing that can be converted" in error and "--describe" in error
    assert error.count("\n") == 1 and not (tmp_path / "out.pt").exists()
    assert call_tool("convert_t7", tmp_path / "file.t7", "--output", tmp_path / "file.t7") == 2
    assert "is the file to convert" in capsys.readouterr().err


def test_describe_prints_the_tree(call_tool, capsys):
    assert call_tool("convert_t7", DATA / "deepmask.t7", "--describe") == 0
    assert "nn.SpatialSymmetricPadding (pad_b=3" in capsys.readouterr().out


def test_converted_checkpoints_propose_and_start_the_next_stage(
    call_tool, tiny_recipe, tmp_path, capsys
):
    deepmask, recipe = tmp_path / "deepmask.pt", copy.deepcopy(tiny_recipe)
    assert call_tool("convert_t7", DATA / "deepmask.t7", "--output", deepmask) == 0
    assert "139 parameters used" in capsys.readouterr().out
    recipe["trunk"] = {"name": "resnet50", "weights": None, "width": 4}
    recipe["deepmask"] |= {"patch_size": 160, "mask_size": 56, "score_hidden": 64}
    recipe["sharpmask"]["optim"]["batch_size"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    start = ("--stage", "sharpmask", "--config", tmp_path / "recipe.yaml", "--device", "cpu")
    run = tmp_path / "run" / "sharpmask"
    assert (
        call_tool("train_stage", *start, "--output", run, "--set", f"init.deepmask={deepmask}") == 0
    )
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (100, 140, 3)).astype(np.uint8)
    cv2.imwrite(str(tmp_path / "images" / "1.png"), pixels)
    for checkpoint in (deepmask, run / "checkpoints" / "best.pt"):
        output = tmp_path / checkpoint.stem
        options = ("--images", tmp_path / "images", "--output", output, "--num-proposals", 5)
        assert call_tool("propose", "--checkpoint", checkpoint, *options, "--device", "cpu") == 0
        assert (output / "proposals.json").is_file()


def lua(value: object, known: dict | None = None) -> object:
    """What `written` takes, of what the reader gave; what is shared stays so."""
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][0]
    if isinstance(value, torch.Tensor):
        kind = {torch.float32: "Float", torch.int64: "Long"}[value.dtype]
        storage = Storage(kind, value.flatten().numpy()) if value.numel() else None
        new = Tensor(storage, tuple(value.shape), value.contiguous().stride(), kind=kind)
    elif isinstance(value, Torch7Object):
        new = Instance(value.typename, None)
    elif isinstance(value, dict | list):
        new = {}
    else:
        return value
    known[id(value)] = new, value
    if isinstance(value, Torch7Object):
        new.fields = lua(value.fields, known)
    elif isinstance(value, dict | list):
        table = value if isinstance(value, dict) else dict(enumerate(value, 1))
        new |= {key: lua(item, known) for key, item in table.items()}
    return new


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
    (tmp_path / "large.t7").write_bytes(written(lua(file)))
    size = (tmp_path / "large.t7").stat().st_size
    assert size > 75e6
    paths = [ROOT, tmp_path / "large.t7", tmp_path / "out.pt", DATA / "deepmask.t7"]
    command = [sys.executable, "-c", MEMORY, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 * size
