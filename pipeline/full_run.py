"""All stages in a row: train, propose, score, report. A run that was interrupted continues where it stopped."""

import json
import time
from pathlib import Path

import torch

from pipeline import distributed
from pipeline.config import Config, find_path, load_config, save_config
from pipeline.engine import fit
from pipeline.files import write_json
from pipeline.load import load_proposer
from pipeline.propose_run import propose_images
from pipeline.report import write_report
from pipeline.scoring import score_patches, score_proposals
from pipeline.stages import STAGES, prepare_data

SUMMARY = "summary.json"


def run_pipeline(config_path: str, output: Path, *, overrides: list[str], device: torch.device) -> dict:
    """Trains and scores every stage on the validation split and writes summary.json and report.html.

    Returns:
        The summary: scores by stage, and the seconds that each stage took over all its sessions.
    """
    config = load_config(config_path, overrides)
    prepare_data(config)
    output.mkdir(parents=True, exist_ok=True)
    save_config(config, output / "config.yaml")
    summary = _read_summary(output / SUMMARY)
    for name in STAGES:
        start = time.monotonic()
        print(f"\n== {name} ==", flush=True)
        checkpoint = train(name, load_config(config_path, overrides), output / name, device)
        if distributed.is_main():
            summary[name] = score(config, checkpoint, output / name, device)
            summary["seconds"][name] = round(summary["seconds"].get(name, 0) + time.monotonic() - start, 1)
            write_json(output / SUMMARY, summary)
        distributed.barrier()
    if distributed.is_main():
        val = config.data.val
        report = write_report(output, annotations=find_path(val.annotations, key="data.val.annotations"),
                              images=find_path(val.images, key="data.val.images"))  # fmt: skip
        print(f"\nsummary in {output / SUMMARY}, report in {report}")
    return summary


def train(name: str, config: Config, output: Path, device: torch.device) -> Path:
    """Trains a stage, or takes up its run where it stopped; returns the best checkpoint."""
    stage = STAGES[name](config)
    return fit(stage, config, output, device=device, resume=True)


def score(config: Config, checkpoint: Path, output: Path, device: torch.device) -> dict:
    """Patch and proposal scores of a checkpoint on the validation split."""
    val = config.data.val
    annotations = find_path(val.annotations, key="data.val.annotations")
    images = find_path(val.images, key="data.val.images")
    patches = score_patches(annotations, images, checkpoint, output / "patches", workers=config.data.workers,
                            device=str(device))  # fmt: skip
    proposer, settings = load_proposer(checkpoint, device)
    propose_images(proposer, images, output / "proposals", settings=settings, annotations=annotations)
    return {"patches": patches, "proposals": score_proposals(annotations, output / "proposals", output / "scores")}


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text()) if path.exists() else {}
    return {**summary, "seconds": summary.get("seconds", {})}


