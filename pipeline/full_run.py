"""All stages in a row: train, propose, score, report.

A run that was interrupted continues where it stopped; what is done is not done again.
"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch

from datasets.files import write_json
from pipeline import distributed
from pipeline.config import Config
from pipeline.data import prepare_data, split_files
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.scores import score_detections, score_patches, score_proposals
from pipeline.inference.detect import Detector, load_detector
from pipeline.inference.detect_run import RESULTS, detect_images, with_images
from pipeline.inference.detections import Detections
from pipeline.inference.proposals import ProposalStore
from pipeline.inference.propose import load_proposer
from pipeline.inference.propose_run import propose_images
from pipeline.recipe import load_config, save_config
from pipeline.report.report import write_report
from pipeline.training.engine import fit
from pipeline.training.prepare import build_stage, prepare_stage

SUMMARY = "summary.json"
PROPOSAL_COUNTS = (10, 30, 100, 200, 400, 1000)
FEW_IMAGES = 500  # up to here AP is measured for every number of proposals, too


def run_pipeline(
    config_path: str, output: Path, *, overrides: list[str], device: torch.device
) -> dict:
    """Trains and scores every stage on the validation split; writes summary.json and report.html.

    Returns:
        The summary: scores by stage, and the seconds that each stage took over all its sessions.
    """
    config = load_config(config_path, overrides)
    if config.init.weights and len(config.stages) > 1:
        raise ValueError(
            f"init.weights {config.init.weights} is of one stage, and {len(config.stages)} are to "
            "run; fine-tune a stage by tools/train_stage.py"
        )
    prepare_data(config)
    summary = _read_summary(output / SUMMARY)
    for name in config.stages:
        start = time.monotonic()
        if distributed.is_main():
            print(f"\n== {name} ==", flush=True)
        own = config
        if name == "multipathnet":  # SharpMask's proposals have been made for its own scores
            val_proposals = str(output / "sharpmask" / "proposals")
            own = replace(config, init=replace(config.init, val_proposals=val_proposals))
        inputs = prepare_stage(name, own, output / name, device)
        stage = build_stage(name, own, inputs)
        checkpoint = fit(stage, own, output / name, device=device, resume=True)
        summary[name] = SCORERS[name](config, checkpoint, output / name, device)
        seconds = summary["seconds"].get(name, 0) + time.monotonic() - start
        summary["seconds"][name] = round(seconds, 1)
        if distributed.is_main():
            write_json(output / SUMMARY, summary)
    if distributed.is_main():
        save_config(config, output / "config.yaml")
        report = write_report(output, **_validation_files(config))
        print(f"\nsummary in {output / SUMMARY}, report in {report}")
    return summary


def score_masks(config: Config, checkpoint: Path, output: Path, device: torch.device) -> dict:
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


def score_detector(config: Config, checkpoint: Path, output: Path, device: torch.device) -> dict:
    """Detections in the validation images from SharpMask's proposals, and their AP."""
    files = _validation_files(config)
    store = ProposalStore(output.parent / "sharpmask" / "proposals")
    detector, settings = load_detector(checkpoint, device)
    detect_images(detector, store, files["images"], output, settings=settings)
    scores = {}
    if distributed.is_main():
        scores = score_detections(files["annotations"], output / RESULTS, output / "scores")
        if len(store.images()) <= FEW_IMAGES:
            _score_by_proposals(detector, store, files, output / "scores")
    distributed.barrier()
    return {"detections": scores}


def _score_by_proposals(
    detector: Detector, store: ProposalStore, files: dict[str, Path], output: Path
) -> None:
    """AP for growing numbers of proposals, into by_proposals.json: where more stop to help."""
    found: list[list[Detections]] = [[] for _ in PROPOSAL_COUNTS]
    named: list[str] = []  # images left out, as they were before
    for image, proposals in with_images(store, store.shards(), files["images"], named):
        by_count = detector.detect_by_count(image, proposals, PROPOSAL_COUNTS)
        for detections, one in zip(found, by_count, strict=True):
            detections.append(one)
    ground_truth = load_ground_truth(files["annotations"])
    content = {"counts": list(PROPOSAL_COUNTS), "box": [], "mask": []}
    for detections in found:
        results = [result for one in detections for result in one.results()]
        metrics = evaluate_detections(ground_truth, results).metrics()
        for kind in ("box", "mask"):
            content[kind].append(metrics[kind]["AP"] if kind in metrics else None)
    write_json(output / "by_proposals.json", content)


SCORERS = {
    "deepmask": score_masks,
    "sharpmask": score_masks,
    "multipathnet": score_detector,
}


def _drop_stale(store: ProposalStore, settings: dict) -> None:
    """Proposals of an earlier checkpoint are made anew: here, unlike elsewhere, they are ours."""
    if store.changed_settings(settings):
        print(f"{store.directory}: made with an earlier checkpoint, made anew")
        stale = store.directory.with_name(f"{store.directory.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)  # of a run that was killed right here
        store.directory.rename(stale)  # at once: half a store would pass for a whole one
        shutil.rmtree(stale)


def _validation_files(config: Config) -> dict[str, Path]:
    annotations, images = split_files(config, "val")
    return {"annotations": annotations, "images": images}


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text()) if path.exists() else {}
    return {**summary, "seconds": summary.get("seconds", {})}
