"""What a run directory holds, and whether its run is to be continued."""

from pathlib import Path

from pipeline import distributed
from pipeline.checkpoint import BEST, LAST
from pipeline.training.run_log import METRICS

RUN_FILES = ("config.yaml", METRICS, "tensorboard", f"checkpoints/{BEST}", f"checkpoints/{LAST}")


def holds_run(output: Path) -> bool:
    """Whether a directory has any file of a run, even of one that never saved its state."""
    return any((output / name).exists() for name in RUN_FILES)


def find_begun(output: Path) -> Path | None:
    """The checkpoint that a run is continued from.

    One that was killed while it saved for the first time may have its best one only.
    """
    paths = (output / "checkpoints" / name for name in (LAST, BEST))
    return next((path for path in paths if path.exists()), None)


def resumes_run(output: Path, resume: bool) -> bool:
    """Whether to continue the run in a directory: as asked, or where torchrun has restarted it.

    All processes call it.

    Raises:
        ValueError: the directory holds a run, and it is neither.
    """
    held = holds_run(output)
    if not distributed.allowed_at_first(output, resume or not held):
        raise ValueError(
            f"{output} already holds a run; add --resume to continue it, or choose another --output"
        )
    return resume or held
