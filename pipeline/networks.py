"""The networks of a config."""

from models.deepmask import DeepMask
from models.sharpmask import SharpMask
from models.trunk import build_trunk
from pipeline.config import DEEPMASK_SIZES, Config, find_path


def build_deepmask(config: Config, *, pretrained: bool = True) -> DeepMask:
    """The DeepMask of a config.

    Args:
        pretrained: False leaves the trunk random, for weights that come from a checkpoint.
    """
    weights = config.trunk.weights if pretrained else None
    if weights not in (None, "imagenet"):
        weights = find_path(weights, key="trunk.weights")
    c = config.deepmask
    sizes = {name: getattr(c, name) for name in DEEPMASK_SIZES}
    return DeepMask(build_trunk(config.trunk.name, weights=weights), dropout=c.dropout, **sizes)


def build_sharpmask(config: Config) -> SharpMask:
    """The SharpMask of a config, its weights random: they come from checkpoints or training."""
    c = config.sharpmask
    return SharpMask(
        build_deepmask(config, pretrained=False),
        km=c.km,
        ks=c.ks,
        widths=c.widths,
        merge=c.merge,
        num_modules=c.num_modules,
    )
