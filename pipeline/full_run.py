"""All stages in a row: train, propose, score, report.

A run that was interrupted continues where it stopped; what is done is not done again.
"""

import json
import shutil
import time
from pathlib import Path

import torch

from datasets.files import write_json
from pipeline import distributed
from pipeline.config import Config, find_path, load_config, save_config
from pipeline.engine import fit
from pipeline.load import load_proposer
from pipeline.proposals import ProposalStore
from pipeline.propose_run import propose_images
from pipeline.report import write_report
from pipeline.scoring import score_patches, score_proposals
from pipeline.splits import prepare_data
from pipeline.stages import STAGES, build_stage

SUMMARY = "summary.json"


def run_pipeline(
    config_path: str, output: Path, *, overrides: list[str], device: torch.device
) -> dict:
    """Trains and scores every stage on the validation split; writes summary.json and report.html.

    Returns:
        The summary: scores by stage, and the seconds that each stage took over all its sessions.
    """
    config = load_config(config_path, overrides)
    prepare_data(config)
    summary = _read_summary(output / SUMMARY)
    for name in STAGES:
        start = time.monotonic()
        if distributed.is_main():
            print(f"\n== {name} ==", flush=True)
        stage = build_stage(name, load_config(config_path, overrides), output / name)
        checkpoint = fit(stage, stage.config, output / name, device=device, resume=True)
        summary[name] = score(config, checkpoint, output / name, device)
        seconds = summary["seconds"].get(name, 0) + time.monotonic() - start
        summary["seconds"][name] = round(seconds, 1)
        if distributed.is_main():
            write_json(output / SUMMARY, summary)
    if distributed.is_main():
        save_config(config, output / "config.yaml")
        report = write_report(output, **_validation_files(config))
        print(f"\nsummary in {output / SUMMARY}, report in {report}")
    return summary


def score(config: Config, checkpoint: Path, output: Path, device: torch.device) -> dict:
    """Patch and proposal scores of a checkpoint on the validation split.

    All processes work on it; the main one scores the proposals and writes.
    """
    files = _validation_files(config)
    patches = score_patches(
        **files,
        checkpoint=checkpoint,
        output=output / "patches",
        workers=config.data.workers,
        device=device,
    )
    proposer, settings = load_proposer(checkpoint, device)
    if distributed.is_main():
        _drop_stale(ProposalStore(output / "proposals"), settings)
    distributed.barrier()
    propose_images(
        proposer,
        files["images"],
        output / "proposals",
        settings=settings,
        annotations=files["annotations"],
    )
    scores = {}
    if distributed.is_main():
        scores = score_proposals(files["annotations"], output / "proposals", output / "scores")
    distributed.barrier()
    return {"patches": patches, "proposals": scores}


def _drop_stale(store: ProposalStore, settings: dict) -> None:
    """Proposals of an earlier checkpoint are made anew: here, unlike elsewhere, they are ours."""
    if store.changed_settings(settings):
        print(f"{store.directory}: made with an earlier checkpoint, made anew")
        stale = store.directory.with_name(f"{store.directory.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)  # of a run that was killed right here
        store.directory.rename(stale)  # at once: half a store would pass for a whole one
        shutil.rmtree(stale)


def _validation_files(config: Config) -> dict[str, Path]:
    val = config.data.val
    return {
        "annotations": find_path(val.annotations, key="data.val.annotations"),
        "images": find_path(val.images, key="data.val.images"),
    }


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text()) if path.exists() else {}
    return {**summary, "seconds": summary.get("seconds", {})}
