"""SharpMask: top-down refinement of DeepMask's masks with the features of earlier layers.

Pinheiro, Lin, Collobert, Dollar, *Learning to Refine Object Segments*, ECCV 2016, section 3; the
defaults are the released models' arrangement. A refinement module takes the mask encoding M^i and
the skip features F^i of the same stride and gives M^{i+1} at twice the resolution:

    M^{i+1} = up2(relu(H_i(F^i) + V_i(M^i)))

H_i, the horizontal net, depends on the image only: it runs once on a whole image, for all
proposals. The vertical net V_i runs for each chosen proposal, on its windows of the horizontal
maps.

Letters: B patches, N proposals, E embedding width, P patch size in pixels, F = P / 16 cells.
Module i = 1..4 works at stride 2^(5 - i), on windows of F 2^(i - 1) cells.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.deepmask import DeepMask, convolve_rows, resize_mask_logits
from models.settings import require, require_one_of
from models.trunk import STRIDES

CARRIED_RANGE = 4.0  # logits below -4 (probability .02) are carried as -4, see start_from_deepmask


@dataclass(frozen=True)
class SharpMaskConfig:
    """The refinement; the defaults are the released models'. Patch and context are DeepMask's."""

    km: int = 32  # channels of the mask encoding M^1
    ks: int = 32  # channels of the skip features S^1
    widths: str = "halving"  # of km and ks: halving (at each module) | constant (paper, section 4)
    merge: str = "sum"  # sum (released) | concat (paper): the same function, see RefinementModule
    num_modules: int = 4  # each fewer halves the masks' resolution, which is the patch's with 4
    horizontal_widths: tuple[int, int, int, int] = (64, 64, 64, 32)  # first layer of H_1 to H_4

    def __post_init__(self) -> None:
        require_one_of(self, "widths", ("halving", "constant"))
        require_one_of(self, "merge", ("sum", "concat"))
        require(self, "from 1 to 4", lambda v: 1 <= v <= len(STRIDES), "num_modules")
        divisor = 2**self.num_modules if self.widths == "halving" else 1
        words = f"a positive multiple of {divisor} ({self.num_modules} modules)"
        require(self, words, lambda v: v > 0 and v % divisor == 0, "km", "ks")
        require(self, "widths > 0", lambda v: min(v) > 0, "horizontal_widths")


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A convolution that pads with the mirror of its input."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="replicate")


class RefinementModule(nn.Module):
    """One step up: horizontal and vertical net, merged (ECCV 2016, section 3.2).

    The paper concatenates both sides and convolves ("concat"). Convolution is linear, so the sum of
    one convolution on each side ("sum") is the same function. It is half the work for a proposal,
    since the horizontal side no longer depends on it.
    """

    def __init__(
        self,
        skip_channels: int,
        width: int,
        *,
        ks: tuple[int, int],
        km: tuple[int, int],
        merge: str,
    ):
        """
        Args:
            skip_channels: of F^i.
            width: of the first layer of the horizontal net.
            ks, km: channels of skip features and mask encoding, before and after the merge.
            merge: "sum" or "concat".
        """
        super().__init__()
        self.relu = relu = nn.ReLU(inplace=True)  # nothing else reads a convolution's output
        skip: list[nn.Module] = [conv3x3(skip_channels, width), relu, conv3x3(width, ks[0])]
        mask: list[nn.Module] = [conv3x3(km[0], km[0])]
        if merge == "sum":
            skip += [relu, conv3x3(ks[0], km[1])]
            mask += [relu, conv3x3(km[0], km[1])]
            self.merge = None
        else:
            self.merge = conv3x3(ks[0] + km[0], km[1])
        self.horizontal, self.vertical = nn.Sequential(*skip), nn.Sequential(*mask)

    def forward(self, skip: Tensor, mask: Tensor, *, double: bool = False) -> Tensor:
        """M^{i+1} from the horizontal net's output and M^i.

        Args:
            skip: (N, c, s, s), windows of `horizontal`'s maps.
            mask: (N, km[0], s, s), or half that side if it is to be doubled first. The result,
                (N, km[1], s, s), is not yet doubled.
        """
        first, *others = self.vertical
        assert isinstance(first, nn.Conv2d)
        mask = convolve_doubled(first, mask) if double else first(mask)  # (N, km[0], s, s)
        for layer in others:
            mask = layer(mask)
        if self.merge is None:
            merged = mask.add_(skip)
        else:
            merged = self.merge(self.relu(torch.cat([skip, mask], dim=1)))
        return self.relu(merged)

    def start_by_copying(self) -> None:
        """Makes output channel 0 the mask encoding's channel 0."""
        *_, last = self.horizontal
        assert isinstance(last, nn.Conv2d)
        for layer in self.vertical:
            if isinstance(layer, nn.Conv2d):
                _copy_channel(layer, 0)
        if self.merge is None:
            nn.init.zeros_(last.weight[0])
            nn.init.zeros_(last.get_parameter("bias")[:1])
        else:
            _copy_channel(self.merge, last.out_channels)


class SharpMask(nn.Module):
    """A frozen DeepMask and the refinement modules on top of it."""

    def __init__(self, deepmask: DeepMask, **settings: Any):
        """
        Args:
            deepmask: its parameters are frozen here.
            settings: fields of `SharpMaskConfig`.

        Raises:
            ValueError: a setting that cannot be.
        """
        super().__init__()
        c = SharpMaskConfig(**settings)
        self.deepmask = deepmask.eval().requires_grad_(False)
        self.patch_size, self.context = deepmask.patch_size, deepmask.context
        self.cells, self.km = deepmask.cells, c.km
        shrink = [2**i if c.widths == "halving" else 1 for i in range(c.num_modules + 1)]
        self.encode = nn.Linear(deepmask.mask_head.in_channels, c.km * self.cells**2)
        self.refinements = nn.ModuleList(
            RefinementModule(
                deepmask.trunk.channels[-1 - i],
                c.horizontal_widths[i],
                ks=(c.ks // shrink[i], c.ks // shrink[i + 1]),
                km=(c.km // shrink[i], c.km // shrink[i + 1]),
                merge=c.merge,
            )
            for i in range(c.num_modules)
        )
        self.predict = conv3x3(c.km // shrink[-1], 1)
        # PyTorch's default shrinks the signal at every layer, and these nets have twelve in a row.
        for layer in self.refinements.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.get_parameter("bias"))

    @torch.no_grad()
    def start_from_deepmask(self) -> None:
        """Sets weights so that the refined mask starts as DeepMask's.

        Channel 0 carries DeepMask's logits, averaged over the F x F cells, from the encoding to the
        prediction. With random weights the last encodings (2 channels in the released arrangement)
        tend to die: switching all ReLUs off is the fastest way to lower the loss.
        """
        head = self.deepmask.mask_head
        size, cells = self.deepmask.mask_size, self.cells
        weight = head.weight.flatten(1).T.reshape(1, -1, size, size)  # (1, E, M, M)
        self.encode.weight[: cells**2] = F.adaptive_avg_pool2d(weight, cells)[0].flatten(1).T
        bias = head.get_parameter("bias").view(1, 1, size, size)
        self.encode.bias[: cells**2] = F.adaptive_avg_pool2d(bias, cells).flatten() + CARRIED_RANGE
        for module in self.modules():
            if isinstance(module, RefinementModule):
                module.start_by_copying()
        _copy_channel(self.predict, 0)
        self.predict.get_parameter("bias").fill_(-CARRIED_RANGE)

    def train(self, mode: bool = True) -> "SharpMask":
        """Training mode for the refinement; DeepMask stays as it is used, without dropout."""
        super().train(mode)
        self.deepmask.eval()
        return self

    def forward(self, patches: Tensor, *, head: str = "both") -> dict[str, Tensor]:
        """As `DeepMask.forward`, but "mask_logits" are refined: (B, P, P)."""
        with torch.no_grad():
            features = self.deepmask.trunk(patches)
            center = self.deepmask.crop_center(features[-1])
            embedding = self.deepmask.embed(center)
        outputs = {}
        if head in ("mask", "both"):
            windows = self.horizontal_maps(self.crop_windows(features))
            logits = self.refine(embedding.flatten(1), windows)
            outputs["mask_logits"] = resize_mask_logits(logits, self.patch_size)
        if head in ("score", "both"):
            with torch.no_grad():
                outputs["score_logits"] = self.deepmask.score(embedding, center).flatten()
        return outputs

    def crop_windows(self, features: list[Tensor]) -> list[Tensor]:
        """Each level's features (B, C, s + 2 border, s + 2 border) cropped to the patch's s x s."""
        windows = []
        for stride, feature in zip(STRIDES, features, strict=True):
            size = self.patch_size // stride
            border = (feature.shape[-1] - size) // 2
            windows.append(feature[..., border : border + size, border : border + size])
        return windows

    def horizontal_maps(self, features: list[Tensor]) -> list[Tensor]:
        """H_i(F^i) for every module, from stride 16 on, of patches or of a whole image."""
        return [
            module.get_submodule("horizontal")(feature)
            for module, feature in zip(self.refinements, reversed(features), strict=False)
        ]

    def refine(self, embeddings: Tensor, windows: list[Tensor]) -> Tensor:
        """Mask logits (N, S, S) of embeddings (N, E); S is P, or P / 2^(4 - n) of n modules.

        `windows` are for each module (N, c, s, s) of its horizontal map, s = F 2^(i - 1).
        """
        mask = convolve_rows(embeddings, self.encode.weight, self.encode.bias)
        mask = mask.view(-1, self.km, self.cells, self.cells)
        mask = mask.contiguous(memory_format=torch.channels_last)
        for i, (module, window) in enumerate(zip(self.refinements, windows, strict=True)):
            mask = module(window, mask, double=i > 0)
        return convolve_doubled(self.predict, mask)[:, 0]


def convolve_doubled(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 layer on `x` doubled by nearest neighbor, computed without doubling it.

    Each of the four pixels made from one pixel sees only 2 x 2 different ones. So the layer equals
    one of four times as many output channels on `x` itself. With few channels these fill the vector
    registers better, and a quarter of the pixels is padded: it takes a third to half of the time.
    (N, C, h, w) to (N, C_out, 2 h, 2 w), both channels last.
    """
    # (x, y, C_out, C_in, 3, 3): a layer for each of the four pixels.
    weight = _taps_on_undoubled(_taps_on_undoubled(layer.weight, 2), 4)
    weight = weight.transpose(0, 1).flatten(0, 2)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    four = F.conv2d(padded, weight, layer.get_parameter("bias").repeat(4))  # (N, 4 C_out, h, w)
    # The two pixels of a row are adjacent and are moved as one: this takes a third of the time of
    # `pixel_shuffle`.
    count, _, height, width = four.shape
    rows = four.permute(0, 2, 3, 1).reshape(count, height, width, 2, -1).transpose(2, 3)
    return rows.reshape(count, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def _taps_on_undoubled(weight: Tensor, dim: int) -> Tensor:
    """Which of three undoubled neighbors three taps fall on: (2, ...) for even and odd pixels.

    Sums of slices: a matrix of ones and zeros would be copied to the GPU in every call, which waits
    for it.
    """
    low, middle, high = weight.unbind(dim)
    zero = torch.zeros_like(low)
    even, odd = (low, middle + high, zero), (zero, low + middle, high)
    return torch.stack([torch.stack(taps, dim) for taps in (even, odd)])


def _copy_channel(layer: nn.Conv2d, source: int) -> None:
    """Makes output channel 0 a copy of one input channel."""
    layer.weight[0] = 0
    layer.weight[0, source, 1, 1] = 1
    layer.get_parameter("bias")[0] = 0


class DenseNetwork(nn.Module):
    """Embeddings and scores of all cells of an image, and the horizontal maps of a SharpMask.

    Masks are decoded later, for chosen cells only (ECCV 2016, section 3.4). No branch depends on an
    image: it can be traced.
    """

    def __init__(self, deepmask: DeepMask, refinement: SharpMask | None):
        super().__init__()
        self.deepmask, self.refinement = deepmask, refinement

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Embeddings (1, E, h, w), score logits (1, h, w), a horizontal map (1, c, h', w') for
        each refinement module, of normalized pixels (1, 3, H, W).
        """
        features = self.deepmask.trunk(pixels)
        embeddings = self.deepmask.tail(features[-1])
        # In full precision: bfloat16 would rank many cells as equals.
        scores = self.deepmask.score(embeddings.float(), features[-1].float())
        horizontal = self.refinement.horizontal_maps(features) if self.refinement else []
        return embeddings, scores, *horizontal
