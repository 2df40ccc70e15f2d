"""DeepMask: the same weights on patches and densely over an image."""

import pytest
import torch
import torch.nn.functional as F

from models.deepmask import STRIDE, DeepMask, resize_mask_logits
from models.trunk import build_trunk

# Pixels by which a level-4 cell sees beyond its own 16 pixels, rounded up to whole cells: the sum
# over the trunk's layers of (kernel - 1) / 2 times their input stride.
RECEPTIVE_MARGIN = {"resnet18": 112, "vgg11": 80, "densenet121": 528, "tiny": 64}
SMALL = {"mask_size": 8, "reduction": 4, "embedding": 16, "score_hidden": 8}


def small_deepmask(name: str, **options) -> DeepMask:
    torch.manual_seed(0)
    model = DeepMask(build_trunk(name), **{"patch_size": 96, **SMALL, **options}).eval()
    # The tiny trunk's blocks start as the identity; let every layer take part.
    for parameter in model.parameters():
        if parameter.dim() == 4 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(memory_format=torch.channels_last)


def dense(model: DeepMask, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = model.trunk(padded)[-1]
    embeddings = model.embed(features)
    return embeddings, model.score(embeddings, features)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg11", "vgg16", "densenet121", "tiny"])
@torch.inference_mode()
def test_dense_equals_patch_when_the_patch_is_all_there_is(name):
    """On an image of exactly a training patch, the center cell is the patch forward."""
    model = small_deepmask(name)
    patch = torch.randn(1, 3, model.patch_size + model.context, model.patch_size + model.context)
    alone = model(patch)
    embeddings, scores = dense(model, patch)
    assert scores.shape == (1, 3, 3)  # the patch with a cell of context on each side
    torch.testing.assert_close(scores[:, 1, 1], alone["score_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        model.decode_masks(embeddings[:, :, 1, 1]), alone["mask_logits"], rtol=0, atol=1e-4
    )


@torch.inference_mode()
def test_cells_of_a_larger_patch_are_the_dense_ones():
    model = small_deepmask("tiny")
    patches = torch.randn(2, 3, *2 * [model.patch_size + model.context + 2 * STRIDE])
    embeddings, scores = dense(model, patches)
    outputs = model(patches, head="score", cells=3, decode=torch.tensor([4, 17]))
    torch.testing.assert_close(outputs["score_logits"], scores[:, 1:-1, 1:-1])
    for mask, cell in zip(outputs["mask_logits"], (embeddings[0, :, 2, 2], embeddings[1, :, 3, 3]),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(mask, model.decode_masks(cell[None])[0])


@pytest.mark.parametrize(
    ("name", "separate_heads"), [*((name, False) for name in RECEPTIVE_MARGIN), ("vgg11", True)]
)
@torch.inference_mode()
def test_dense_cell_equals_the_patch_with_its_real_surroundings(name, separate_heads):
    """Cell (i, j) of a large image is the patch centered there.

    The patch is cut with as much context as the trunk can see; with the training context of 32
    pixels its border features see the mirror instead of the picture, which is the method's
    approximation, not a matter of arithmetic.
    """
    model = small_deepmask(name, separate_heads=separate_heads)
    margin = RECEPTIVE_MARGIN[name]
    size = model.patch_size + 2 * margin
    rows, columns = 1, 2
    image = torch.randn(1, 3, size + STRIDE * rows, size + STRIDE * columns)
    embeddings, scores = dense(model, image)
    first = margin // STRIDE  # the first cell whose patch has its whole context in the image
    for i, j in ((0, 0), (rows, columns)) if name == "tiny" else ((rows, columns),):
        patch = image[..., STRIDE * i : STRIDE * i + size, STRIDE * j : STRIDE * j + size]
        alone = model(patch)
        torch.testing.assert_close(
            scores[:, first + i, first + j], alone["score_logits"], rtol=0, atol=1e-4
        )
        masks = model.decode_masks(embeddings[:, :, first + i, first + j])
        torch.testing.assert_close(masks, alone["mask_logits"], rtol=0, atol=1e-4)


def test_heads_alone_and_together():
    model = small_deepmask("tiny")
    x = torch.randn(2, 3, 128, 128)
    both, mask, score = (model(x, head=head) for head in ("both", "mask", "score"))
    assert both["mask_logits"].shape == (2, 8, 8) and both["score_logits"].shape == (2,)
    assert both.keys() == mask.keys() | score.keys() and len(mask) == len(score) == 1
    for name, value in (mask | score).items():
        assert torch.equal(both[name], value)


@pytest.mark.parametrize(
    ("separate_heads", "head", "expected"),
    [
        (False, "mask", {"trunk", "tail", "mask_head"}),
        (False, "score", {"trunk", "tail", "score_head"}),
        (True, "mask", {"trunk", "tail", "mask_head"}),
        (True, "score", {"trunk", "score_tail", "score_head"}),
    ],
)
def test_a_loss_reaches_the_trunk_and_its_head_only(separate_heads, head, expected):
    model = small_deepmask("tiny", separate_heads=separate_heads).train()
    model(torch.randn(2, 3, 128, 128), head=head)[f"{head}_logits"].sum().backward()
    trained = {n.partition(".")[0] for n, p in model.named_parameters() if p.grad is not None}
    assert trained == expected


@torch.inference_mode()
def test_the_papers_score_head_pools_the_patch_and_has_its_own_embedding():
    """NIPS 2015, section 3.1, as fully connected layers on a patch."""
    model = small_deepmask("tiny", context=0, separate_heads=True)
    patches = torch.randn(2, 3, 96, 96)
    _, layer, _ = model.score_tail
    pooled = F.max_pool2d(model.trunk(patches)[-1], 2)  # (2, C, 3, 3)
    hidden = F.relu(F.linear(pooled.flatten(1), layer.weight.flatten(1), layer.bias))
    expected = model.score_head(hidden[:, :, None, None]).flatten()
    torch.testing.assert_close(model(patches)["score_logits"], expected, rtol=0, atol=1e-5)


def test_published_arrangements():
    eccv = DeepMask(build_trunk("resnet50"))
    assert [tuple(m.weight.shape) for m in eccv.tail if hasattr(m, "weight")] == [
        (128, 1024, 1, 1),
        (512, 128, 10, 10),
    ]
    assert eccv.mask_head.weight.shape[:2] == (56**2, 512)
    nips = DeepMask(
        build_trunk("vgg11"), patch_size=224, context=0, reduction=512, separate_heads=True
    )
    with torch.inference_mode():
        assert nips.eval()(torch.zeros(1, 3, 224, 224))["mask_logits"].shape == (1, 56, 56)
    assert nips.cells == 14 and nips.score_tail[1].weight.shape == (512, 512, 7, 7)


@pytest.mark.parametrize(
    "option",
    [
        {"patch_size": 100},
        {"patch_size": 0},
        {"patch_size": 80, "separate_heads": True},
        {"context": 16},
        {"context": -32},
    ],
)
def test_sizes_must_fall_on_cells(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        small_deepmask("tiny", **option)


def test_resizing_masks_aligns_areas():
    logits = torch.tensor([[[0.0, 1.0], [2.0, 3.0]]])
    resized = resize_mask_logits(logits, 4)
    assert resized.shape == (1, 4, 4)
    torch.testing.assert_close(resized.mean(), logits.mean())
    torch.testing.assert_close(resized[0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))
