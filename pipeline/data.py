"""Training and validation data of a config: annotations, image folders, files that fail."""

from pathlib import Path

from datasets.coco import CocoInstances
from datasets.shapes import write_shapes
from pipeline import distributed
from pipeline.config import Config, SplitConfig, find_path


def prepare_data(config: Config) -> None:
    """Writes the synthetic dataset when the config asks for it, and points train and val to it."""
    shapes = config.data.shapes
    if shapes is None:
        return
    for split, count in (("train", shapes.train_images), ("val", shapes.val_images)):
        if distributed.is_main():
            write_shapes(shapes.directory, num_images=count, seed=shapes.seed, split=split)
        directory = Path(shapes.directory)
        setattr(
            config.data,
            split,
            SplitConfig(
                annotations=str(directory / "annotations" / f"instances_{split}.json"),
                images=str(directory / "images" / split),
            ),
        )
    distributed.barrier()


def split_files(config: Config, split: str) -> tuple[Path, Path]:
    """Annotations and image folder of "train" or "val".

    Raises:
        ValueError or FileNotFoundError: they are not named, or not there.
    """
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


def load_split(config: Config, split: str) -> tuple[CocoInstances, Path]:
    """Annotations and image folder of "train" or "val"; says what they hold."""
    annotations, images = split_files(config, split)
    coco = CocoInstances.load(annotations)
    if distributed.is_main():
        print(f"{split}: {coco.summary()}", flush=True)
    return coco, images


class BrokenFiles:
    """Names each unreadable image once, and stops the run when there are too many."""

    def __init__(self, images: int, max_share: float):
        self.images, self.max_share, self.messages = images, max_share, {}

    def note(self, messages: list[str]) -> None:
        """Notes the images of a minibatch that could not be read.

        Raises:
            ValueError: more than the configured share of the images is unreadable; has the list.
        """
        for message in messages:
            if message not in self.messages:
                self.messages[message] = True
                print(f"skipped ({len(self.messages)} so far): {message}", flush=True)
        # Every process meets its share of the images.
        images = self.images / distributed.share()[1]
        if len(self.messages) > self.max_share * images:
            raise ValueError(
                f"{len(self.messages)} of {images:.0f} images cannot be read, more than "
                f"data.max_broken_share {self.max_share:g}: " + "; ".join(self.messages)
            )
