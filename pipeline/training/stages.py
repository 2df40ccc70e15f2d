"""The stages by name, each on what the stages before it have left beside its run directory."""

from pathlib import Path

import torch

from datasets.coco import CocoInstances
from pipeline.checkpoint import BEST, LAST
from pipeline.config import Config, find_path
from pipeline.data import prepare_data, split_files
from pipeline.inference.proposals import ProposalStore
from pipeline.inference.propose_run import propose_images
from pipeline.initial_weights import read_initial_weights, start_from
from pipeline.load import load_proposer
from pipeline.training.engine import Stage
from pipeline.training.patch_stages import DeepMaskStage, SharpMaskStage
from pipeline.training.roi_stage import MultiPathNetStage


def build_stage(name: str, config: Config, output: Path, device: torch.device) -> Stage:
    """A stage by its name, on what the stages before it have left beside `output`.

    Args:
        output: the stage's run directory.

    Raises:
        ValueError or FileNotFoundError: what it needs is not there or does not fit.
    """
    begun = (output / "checkpoints" / LAST).exists()
    content = None if begun else read_initial_weights(name, config)
    stage = _build(name, config, output, device, filled=begun or content is not None)
    if content is not None:
        start_from(stage, content, source=config.init.weights)
    return stage


def _build(name: str, config: Config, output: Path, device: torch.device, *, filled: bool) -> Stage:
    """`filled`: a checkpoint of the stage is going to fill the whole network."""
    if name == DeepMaskStage.name:
        return DeepMaskStage(config)
    if name == SharpMaskStage.name:  # its own checkpoint holds the DeepMask, too
        return SharpMaskStage(config, None if filled else find_deepmask(config, output))
    stores = {split: find_proposals(config, split, output, device) for split in ("train", "val")}
    trunk = None
    if config.multipathnet.trunk.weights == "deepmask" and not filled:
        trunk = find_proposer(config, output)
    proposals = {split: store.boxes() for split, store in stores.items()}
    stage = MultiPathNetStage(config, proposals, trunk_checkpoint=trunk)
    for split, data in (("train", stage.train_data), ("val", stage.val_data)):
        check_images(stores[split], data.coco)
    return stage


def find_deepmask(config: Config, output: Path) -> Path:
    """The DeepMask that a SharpMask run starts from: `init.deepmask`, or of the run beside it.

    Raises:
        FileNotFoundError: there is none; says how to get one.
    """
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


def find_proposer(config: Config, output: Path) -> Path:
    """The network that proposes for a detector: `init.proposer`, or of the runs beside it.

    Raises:
        FileNotFoundError: there is none; says how to get one.
    """
    if config.init.proposer:
        return find_path(config.init.proposer, key="init.proposer")
    for name in (SharpMaskStage.name, DeepMaskStage.name):
        path = output.parent / name / "checkpoints" / BEST
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no proposals and no network to make them: {output.parent} holds no sharpmask or deepmask "
        "run; name proposal stores by --set init.train_proposals=DIR init.val_proposals=DIR, or a "
        "checkpoint by --set init.proposer=CHECKPOINT"
    )


def find_proposals(config: Config, split: str, output: Path, device: torch.device) -> ProposalStore:
    """A split's proposals: `init.{split}_proposals`, or made in the run directory.

    Raises:
        FileNotFoundError: a store that is not there; see `find_proposer`.
    """
    key = f"{split}_proposals"
    if given := getattr(config.init, key):
        return ProposalStore(find_path(given, key=f"init.{key}"))
    prepare_data(config)
    annotations, images = split_files(config, split)
    sampling = config.multipathnet.sampling
    proposer, settings = load_proposer(
        find_proposer(config, output),
        device,
        num_proposals=sampling.max_proposals,
        scales=sampling.proposal_scales,
        refine=sampling.refine_proposals,
    )
    store = output / "proposals" / split
    propose_images(
        proposer,
        images,
        store,
        settings=settings,
        annotations=annotations,
        max_images=sampling.max_images if split == "train" else None,
    )
    return ProposalStore(store)


def check_images(store: ProposalStore, coco: CocoInstances) -> None:
    """Makes sure that a store's images are the annotated ones.

    Two splits, or two datasets, may well count their images from 1.

    Raises:
        ValueError: an image of the same id has another size.
    """
    sizes = dict(zip(coco.image_ids.tolist(), coco.image_sizes.tolist(), strict=True))
    for image in store.images().values():
        here, there = [image["height"], image["width"]], sizes.get(image["id"])
        if there not in (None, here):
            raise ValueError(
                f"{store.directory} is of other images than {coco.path}: image_id {image['id']} "
                f"has {here[1]}x{here[0]} pixels there, and {there[1]}x{there[0]} here"
            )
