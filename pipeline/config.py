"""The settings of the whole pipeline, as dataclasses; `pipeline/recipe.py` reads them from YAML.

The networks and samplers have theirs beside them; the sections here contain those. The defaults are
the published recipes (ECCV 2016 with ResNet-50; the released code where it differs from the paper).
Each class checks its own values.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from datasets.crops import CropConfig
from datasets.image_survey import EXIF_CHOICES
from datasets.images import MAX_PIXELS, MAX_READABLE_PIXELS
from datasets.patch_sampler import PatchSamplingConfig
from datasets.resize import PixelConfig
from datasets.roi_sampler import RoiSamplingConfig
from datasets.shapes import SceneConfig
from models.backbone import WITH_LAST_STAGE
from models.cifar import CIFAR_NETWORKS
from models.deepmask import DeepMaskConfig
from models.multipathnet import MultiPathNetConfig
from models.settings import require, require_one_of
from models.sharpmask import SharpMaskConfig
from models.trunk import TrunkConfig

STAGES = ("deepmask", "sharpmask", "multipathnet")  # in the order of the pipeline
PRETRAIN = "pretrain"  # a stage that a trunk without ImageNet weights may have before those
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class SplitConfig:
    """A COCO-format split.

    Relative paths are looked for below the working directory, then below the project's root.
    """

    annotations: str = ""  # the instances json
    images: str = ""  # the folder that its file names are relative to


@dataclass(frozen=True)
class ShapesConfig(SceneConfig):
    """The synthetic dataset, written where `directory` says when it is not there yet."""

    directory: str = "runs/shapes"  # gets annotations/ and images/
    train_images: int = 1200  # how many
    val_images: int = 200  # how many
    seed: int = 0  # of what is drawn

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "greater than 0", lambda v: v > 0, "train_images", "val_images")
        require(self, "from 0 to 4294967295", lambda v: 0 <= v < 2**32, "seed")


@dataclass(frozen=True)
class DataConfig:
    """What is trained and validated on."""

    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    shapes: ShapesConfig | None = None  # when set, it gives train and val
    # Trained, validated and scored on; names, or ids as in the json. null: all. Objects of others
    # are as if they were not annotated.
    categories: tuple[str, ...] | None = None
    # Data-loading processes for each training process; 0 loads in the training process itself.
    workers: int = 4
    max_broken_fraction: float = 0.01  # of the training images; more unreadable ones stop the run
    # apply: annotations are of images as their EXIF orientation turns them; ignore: of the stored
    # pixels; auto: as the annotated sizes show, else apply.
    exif: str = "auto"
    max_pixels: int = MAX_PIXELS  # an image that has more is not decoded

    def __post_init__(self) -> None:
        require(self, "null or a list of names or ids", lambda v: len(v) > 0, "categories")
        require(self, "at least 0", lambda v: v >= 0, "workers")
        require(self, "from 0 to 1", lambda v: 0 <= v <= 1, "max_broken_fraction")
        require_one_of(self, "exif", EXIF_CHOICES)
        require(self, "from 1 to 2^30", lambda v: 0 < v <= MAX_READABLE_PIXELS, "max_pixels")


@dataclass(frozen=True)
class OptimConfig:
    """How a stage is optimized. An epoch is a number of minibatches, as in the released code."""

    batch_size: int = 32  # of the whole step, over all processes
    # Parts of each process's minibatch, one after another: less memory, the same results.
    accumulate: int = 1
    batches_per_epoch: int = 4000  # training steps
    epochs: int = 300  # of the whole run
    optimizer: str = "sgd"  # sgd | adamw
    momentum: float = 0.9  # sgd only
    weight_decay: float = 5e-4  # of weights, and of biases if they decay
    decay_biases: bool = True  # or weights only
    lr: float = 1e-3  # highest learning rate
    lr_drops: dict[int, float] = field(default_factory=dict)  # epoch: factor on lr from there on
    schedule: str = "steps"  # steps (lr_drops) | cosine (to zero at the end)
    warmup_batches: int = 0  # linear from zero
    trunk_lr_factor: float = 1.0  # on the learning rate of the trunk
    clip_gradient: float | None = None  # largest norm
    # Of an exponential moving average of the weights, which is then validated and kept; null: none.
    ema_decay: float | None = None
    amp: bool = True  # bfloat16 on CUDA, where --precision does not say otherwise
    validate_every: int = 2  # epochs
    validation_batches: int = 500  # minibatches of a validation
    # The result, best.pt, has the highest metric of all validations; false: of the last one. Of
    # few validation patches the highest is chance, and it says nothing of ranking.
    keep_best: bool = True
    save_every_minutes: float = 10.0  # between two writes of last.pt
    log_every: int = 20  # minibatches

    def __post_init__(self) -> None:
        require_one_of(self, "optimizer", ("sgd", "adamw"))
        require_one_of(self, "schedule", ("steps", "cosine"))
        require(self, "greater than 0", lambda v: v > 0, "batch_size", "accumulate",
                "batches_per_epoch", "epochs", "lr", "clip_gradient", "validate_every",
                "validation_batches", "log_every")  # fmt: skip
        require(self, "at least 0", lambda v: v >= 0, "weight_decay", "warmup_batches",
                "trunk_lr_factor", "save_every_minutes")  # fmt: skip
        require(self, "from 0 to below 1", lambda v: 0 <= v < 1, "momentum", "ema_decay")
        require(self, "epochs with factors > 0",
                lambda v: all(epoch >= 0 and f > 0 for epoch, f in v.items()),
                "lr_drops")  # fmt: skip


@dataclass(frozen=True)
class PretrainStageConfig:
    """A trunk learns to classify, before `--stage deepmask` (He et al., CVPR 2016, section 3.4).

    Crops are of class folders, or of the objects of `data.train` and `data.val`.
    """

    trunk: TrunkConfig = field(default_factory=lambda: TrunkConfig(weights=None))
    train_folder: str | None = None  # with a folder of images for each class; null: the objects
    val_folder: str | None = None  # the same, for validation
    crops: CropConfig = field(default_factory=CropConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            batch_size=256,
            batches_per_epoch=5000,
            epochs=90,
            lr=0.1,
            weight_decay=1e-4,
            lr_drops={30: 0.1, 60: 0.01},
        )
    )

    def __post_init__(self) -> None:
        if self.trunk.frozen_levels:
            raise ValueError(
                f"trunk.frozen_levels must be 0, got {self.trunk.frozen_levels}: all levels learn"
            )
        if self.optim.accumulate != 1:
            raise ValueError(
                f"optim.accumulate must be 1, got {self.optim.accumulate}: batch norm learns from "
                "whole minibatches; a smaller optim.batch_size needs less memory"
            )
        if (self.train_folder is None) != (self.val_folder is None):
            missing = "train_folder" if self.train_folder is None else "val_folder"
            raise ValueError(f"{missing} is not set: set it, too, or neither of the two folders")


@dataclass(frozen=True)
class DeepMaskStageConfig(DeepMaskConfig):
    """The network's sizes, and its training (NIPS 2015, section 3.3; the released code)."""

    target_size: int = 112  # G, the side of the targets that the coarse mask is resized to
    # The mask loss is summed over the batch of 32 and the score loss averaged: lambda = 1/32.
    mask_weight: float = 32.0
    score_weight: float = 1.0  # of the score loss
    sampling: PatchSamplingConfig = field(default_factory=PatchSamplingConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr_drops={50: 0.5, 120: 0.1}))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "greater than 0", lambda v: v > 0, "target_size")
        require(self, "at least 0", lambda v: v >= 0, "mask_weight", "score_weight")


@dataclass(frozen=True)
class SharpMaskStageConfig(SharpMaskConfig):
    """The refinement's sizes, and its training (ECCV 2016, section 3.3; the released code)."""

    mask_weight: float = 32.0  # as for DeepMask
    sampling: PatchSamplingConfig = field(
        default_factory=lambda: PatchSamplingConfig(mask_batch_prob=1.0)
    )
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            momentum=0.0, weight_decay=0.0, lr_drops={50: 0.5, 80: 0.1}
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "at least 0", lambda v: v >= 0, "mask_weight")


@dataclass(frozen=True)
class MultiPathNetStageConfig(MultiPathNetConfig):
    """The detector's arrangement, its images and its training (BMVC 2016, section 4)."""

    # Its own trunk. Weights may also be "deepmask": the trunk of the proposals' network.
    trunk: TrunkConfig = field(default_factory=lambda: TrunkConfig(name="vgg16", frozen_levels=1))
    align_corners: bool = False  # images are resized as the released code does
    # Corners of a box are its first and last pixel (released code), not its edges.
    inclusive_boxes: bool = False
    pixels: PixelConfig = field(default_factory=PixelConfig)
    box_weight: float = 1.0  # of the box regressor's loss
    frozen_epochs: int = 0  # phase 1: the whole trunk is frozen for so many epochs
    # The best checkpoint has the highest AP in so many validation images; 0: the best RoI accuracy.
    validation_images: int = 0
    sampling: RoiSamplingConfig = field(default_factory=RoiSamplingConfig)
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            batch_size=4,
            batches_per_epoch=100,
            epochs=3200,
            weight_decay=0.0,
            lr_drops={2800: 0.1},
            validate_every=100,
            validation_batches=100,
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "at least 0", lambda v: v >= 0, "box_weight", "frozen_epochs",
                "validation_images")  # fmt: skip
        if self.head == "layer4" and self.trunk.name not in WITH_LAST_STAGE:
            raise ValueError(
                f"head layer4 is the last stage of a ResNet or MobileNetV2, and {self.trunk.name} "
                "is none; use head fc"
            )
        if self.sampling.bg_iou_low >= self.iou_thresholds[0]:
            raise ValueError(
                f"sampling.bg_iou_low must be below the lowest of iou_thresholds, "
                f"{self.iou_thresholds[0]}, got {self.sampling.bg_iou_low}"
            )


@dataclass(frozen=True)
class InitConfig:
    """Initial weights and proposals; by default, the sibling runs of --output."""

    # Checkpoint of the same stage, to fine-tune: all its weights, and a new optimizer.
    weights: str | None = None
    deepmask: str | None = None  # checkpoint, for SharpMask
    proposer: str | None = None  # DeepMask or SharpMask checkpoint, to make proposals with
    train_proposals: str | None = None  # proposal store of the training images
    val_proposals: str | None = None  # proposal store of the validation images


def _scale_range(value: tuple[float, float, float]) -> bool:
    return -math.inf < value[0] <= value[1] < math.inf and value[2] > 0


class ProposalLimit:
    """How many of an image's proposals, the best, are made or taken."""

    num_proposals: int
    per_megapixel: float | None

    def limit(self, height: int, width: int) -> int:
        """The number for an image of this size."""
        return max(self.num_proposals, int((self.per_megapixel or 0) * height * width / 1e6))


@dataclass(frozen=True)
class ProposeConfig(ProposalLimit):
    """Full-image inference (ECCV 2016, section 3; released code)."""

    num_proposals: int = 1000  # the best of each image
    per_megapixel: float | None = None  # so many for each megapixel, if more than num_proposals
    # Smallest, largest, step. null or auto: those that reach the objects which the network was
    # trained on. The published [-2.5, 0.5, 0.5] stay where the checkpoint knows no objects, or
    # where they reach half of them with a patch of 160 or more.
    log2_scales: tuple[float, float, float] | None = None
    mask_threshold: float = 0.2  # on probabilities
    align_corners: bool = False  # images and masks are resized as the released code does
    amp: bool = True  # bfloat16 on CUDA, where --precision does not say otherwise
    # Mask IoU from which on the lower-scored of two proposals is dropped; null keeps all, as the
    # published AR does.
    nms: float | None = None
    # With nms: it scores lower instead, so that it comes later (linear Soft-NMS).
    soft_nms: bool = False
    # GB for maps of the network: what needs more than twice as much goes through it by bands of
    # rows, with the same results; null: .4 on a CPU, a quarter of what is free on CUDA.
    memory: float | None = None

    def __post_init__(self) -> None:
        words = ("num_proposals", "per_megapixel", "memory")
        require(self, "greater than 0 and at most a million", lambda v: 0 < v <= 1e6, *words)
        require(self, "MIN MAX STEP with MIN <= MAX and STEP > 0", _scale_range, "log2_scales")
        require(self, "between 0 and 1", lambda v: 0 < v < 1, "mask_threshold")
        require(self, "above 0 and at most 1", lambda v: 0 < v <= 1, "nms")
        if self.soft_nms and self.nms is None:
            raise ValueError("soft_nms needs nms, the mask IoU of near duplicates")


@dataclass(frozen=True)
class DetectConfig(ProposalLimit):
    """Detection in whole images (BMVC 2016, section 4)."""

    num_proposals: int = 400  # the best of each image
    per_megapixel: float | None = None  # so many for each megapixel, if more than num_proposals
    score_threshold: float = 0.001  # detections score higher
    nms: float = 0.3  # IoU of boxes of one class
    max_detections: int = 100  # per image
    box_voting_iou: float | None = None  # boxes of a class that overlap more vote for their place
    box_refinement_iters: int = 0  # how often detections are fed back as RoIs
    flip: bool = False  # mean with the mirrored image
    short_sides: tuple[int, ...] = ()  # image scales; empty: that of training
    chunk: int = 128  # RoIs at once: bounds memory

    def __post_init__(self) -> None:
        words = ("num_proposals", "per_megapixel", "max_detections", "chunk")
        require(self, "greater than 0", lambda v: v > 0, *words)
        require(self, "at least 0", lambda v: v >= 0, "score_threshold", "box_refinement_iters")
        require(self, "above 0 and at most 1", lambda v: 0 < v <= 1, "nms", "box_voting_iou")
        require(self, "sides > 0", lambda v: all(side > 0 for side in v), "short_sides")


@dataclass(frozen=True)
class MaskNetworkConfig:
    """The part of a recipe that a trained DeepMask or SharpMask and its proposals depend on."""

    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    deepmask: DeepMaskConfig = field(default_factory=DeepMaskConfig)
    sharpmask: SharpMaskConfig = field(default_factory=SharpMaskConfig)
    propose: ProposeConfig = field(default_factory=ProposeConfig)


@dataclass(frozen=True)
class Config:
    """A recipe: data, trunk, and a section for each step of the pipeline."""

    seed: int = 0  # of weights, samples and dropout
    stages: tuple[str, ...] = STAGES  # what tools/run_pipeline.py runs, in this order
    data: DataConfig = field(default_factory=DataConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    deepmask: DeepMaskStageConfig = field(default_factory=DeepMaskStageConfig)
    sharpmask: SharpMaskStageConfig = field(default_factory=SharpMaskStageConfig)
    init: InitConfig = field(default_factory=InitConfig)
    multipathnet: MultiPathNetStageConfig = field(default_factory=MultiPathNetStageConfig)
    pretrain: PretrainStageConfig = field(default_factory=PretrainStageConfig)
    propose: ProposeConfig = field(default_factory=ProposeConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)

    def __post_init__(self) -> None:
        require(self, "from 0 to 4294967295", lambda v: 0 <= v < 2**32, "seed")
        if self.trunk.name == "caffenet":  # it has no level at stride 2
            raise ValueError("trunk.name caffenet can only be a detector's trunk")
        for key, trunk in (("", self.trunk), ("multipathnet.", self.multipathnet.trunk)):
            if trunk.name in CIFAR_NETWORKS:
                raise ValueError(
                    f"{key}trunk.name {trunk.name} can only be pretrain.trunk.name: its features "
                    "are at strides 1, 2 and 4, and masks and boxes need them at up to 16"
                )
        words = f"a prefix of {', '.join(STAGES)}"
        require(self, words, lambda v: len(v) > 0 and tuple(v) == STAGES[: len(v)], "stages")
