"""DeepMask: a class-agnostic mask and an objectness score for the object centered in a patch.

Pinheiro, Collobert, Dollar, *Learning to Segment Object Candidates*, NIPS 2015; the default is the
arrangement of the ECCV 2016 models. All linear layers are written as convolutions, so the same
weights run on a patch and, densely, on a whole image: cell (i, j) of the dense output is the patch
centered at pixel (16 i, 16 j) of the image before its border of P/2 pixels was added.

Letters: B patches, P patch size in pixels, F = P / 16 feature cells, E embedding width, M mask
size, (h, w) cells of a dense output, N chosen cells.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.settings import require
from models.trunk import STRIDES, Trunk

STRIDE = STRIDES[-1]
AUTO_PATCH_SIZE = 0  # a recipe's patch_size auto, until training has chosen it


@dataclass(frozen=True)
class DeepMaskConfig:
    """The sizes of a DeepMask; the defaults are the ECCV 2016 models'."""

    # P, the side of the patch that a mask covers; a multiple of 16. auto: DeepMask's training takes
    # 64 to 160 by the sizes of its objects, the later stages have the DeepMask's. Then mask_size,
    # target_size and both sections' sampling.jitter_shift and negative_distance, where they have
    # their default, which is for a patch of 160, follow in proportion.
    patch_size: int = 160
    context: int = 32  # C, pixels around it in a training patch, half on each side; of 32
    mask_size: int = 56  # M, the side of the coarse mask
    reduction: int = 128  # channels of the 1x1 convolution before the embedding
    embedding: int = 512  # E
    score_hidden: int = 1024  # width of the score head's hidden layer
    # Whether the score head has an embedding of its own (NIPS 2015) or shares the mask head's.
    separate_heads: bool = False
    dropout: float = 0.5  # probability to drop, in the score head

    def __post_init__(self) -> None:
        require(self, "greater than 0", lambda v: v > 0, "mask_size", "reduction", "embedding",
                "score_hidden")  # fmt: skip
        require(self, "at least 0", lambda v: v >= 0, "context")
        require(self, "greater than 0", lambda v: v > 0 or v == AUTO_PATCH_SIZE, "patch_size")
        require(self, "a multiple of 16", lambda v: v % STRIDE == 0, "patch_size")
        require(self, "a multiple of 32", lambda v: v % (2 * STRIDE) == 0, "context")
        require(self, "from 0 to below 1", lambda v: 0 <= v < 1, "dropout")
        if self.separate_heads and self.patch_size % (2 * STRIDE):
            raise ValueError(
                "patch_size must be a multiple of 32 with separate_heads (2x2 pooling), "
                f"got {self.patch_size}"
            )


class DeepMask(nn.Module):
    """Trunk, tail and two heads (NIPS 2015, section 3; ECCV 2016, section 3.1)."""

    def __init__(self, trunk: Trunk, **settings: Any):
        """
        Args:
            settings: fields of `DeepMaskConfig`.

        Raises:
            ValueError: a setting that cannot be, or a trunk without the four strides.
        """
        super().__init__()
        if trunk.strides != STRIDES:
            raise ValueError(
                f"trunk {trunk.name} has levels at strides {trunk.strides}, not {STRIDES}"
            )
        c = DeepMaskConfig(**settings)
        if c.patch_size == AUTO_PATCH_SIZE:
            raise ValueError("patch_size auto is chosen by training; a network needs a number")
        self.patch_size, self.context, self.mask_size = c.patch_size, c.context, c.mask_size
        self.cells = c.patch_size // STRIDE
        self.trunk = trunk
        # No ReLU between embedding and mask head: together they are one low-rank linear map.
        self.tail = nn.Sequential(
            nn.Conv2d(trunk.channels[-1], c.reduction, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(c.reduction, c.embedding, self.cells),
        )
        self.score_tail = None
        if c.separate_heads:
            # NIPS 2015, section 3.1: 2x2 max pooling and a fully connected layer. Densely, windows
            # start at any cell: pooling keeps every cell, and the layer takes every other one.
            self.score_tail = nn.Sequential(
                nn.MaxPool2d(2, stride=1),
                nn.Conv2d(trunk.channels[-1], c.embedding, self.cells // 2, dilation=2),
                nn.ReLU(inplace=True),
            )
        self.mask_head = nn.Conv2d(c.embedding, c.mask_size**2, 1)
        self.score_head = nn.Sequential(
            nn.Dropout(c.dropout),
            nn.Conv2d(c.embedding, c.score_hidden, 1),
            nn.ReLU(inplace=True),
            nn.Dropout(c.dropout),
            nn.Conv2d(c.score_hidden, 1, 1),
        )

    def forward(
        self, patches: Tensor, *, head: str = "both", cells: int = 1, decode: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits of normalized patches (B, 3, S, S): "mask_logits" (B, M, M), "score_logits" (B,).

        S is P plus an even number of cells of surroundings, in training P + C; the P x P center of
        the trunk's map is used. `head` is "mask", "score" or "both".

        With n `cells`, S is 16 (n - 1) larger and "score_logits" of "score" are (B, n, n). To learn
        IoUs, `decode` (k,) are indices of such cells, whose masks are "mask_logits" (k, M, M); no
        gradient comes from these.
        """
        features = self.crop_center(self.trunk(patches)[-1], self.cells + cells - 1)
        if head == "score" and (cells > 1 or decode is not None):
            return self._score_cells(features, decode)
        embedding = self.embed(features)  # (B, E, 1, 1)
        outputs = {}
        if head in ("mask", "both"):
            outputs["mask_logits"] = self.decode_masks(embedding.flatten(1))
        if head in ("score", "both"):
            outputs["score_logits"] = self.score(embedding, features).flatten()
        return outputs

    def _score_cells(self, features: Tensor, decode: Tensor | None) -> dict[str, Tensor]:
        embeddings = self.embed(features)  # (B, E, n, n)
        outputs = {"score_logits": self.score(embeddings, features)}
        if decode is not None:
            with torch.no_grad():
                chosen = embeddings.permute(0, 2, 3, 1).flatten(0, 2)[decode]
                outputs["mask_logits"] = self.decode_masks(chosen)
        return outputs

    def crop_center(self, features: Tensor, cells: int | None = None) -> Tensor:
        """The center of the stride-16 map of patches, F x F cells or as many as given.

        (B, C, f, f) to (B, C, F, F).
        """
        size = cells or self.cells
        border = (features.shape[-1] - size) // 2
        return features[..., border : border + size, border : border + size]

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings of all F x F windows of a stride-16 map.

        (B, C, f, g) to (B, E, f - F + 1, g - F + 1).
        """
        reduce, relu, window = self.tail
        assert isinstance(window, nn.Conv2d)
        features = relu(reduce(features))  # (B, reduction, f, g)
        if features.shape[-2:] != window.kernel_size:
            return window(features)
        # A single window is a matrix product. In channels-last order, which both tensors have in
        # training, these are views, and backward is several times faster than the convolution's:
        # it reorders neither the largest weight of the model nor its gradient.
        x, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (features, window.weight))
        return F.linear(x, weight, window.bias)[:, :, None, None]

    def score(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Objectness logits (B, h, w) of all windows of a stride-16 map (B, C, f, g).

        `embeddings` (B, E, h, w) are `embed`'s of the same map.
        """
        if self.score_tail is not None:
            embeddings = self.score_tail(features)
        return self.score_head(embeddings)[:, 0]

    def decode_masks(self, embeddings: Tensor) -> Tensor:
        """Coarse mask logits of chosen embeddings: (N, E) to (N, M, M)."""
        logits = convolve_rows(embeddings, self.mask_head.weight, self.mask_head.bias)
        return logits.view(-1, self.mask_size, self.mask_size)


def convolve_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias, computed as a convolution of one image whose pixels are the rows.

    On a CPU, the library of convolutions multiplies large matrices up to twice as fast as the one
    of matrix products. As N images of one pixel each it would be the slowest.

    Args:
        x: (N, E). weight: (K, E), or (K, E, 1, 1). The result is (N, K).
    """
    # Not len(x), which an exported graph would take for a constant.
    pixels = x.reshape(1, x.shape[0], 1, -1).permute(0, 3, 1, 2)  # (1, E, N, 1), channels last
    rows = F.conv2d(pixels, weight.reshape(*weight.shape[:2], 1, 1), bias)
    return rows.permute(0, 2, 3, 1).flatten(0, 2)


def resize_mask_logits(logits: Tensor, size: int) -> Tensor:
    """Bilinear resize, pixel areas aligned: (N, M, M) to (N, size, size)."""
    if logits.shape[-1] == size:
        return logits
    return F.interpolate(logits[:, None], size=(size, size), mode="bilinear", align_corners=False)[
        :, 0
    ]
