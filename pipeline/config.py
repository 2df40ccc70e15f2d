"""The configuration: one YAML file is a recipe for the whole pipeline.

The dataclasses below are the schema. Their defaults are the published recipes (ECCV 2016 with
ResNet-50; the released code where it differs from the paper), so a YAML file holds only what it
changes. Unknown keys, at any depth, and values of a wrong type are errors.
"""

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datasets.files import atomic_path
from datasets.resize import RESAMPLINGS
from models.multipathnet import ROI_BINS
from models.sharpmask import ARRANGEMENTS, HORIZONTAL_WIDTHS, WIDTHS
from models.trunk import PADDINGS, STEM_WIDTH

STAGES = ("deepmask", "sharpmask", "multipathnet")  # in the order of the pipeline
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class SplitConfig:
    """A COCO-format split.

    Relative paths are looked for below the working directory, then below the project's root.
    """

    annotations: str = ""
    images: str = ""


@dataclass
class ShapesConfig:
    """The synthetic dataset, written where `directory` says when it is not there yet."""

    directory: str = "runs/shapes"
    train_images: int = 1200
    val_images: int = 200
    seed: int = 0


@dataclass
class DataConfig:
    train: SplitConfig = field(default_factory=SplitConfig)
    val: SplitConfig = field(default_factory=SplitConfig)
    shapes: ShapesConfig | None = None  # when set, train and val are made by it
    # Data-loading processes for each training process; 0 loads in the training process itself.
    workers: int = 4
    max_broken_share: float = 0.01  # of the training images; more unreadable ones stop the run


@dataclass
class TrunkConfig:
    name: str = "resnet50"  # models/trunk.py lists them
    weights: str | None = "imagenet"  # "imagenet", the path of a local state dict, or null
    width: int = STEM_WIDTH  # of a ResNet's first convolution; the others are in proportion
    frozen_levels: int = 0  # how many of the four levels stay as they are
    padding: str = "symmetric"  # symmetric | zero (detectors of the released code)
    ceil_pooling: bool = False  # pools round sizes up, as Caffe's networks do


@dataclass
class SamplingConfig:
    """Numbers of patch sampling (released code, DataSampler)."""

    patches_per_image: int = 1  # patches of a minibatch that share one decoded image
    mask_share: float = 0.5  # probability that a minibatch is of mask patches
    jitter_shift: float = 16.0  # pixels of the patch
    jitter_scale: float = 0.25  # octaves
    min_area: float = 100.0  # pixels of the original
    min_side: float = 5.0
    score_scales: tuple[float, float] = (-3.0, 2.0)  # octaves
    negative_distance: float = 48.0  # pixels of the resized image
    negative_octaves: float = 2.5
    flip: bool = True


@dataclass
class OptimConfig:
    """How a stage is optimized. An epoch is a number of minibatches, as in the released code."""

    batch_size: int = 32  # of the whole step, over all processes
    batches_per_epoch: int = 4000
    epochs: int = 300
    optimizer: str = "sgd"  # sgd | adamw
    momentum: float = 0.9  # sgd only
    weight_decay: float = 5e-4
    lr: float = 1e-3
    lr_drops: dict[int, float] = field(default_factory=dict)  # epoch: factor on lr from there on
    schedule: str = "steps"  # steps (lr_drops) | cosine (to zero at the end)
    warmup_batches: int = 0  # linear from zero
    trunk_lr_factor: float = 1.0  # on the learning rate of the trunk
    clip_gradient: float | None = None  # largest norm
    amp: bool = True  # bfloat16 autocast, on CUDA only
    validate_every: int = 2  # epochs
    validation_batches: int = 500
    save_every_minutes: float = 10.0
    log_every: int = 20  # minibatches


@dataclass
class DeepMaskConfig:
    patch_size: int = 160  # P
    context: int = 32  # C
    mask_size: int = 56  # M
    target_size: int = 112  # G
    reduction: int = 128
    embedding: int = 512
    score_hidden: int = 1024
    dropout: float = 0.5
    # The mask loss is summed over the batch of 32 and the score loss averaged: lambda = 1/32
    # (NIPS 2015, section 3.3).
    mask_weight: float = 32.0
    score_weight: float = 1.0
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr_drops={50: 0.5, 120: 0.1}))


# What two DeepMasks must agree in for the weights of one to fit the other.
DEEPMASK_SIZES = (
    "patch_size", "context", "mask_size", "reduction", "embedding", "score_hidden"
)  # fmt: skip


@dataclass
class SharpMaskConfig:
    """The refinement; patch and context are DeepMask's."""

    km: int = 32  # channels of the mask encoding at the first module
    ks: int = 32  # channels of the skip features there
    widths: str = "halving"  # of km and ks over the modules: halving | constant
    merge: str = "sum"  # sum (released) | concat (paper): the same function
    num_modules: int = 4
    horizontal_widths: tuple[int, int, int, int] = HORIZONTAL_WIDTHS  # first layer of each H_i
    mask_weight: float = 32.0  # as for DeepMask
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(mask_share=1.0))
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            momentum=0.0, weight_decay=0.0, lr_drops={50: 0.5, 80: 0.1}
        )
    )


@dataclass
class RoiSamplingConfig:
    """Numbers of RoI sampling (BMVC 2016, section 4; Fast R-CNN, section 2.3)."""

    rois_per_image: int = 64
    foreground_share: float = 0.25
    background_low: float = 0.1  # IoU
    crowd_overlap: float = 0.7
    max_proposals: int = 1000
    # How proposals are made where no store of them is given; null: the scales of `propose`.
    proposal_scales: tuple[float, float, float] | None = None
    refine_proposals: bool = True
    # Only the first so many training images: making proposals takes longer than training on them.
    max_images: int | None = None
    short_side: int = 800  # pixels of the resized image
    long_side: int = 1000
    flip: bool = True


@dataclass
class PixelConfig:
    """How images come to the network: RGB in [0, 1] less the mean, by the deviation."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    bgr: bool = False  # the channels are then turned around, as Caffe's networks take them


@dataclass
class MultiPathNetConfig:
    """The detector; Fast R-CNN is foveal, skip and box_tower false and thresholds [0.5]."""

    # Its own trunk. Weights may also be "deepmask": the trunk of the proposals' network.
    trunk: TrunkConfig = field(default_factory=lambda: TrunkConfig(name="vgg16", frozen_levels=1))
    head: str = "fc"  # fc: fc6 and fc7 in every tower | layer4: a ResNet's last stage
    foveal: bool = True  # four regions around a proposal, not one
    skip: bool = True  # conv3 and conv4 beside conv5
    box_tower: bool = True  # a tower of its own for the box regressor
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.55, 0.6, 0.65, 0.7, 0.75])
    draw_threshold: bool = False  # one threshold a minibatch (released code) instead of all
    normalize: bool = True  # pooled blocks to one L2 norm; else by fixed factors
    scale: float = 1000.0  # that norm: for blocks of 512 x 7 x 7, numbers of about 6
    pooled_size: int = 7
    roi_bins: str = "overlapping"  # overlapping (Fast R-CNN) | rounded (released code)
    resampling: str = "area"  # of the images: area | corners (released code), see resize_sides
    # Corners of a box are its first and last pixel (released code), not its edges.
    inclusive_boxes: bool = False
    pixels: PixelConfig = field(default_factory=PixelConfig)
    width: int = 512  # channels of a tower's block
    features: int = 4096  # of fc6 and fc7
    dropout: float = 0.5
    box_weight: float = 1.0
    frozen_epochs: int = 0  # phase 1: the whole trunk is frozen for so many epochs
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


@dataclass
class InitConfig:
    """What a stage starts from; without, the run directories beside the output are taken."""

    # Checkpoint of the same stage, to fine-tune: all its weights, and a new optimizer.
    weights: str | None = None
    deepmask: str | None = None  # checkpoint, for SharpMask
    proposer: str | None = None  # DeepMask or SharpMask checkpoint, to make proposals with
    train_proposals: str | None = None  # proposal stores
    val_proposals: str | None = None


@dataclass
class DetectConfig:
    """Detection in whole images (BMVC 2016, section 4)."""

    num_proposals: int = 400  # the best of each image
    score_threshold: float = 0.001
    nms: float = 0.3  # IoU of boxes of one class
    max_detections: int = 100  # per image
    vote: float | None = None  # IoU from which on boxes of a class vote for each other's place
    localizations: int = 0  # how often detections are fed back as RoIs
    flip: bool = False  # mean with the mirrored image
    short_sides: list[int] = field(default_factory=list)  # image scales; empty: that of training
    chunk: int = 128  # RoIs at once: bounds memory


@dataclass
class ProposeConfig:
    """Full-image inference (ECCV 2016, section 3; released code)."""

    num_proposals: int = 1000
    scales: tuple[float, float, float] = (-2.5, 0.5, 0.5)  # smallest, largest, step, in octaves
    mask_threshold: float = 0.2  # on probabilities
    resampling: str = "area"  # of images and masks: area | corners (released code), see Proposer
    amp: bool = True  # bfloat16 autocast, on CUDA only
    # Mask IoU from which on the lower-scored of two proposals is dropped; null keeps all, as the
    # published AR does.
    nms: float | None = None


@dataclass
class Config:
    seed: int = 0
    # What tools/run_pipeline.py runs, in this order.
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    data: DataConfig = field(default_factory=DataConfig)
    trunk: TrunkConfig = field(default_factory=TrunkConfig)
    deepmask: DeepMaskConfig = field(default_factory=DeepMaskConfig)
    sharpmask: SharpMaskConfig = field(default_factory=SharpMaskConfig)
    init: InitConfig = field(default_factory=InitConfig)
    multipathnet: MultiPathNetConfig = field(default_factory=MultiPathNetConfig)
    propose: ProposeConfig = field(default_factory=ProposeConfig)
    detect: DetectConfig = field(default_factory=DetectConfig)


CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("steps", "cosine"),
    "widths": WIDTHS,
    "merge": ARRANGEMENTS,
    "head": ("fc", "layer4"),
    "padding": PADDINGS,
    "roi_bins": ROI_BINS,
    "resampling": RESAMPLINGS,
}
# What must hold of a value, in words and as a test, and of which keys. Checked when a config is
# read: a mistake in a later stage's section shows before the first stage has been trained for days.
CONDITIONS = (
    ("greater than 0", lambda v: v > 0,
     ("batch_size", "batches_per_epoch", "epochs", "patches_per_image", "lr", "clip_gradient",
      "validate_every", "validation_batches", "log_every", "num_proposals", "patch_size",
      "mask_size", "target_size", "reduction", "embedding", "score_hidden", "train_images",
      "val_images", "km", "ks", "rois_per_image", "max_proposals", "max_images",
      "short_side", "long_side", "pooled_size", "width", "features", "max_detections", "chunk")),
    ("at least 0", lambda v: v >= 0,
     ("workers", "weight_decay", "warmup_batches", "trunk_lr_factor", "save_every_minutes",
      "context", "mask_weight", "score_weight", "jitter_shift", "jitter_scale", "min_area",
      "min_side", "scale", "negative_distance", "negative_octaves", "box_weight", "frozen_epochs",
      "score_threshold", "localizations")),
    ("from 0 to 1", lambda v: 0 <= v <= 1, ("mask_share", "max_broken_share", "foreground_share",
      "background_low", "crowd_overlap")),
    ("from 0 to below 1", lambda v: 0 <= v < 1, ("dropout", "momentum")),
    ("between 0 and 1", lambda v: 0 < v < 1, ("mask_threshold",)),
    ("above 0 and at most 1", lambda v: 0 < v <= 1, ("nms", "vote")),
    ("ascending IoUs between 0 and 1",
     lambda v: len(v) > 0 and all(0 < a < 1 for a in v) and list(v) == sorted(set(v)),
     ("thresholds",)),
    (f"a row of {', '.join(STAGES)} from the first on",
     lambda v: len(v) > 0 and tuple(v) == STAGES[: len(v)], ("stages",)),
    ("sides > 0", lambda v: all(side > 0 for side in v), ("short_sides",)),
    ("deviations > 0", lambda v: all(deviation > 0 for deviation in v), ("std",)),
    ("widths > 0", lambda v: all(width > 0 for width in v), ("horizontal_widths",)),
    ("from 0 to 4294967295", lambda v: 0 <= v < 2**32, ("seed",)),
    ("from 0 to 4", lambda v: 0 <= v <= 4, ("frozen_levels",)),
    ("from 1 to 4", lambda v: 1 <= v <= 4, ("num_modules",)),
    ("MIN MAX with MIN <= MAX", lambda v: -math.inf < v[0] <= v[1] < math.inf, ("score_scales",)),
    ("MIN MAX STEP with MIN <= MAX and STEP > 0",
     lambda v: -math.inf < v[0] <= v[1] < math.inf and v[2] > 0, ("scales", "proposal_scales")),
    ("epochs with factors > 0",
     lambda v: all(k >= 0 and factor > 0 for k, factor in v.items()), ("lr_drops",)),
)  # fmt: skip


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """A recipe: the defaults, changed by a YAML file, changed by dotted overrides.

    Args:
        overrides: such as `deepmask.optim.lr=1e-4`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key or value that the schema does not have, in one line.
    """
    path = Path(path)
    if not path.is_file() and not path.is_absolute() and (ROOT / path).is_file():
        path = ROOT / path
    if not path.is_file():
        raise FileNotFoundError(
            f"config {path} does not exist; recipes that come with the project are in configs/"
        )
    try:
        layer = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"config {path} is not YAML: {_one_line(error)}") from error
    if not isinstance(layer, DictConfig):
        raise ValueError(f"config {path} must be a mapping of keys to values")
    config = _merge(OmegaConf.structured(Config), layer, source=f"config {path}")
    for override in overrides:
        if "=" not in override:
            raise ValueError(
                f"--set {override}: write key=value, for example deepmask.optim.lr=1e-4"
            )
        try:
            layer = OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"--set {override}: {_one_line(error)}") from error
        config = _merge(config, layer, source=f"--set {override}")
    return OmegaConf.to_object(config)


def config_from_dict(values: dict, *, source: str) -> Config:
    """The config that a checkpoint carries.

    Raises:
        ValueError: it is of another schema; names `source`.
    """
    return OmegaConf.to_object(
        _merge(OmegaConf.structured(Config), OmegaConf.create(values), source=source)
    )


def config_to_dict(config: Config) -> dict:
    """Plain dicts, lists, numbers and strings, for checkpoints and config.yaml."""
    return OmegaConf.to_container(OmegaConf.structured(config))


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML."""
    with atomic_path(path) as temporary:
        OmegaConf.save(OmegaConf.structured(config), temporary)


def find_path(path: str, *, key: str) -> Path:
    """A path of a config: as it is below the working directory, else below the project's root.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    if not path:
        raise ValueError(f"{key} is empty; give a path")
    for candidate in (Path(path), ROOT / path):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{key}: {path} does not exist, neither here nor below {ROOT}")


def _merge(config: DictConfig, layer: Any, *, source: str) -> DictConfig:
    try:
        _check_keys(OmegaConf.to_container(layer), Config, prefix="", source=source)
        config = OmegaConf.merge(config, layer)
        _check_values(config, prefix="", source=source)
    except OmegaConfBaseException as error:
        place = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{source}: {place}{_one_line(error)}") from error
    return config


def _check_keys(values: Any, schema: type, *, prefix: str, source: str) -> None:
    """An unknown key is an error that says what was probably meant.

    So is a section or list of a wrong form.
    """
    known = {f.name: f for f in fields(schema)}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = (
                f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
            )
            raise ValueError(f"{source}: unknown key {prefix}{key}; {hint}")
        annotation = known[key].type
        section = _dataclass_of(annotation)
        if section and isinstance(value, dict):
            _check_keys(value, section, prefix=f"{prefix}{key}.", source=source)
        elif section and not isinstance(value, annotation):  # None where it is allowed
            raise ValueError(
                f"{source}: {prefix}{key} must be a mapping of keys to values, got {value!r}"
            )
        length = len(get_args(annotation))
        if get_origin(annotation) is tuple and not (
            isinstance(value, list | tuple) and len(value) == length
        ):
            raise ValueError(
                f"{source}: {prefix}{key} must be a list of {length} values, got {value!r}"
            )


def _dataclass_of(annotation: Any) -> type | None:
    candidates = getattr(annotation, "__args__", (annotation,))
    return next((c for c in candidates if is_dataclass(c)), None)


def _check_values(node: DictConfig, *, prefix: str, source: str) -> None:
    for key in node:
        value = node[key]
        if isinstance(value, DictConfig):
            _check_values(value, prefix=f"{prefix}{key}.", source=source)
        else:
            check_value(key, value, place=f"{source}: {prefix}{key}")


def check_value(key: str, value: Any, *, place: str) -> None:
    """Whether a value may stand for a key of that name, in whatever section.

    Args:
        place: where it stands, for the error.

    Raises:
        ValueError: it may not; says what may.
    """
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{place} must be one of {', '.join(CHOICES[key])}, got {value!r}")
    for words, holds, keys in CONDITIONS:
        if key in keys and value is not None and not holds(value):
            raise ValueError(f"{place} must be {words}, got {value!r}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    ")[0].split())
