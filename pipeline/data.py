"""Training and validation data of a config: files, samples, minibatches on the device."""

import itertools
from collections.abc import Collection, Generator, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.categories import use_categories
from datasets.category_names import choose_categories
from datasets.coco import CocoInstances
from datasets.coco_file import read_categories, read_federated, refuse_federated
from datasets.image_survey import overfull_images, survey_images
from datasets.images import ImageError, ImageFolder
from datasets.loading import TrainingDataset, batch_loader, serve
from datasets.patch_sampler import PatchSampler, PatchSamplingConfig
from datasets.patches import PatchDataset
from datasets.proposal_boxes import ProposalBoxes
from datasets.roi_sampler import RoiSampler
from datasets.rois import RoiDataset
from datasets.shapes import write_shapes
from models.boxes import encode_boxes
from pipeline import distributed
from pipeline.config import (
    ROOT,
    Config,
    DataConfig,
    DeepMaskStageConfig,
    MultiPathNetStageConfig,
    ShapesConfig,
    SplitConfig,
)
from pipeline.recipe import find_path


def prepare_data(config: Config) -> None:
    """Writes the synthetic dataset when the config asks for it and it is not there yet.

    Raises:
        ValueError: the config names files, too.
    """
    data, shapes = config.data, config.data.shapes
    if shapes is not None and (data.train, data.val) != (SplitConfig(), SplitConfig()):
        raise ValueError(
            "data.shapes must be null where data.train and data.val name files; add --set "
            "data.shapes=null"
        )
    if shapes is not None and distributed.is_main():
        for split, count in (("train", shapes.train_images), ("val", shapes.val_images)):
            directory = _shapes_directory(shapes)
            write_shapes(directory, num_images=count, seed=shapes.seed, split=split, scene=shapes)
    distributed.barrier()


def _shapes_directory(shapes: ShapesConfig) -> Path:
    """Looked for as other paths of a config are; where it is not yet, below the cwd."""
    here, below_root = Path(shapes.directory), ROOT / shapes.directory
    return below_root if below_root.is_dir() and not here.is_dir() else here


def split_files(config: Config, split: str) -> tuple[Path, Path]:
    """Annotations and image folder of "train" or "val".

    Raises:
        ValueError or FileNotFoundError: they are not named, or not there.
    """
    if config.data.shapes is not None:
        directory = _shapes_directory(config.data.shapes)
        return directory / "annotations" / f"instances_{split}.json", directory / "images" / split
    paths: SplitConfig = getattr(config.data, split)
    if not paths.annotations or not paths.images:
        raise ValueError(
            f"the config names no {split} data: "
            f"set data.{split}.annotations and data.{split}.images"
        )
    annotations = find_path(paths.annotations, key=f"data.{split}.annotations")
    images = find_path(paths.images, key=f"data.{split}.images")
    if not images.is_dir():
        raise ValueError(f"data.{split}.images: {images} is not a folder")
    return annotations, images


def load_split(
    config: Config, split: str, *, like: CocoInstances | None = None
) -> tuple[CocoInstances, ImageFolder]:
    """Annotations and image folder of "train" or "val"; says what they hold.

    Of `data.categories`, with the categories of `like`, if given.

    Raises:
        ValueError: files that cannot be used, or annotations of other categories.
    """
    annotations, images = split_files(config, split)
    coco = CocoInstances.load(annotations, config.data.categories)
    distributed.say(f"{split}: {coco.summary()}")
    if like is not None:
        categories = dict(zip(like.category_ids.tolist(), like.category_names, strict=True))
        if line := use_categories(coco, categories, source=like.path):
            distributed.say(line)
    find_files(coco, images)
    return coco, survey_split(coco, images, config.data, split)


def survey_split(
    coco: CocoInstances, images: str | Path, data: DataConfig, split: str
) -> ImageFolder:
    """The images as they are to be read, see `survey_images`; says what was found."""
    exif, lines = data.exif, list[str]()
    if distributed.is_main():
        exif, lines = survey_images(
            [Path(images, coco.file_name(i)) for i in range(len(coco))],
            exif=data.exif,
            annotated_sizes=lambda: [(h, w) for h, w in coco.image_sizes.tolist()],
            overfull=lambda: overfull_images(coco),
        )
    for line in lines:
        distributed.say(f"{split}: {line}")
    return ImageFolder(Path(images), distributed.gather(exif)[0], data.max_pixels)


def find_files(coco: CocoInstances, images: str | Path) -> None:
    """Finds the files of annotated images; says what had to be resolved."""
    if message := coco.find_files(images):
        distributed.say(message)


def check_categories(config: Config) -> None:
    """Checks for a detector, before anything is made, that it can be trained and scored.

    Raises:
        ValueError: a chosen category is not there, validation has objects of categories that
            training does not have, or not every object is annotated.
    """
    chosen = config.data.categories
    (train, _), (val, _) = (split_files(config, split) for split in ("train", "val"))
    for path in (train, val):
        refuse_federated(
            path,
            read_federated(path),
            "a detector would learn the other objects as background; train the mask stages alone "
            "(stages: [deepmask, sharpmask]), or remove such keys if every object is annotated",
        )
    categories, val_categories = read_categories(train), read_categories(val)
    is_same = categories == val_categories
    if chosen is not None:
        categories = choose_categories(train, categories, chosen)
        choose_categories(val, val_categories, chosen)
    if not is_same:
        use_categories(CocoInstances.load(val, chosen), categories, source=str(train))


def patch_dataset(
    c: DeepMaskStageConfig,
    coco: CocoInstances,
    images: str | Path | ImageFolder,
    *,
    sampling: PatchSamplingConfig,
    target_size: int,
    seed: int,
) -> PatchDataset:
    """Patches of annotated images, for a DeepMask and as a stage draws them."""
    sampler = PatchSampler(coco, patch_size=c.patch_size, config=sampling, seed=seed)
    return PatchDataset(
        coco,
        images,
        sampler,
        patch_size=c.patch_size,
        context=c.context,
        target_size=target_size,
    )


def roi_dataset(
    c: MultiPathNetStageConfig,
    coco: CocoInstances,
    images: str | Path | ImageFolder,
    proposals: ProposalBoxes,
    *,
    seed: int,
    image_ids: Collection[int] | None = None,
    all_images: bool = False,
) -> RoiDataset:
    """RoIs of annotated images and their proposals; those of `image_ids` were searched for some.

    `all_images`, for validation: whatever `max_images` says, for all IoU thresholds at once, and
    of unchanged scale and colors.

    Raises:
        ValueError: no proposal is of these images.
    """
    if not set(proposals.image_ids.tolist()) & set(coco.image_ids.tolist()):
        raise ValueError(f"the proposals are of other images than {coco.path}: no id is in both")
    sampling = c.sampling
    if all_images:
        sampling = replace(
            sampling, max_images=None, draw_threshold=False, jitter_scale=0.0, jitter_color=0.0
        )
    sampler = RoiSampler(
        coco,
        proposals,
        config=sampling,
        iou_thresholds=c.iou_thresholds,
        image_ids=image_ids,
        seed=seed,
    )
    if missing := sampler.num_not_searched:
        distributed.say(
            f"{coco.path}: {missing} images with objects are left out: the store of proposals does "
            "not have them"
        )
    return RoiDataset(
        coco,
        images,
        sampler,
        pixels=c.pixels,
        align_corners=c.align_corners,
        inclusive_boxes=c.inclusive_boxes,
        images_per_batch=c.optim.batch_size,
    )


def delta_statistics(
    data: RoiDataset, *, images: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean and deviation (4,) float32 of the box deltas that training draws as foreground.

    A deviation is 1 where the deltas are all the same, as they are when no proposal but the
    ground-truth boxes is foreground.

    Args:
        data: the training RoIs; no pixel is read.
        images: how many to measure on at most, chosen by `seed` among those with an object.

    Raises:
        ValueError: no image of the dataset has an object.
    """
    sampler, rng = data.sampler, np.random.default_rng(seed)
    if len(sampler.object_images) == 0:
        raise ValueError(f"{data.coco.path}: no image has an object: {data.coco.why_none()}")
    rows = rng.permutation(sampler.object_images)[:images].tolist()
    deltas = []
    for sample in (sampler.sample(row, rng) for row in rows):
        foreground = sample.labels.max(axis=0) > 0
        corners = (data.corners(boxes)[foreground] for boxes in (sample.rois, sample.boxes))
        deltas.append(encode_boxes(*map(torch.from_numpy, corners)))
    values = torch.cat(deltas).double()
    mean, std = values.mean(0), values.std(0, unbiased=False)
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def device_batches(
    data: TrainingDataset,
    indices: Iterable[list],
    device: torch.device,
    *,
    workers: int,
) -> Generator[dict]:
    """Minibatches of the given indices on the device, their pixels channels-last.

    Raises:
        ImageError: too many images in a row cannot be read.
        ChildProcessError: a worker was killed.
    """
    cuda = device.type == "cuda"
    loader = batch_loader(data, indices, data.collate, workers=workers, pin_memory=cuda)
    try:
        for batch in serve(loader):
            for name, value in batch.items():
                if isinstance(value, Tensor):
                    value = value.to(device, non_blocking=cuda)
                    if value.dim() == 4:
                        value = value.contiguous(memory_format=torch.channels_last)
                    batch[name] = value
            yield batch
    except ImageError as error:
        # From a worker process it comes with that process's traceback before it.
        raise ImageError(str(error).rpartition(f"{ImageError.__name__}: ")[2]) from None


class BrokenFiles:
    """Names each unreadable image once, and stops the run when there are too many."""

    def __init__(self, images: int, max_fraction: float):
        self.images, self.max_fraction = images, max_fraction
        self.messages: dict[str, None] = {}  # of all processes
        self.news: list[str] = []

    def note(self, messages: list[str]) -> bool:
        """Notes the images of a minibatch that could not be read; whether any is to report."""
        self.news += [message for message in messages if message not in self.messages]
        return bool(self.news)

    def report(self) -> None:
        """Names the images that any process has noted since the last report; all call it.

        Raises:
            ValueError: more than the configured fraction of the images is unreadable.
        """
        for message in itertools.chain(*distributed.gather(self.news)):
            if message not in self.messages:
                self.messages[message] = None
                distributed.say(f"skipped ({len(self.messages)} so far): {message}")
        self.news = []
        if len(self.messages) > self.max_fraction * self.images:
            raise ValueError(
                f"{len(self.messages)} of {self.images} images cannot be read, more than "
                f"data.max_broken_fraction {self.max_fraction:g}: " + "; ".join(self.messages)
            )
