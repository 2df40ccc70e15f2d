"""All stages in a row: train, propose, score, report.

A run that was interrupted continues where it stopped; what is done is not done again.
"""

import itertools
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from datasets.files import write_json
from pipeline import distributed
from pipeline.config import Config
from pipeline.data import check_categories, prepare_data, split_files
from pipeline.evaluation.ground_truth import IOU_TYPES, load_ground_truth
from pipeline.evaluation.precision import evaluate_detections
from pipeline.evaluation.scores import score_detections, score_patches, score_proposals
from pipeline.inference.detect import Detector, load_detector
from pipeline.inference.detect_folders import DETECTIONS, detect_images, detect_in_part
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.proposals import results_of
from pipeline.inference.propose import load_proposer
from pipeline.recipe import load_config, save_config
from pipeline.report.report import write_report
from pipeline.run_lock import locks_output
from pipeline.training.engine import fit
from pipeline.training.prepare import build_stage, choose_sizes, prepare_stage, propose_split
from pipeline.training.run_directory import holds_run
from pipeline.training.stages import check_batch

SUMMARY = "summary.json"
PROPOSAL_COUNTS = (10, 30, 100, 200, 400, 1000)
FEW_IMAGES = 500  # up to here AP is measured for every number of proposals, too


@locks_output
def run_pipeline(
    config_path: str,
    output: Path,
    *,
    overrides: list[str],
    device: torch.device,
    precision: str | None = None,
) -> dict:
    """Trains and scores every stage on the validation split; writes summary.json and report.html.

    `precision` is that of training, as in `fit`.

    Returns:
        The summary: scores by stage, and the seconds that each stage took over all its sessions.
    """
    config = load_config(config_path, overrides)
    if config.init.weights and len(config.stages) > 1:
        raise ValueError(
            f"init.weights {config.init.weights} is of one stage, and {len(config.stages)} are to "
            "run; fine-tune a stage by tools/train_stage.py"
        )
    if "multipathnet" in config.stages:
        for name in ("proposer", "train_proposals", "val_proposals"):
            if value := getattr(config.init, name):
                raise ValueError(
                    f"init.{name} {value}: the detector of this run is for the proposals of its "
                    "SharpMask; train one for others by tools/train_stage.py"
                )
    for name in config.stages:  # before hours of training
        check_batch(config, name)
    prepare_data(config)
    if "multipathnet" in config.stages:
        check_categories(config)
    path = output / SUMMARY
    summary = json.loads(path.read_text()) if path.exists() else {}
    seconds = summary.setdefault("seconds", {})
    for name in config.stages:
        start = time.monotonic()
        distributed.say(f"\n== {name} ==")
        config = stage_config = choose_sizes(name, config, output / name)
        if name == "multipathnet":  # SharpMask's proposals have been made for its own scores
            val_proposals = str(output / "sharpmask" / "proposals")
            stage_config = replace(config, init=replace(config.init, val_proposals=val_proposals))
        inputs = prepare_stage(name, stage_config, output / name, device)
        stage = build_stage(name, stage_config, inputs)
        run = output / name
        checkpoint = fit(
            stage, stage_config, run, device=device, resume=holds_run(run), precision=precision
        )
        summary[name] = SCORERS[name](config, checkpoint, output / name, device)
        seconds[name] = round(seconds.get(name, 0) + time.monotonic() - start, 1)
        if distributed.is_main():
            write_json(path, summary)
    if distributed.is_main():
        save_config(config, output / "config.yaml")
        annotations, images = split_files(config, "val")
        report = write_report(
            output, annotations=annotations, images=images, chosen=config.data.categories
        )
        print(f"\nsummary in {path}, report in {report}")
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
        chosen=config.data.categories,
        workers=config.data.workers,
        device=device,
    )
    # As many as the detector asks for, too.
    num_proposals = max(config.propose.num_proposals, config.detect.num_proposals)
    proposer, settings = load_proposer(checkpoint, device, num_proposals=num_proposals)
    store = output / "proposals"
    # Proposals of an earlier checkpoint are made again: here, unlike elsewhere, they are ours.
    if distributed.is_main() and ProposalStore(store).changed_settings(settings):
        print(f"{store}: made with an earlier checkpoint, made again")
        stale = store.with_name("proposals.stale")
        shutil.rmtree(stale, ignore_errors=True)  # of a run that was killed right here
        store.rename(stale)  # at once: half a store would pass for a whole one
        shutil.rmtree(stale)
    distributed.barrier()
    propose_split(config, "val", proposer, store, settings=settings)
    scores = {}
    if distributed.is_main():
        scores = score_proposals(
            annotations, store, output / "scores", chosen=config.data.categories
        )
    distributed.barrier()
    return {"patches": patches, "proposals": scores}


def score_detector(config: Config, checkpoint: Path, output: Path, device: torch.device) -> dict:
    """Detections in the validation images from SharpMask's proposals, and their AP."""
    (annotations, images), chosen = split_files(config, "val"), config.data.categories
    store = ProposalStore(output.parent / "sharpmask" / "proposals")
    detector, settings = load_detector(checkpoint, device)
    detect_images(detector, store, images, output, settings=settings)
    scores = {}
    if len(store.images()) <= FEW_IMAGES:
        by_count = score_by_proposals(detector, store, annotations, images, chosen=chosen)
        if distributed.is_main():
            write_json(output / "scores" / "by_proposals.json", by_count)
    if distributed.is_main():
        scores = score_detections(
            annotations, output / DETECTIONS, output / "scores", chosen=chosen
        )
    distributed.barrier()
    return {"detections": scores}


def score_by_proposals(
    detector: Detector,
    store: ProposalStore,
    annotations: Path,
    images: Path,
    *,
    chosen: Sequence[str] | None = None,
) -> dict[str, list]:
    """AP for growing numbers of proposals: where more stop to help.

    Of the chosen categories, see `CocoInstances.load`.

    The processes share the images; each gets the result of all.
    """
    detect = partial(detector.detect_by_count, num_proposals=PROPOSAL_COUNTS)
    results: list[list[dict]] = [[] for _ in PROPOSAL_COUNTS]
    for part in store.parts()[distributed.rank() :: distributed.world_size()]:
        # Images that are left out (broken) have been named before.
        for _, by_count in detect_in_part(detect, store, part, images, broken=[]):
            for found, detections in zip(results, by_count, strict=True):
                found += results_of(detections)
    parts = distributed.gather(results)
    results = [list(itertools.chain(*of_count)) for of_count in zip(*parts, strict=True)]
    ground_truth = load_ground_truth(annotations, chosen=chosen, categories=detector.category_names)
    metrics = [evaluate_detections(ground_truth, found).metrics() for found in results]
    by_type = {t: [m.get(t, {}).get("AP") for m in metrics] for t in IOU_TYPES}
    return {"counts": list(PROPOSAL_COUNTS)} | by_type


SCORERS = {"deepmask": score_masks, "sharpmask": score_masks, "multipathnet": score_detector}
