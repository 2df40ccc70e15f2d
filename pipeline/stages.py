"""The stages by name, each on what the stages before it have left in the run directory."""

from pathlib import Path

from pipeline.checkpoint import BEST, LAST
from pipeline.config import Config, find_path
from pipeline.patch_stages import DeepMaskStage, PatchStage, SharpMaskStage

STAGES = (DeepMaskStage.name, SharpMaskStage.name)  # in the order of the pipeline


def build_stage(name: str, config: Config, output: Path) -> PatchStage:
    """A stage by its name, on what the stages before it have left beside `output`.

    Raises:
        ValueError or FileNotFoundError: what it needs is not there or does not fit.
    """
    if name == DeepMaskStage.name:
        return DeepMaskStage(config)
    return SharpMaskStage(config, find_initial_deepmask(config, output))


def find_initial_deepmask(config: Config, output: Path) -> Path | None:
    """The DeepMask that a SharpMask run starts from: `init.deepmask`, or of the run beside it.

    Args:
        output: the run directory.

    Returns:
        A checkpoint; None when the run has begun: then its own checkpoint holds the DeepMask.

    Raises:
        FileNotFoundError: there is none; says how to get one.
    """
    if (output / "checkpoints" / LAST).exists():
        return None
    if config.init.deepmask:
        return find_path(config.init.deepmask, key="init.deepmask")
    beside = output.parent / "deepmask"
    if not (beside / "checkpoints" / BEST).is_file():
        raise FileNotFoundError(
            f"no trained DeepMask: {beside / 'checkpoints' / BEST} does not exist; name one by "
            "--set init.deepmask=CHECKPOINT, or train it first: tools/train_stage.py "
            f"--stage deepmask --output {beside}"
        )
    return beside / "checkpoints" / BEST
