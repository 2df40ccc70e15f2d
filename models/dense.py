"""DeepMask or SharpMask on whole images: what depends on the image alone, before cells are chosen.

Letters: E embedding width, (H, W) an image with its border, (h, w) cells.
"""

import torch
from torch import Tensor, nn

from models.deepmask import DeepMask
from models.sharpmask import SharpMask


class DenseNetwork(nn.Module):
    """Trunk, embeddings and scores of all cells, and the horizontal nets if there are any.

    No mask is decoded here (ECCV 2016, section 3.4: top-down only for chosen cells).
    """

    def __init__(self, deepmask: DeepMask, refinement: SharpMask | None):
        super().__init__()
        self.deepmask, self.refinement = deepmask, refinement

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """
        Args:
            pixels: (1, 3, H, W), normalized.

        Returns:
            Embeddings (1, E, h, w), score logits (1, h, w), and of each refinement module its
            horizontal map (1, c, h', w').
        """
        features = self.deepmask.trunk(pixels)
        embeddings = self.deepmask.embed(features[-1])
        # In full precision under autocast, too: eight bits would rank many cells as equals.
        with torch.autocast(pixels.device.type, enabled=False):
            scores = self.deepmask.score(embeddings.float())
        horizontal = self.refinement.horizontal_maps(features) if self.refinement else []
        return embeddings, scores, *horizontal
