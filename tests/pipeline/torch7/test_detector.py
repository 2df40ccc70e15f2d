"""Fast R-CNN of Caffe's networks against a slow forward, and what is refused in a detector.

There is no file of these networks here: theirs are trees with what is known of them.
"""

import numpy as np
import pytest
import torch
from torch import nn

from datasets.resize import normalize
from models.multipathnet import MultiPathNet
from pipeline.checkpoint import save_checkpoint
from pipeline.inference.detect import load_detector
from pipeline.inference.proposals import Proposals
from pipeline.networks import make_multipathnet
from pipeline.recipe import config_to_dict
from pipeline.torch7.convert import find_converter
from pipeline.torch7.detector import convert_detector, known_categories
from pipeline.torch7.modules import unused_parameters
from tests.pipeline.torch7.lua_networks import (
    CAFFE_NETWORKS,
    CLASSES,
    FastRCNN,
    assert_near,
    change,
    lua,
    module,
)

CPU = torch.device("cpu")


def filled(content: dict) -> MultiPathNet:
    """The network of a checkpoint, without first drawing ImageNet's fc6 and fc7 at random."""
    with torch.device("meta"):
        model = make_multipathnet(content["config"], num_classes=CLASSES)
    model.to_empty(device=CPU).load_state_dict(content["model"])
    return model.eval()


@pytest.mark.parametrize("name", CAFFE_NETWORKS)
@torch.inference_mode()
def test_fast_rcnn_of_caffe_computes_the_same(name):
    network, used = FastRCNN(name), set()
    value = network.lua()
    assert find_converter(value) is convert_detector
    words, content = convert_detector(value, used)
    assert words.startswith("Fast R-CNN on") and "20 classes" in words
    assert not unused_parameters(value, used)
    model = filled(content)
    # 75 x 102 pixels: pools round sizes up.
    image = np.random.default_rng(1).integers(0, 256, (75, 102, 3), np.uint8)
    theirs = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1).float()
    theirs = (theirs - torch.tensor([102.9801, 115.9465, 122.7717])[:, None, None])[None]
    planes = normalize(image.astype(np.float32) / 255, content["config"].multipathnet.pixels)
    layers = model.layers(torch.from_numpy(planes)[None])
    assert_near(layers[16], network.features(theirs))
    rois = torch.tensor([[1, 1, 1, 102, 75], [1, 20, 10, 70, 50], [1, -5, 30, 40, 90.0]])
    logits, deltas = network(theirs, rois)
    found = model.classify_rois(layers, rois - 1)
    assert_near(found["class_logits"][:, 0], logits)
    assert_near(found["deltas"].flatten(1), deltas)
    assert_near(model.decode(found, rois[:, 1:])[0], logits.softmax(1))


def test_fast_rcnn_of_caffe_detects(tmp_path):
    _, content = convert_detector(FastRCNN("caffenet").lua(), set())
    checkpoint = content | {"config": config_to_dict(content["config"])}
    save_checkpoint(tmp_path / "fast.pt", checkpoint)
    detector, _ = load_detector(tmp_path / "fast.pt", CPU, overrides={"short_sides": [60]})
    image, boxes = np.zeros((60, 80, 3), np.uint8), np.array([[4, 5, 60, 50]], np.float32)
    found = detector(image, Proposals(1, "x", 60, 80, np.ones(1, np.float32), boxes, [b""]))
    assert len(found) > 0
    assert [detector.categories[n]["name"] for n in (0, 19)] == ["aeroplane", "tvmonitor"]


def test_categories_are_cocos_vocs_or_numbers():
    coco, voc = known_categories(80), known_categories(20)
    assert [coco[i] for i in (0, 11, 79)] == [
        {"id": 1, "name": "person"},
        {"id": 13, "name": "stop sign"},
        {"id": 90, "name": "toothbrush"},
    ]
    assert [each["id"] for each in voc] == list(range(1, 21)) and voc[14]["name"] == "person"
    assert known_categories(2) == [{"id": 1, "name": "class 1"}, {"id": 2, "name": "class 2"}]


FEATURES = "model.modules[1].modules[1].modules[1]"


def test_what_does_not_fit_is_listed():
    value = FastRCNN("caffenet").lua()
    settings = {
        1: {"dW": 2},
        3: {"padW": 0},
        4: {"k": 2},
        5: {"weight": torch.zeros(256, 48, 3, 3)},
    }
    change(value, {f"{FEATURES}.modules[{i}]": fields for i, fields in settings.items()})
    with pytest.raises(ValueError) as error:
        convert_detector(value, set())
    message = str(error.value)
    assert "modules[1]: stride 4 2 instead of 4 4" in message
    assert "modules[3]: kernel, stride and padding 3 3 2 2 1 0 instead of 3 3 2 2 1 1" in message
    assert "modules[4]: k 2 instead of 1" in message
    assert "trunk.levels.1.2.weight is (256, 48, 3, 3) instead of (256, 48, 5, 5)" in message


HEADS = module("nn.ConcatTable", *(lua(nn.Linear(size, CLASSES + 1)) for size in (8, 3)))
OTHERS = [
    ({"model.modules[5]": {"modules": lambda m: [m[1]] * 2}}, "is in the network twice"),
    (
        {"model.modules[5]": {"modules": lambda m: [HEADS, m[1]]}},
        r"modules\[1\]: class linears of different inputs",
    ),
    (
        {"model": {"modules": lambda m: m[:-1]}},
        "expected ParallelTable ROIPooling any. ConcatTable",
    ),
    ({"model.modules[5].modules[2]": {"weight": torch.ones(4, 8)}}, "4 outputs for background and"),
    (
        {"model.modules[5]": {"modules": lambda m: [module("nn.ConcatTable", *m * 4), m[1]]}},
        "8 class",
    ),
    ({"model.modules[2]": {"spatial_scale": 1 / 8}}, r"2\]: expected square pooling at stride 16"),
    (
        {"model": {"modules": lambda m: [*m, module("nn.Linear")]}},
        r"model.modules\[6\]: unexpected Linear",
    ),
    (
        {FEATURES: {"modules": lambda m: [part for part in m if "Norm" not in part.typename]}},
        "1, 1, 3 convolutions between pools",
    ),
]


@pytest.mark.parametrize("edits, reason", OTHERS)
def test_other_structures_are_refused(edits, reason):
    value = FastRCNN("caffenet").lua()
    change(value, edits)
    with pytest.raises(ValueError, match=reason):
        convert_detector(value, set())
