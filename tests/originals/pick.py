"""Picks `outputs.npz` from a folder of what the original code wrote, see README.md."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from pipeline.torch7.convert import convert_file

OUTPUTS = Path(__file__).with_name("outputs.npz")
CORNER, CORNER_INPUT = 6, 18  # cells of level 2's output, and what they see of its input
POOLED_CHANNELS, POOLED_ROIS, DECODED_ROIS = 8, 3, 4
WEIGHTS = ("deepmask.trunk.levels.2.", "deepmask.score_head.", "refinements.0.vertical.")


def read_outputs() -> dict[str, torch.Tensor]:
    """The numbers by name."""
    with np.load(OUTPUTS) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    masks, detector = (
        parser.parse_args().folder / name for name in ("deepmask_sharpmask", "multipathnet")
    )

    def of(folder: Path, name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy")

    found = {
        "dm/level_1": of(masks, "dm_patch_trunk_05")[..., :CORNER_INPUT, :CORNER_INPUT],
        "dm/level_2": of(masks, "dm_patch_trunk_06")[..., :CORNER, :CORNER],
        "dm/code": of(masks, "dm_patch_code"),
        "dm/score": of(masks, "dm_patch_score"),
        **{f"sm/{name}": of(masks, f"sm_patch_{name}") for name in ("ref_0", "neth_1", "netv_1")},
        "sm/ref_1": of(masks, "sm_patch_ref_1"),
    }
    for prefix in ("dm", "sm", "smdm"):
        for name in ("scores_1", "scores_2", "scores_3", "top_scores"):
            found[f"{prefix}/{name}"] = of(masks, f"{prefix}_{name}")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {}
        for name, source in (("masks", masks / "sharpmask.t7"), ("det", detector / "model.t7")):
            convert_file(source, Path(folder, name))
            checkpoints[name] = torch.load(Path(folder, name), weights_only=True)
    for name, value in checkpoints["masks"]["model"].items():
        if name.startswith(WEIGHTS):
            found[f"dm/model/{name}"] = value.numpy()
    for name in ("delta_mean", "delta_std"):
        found[f"det/{name}"] = checkpoints["det"]["model"][name].numpy()
    found |= {
        f"det/{name}": of(detector, name)
        for name in ("boxes", "net_rois", "scored_boxes", "nms_0.3", "nms_dense_0.3")
    }
    found["det/features"] = of(detector, "features")[:, :POOLED_CHANNELS]
    found["det/pooled"] = of(detector, "pooled")[:POOLED_ROIS, :POOLED_CHANNELS]
    found["det/head_logits"] = of(detector, "head_logits")[:, :DECODED_ROIS]
    for name in ("bbox_raw", "probs", "pred_boxes"):
        found[f"det/{name}"] = of(detector, name)[:DECODED_ROIS]
    np.savez_compressed(OUTPUTS, **found)


if __name__ == "__main__":
    main()
