"""Refinement: shapes for every trunk, the two merges, independence, frozen DeepMask."""

import pytest
import torch
import torch.nn.functional as F

from models.deepmask import DeepMask, resize_mask_logits
from models.sharpmask import SharpMask, conv3x3, convolve_doubled
from models.trunk import build_trunk


def small_deepmask(trunk: str = "tiny", patch_size: int = 64) -> DeepMask:
    return DeepMask(
        build_trunk(trunk),
        patch_size=patch_size,
        mask_size=14,
        reduction=8,
        embedding=16,
        score_hidden=8,
    )


@pytest.fixture(scope="module")
def model() -> SharpMask:
    torch.manual_seed(0)
    return SharpMask(small_deepmask()).eval()


@pytest.mark.parametrize("trunk", ["resnet18", "resnet50", "vgg11", "densenet121", "tiny"])
def test_mask_has_the_resolution_of_the_patch_for_every_trunk(trunk):
    model = SharpMask(small_deepmask(trunk, 32))
    outputs = model(torch.randn(2, 3, 64, 64))
    assert outputs["mask_logits"].shape == (2, 32, 32) and outputs["score_logits"].shape == (2,)


@pytest.mark.parametrize("num_modules", [1, 2, 3, 4])
@pytest.mark.parametrize("widths", ["halving", "constant"])
def test_fewer_modules_and_both_schedules(num_modules, widths):
    model = SharpMask(small_deepmask(), km=16, ks=32, widths=widths, num_modules=num_modules)
    assert len(model.refinements) == num_modules
    patches = torch.randn(1, 3, 96, 96)
    refined = model(patches)["mask_logits"]
    assert refined.shape == (1, 64, 64)
    # Proposals have what the last module saw, which is not made larger before it is pasted.
    features = model.deepmask.trunk(patches)
    embedding = model.deepmask.embed(model.deepmask.crop_center(features[-1])).flatten(1)
    logits = model.refine(embedding, model.horizontal_maps(model.crop_windows(features)))
    assert logits.shape == (1, 4 << num_modules, 4 << num_modules)
    torch.testing.assert_close(resize_mask_logits(logits, 64), refined)
    last = model.predict.in_channels
    assert last == (16 if widths == "constant" else 16 // 2**num_modules)


def test_widths_are_the_released_models():
    """The table of the released code for ResNet-50: 64, 32, 16 | 32, 16 down to 32, 4, 2 | 4, 2."""
    model = SharpMask(DeepMask(build_trunk("resnet50")))
    convolutions = [
        [
            [m.out_channels for m in net if isinstance(m, torch.nn.Conv2d)]
            for net in (module.horizontal, module.vertical)
        ]
        for module in model.refinements
    ]
    assert convolutions == [
        [[64, 32, 16], [32, 16]],
        [[64, 16, 8], [16, 8]],
        [[64, 8, 4], [8, 4]],
        [[32, 4, 2], [4, 2]],
    ]
    skips = [module.horizontal[0].in_channels for module in model.refinements]
    assert skips == [1024, 512, 256, 64]
    assert model.encode.out_features == 32 * 10 * 10


def test_forward_follows_the_equation_of_the_paper(model):
    """M^{i+1} = up2(relu(H_i(F_i) + V_i(M^i))), written out with padded convolutions."""

    def net(layers, x):
        for layer in layers:
            if isinstance(layer, torch.nn.Conv2d):
                x = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), layer.weight, layer.bias)
            else:
                x = x.clamp(min=0)
        return x

    patches = torch.randn(2, 3, 96, 96)
    features = model.deepmask.trunk(patches)
    embedding = model.deepmask.tail(features[3][..., 1:5, 1:5])[..., 0, 0]
    mask = (embedding @ model.encode.weight.T + model.encode.bias).view(2, 32, 4, 4)
    for i, module in enumerate(model.refinements):
        border = 2**i  # 1 cell at stride 16, 2 at 8, 4 at 4, 8 at 2
        skip = features[3 - i][..., border:-border, border:-border]
        merged = net(module.horizontal, skip) + net(module.vertical, mask)
        mask = merged.clamp(min=0).repeat_interleave(2, -1).repeat_interleave(2, -2)
    expected = net([model.predict], mask)[:, 0]
    torch.testing.assert_close(model(patches)["mask_logits"], expected, rtol=1e-4, atol=1e-5)


def test_prediction_at_half_resolution_is_the_layer_on_the_doubled_map():
    torch.manual_seed(3)
    layer, x = conv3x3(3, 2), torch.randn(2, 3, 5, 7)
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(convolve_doubled(layer, x), layer(doubled), rtol=1e-5, atol=1e-5)


def test_concatenation_and_sum_are_the_same_function(model):
    """One convolution of both sides equals the sum of a convolution of each."""
    torch.manual_seed(1)
    concat = SharpMask(model.deepmask, merge="concat").eval()
    concat.encode, concat.predict = model.encode, model.predict
    for theirs, ours in zip(concat.refinements, model.refinements, strict=True):
        theirs.horizontal.load_state_dict(ours.horizontal[:3].state_dict())
        theirs.vertical.load_state_dict(ours.vertical[:1].state_dict())
        skip, mask = ours.horizontal[4], ours.vertical[2]
        with torch.no_grad():
            theirs.merge.weight.copy_(torch.cat([skip.weight, mask.weight], dim=1))
            theirs.merge.bias.copy_(skip.bias + mask.bias)
    patches = torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(
        concat(patches)["mask_logits"], model(patches)["mask_logits"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("merge", ["sum", "concat"])
@pytest.mark.parametrize("num_modules", [2, 4])
def test_refinement_starts_as_deepmasks_mask(merge, num_modules):
    """Its logits, averaged over cells of 16 px and cut off at -4."""
    torch.manual_seed(2)
    model = SharpMask(small_deepmask(), merge=merge, num_modules=num_modules)
    with torch.no_grad():
        model.deepmask.mask_head.weight *= 100
    model.start_from_deepmask()
    patches = torch.randn(2, 3, 96, 96)
    coarse = model.deepmask(patches)["mask_logits"]
    assert coarse.min() < -4 and coarse.max() > 1
    cells = F.adaptive_avg_pool2d(coarse, 4).clamp(min=-4)
    expected = cells.repeat_interleave(16, -1).repeat_interleave(16, -2)
    refined = model(patches)["mask_logits"]
    inner = 16 if num_modules == 4 else 12  # bilinear upsampling blends at the cells' edges
    got, want = (x.view(2, 4, 16, 4, 16) for x in (refined, expected))
    low, high = (16 - inner) // 2, (16 + inner) // 2
    torch.testing.assert_close(
        got[:, :, low:high, :, low:high], want[:, :, low:high, :, low:high], rtol=1e-4, atol=1e-4
    )


def test_deepmask_is_frozen_and_without_dropout_in_training(model):
    model.train()
    assert not any(module.training for module in model.deepmask.modules())
    assert model.refinements.training
    loss = model(torch.randn(2, 3, 96, 96))["mask_logits"].sum()
    loss.backward()
    assert all(p.grad is None for p in model.deepmask.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    model.zero_grad()
    model.eval()


def test_score_is_deepmasks(model):
    patches = torch.randn(3, 3, 96, 96)
    torch.testing.assert_close(
        model(patches, head="score")["score_logits"], model.deepmask(patches)["score_logits"]
    )


@pytest.mark.parametrize(
    "options",
    [{"km": 24}, {"ks": 8}, {"widths": "thirds"}, {"merge": "product"}, {"num_modules": 5}],
)
def test_impossible_arrangements_are_refused(options):
    with pytest.raises(ValueError):
        SharpMask(small_deepmask(), **options)


def test_trains_in_half_precision(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(2, 3, 64, 64))["mask_logits"]
    assert logits.dtype == torch.bfloat16
    logits.float().mean().backward()
    slopes = [p.grad for p in model.refinements.parameters()]
    assert all(slope is not None and slope.isfinite().all() for slope in slopes)
