"""Recipes: the settings of `pipeline/config.py` from YAML files, the command line and checkpoints.

A file holds only what it changes. Unknown keys, at any depth, and values of a wrong type are
errors.
"""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from datasets.files import atomic_path
from models.deepmask import AUTO_PATCH_SIZE
from pipeline.config import ROOT, Config

# Settings that got another name, or another place: files and checkpoints from before still load.
RENAMED = {
    "data.max_broken_share": "data.max_broken_fraction",
    "deepmask.sampling.mask_share": "deepmask.sampling.mask_batch_prob",
    "deepmask.sampling.score_scales": "deepmask.sampling.negative_log2_scales",
    "deepmask.sampling.score_log2_scales": "deepmask.sampling.negative_log2_scales",
    "deepmask.sampling.negative_octaves": "deepmask.sampling.negative_scale_distance",
    "deepmask.sampling.negative_log2_scale": "deepmask.sampling.negative_scale_distance",
    "deepmask.optim.optimiser": "deepmask.optim.optimizer",
    "sharpmask.sampling.mask_share": "sharpmask.sampling.mask_batch_prob",
    "sharpmask.sampling.score_scales": "sharpmask.sampling.negative_log2_scales",
    "sharpmask.sampling.score_log2_scales": "sharpmask.sampling.negative_log2_scales",
    "sharpmask.sampling.negative_octaves": "sharpmask.sampling.negative_scale_distance",
    "sharpmask.sampling.negative_log2_scale": "sharpmask.sampling.negative_scale_distance",
    "sharpmask.optim.optimiser": "sharpmask.optim.optimizer",
    "multipathnet.box_tower": "multipathnet.use_box_tower",
    "multipathnet.thresholds": "multipathnet.iou_thresholds",
    "multipathnet.draw_threshold": "multipathnet.sampling.draw_threshold",
    "multipathnet.normalise": "multipathnet.normalize",
    "multipathnet.scale": "multipathnet.norm_scale",
    "multipathnet.roi_bins": "multipathnet.roi_pool",
    "multipathnet.resampling": "multipathnet.align_corners",
    "multipathnet.sampling.foreground_share": "multipathnet.sampling.fg_fraction",
    "multipathnet.sampling.background_low": "multipathnet.sampling.bg_iou_low",
    "multipathnet.sampling.proposal_scales": "multipathnet.sampling.proposal_log2_scales",
    "multipathnet.optim.optimiser": "multipathnet.optim.optimizer",
    "propose.scales": "propose.log2_scales",
    "propose.resampling": "propose.align_corners",
    "detect.vote": "detect.box_voting_iou",
    "detect.localisations": "detect.box_refinement_iters",
}
# Settings that may be the word auto, and what stands for it in the dataclasses.
AUTO = "auto"
AUTO_VALUES = {
    "deepmask.patch_size": AUTO_PATCH_SIZE,
    "propose.log2_scales": None,
    "multipathnet.sampling.proposal_log2_scales": None,
}
# A recipe has a few kilobytes, in four levels; more is no recipe, and can take hours to read.
MAX_BYTES, MAX_DEPTH = 1 << 18, 10
NOT_YAML = (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError)
RENAMED_VALUES = {"area": False, "corners": True, "overlapping": "caffe", "rounded": "lua"}


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Keys and values in a message may have line breaks."""
    try:
        yield
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from error


@_one_line_errors()
def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """A recipe: the defaults, changed by a YAML file, changed by overrides (`seed=1`).

    The file is below the working directory or the project's root.

    Raises:
        ValueError or FileNotFoundError: no such file, or a key or value that cannot be.
    """
    path = Path(path)
    if not path.is_file() and not path.is_absolute() and (ROOT / path).is_file():
        path = ROOT / path
    if not path.is_file():
        raise FileNotFoundError(
            f"config {path} does not exist; recipes that come with the project are in configs/"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"config {path} is not YAML of a recipe: more than {MAX_BYTES:,} bytes")
    try:
        layer = OmegaConf.load(path)
    except NOT_YAML as error:
        raise ValueError(f"config {path} is not YAML: {_one_line(error)}") from error
    if not isinstance(layer, DictConfig):
        raise ValueError(f"config {path} must be a mapping of keys to values")
    layers: dict[str, Any] = {f"config {path}": OmegaConf.to_container(layer)}
    for override in overrides:
        if "=" not in override:
            raise ValueError(
                f"--set {override}: write key=value, for example deepmask.optim.lr=1e-4"
            )
        try:
            layer = OmegaConf.from_dotlist([override])
            layers[f"--set {override}"] = OmegaConf.to_container(layer)
        except NOT_YAML as error:
            raise ValueError(f"--set {override}: {_one_line(error)}") from error
    return _resolve(layers, Config)


@_one_line_errors()
def config_from_dict(values: dict, *, source: str, schema: type = Config) -> Any:
    """The config that a checkpoint carries, or the part of it that a smaller schema has.

    `source` is named if it is no `Config`.
    """
    return _resolve({source: values}, schema)


def config_to_dict(config: Config) -> dict:
    """Plain dicts, lists, numbers and strings, for checkpoints and config.yaml."""
    container: Any = OmegaConf.to_container(OmegaConf.structured(config))
    values = {str(key): _plain(value) for key, value in container.items()}
    for key, auto in AUTO_VALUES.items():
        section, name = _section_with(values, key), key.split(".")[-1]
        if section and section[name] == auto:
            section[name] = AUTO
    return values


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted key."""
    items: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        items |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return items


def changed_settings(old: Config, new: Config) -> list[str]:
    """The settings that differ, in words."""
    was, now = flatten(config_to_dict(old)), flatten(config_to_dict(new))
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return [f"{name} {was.get(name)} -> {now.get(name)}" for name in names]


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML."""
    with atomic_path(path) as temporary:
        OmegaConf.save(OmegaConf.create(config_to_dict(config)), temporary)


def find_path(path: str, *, key: str) -> Path:
    """A path of a config: below the working directory, else below the project's root."""
    if not path:
        raise ValueError(f"{key} is empty; give a path")
    for candidate in (Path(path), ROOT / path):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{key}: {path} does not exist, neither here nor below {ROOT}")


def settings_of(schema: type, config: Any) -> dict[str, Any]:
    """The fields of a dataclass, by name, from a config that has them too."""
    return {f.name: getattr(config, f.name) for f in fields(schema)}


def _plain(value: Any) -> Any:
    """Lists for tuples, which checkpoints and YAML do not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@cache
def _defaults(schema: type) -> Any:
    return OmegaConf.structured(schema)  # copying it takes a fifth of the time


def _resolve(layers: dict[str, Any], schema: type) -> Any:
    """The defaults, changed by one layer after the other, each by the name of its source."""
    merged = deepcopy(_defaults(schema))
    source = ""
    try:
        for source, layer in layers.items():
            layers[source] = _with_new_names(_plain_copy(layer, source))
            _read_auto(layers[source], source)
            _check_keys(layers[source], Config, prefix="", source=source)
            _refuse_other_words(layers[source], source)
            part = _part_of(layers[source], schema)
            _empty_mappings(merged, part)
            merged = OmegaConf.unsafe_merge(merged, part)
    except OmegaConfBaseException as error:
        place = f"{error.full_key}: " if error.full_key else ""
        raise ValueError(f"{source}: {place}{_one_line(error)}") from error
    try:
        return _instantiate(schema, merged)
    except ValueError as error:  # it starts with the key
        key = str(error).split(" ")[0]
        named = [source for source, layer in layers.items() if _section_with(layer, key)]
        raise ValueError(f"{[*layers, *named][-1]}: {error}") from None


def _plain_copy(values: Any, source: str) -> dict:
    """A copy of what a file or checkpoint holds, whoever wrote it.

    An interpolation, such as `${oc.env:NAME}`, would be resolved against the environment or run a
    resolver, so there are none.

    Raises:
        ValueError: something that no recipe has.
    """

    def copy(value: Any, key: str, depth: int) -> Any:
        if isinstance(value, str) and "${" in value or "${" in key:
            raise ValueError(
                f"{source}: {cut(key)}: interpolations are not resolved, write the value itself; "
                f"got {cut(str(value))}"
            )
        if depth > MAX_DEPTH:
            raise ValueError(f"{source}: {cut(key)} is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, Mapping):
            return {
                name if isinstance(name, int) else str(name): copy(
                    item, f"{key}.{name}".lstrip("."), depth + 1
                )
                for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [copy(item, f"{key}[{i}]", depth + 1) for i, item in enumerate(value)]
        if value is not None and not isinstance(value, str | int | float):
            raise ValueError(f"{source}: {cut(key)} is a {type(value).__name__}")
        if isinstance(value, int) and value.bit_length() > 64:  # Python may refuse to print it
            raise ValueError(f"{source}: {cut(key)} is a number of more than 64 bits")
        return value

    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: its config is a {type(values).__name__}, not a mapping")
    return copy(values, "", 0)


def cut(text: str, limit: int = 60) -> str:
    """The text, or its start if it is long; for messages."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _part_of(values: dict, schema: type) -> dict:
    """The values that a schema has fields for."""
    part = {}
    for f in fields(schema):
        if f.name in values:
            value, section = values[f.name], _dataclass_of(f.type)
            part[f.name] = _part_of(value, section) if section and value is not None else value
    return part


def _empty_mappings(config: DictConfig, part: dict) -> None:
    """Empties the mappings that a layer has, such as `lr_drops`: it replaces them, as any value."""
    for name, value in part.items():
        node = config.get(name)
        if isinstance(value, dict) and isinstance(node, DictConfig):
            if OmegaConf.get_type(node) is dict:
                with read_write(config):
                    config[name] = {}
            else:
                _empty_mappings(node, value)


def _with_new_names(values: Any) -> Any:
    """The same with the settings of `RENAMED` under their new names."""
    for old, new in RENAMED.items():
        if (section := _section_with(values, old)) is None:
            continue
        name = old.split(".")[-1]
        value = section.pop(name)
        if isinstance(value, str):
            value = RENAMED_VALUES.get(value, value)
        *sections, name = new.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return values


def _section_with(values: Any, key: str) -> dict | None:
    """The section that holds a dotted key, if it is there."""
    *sections, name = key.split(".")
    for part in sections:
        values = values.get(part) if isinstance(values, dict) else None
    return values if isinstance(values, dict) and name in values else None


def _read_auto(values: Any, source: str) -> None:
    """Replaces the word auto by what stands for it; other words are errors."""
    for key, auto in AUTO_VALUES.items():
        if (section := _section_with(values, key)) is None:
            continue
        name = key.split(".")[-1]
        value, is_scales = section[name], auto is None
        if value == AUTO:
            section[name] = auto
        elif isinstance(value, str) if is_scales else type(value) is not int or value <= 0:
            words = "MIN MAX STEP" if is_scales else "a number of pixels"
            raise ValueError(f"{source}: {key} must be {words} or auto, got {cut(repr(value))}")


def _refuse_other_words(values: Any, source: str) -> None:
    """Names of categories that YAML reads as no text, such as no and 1e3, would be others."""
    section = _section_with(values, "data.categories") or {}
    names = section.get("categories")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, bool | float):
            raise ValueError(
                f"{source}: data.categories: YAML reads a name as {name}; write it in quotes"
            )


def _instantiate(schema: type, node: Mapping, *, prefix: str = "") -> Any:
    """The dataclass of a node; an error of its own checks starts with the dotted key."""
    values = {}
    for f in fields(schema):
        section, value = _dataclass_of(f.type), node[f.name]
        if section and value is not None:
            value = _instantiate(section, value, prefix=f"{prefix}{f.name}.")
        elif OmegaConf.is_config(value):
            value = OmegaConf.to_object(value)
        values[f.name] = tuple(value) if isinstance(value, list) else value
    try:
        return schema(**values)
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None


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
        annotation: Any = known[key].type
        section = _dataclass_of(annotation)
        if section and isinstance(value, dict):
            _check_keys(value, section, prefix=f"{prefix}{key}.", source=source)
        elif section and not isinstance(value, annotation):  # None where it is allowed
            raise ValueError(
                f"{source}: {prefix}{key} must be a mapping of keys to values, got {value!r}"
            )
        container = next(a for a in _alternatives(annotation) if a is not NoneType)
        if value is None and container is not annotation:
            continue
        if get_origin(container) is dict and not _is_mapping_of_numbers(value):
            raise ValueError(
                f"{source}: {prefix}{key} must be a mapping of numbers to numbers, got {value!r}"
            )
        if get_origin(container) is not tuple:
            continue
        types = get_args(container)
        any_length, is_list = Ellipsis in types, isinstance(value, list | tuple)
        if not is_list or not any_length and len(value) != len(types):
            words = "a list" if any_length else f"a list of {len(types)} values"
            raise ValueError(f"{source}: {prefix}{key} must be {words}, got {value!r}")
        if any(isinstance(item, list | tuple | dict) for item in value):
            raise ValueError(f"{source}: {prefix}{key} must be a list of plain values")


def _is_mapping_of_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(number, int | float) for pair in value.items() for number in pair
    )


def _dataclass_of(annotation: Any) -> Any:
    return next((c for c in _alternatives(annotation) if is_dataclass(c)), None)


def _alternatives(annotation: Any) -> tuple:
    """The types that a union joins; of another annotation, itself."""
    return annotation.__args__ if isinstance(annotation, UnionType) else (annotation,)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    ")[0].split())
