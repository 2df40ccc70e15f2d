"""What a stage starts from: found beside its run directory or named by the config, or made.

`prepare_stage` may take long, since it makes the proposals that a detector is trained on;
`build_stage` reads data and weights and nothing else.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from datasets.coco import CocoInstances
from datasets.proposal_boxes import ProposalBoxes
from pipeline import distributed
from pipeline.checkpoint import BEST, find_proposer_beside, load_checkpoint, load_weights
from pipeline.config import PRETRAIN, Config
from pipeline.data import check_categories, prepare_data, split_files
from pipeline.inference.proposal_store import ProposalStore
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.inference.propose_folders import propose_images
from pipeline.networks import check_same_network
from pipeline.recipe import find_path
from pipeline.sizes import choose_by_checkpoint, choose_by_data, is_auto
from pipeline.training.pretrain import PretrainStage
from pipeline.training.run_directory import find_begun
from pipeline.training.stages import (
    DeepMaskStage,
    MultiPathNetStage,
    SharpMaskStage,
    Stage,
    check_batch,
)

# What belongs to the categories: of a detector, with the mean and deviation of its box deltas, and
# of a classifier.
CATEGORY_WEIGHTS = ("cls_score.", "bbox_pred.", "delta_", "fc.")


@dataclass(frozen=True)
class StageInputs:
    """What a stage starts from.

    Attributes:
        filled: whether a checkpoint, that of the run or `weights`, fills the whole network.
        weights: the one that a fine-tuned network starts from.
        masks: checkpoint of the DeepMask that a SharpMask is built on, or of the mask network whose
            trunk a detector starts from.
        proposals: stores of the "train" and "val" images, for a detector.
        boxes: the files of their boxes, see `ProposalBoxes`.
    """

    filled: bool = False
    weights: Path | None = None
    masks: Path | None = None
    proposals: dict[str, ProposalStore] = field(default_factory=dict)
    boxes: dict[str, Path] = field(default_factory=dict)


def choose_sizes(name: str, config: Config, output: Path) -> Config:
    """The config with a number where it says `patch_size: auto`; says which and why.

    A DeepMask has the patch for its training objects. A run that goes on, is fine-tuned or builds
    on a mask network keeps the patch it has there. A detector of given proposals has none, nor has
    a classifier.

    Raises:
        ValueError or FileNotFoundError: what it depends on is not there or cannot be used.
    """
    if name == PRETRAIN or not is_auto(config):
        return config
    if begun := find_begun(output):
        return choose_by_checkpoint(config, begun)
    if config.init.weights is not None:
        return choose_by_checkpoint(config, find_path(config.init.weights, key="init.weights"))
    if name == "deepmask":
        return choose_by_data(config)
    if name == "sharpmask":
        return choose_by_checkpoint(config, find_deepmask(config, output))
    if config.init.train_proposals and config.init.val_proposals:
        return config
    return choose_by_checkpoint(config, find_proposer(config, output))


def prepare_stage(name: str, config: Config, output: Path, device: torch.device) -> StageInputs:
    """Finds or makes what a stage starts from: data, checkpoints, proposals.

    Args:
        output: the stage's run directory; what the stages before it have left is beside it.
        device: where proposals are made.

    Raises:
        ValueError or FileNotFoundError: what it needs is not there or does not fit.
    """
    check_batch(config, name)
    prepare_data(config)
    if name == "multipathnet":  # before proposals are made
        check_categories(config)
    weights = masks = None
    begun = find_begun(output) is not None
    if config.init.weights is not None and not begun:
        if name == "sharpmask" and config.init.deepmask:
            raise ValueError(
                "init.weights and init.deepmask are both set, and a SharpMask checkpoint holds its "
                "DeepMask; set only one of them"
            )
        weights = find_path(config.init.weights, key="init.weights")
        check_same_network(load_checkpoint(weights, stage=name), config, name, source=str(weights))
    filled = begun or weights is not None
    if name == "sharpmask" and not filled:
        masks = find_deepmask(config, output)
    proposals, boxes = {}, {}
    if name == "multipathnet":
        proposals = {s: find_proposals(config, s, output, device) for s in ("train", "val")}
        boxes = {s: write_boxes(config, s, output, store) for s, store in proposals.items()}
        if config.multipathnet.trunk.weights == "deepmask" and not filled:
            masks = find_proposer(config, output)
    return StageInputs(filled, weights, masks, proposals, boxes)


def build_stage(name: str, config: Config, inputs: StageInputs) -> Stage:
    """A stage with its data, its network filled from what it starts from.

    Raises:
        ValueError or FileNotFoundError: data or weights that do not fit.
    """
    stage: Stage
    if name == PRETRAIN:
        stage = PretrainStage(config, filled=inputs.filled)
    elif name == "deepmask":
        stage = DeepMaskStage(config, filled=inputs.filled)
    elif name == "sharpmask":
        stage = _build_sharpmask(config, inputs.masks)
    else:
        stage = _build_multipathnet(config, inputs)
    if inputs.weights is not None:
        start_from(stage, load_checkpoint(inputs.weights), source=str(inputs.weights))
    return stage


def _build_sharpmask(config: Config, deepmask: Path | None) -> SharpMaskStage:
    stage = SharpMaskStage(config)
    if deepmask is not None:
        checkpoint = load_checkpoint(deepmask, stage="deepmask")
        check_same_network(checkpoint, config, "deepmask", source=str(deepmask))
        load_weights(stage.model.deepmask, checkpoint["model"], source=str(deepmask))
        stage.model.start_from_deepmask()
        distributed.say(f"DeepMask from {deepmask}")
    return stage


def _build_multipathnet(config: Config, inputs: StageInputs) -> MultiPathNetStage:
    stores = inputs.proposals
    boxes = {split: ProposalBoxes.load(path) for split, path in inputs.boxes.items()}
    image_ids = {split: set(store.images()) for split, store in stores.items()}
    stage = MultiPathNetStage(
        config, boxes, stores["val"], image_ids=image_ids, filled=inputs.filled
    )
    check_images(stores["train"], stage.train_data.coco)
    check_images(stores["val"], stage.val_data.coco)
    if inputs.masks is not None:
        checkpoint = load_checkpoint(inputs.masks, stage=("deepmask", "sharpmask"))
        prefix = "deepmask.trunk." if checkpoint["stage"] == "sharpmask" else "trunk."
        state = checkpoint["model"].items()
        weights = {k.removeprefix(prefix): v for k, v in state if k.startswith(prefix)}
        load_weights(stage.model.trunk, weights, source=f"the trunk of {inputs.masks}")
    return stage


def start_from(stage: Stage, checkpoint: dict[str, Any], *, source: str) -> None:
    """Fills a stage's network from a checkpoint of the same stage.

    Of other categories than the dataset's, a detector keeps its random classifier and box
    regressor, and a pretrained trunk its random classifier.
    """
    state, lines = checkpoint["model"], [f"weights from {source}"]
    own, theirs = (_category_names(each) for each in (stage.metadata, checkpoint))
    if own != theirs:
        kept = stage.model.state_dict()
        state = {k: v for k, v in state.items() if not k.startswith(CATEGORY_WEIGHTS)}
        state |= {k: v for k, v in kept.items() if k.startswith(CATEGORY_WEIGHTS)}
        lines.append(
            f"its {len(theirs)} categories are not the dataset's {len(own)}, so its outputs for "
            "them start from random weights"
        )
    load_weights(stage.model, state, source=source)
    distributed.say("\n".join(lines))


def _category_names(metadata: dict[str, Any]) -> list[str]:
    return [category["name"] for category in metadata.get("categories", ())]


def find_deepmask(config: Config, output: Path) -> Path:
    """The DeepMask that a SharpMask run starts from: `init.deepmask`, or of the run beside it."""
    if config.init.deepmask:
        return find_path(config.init.deepmask, key="init.deepmask")
    beside = output.parent / "deepmask" / "checkpoints" / BEST
    if not beside.is_file():
        raise FileNotFoundError(
            f"no trained DeepMask: {beside} does not exist; name one by "
            "--set init.deepmask=CHECKPOINT, or train it first: tools/train_stage.py "
            f"--stage deepmask --output {output.parent / 'deepmask'}"
        )
    return beside


def find_proposer(config: Config, output: Path) -> Path:
    """The network that proposes for a detector: `init.proposer`, or of the runs beside it."""
    if config.init.proposer:
        return find_path(config.init.proposer, key="init.proposer")
    if path := find_proposer_beside(output):
        return path
    raise FileNotFoundError(
        f"no proposals and no network to make them: {output.parent} holds no sharpmask or deepmask "
        "run; name proposal stores by --set init.train_proposals=DIR init.val_proposals=DIR, or a "
        "checkpoint by --set init.proposer=CHECKPOINT"
    )


def find_proposals(config: Config, split: str, output: Path, device: torch.device) -> ProposalStore:
    """A split's proposals: `init.{split}_proposals`, or made in the run directory."""
    key = f"{split}_proposals"
    if given := getattr(config.init, key):
        return ProposalStore(find_path(given, key=f"init.{key}"))
    sampling = config.multipathnet.sampling
    proposer, settings = load_proposer(
        find_proposer(config, output),
        device,
        num_proposals=sampling.max_proposals,
        log2_scales=sampling.proposal_log2_scales,
        refine=sampling.refine_proposals,
    )
    store = output / "proposals" / split
    max_images = sampling.max_images if split == "train" else None
    propose_split(config, split, proposer, store, settings=settings, max_images=max_images)
    return ProposalStore(store)


def propose_split(
    config: Config,
    split: str,
    proposer: Proposer,
    store: Path,
    *,
    settings: dict[str, Any],
    max_images: int | None = None,
) -> None:
    """Fills a proposal store for the images of a split, or for the first of them."""
    annotations, images = split_files(config, split)
    propose_images(
        proposer,
        images,
        store,
        settings=settings,
        annotations=annotations,
        exif=config.data.exif,
        max_pixels=config.data.max_pixels,
        max_images=max_images,
        write_json=False,
    )


def write_boxes(config: Config, split: str, output: Path, store: ProposalStore) -> Path:
    """Writes the boxes of a split's best proposals where all processes map them from.

    Raises:
        ValueError: the store holds no proposals.
    """
    path = output / "proposals" / f"{split}_boxes.f32"
    if distributed.is_main():
        limit = config.multipathnet.sampling.max_proposals
        stamps = [(name, *stamp) for name, stamp in store.stamps().items()]
        stamp = json.dumps([str(store.directory.resolve()), limit, stamps])
        if not ProposalBoxes.is_current(path, stamp):  # it takes minutes at COCO's size
            if not store.count():
                raise ValueError(f"{store.directory} holds no proposals")
            ProposalBoxes.write(store.box_rows(), path, limit=limit, stamp=stamp)
    distributed.barrier()
    return path


def check_images(store: ProposalStore, coco: CocoInstances) -> None:
    """Raises a ValueError if an image of a store has another size than the annotated one.

    Two splits, or two datasets, may well count their images from 1.
    """
    sizes = dict(zip(coco.image_ids.tolist(), coco.image_sizes.tolist(), strict=True))
    for image in store.images().values():
        here, there = [image["height"], image["width"]], sizes.get(image["id"])
        if there not in (None, here):
            raise ValueError(
                f"{store.directory} is of other images than {coco.path}: image_id {image['id']} "
                f"has {here[1]}x{here[0]} pixels there, and {there[1]}x{there[0]} here"
            )
