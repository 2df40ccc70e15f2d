"""Networks with `from_pretrained`, `save_pretrained` and `push_to_hub`; needs `huggingface_hub`.

    from pipeline.hub_model import HubModel

    model = HubModel.from_pretrained("user/name")  # or a folder
    model.network                                  # a DeepMask, SharpMask or MultiPathNet
    HubModel.from_checkpoint("runs/coco/sharpmask").push_to_hub("user/name")

Nothing of ours imports this file.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import nn

from pipeline.checkpoint import HUB_CONFIG, HUB_WEIGHTS
from pipeline.hub import save_hub_folder
from pipeline.networks import load_network
from pipeline.pretrained import without_training


class HubModel(nn.Module, ModelHubMixin, library_name="maskpath"):
    """A trained network and what its checkpoint says of it, as the hub's mixin wants them."""

    def __init__(self, network: nn.Module, checkpoint: dict[str, Any]):
        """
        Args:
            network: any of ours.
            checkpoint: all of its checkpoint but the weights.

        Attributes:
            network, checkpoint: these.
        """
        super().__init__()
        self.network, self.checkpoint = network, checkpoint

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network computes."""
        return self.network(*args, **kwargs)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "HubModel":
        """The network of a checkpoint, or of a folder; errors are those of `load_network`."""
        network, _, checkpoint = load_network(path)
        return cls(network, without_training(checkpoint, source=str(path)))

    def _save_pretrained(self, save_directory: Path) -> None:
        save_hub_folder(self.checkpoint | {"model": self.network.state_dict()}, save_directory)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "HubModel":
        if Path(model_id).is_dir():
            return cls.from_checkpoint(model_id)
        names = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        chosen: dict[str, Any] = {name: options[name] for name in names}
        files = [HUB_WEIGHTS, HUB_CONFIG]
        return cls.from_checkpoint(snapshot_download(model_id, allow_patterns=files, **chosen))
