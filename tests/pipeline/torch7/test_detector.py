"""The released detector against the original's own outputs, and Fast R-CNN against a slow forward.

There is no file of the Caffe networks here: theirs are written as the trees that the reader gives,
with what is known of them, and computed by a walk over the tree.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets.transforms import PixelRules, normalize
from pipeline.load import load_detector
from torch import Tensor, nn
from torchvision.ops import roi_pool

from datasets.roi_sampler import mirror
from models.multipathnet import MultiPathNet
from models.roi_pooling import roi_pool_rounded
from models.trunk import build_trunk, load_backbone
from pipeline.checkpoint import save_checkpoint
from pipeline.inference.detect import Detector, select_boxes
from pipeline.inference.proposals import Proposals
from pipeline.networks import build_multipathnet
from pipeline.recipe import config_from_dict
from pipeline.torch7.caffe import convert_caffe_network, is_caffe_network
from pipeline.torch7.convert import convert_file
from pipeline.torch7.detector import convert_detector, is_detector
from pipeline.torch7.modules import Taken
from pipeline.torch7.objects import LuaFunction, Torch7Object
from pipeline.torch7.reader import read_torch7
from tests.real_data import TORCH7

REFERENCE = TORCH7 / "multipathnet"
CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest value, and of each probability
CORNER = torch.tensor([0, 0, 1, 1])  # from a box's first and last pixel to its edges


def reference(name: str) -> Tensor:
    return torch.from_numpy(np.load(REFERENCE / f"{name}.npy"))


def assert_near(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    if not REFERENCE.is_dir():
        pytest.skip(f"{REFERENCE} is not there")
    path = tmp_path_factory.mktemp("detector") / "detector.pt"
    convert_file(REFERENCE / "model.t7", path)
    return path


@pytest.fixture(scope="module")
def detector(checkpoint) -> Detector:
    return load_detector(checkpoint, CPU)[0]


@pytest.fixture(scope="module")
@torch.inference_mode()
def outputs(detector) -> dict[str, Tensor]:
    """Everything between the original's input and its boxes."""
    model, rois = detector.model, reference("net_rois") - 1  # Lua counts from 1
    layers = model.layers(reference("net_input"))
    pooled = model.pool(layers[16], rois, 1 / 16)
    heads = model.classify_rois(layers, rois)
    probabilities, boxes = model.decode(heads, reference("boxes") - 1)
    return {
        "features": layers[16],
        "pooled": pooled[:8],
        "roi_code": model.towers[0].head(model.towers[0].pooling([pooled])),
        "head_logits": heads["class_logits"].transpose(0, 1),
        "bbox_raw": heads["deltas"].flatten(1),
        "bbox_deltas": (heads["deltas"] * model.delta_std + model.delta_mean).flatten(1),
        "probs": probabilities,
        "probs_direct": probabilities,
        "pred_boxes": boxes.flatten(1) + 1,
    }


@pytest.mark.parametrize(
    "name",
    ["features", "pooled", "roi_code", "head_logits", "bbox_raw", "bbox_deltas", "probs",
     "probs_direct", "pred_boxes"],
)  # fmt: skip
def test_every_intermediate_is_the_originals(name, outputs):
    theirs = reference(name)
    # We do not decode the background's box.
    assert_near(outputs[name], theirs[:, 4:] if name == "pred_boxes" else theirs)


def test_each_probability_is_the_originals(outputs):
    theirs = reference("probs")
    assert float(((outputs["probs"] - theirs).abs() / theirs).max()) <= TOLERANCE


def test_pooling_of_fast_rcnn_would_not_be_the_originals(detector, outputs):
    """What the choice of the bins is for."""
    other = roi_pool(outputs["features"], reference("net_rois")[:8] - 1, 14, 1 / 16)
    assert float((other - reference("pooled")).abs().max()) > 1


@pytest.mark.parametrize("scores", ["of the original", "of ours"])
def test_kept_boxes_are_the_originals(scores, outputs):
    """The boxes that the original scored, by both of its two NMS."""
    scored = reference("scored_boxes")
    best = scored[:, 4] if scores == "of the original" else outputs["probs"][:, 1:].amax(1)
    values, _, boxes, rows = select_boxes(
        torch.stack([1 - best, best], 1),
        (scored[:, :4] - 1 + CORNER)[:, None],
        score_threshold=0.0,
        nms_iou=0.3,
    )
    assert rows.tolist() == (reference("nms_dense_0.3") - 1).tolist()
    kept = torch.cat([boxes + 1 - CORNER, values[:, None]], 1)
    assert_near(kept, reference("nms_0.3"))
    assert_near(kept[:, 4], reference("nms_0.3")[:, 4])


def test_every_parameter_is_used_once(checkpoint, tmp_path):
    value = read_torch7(REFERENCE / "model.t7")
    taken = Taken(value)
    _, content = convert_detector(value, taken)
    assert taken.unused() == []
    lines = convert_file(REFERENCE / "model.t7", tmp_path / "again.pt")
    assert "71 parameters used, each once; 0 not used" in lines
    # 6 convolutions of stem and layer1 with 2 parameters, 16 others with 3, 7 linears, BBoxNorm
    assert taken.count() == 5 * 2 + 15 * 3 + 7 * 2 + 2
    assert [c["id"] for c in content["categories"]][-2:] == [89, 90]


def test_tool_detects_with_it(checkpoint, tiny_sharpmask, shapes_directory, tmp_path, call_tool):
    arguments = ("--proposal-checkpoint", tiny_sharpmask, "--device", "cpu")
    images = shapes_directory / "images" / "val"
    one = tmp_path / "images"
    one.mkdir()
    first = sorted(images.iterdir())[0]
    (one / first.name).write_bytes(first.read_bytes())
    output = tmp_path / "out"
    code = call_tool(
        "detect", "--checkpoint", checkpoint, "--images", one, "--output", output, *arguments
    )
    assert code == 0 and (output / "detections.json").stat().st_size > 1000


def original_detections(detector: Detector, image: np.ndarray, boxes: Tensor) -> list[tuple]:
    """Class, score and 1-based box of what the Lua test keeps, without a resize.

    Coordinates, clamp and NMS written as there.
    """
    model, (height, width) = detector.model, image.shape[:2]
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    mean, std = (
        torch.tensor(v)[:, None, None] for v in (detector.pixels.mean, detector.pixels.std)
    )
    layers = model.layers(((pixels - mean) / std)[None])
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes - 1], 1)
    found = model.classify_rois(layers, rois)
    probabilities = found["class_logits"].softmax(-1).mean(1)
    deltas = found["deltas"] * model.delta_std + model.delta_mean
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    x, y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    dx, dy, dw, dh = deltas.permute(2, 1, 0)  # (C + 1, R) each
    cx, cy, half_w, half_h = x + dx * w, y + dy * h, w * dw.exp() / 2, h * dh.exp() / 2
    decoded = torch.stack([cx - half_w, cy - half_h, cx + half_w, cy + half_h], 2)
    return original_selection(probabilities, decoded.transpose(0, 1), (height, width))


def original_selection(probabilities: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[tuple]:
    """The Lua test's clamp and NMS of each class, best first: (R, C + 1), (R, C + 1, 4) 1-based."""
    kept, limits = [], torch.tensor([size[1], size[0]] * 2)
    for label in range(1, probabilities.shape[1]):
        rows = torch.minimum(boxes[:, label].clamp(min=1), limits).tolist()
        left = sorted(range(len(rows)), key=lambda n: -float(probabilities[n, label]))
        while left:
            best, *left = left
            kept.append((label, float(probabilities[best, label]), rows[best]))
            left = [n for n in left if overlap(rows[best], rows[n]) <= 0.3]
    return sorted(kept, key=lambda row: -row[1])


def test_mirrored_views_of_inclusive_boxes_agree(checkpoint):
    """The mean over an image and its mirror is, for the mirrored image, the mirrored mean."""
    options = {"short_sides": [96], "flip": True, "score_threshold": 0.01, "nms": 1.0}
    detector, _ = load_detector(checkpoint, CPU, overrides=options)
    image = np.random.default_rng(2).integers(0, 256, (64, 96, 3), np.uint8)
    boxes = np.array([[8, 9, 70, 50]], np.float32)
    there, back = (
        detector(pixels, Proposals(1, "x", 64, 96, np.ones(1, np.float32), own, [b""]))
        for pixels, own in ((image, boxes), (image[:, ::-1].copy(), mirror(boxes, 96)))
    )
    assert len(there) > 5 and there.labels.tolist() == back.labels.tolist()
    np.testing.assert_allclose(there.scores, back.scores, rtol=1e-4)
    np.testing.assert_allclose(there.boxes, mirror(back.boxes, 96), atol=0.01)


def overlap(a: list[float], b: list[float]) -> float:
    w, h = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + 1 for i in (0, 1))
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return 0 if w <= 0 or h <= 0 else w * h / (sum(areas) - w * h)


def test_detections_of_an_image_are_those_of_the_lua_test(checkpoint):
    """Boxes that come and go have edges; in between they are the original's."""
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (96, 128, 3), np.uint8)
    corners = torch.tensor(
        [[1, 1, 128, 96], [20, 30, 60, 80], [22, 28, 64, 85], [90, 3, 127, 40.0]]
    )
    options = {"short_sides": [96], "score_threshold": 0.0, "max_detections": 1000}
    detector, _ = load_detector(checkpoint, CPU, overrides=options)
    proposals = Proposals(
        1, "x", 96, 128, np.ones(4, np.float32), (corners - 1 + CORNER).numpy(), [b""] * 4
    )
    found = detector(image, proposals)
    with torch.inference_mode():
        theirs = original_detections(detector, image, corners)
    assert len(found) == len(theirs) > 80
    np.testing.assert_allclose(found.scores, [row[1] for row in theirs], rtol=TOLERANCE)
    boxes = found.boxes + 1 - CORNER.numpy()
    np.testing.assert_allclose(boxes, [row[2] for row in theirs], atol=TOLERANCE * 128)
    assert found.labels.tolist() == [detector.categories[row[0] - 1]["id"] for row in theirs]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    """(H, W, 3) float32 from 0 to 255: the original's was scaled and is not of whole numbers."""
    return (reference("image") * 255).permute(1, 2, 0).contiguous().numpy()


@pytest.fixture(scope="module")
def whole(checkpoint) -> Detector:
    """Detects from images, at the original's scale."""
    options = {"short_sides": [240], "score_threshold": 0.0, "max_detections": 10_000}
    return load_detector(checkpoint, CPU, overrides=options)[0]


@torch.inference_mode()
def test_from_the_image_on_probabilities_and_boxes_are_the_originals(whole, image):
    probabilities, boxes = whole._classify_chunk(whole._views(image), reference("boxes") - 1)
    assert_near(probabilities, reference("probs"))
    assert_near(boxes.flatten(1) + 1, reference("pred_boxes")[:, 4:])


def test_detections_from_the_image_are_those_of_the_originals_outputs(whole, image):
    theirs = original_selection(
        reference("probs"), reference("pred_boxes").view(24, 81, 4), image.shape[:2]
    )
    boxes = (reference("boxes") - 1 + CORNER).numpy()
    found = whole(image, Proposals(1, "x", 256, 192, np.ones(24, np.float32), boxes, [b""] * 24))
    assert len(found) == len(theirs) > 800
    ids = np.array([whole.categories[row[0] - 1]["id"] for row in theirs])
    scores = np.array([row[1] for row in theirs])
    np.testing.assert_allclose(found.scores, scores, rtol=TOLERANCE)
    # By category: of near equals of two categories either may come first.
    ours, theirs_first = np.argsort(found.labels, kind="stable"), np.argsort(ids, kind="stable")
    np.testing.assert_array_equal(found.labels[ours], ids[theirs_first])
    boxes = np.array([row[2] for row in theirs])[theirs_first]
    found_boxes = (found.boxes + 1 - CORNER.numpy())[ours]
    np.testing.assert_allclose(found_boxes, boxes, atol=TOLERANCE * 256)


def test_resizing_by_area_would_move_the_boxes(whole, image):
    """What `multipathnet.resampling` is for."""
    whole = copy.copy(whole)
    whole.resampling = "area"
    with torch.inference_mode():
        _, boxes = whole._classify_chunk(whole._views(image), reference("boxes") - 1)
    moved = (boxes.flatten(1) + 1 - reference("pred_boxes")[:, 4:]).abs().max()
    assert 1 < float(moved) < 5


# Trees of the Caffe networks: what `read_torch7` would give.


def module(name: str, *modules: Torch7Object, **fields) -> Torch7Object:
    if modules:
        fields["modules"] = list(modules)
    return Torch7Object(name, fields)


class Writer:
    """Makes modules with random parameters, packed as the release has them: without gradients."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def conv(self, inputs: int, width: int, size: int, stride: int = 1, groups: int = 1):
        fan_in = inputs // groups * size**2
        weight = self.random(width, inputs // groups, size, size, scale=(2 / fan_in) ** 0.5)
        sides = {"kW": size, "kH": size, "dW": stride, "dH": stride}
        sides |= {"padW": size // 2, "padH": size // 2, "groups": groups}
        planes = {"nInputPlane": inputs, "nOutputPlane": width}
        bias = self.random(width, scale=0.1)
        return module("cudnn.SpatialConvolution", weight=weight, bias=bias, **sides, **planes)

    def linear(self, inputs: int, width: int) -> Torch7Object:
        weight = self.random(width, inputs, scale=(2 / inputs) ** 0.5)
        return module("nn.Linear", weight=weight, bias=self.random(width, scale=0.1))


def relu() -> Torch7Object:
    return module("cudnn.ReLU", inplace=True)


def max_pool(size: int, pad: int, *, ceil: bool = True) -> Torch7Object:
    sides = {"kW": size, "kH": size, "dW": 2, "dH": 2, "padW": pad, "padH": pad}
    return module("cudnn.SpatialMaxPooling", ceil_mode=ceil, **sides)


def response_norm() -> Torch7Object:
    return module("inn.SpatialCrossResponseNormalization", size=5, alpha=0.0001, beta=0.75, k=1)


def vgg16_features(writer: Writer) -> Torch7Object:
    layers, inputs = [], 3
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers += [max_pool(2, 0)] if block else []
        for _ in range(depth):
            layers += [writer.conv(inputs, width, 3), relu()]
            inputs = width
    return module("nn.Sequential", *layers)


def caffenet_features(writer: Writer) -> Torch7Object:
    return module(
        "nn.Sequential",
        writer.conv(3, 96, 11, stride=4), relu(), max_pool(3, 1), response_norm(),
        writer.conv(96, 256, 5, groups=2), relu(), max_pool(3, 1), response_norm(),
        writer.conv(256, 384, 3), relu(),
        writer.conv(384, 384, 3, groups=2), relu(),
        writer.conv(384, 256, 3, groups=2), relu(),
    )  # fmt: skip


HIDDEN, CLASSES = 8, 20
NETWORKS = {"vgg16": (vgg16_features, 512, 7), "caffenet": (caffenet_features, 256, 6)}


def fast_rcnn(name: str, *, features: Torch7Object | None = None) -> dict:
    """Fast R-CNN as {unpack, model}, its fc6 and fc7 narrow."""
    writer = Writer(len(name))
    make, width, side = NETWORKS[name]
    drop = module("nn.Dropout", p=0.5, v2=True)
    top = [writer.linear(width * side**2, HIDDEN), relu(), drop, writer.linear(HIDDEN, HIDDEN)]
    network = module(
        "nn.Sequential",
        module(
            "nn.ParallelTable",
            module("nn.Sequential", features or make(writer)),
            module("nn.Identity"),
        ),
        module("inn.ROIPooling", W=side, H=side, spatial_scale=0.0625),
        module("nn.View", numElements=-1),
        module("nn.Sequential", *top, relu(), drop),
        module(
            "nn.ConcatTable",
            writer.linear(HIDDEN, CLASSES + 1),
            writer.linear(HIDDEN, 4 * (CLASSES + 1)),
        ),
    )
    return {"unpack": LuaFunction(100), "model": network}


def run(item: Torch7Object, x):
    """The network's own arithmetic, module by module."""
    f, name = item.fields, item.typename.split(".")[1]
    if name == "Sequential":
        for inner in f["modules"]:
            x = run(inner, x)
    elif name == "ParallelTable":
        x = [run(inner, part) for inner, part in zip(f["modules"], x, strict=True)]
    elif name == "ConcatTable":
        x = [run(inner, x) for inner in f["modules"]]
    elif name == "SpatialConvolution":
        parts = x.chunk(f["groups"], 1)
        weights, biases = f["weight"].chunk(f["groups"]), f["bias"].chunk(f["groups"])
        each = zip(parts, weights, biases, strict=True)
        x = torch.cat([F.conv2d(p, w, b, f["dH"], f["padH"]) for p, w, b in each], 1)
    elif name == "SpatialMaxPooling":
        x = F.max_pool2d(x, f["kH"], f["dH"], f["padH"], ceil_mode=f["ceil_mode"])
    elif name == "SpatialCrossResponseNormalization":
        squares = F.pad(x**2, (0, 0, 0, 0, 2, 2)).unfold(1, f["size"], 1).sum(-1)
        x = x / (f["k"] + f["alpha"] / f["size"] * squares) ** f["beta"]
    elif name == "ReLU":
        x = x.clamp(min=0)
    elif name == "ROIPooling":
        pool = roi_pool_rounded if f.get("v2") else roi_pool
        x = pool(x[0], x[1] - 1, f["H"], f["spatial_scale"])
    elif name == "View":
        x = x.flatten(1)
    elif name == "Linear":
        x = x @ f["weight"].T + f["bias"]
    else:
        assert name in ("Identity", "Dropout"), name
    return x


@pytest.mark.parametrize("name", NETWORKS)
@torch.inference_mode()
def test_fast_rcnn_of_caffe_computes_the_same(name):
    value = fast_rcnn(name)
    assert is_detector(value) and not is_caffe_network(value)
    taken = Taken(value)
    words, content = convert_detector(value, taken)
    assert words.startswith("Fast R-CNN on") and "20 classes" in words and not taken.unused()
    config = config_from_dict(content["config"], source="the test").multipathnet
    model = filled(content)
    # 75 x 102 pixels: pools round sizes up.
    image = np.random.default_rng(1).integers(0, 256, (75, 102, 3), np.uint8)
    lua = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float()
    lua = (lua - torch.tensor([102.9801, 115.9465, 122.7717])[:, None, None])[None]
    planes = normalize(image.astype(np.float32) / 255, PixelRules(**vars(config.pixels)))
    layers = model.layers(torch.from_numpy(planes)[None])
    assert_near(layers[16], run(value["model"].fields["modules"][0].fields["modules"][0], lua))
    rois = torch.tensor([[1, 1, 1, 102, 75], [1, 20, 10, 70, 50], [1, -5, 30, 40, 90.0]])
    logits, deltas = run(value["model"], [lua, rois])
    found = model.classify_rois(layers, rois - 1)
    assert_near(found["class_logits"][:, 0], logits)
    assert_near(found["deltas"].flatten(1), deltas)
    assert_near(model.decode(found, rois[:, 1:])[0], logits.softmax(1))


def filled(content: dict) -> MultiPathNet:
    """The network of a checkpoint, without first drawing ImageNet's fc6 and fc7 at random."""
    config = config_from_dict(content["config"], source="the test")
    with torch.device("meta"):
        model = build_multipathnet(config, num_classes=CLASSES, pretrained=False)
    model.to_empty(device=CPU).load_state_dict(content["model"])
    return model.eval()


def test_fast_rcnn_of_caffe_detects(tmp_path):
    _, content = convert_detector(*tree(fast_rcnn("caffenet")))
    save_checkpoint(tmp_path / "fast.pt", content)
    detector, _ = load_detector(tmp_path / "fast.pt", CPU, overrides={"short_sides": [60]})
    image, boxes = np.zeros((60, 80, 3), np.uint8), np.array([[4, 5, 60, 50]], np.float32)
    found = detector(image, Proposals(1, "x", 60, 80, np.ones(1, np.float32), boxes, [b""]))
    assert len(found) > 0
    assert [detector.categories[n]["name"] for n in (0, 19)] == ["aeroplane", "tvmonitor"]


@pytest.mark.parametrize("name", NETWORKS)
def test_imagenet_networks_become_weights_with_torchvisions_names(name):
    make, width, side = NETWORKS[name]
    writer = Writer(3)
    features = make(writer)
    top = module("nn.Sequential", *fast_rcnn_top(width * side**2, 4096))
    value = {"features": {"unpack": LuaFunction(9), "model": features}, "top": {"model": top}}
    assert is_caffe_network(value) and not is_detector(value)
    taken = Taken(value)
    words, state = convert_caffe_network(value, taken)
    assert not taken.unused() and f"name={name}" in words and "ceil_pooling=true" in words
    with torch.device("meta"):
        layers = load_backbone(name).features[:-1]
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    own = {k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")}
    layers.to_empty(device=CPU).load_state_dict(own)
    x = torch.randn(1, 3, 45, 70)
    with torch.inference_mode():
        assert_near(layers(x), run(features, x))


def test_a_trunk_starts_from_a_converted_caffenet(tmp_path):
    features = caffenet_features(Writer(3))
    top = module("nn.Sequential", *fast_rcnn_top(9216, 4096))
    _, state = convert_caffe_network(*tree({"features": {"model": features}, "top": top}))
    torch.save({k: v for k, v in state.items() if "features" in k}, tmp_path / "weights.pth")
    trunk = build_trunk(
        "caffenet", weights=tmp_path / "weights.pth", padding="zero", ceil_pooling=True
    )
    x = torch.randn(1, 3, 45, 70)
    with torch.inference_mode():
        assert_near(trunk(x)[-1], run(features, x))


def fast_rcnn_top(inputs: int, hidden: int) -> list[Torch7Object]:
    """fc6 and fc7 of zeros that take no memory."""
    linears = [
        module("nn.Linear", weight=torch.zeros(1).expand(*shape), bias=torch.zeros(shape[0]))
        for shape in ((hidden, inputs), (hidden, hidden))
    ]
    return [linears[0], relu(), linears[1], relu()]


def test_what_does_not_fit_is_listed():
    features = caffenet_features(Writer(0))
    first, _, pool, norm, second, *_ = features.fields["modules"]
    first.fields["dW"] = 2
    pool.fields["padW"] = 0
    norm.fields["k"] = 2
    second.fields["weight"] = torch.zeros(256, 48, 3, 3)
    with pytest.raises(ValueError) as error:
        convert_detector(*tree(fast_rcnn("caffenet", features=features)))
    message = str(error.value)
    assert "modules[1]: stride 4 2 instead of 4 4" in message
    assert "modules[3]: kernel, stride, padding" in message
    assert "modules[4]: k 2 instead of 1" in message
    assert "trunk.levels.1.2.weight is (256, 48, 3, 3) instead of (256, 48, 5, 5)" in message


def tree(value: dict) -> tuple[dict, Taken]:
    return value, Taken(value)


def test_parameters_that_nothing_uses_are_named():
    value = fast_rcnn("caffenet")
    switch = module("nn.ModeSwitch", Writer(5).linear(2, 3), module("nn.Identity"))
    value["model"].fields["modules"].append(switch)
    value, taken = tree(value)
    convert_detector(value, taken)
    assert taken.unused() == [
        "model.modules[6].modules[1].weight 3x2",
        "model.modules[6].modules[1].bias 3",
    ]


def test_a_layer_that_is_used_twice_is_refused():
    value = fast_rcnn("caffenet")
    outputs = value["model"].fields["modules"][-1].fields["modules"]
    outputs[0] = outputs[1]
    with pytest.raises(ValueError, match="the parameter is in the network twice"):
        convert_detector(*tree(value))


def test_another_network_is_named():
    features = vgg16_features(Writer(0))
    del features.fields["modules"][2:4]
    with pytest.raises(ValueError, match="1, 2, 3, 3, 3 convolutions between pools"):
        convert_detector(*tree(fast_rcnn("vgg16", features=features)))
