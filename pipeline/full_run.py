"""All stages in a row: train, propose, score, report.

A run that was interrupted continues where it stopped; what is done is not done again.
"""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from datasets.files import write_json
from pipeline import distributed
from pipeline.config import Config
from pipeline.data import prepare_data, split_files
from pipeline.evaluation.ground_truth import load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.scores import score_detections, score_patches, score_proposals
from pipeline.inference.coco_json import results_of
from pipeline.inference.detect import Detector, load_detector
from pipeline.inference.detections import Detections
from pipeline.inference.folders import (
    DETECTIONS,
    detect_images,
    detect_in_shard,
    propose_images,
)
from pipeline.inference.proposals import Proposals, ProposalStore
from pipeline.inference.propose import load_proposer
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
        distributed.say(f"\n== {name} ==")
        stage_config = config
        if name == "multipathnet":  # SharpMask's proposals have been made for its own scores
            val_proposals = str(output / "sharpmask" / "proposals")
            stage_config = replace(config, init=replace(config.init, val_proposals=val_proposals))
        inputs = prepare_stage(name, stage_config, output / name, device)
        stage = build_stage(name, stage_config, inputs)
        checkpoint = fit(stage, stage_config, output / name, device=device, resume=True)
        summary[name] = SCORERS[name](config, checkpoint, output / name, device)
        seconds = summary["seconds"].get(name, 0) + time.monotonic() - start
        summary["seconds"][name] = round(seconds, 1)
        if distributed.is_main():
            write_json(output / SUMMARY, summary)
    if distributed.is_main():
        save_config(config, output / "config.yaml")
        annotations, images = split_files(config, "val")
        report = write_report(output, annotations=annotations, images=images)
        print(f"\nsummary in {output / SUMMARY}, report in {report}")
    return summary


def score_masks(config: Config, checkpoint: Path, output: Path, device: torch.device) -> dict:
    """Patch and proposal scores of a checkpoint on the validation split.

    All processes work on it; the main one scores the proposals and writes.
    """
    annotations, images = split_files(config, "val")
    patches = score_patches(
        annotations,
        images,
        checkpoint,
        output / "patches",
        workers=config.data.workers,
        device=device,
    )
    proposer, settings = load_proposer(checkpoint, device)
    store = output / "proposals"
    if distributed.is_main():
        _drop_stale(ProposalStore(store), settings)
    distributed.barrier()
    propose_images(proposer, images, store, settings=settings, annotations=annotations)
    scores = {}
    if distributed.is_main():
        scores = score_proposals(annotations, store, output / "scores")
    distributed.barrier()
    return {"patches": patches, "proposals": scores}


def score_detector(config: Config, checkpoint: Path, output: Path, device: torch.device) -> dict:
    """Detections in the validation images from SharpMask's proposals, and their AP."""
    annotations, images = split_files(config, "val")
    store = ProposalStore(output.parent / "sharpmask" / "proposals")
    detector, settings = load_detector(checkpoint, device)
    detect_images(detector, store, images, output, settings=settings)
    scores = {}
    if distributed.is_main():
        scores = score_detections(annotations, output / DETECTIONS, output / "scores")
        if len(store.images()) <= FEW_IMAGES:
            by_count = score_by_proposals(detector, store, annotations, images)
            write_json(output / "scores" / "by_proposals.json", by_count)
    distributed.barrier()
    return {"detections": scores}


def score_by_proposals(
    detector: Detector, store: ProposalStore, annotations: Path, images: Path
) -> dict[str, list]:
    """AP for growing numbers of proposals: where more stop to help."""
    found: list[list[Detections]] = [[] for _ in PROPOSAL_COUNTS]
    broken: list[str] = []  # images left out, named before

    def detect(image: np.ndarray, proposals: Proposals) -> list[Detections]:
        return detector.detect_by_count(image, proposals, PROPOSAL_COUNTS)

    for shard in store.shards():
        for _, by_count in detect_in_shard(detect, store, shard, images, broken):
            for detections, one in zip(found, by_count, strict=True):
                detections.append(one)
    ground_truth = load_ground_truth(annotations)
    content: dict[str, list] = {"counts": list(PROPOSAL_COUNTS), "box": [], "mask": []}
    for detections in found:
        results = [result for one in detections for result in results_of(one)]
        metrics = evaluate_detections(ground_truth, results).metrics()
        for iou_type in ("box", "mask"):
            content[iou_type].append(metrics[iou_type]["AP"] if iou_type in metrics else None)
    return content


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


def _read_summary(path: Path) -> dict:
    summary = json.loads(path.read_text()) if path.exists() else {}
    return {**summary, "seconds": summary.get("seconds", {})}
