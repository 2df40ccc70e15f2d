"""Proposals and detections of an image, written as a store of Parquet shards and as COCO results.

A store is a directory. Every shard is written whole, never over another one, and says in its
metadata which images it covers. So an interrupted run continues with the images that no shard
covers, and several processes can write into one store.

A COCO result is {"image_id", "category_id", "score", "bbox" xywh, "segmentation" compressed RLE}.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pycocotools.mask as coco_mask

from datasets.files import atomic_path, write_json
from datasets.images import APPLY
from datasets.proposal_boxes import Rows

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("score", pa.float32()),
        ("logit", pa.float32()),  # scores near 1 are equal in float32; older stores have none
        ("box", pa.list_(pa.float32(), 4)),
        ("counts", pa.binary()),  # compressed RLE
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
SETTINGS = "settings.json"
# Of a shard's metadata, as JSON: its images, also those without a proposal; `num_cut_off` by id.
IMAGES_KEY, CUT_OFF_KEY = b"images", b"cut_off"
MAX_ROWS = 20_000  # of a shard
BOX_DECIMALS = 3  # of detections; COCO's own boxes have two
# Digits of a written score, after its zeros or nines. Detections are ranked over all images.
SCORE_DIGITS, DETECTION_SCORE_DIGITS, MAX_SCORE_DIGITS = 4, 8, 10


@dataclass
class Proposals:
    """Class-agnostic masks of one image, best first.

    Attributes:
        image_id, file_name, height, width: the image.
        logits: (N,) float of the scores. Whoever ranks takes these: scores of surely known objects
            are equal (1 in float32 from 17 on, in float64 from 37 on), their logits are not.
        boxes: (N, 4) float32 xyxy in pixels of the image.
        rles: N compressed RLE strings of the masks.
        num_cut_off: cells that score above .5 and that the limit of proposals left out.
        georeference: where the image lies, see `datasets.large_images.read_georeference`. Stores
            keep it with the image; what is read from them is without.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    logits: np.ndarray
    boxes: np.ndarray
    rles: list[bytes]
    num_cut_off: int = field(default=0, kw_only=True)
    georeference: dict | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def scores(self) -> np.ndarray:
        """(N,) float64 in [0, 1], the sigmoid of the logits."""
        return np.exp(-np.logaddexp(0, -self.logits.astype(np.float64)))

    def rle(self, index: int) -> dict:
        """A mask as COCO's {"size", "counts"}."""
        return {"size": [self.height, self.width], "counts": self.rles[index]}

    def mask(self, index: int) -> np.ndarray:
        """A mask (height, width) bool."""
        return coco_mask.decode(self.rle(index)).astype(bool)


@dataclass
class Detections(Proposals):
    """The same with a category each; `rles` is empty if they have no masks.

    Attributes:
        labels: (N,) int64 category ids as the annotations have them.
    """

    labels: np.ndarray


def logits_of(scores: np.ndarray) -> np.ndarray:
    """(N,) float64 logits of scores in [0, 1]; if one lies outside, they are taken for logits."""
    scores = scores.astype(np.float64)
    if ((scores < 0) | (scores > 1)).any():
        return scores
    with np.errstate(divide="ignore"):  # of 0 and 1
        return np.log(scores) - np.log1p(-scores)


def results_of(found: Proposals) -> list[dict]:
    """COCO results of an image; the category of proposals is 1."""
    labels, digits, xywh = [1] * len(found), SCORE_DIGITS, found.boxes.copy()
    if isinstance(found, Detections):
        labels, digits = found.labels.tolist(), DETECTION_SCORE_DIGITS
        xywh = xywh.astype(np.float64)
    xywh[:, 2:] -= xywh[:, :2]
    if isinstance(found, Detections):
        xywh = xywh.round(BOX_DECIMALS)
    scores = round_scores(found, digits)
    results: list[dict] = [
        {"image_id": found.image_id, "category_id": label, "score": score, "bbox": box}
        for label, score, box in zip(labels, scores, xywh.tolist(), strict=True)
    ]
    size = [found.height, found.width]
    for result, rle in zip(results, found.rles, strict=bool(found.rles)):
        result["segmentation"] = {"size": size, "counts": rle.decode("ascii")}
    return results


def round_scores(found: Proposals, digits: int) -> list[float]:
    """The scores with as few digits, but at least these, as keep different logits different.

    Digits are counted after leading zeros, or nines: with 3 of them, 0.0001234 and 0.9998766 are
    0.000123 and 0.999877.
    """
    logits, first = np.unique(found.logits, return_index=True)  # ascending
    scores = found.scores[first].tolist()
    zeros = (np.abs(logits).clip(max=700) / math.log(10)).astype(int).tolist()
    for count in range(digits, MAX_SCORE_DIGITS + 1):
        rounded = np.array([round(s, count + z) for s, z in zip(scores, zeros, strict=True)])
        if (np.diff(rounded) > 0).all():
            break
    else:
        # Too close, or too near 1, for a float64: each becomes the next one below. As integers,
        # the bits of positive numbers are in the same order, one apart.
        falling = rounded.astype(np.float64).view(np.int64)[::-1]
        steps = np.arange(len(falling))
        falling = np.minimum.accumulate(falling + steps) - steps
        rounded = falling[::-1].clip(min=0).view(np.float64)
    return rounded[np.searchsorted(logits, found.logits)].tolist()


def write_results(path: str | Path, results: Iterable[dict]) -> int:
    """Writes a COCO results file, one result a line, and returns how many there are."""
    count = 0
    with atomic_path(path) as temporary, temporary.open("w") as file:
        file.write("[")
        for result in results:
            text = json.dumps(result, separators=(",", ":"), allow_nan=False)
            file.write((",\n" if count else "\n") + text)
            count += 1
        file.write("\n]\n")
    return count


class ResumableDirectory:
    """A directory of results that an interrupted run continues, and the settings of that run."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.path = self.directory / SETTINGS

    def open_for(self, settings: dict, *, discard: bool = False) -> None:
        """Makes the directory, or makes sure that what it holds was made with the same settings.

        Settings are of JSON's types. What was made with other ones is deleted with `discard`.

        Raises:
            ValueError: other settings, each of them named.
        """
        changed = self.changed_settings(settings)
        if changed and not discard:
            raise ValueError(
                f"{self.directory} holds results of other settings ({', '.join(changed)}); "
                "choose another --output or delete it"
            )
        if changed:
            shutil.rmtree(self.directory)
        if not self.path.exists():
            write_json(self.path, settings)

    def changed_settings(self, settings: dict) -> list[str]:
        """The settings that differ from those of the directory; none if it is new."""
        if not self.path.exists():
            return []
        found, settings = self.settings(), json.loads(json.dumps(settings))  # tuples become lists
        return [f"{k} {found.get(k)!r} -> {v!r}" for k, v in settings.items() if found.get(k) != v]

    def settings(self) -> dict:
        """What the results were made with; empty if that is not known.

        Raises:
            ValueError: the directory has a settings file of another kind.
        """
        if not self.path.exists():
            return {}
        try:
            return dict(json.loads(self.path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(
                f"{self.path} does not hold settings of ours; choose another --output"
            ) from None


class ProposalStore(ResumableDirectory):
    """Writes and reads a store of proposals."""

    def open_for(self, settings: dict, *, discard: bool = False) -> None:
        """As `ResumableDirectory.open_for`; shards of unknown settings are refused."""
        if self.shards() and not self.path.exists():
            raise ValueError(f"{self.directory} holds proposals but no {SETTINGS}; delete it")
        super().open_for(settings, discard=discard)

    def shards(self) -> list[Path]:
        """The shards, by name."""
        return sorted(self.directory.glob("proposals-*.parquet"))

    def exif(self) -> str:
        """How the images were read, see `datasets.images.read_image`."""
        return self.settings().get("exif") or APPLY

    def require_shards(self) -> list[Path]:
        """The shards; ValueError if there is none, as in a directory that is no store."""
        if not (shards := self.shards()):
            raise ValueError(f"{self.directory} is no proposal store: no proposals-*.parquet in it")
        return shards

    def images(self) -> dict[int, dict]:
        """The images that are done: id to {"id", "file_name", "height", "width"}.

        GeoTIFFs have "georeference" as well.
        """
        images = itertools.chain.from_iterable(map(self.images_of, self.shards()))
        return {image["id"]: image for image in images}

    def images_of(self, shard: Path) -> list[dict]:
        """The images that a shard covers, also those without a proposal."""
        metadata = _read(pq.read_schema, shard).metadata or {}
        if IMAGES_KEY not in metadata:
            raise ValueError(f"{shard} is not a shard of a proposal store; choose another --output")
        return json.loads(metadata[IMAGES_KEY])

    def cut_off(self) -> dict[int, int]:
        """`num_cut_off` of the images where it is not 0, by their ids."""
        shards = [_cut_off(_read(pq.read_schema, shard)) for shard in self.shards()]
        return {image_id: count for counts in shards for image_id, count in counts.items()}

    def count(self) -> int:
        """How many proposals the store holds."""
        return sum(_read(pq.read_metadata, shard).num_rows for shard in self.shards())

    def write_shard(self, proposals: list[Proposals], *, writer: int = 0) -> None:
        """Adds a shard of some images; `writer` is the process's rank: no two write one file."""
        earlier = self.directory.glob(f"proposals-{writer:03d}-*.parquet")
        index = 1 + max((int(path.stem.split("-")[2]) for path in earlier), default=-1)
        path = self.directory / f"proposals-{writer:03d}-{index:06d}.parquet"
        table = _to_table(proposals)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def __iter__(self) -> Iterator[Proposals]:
        """The proposals image by image; images without a proposal are left out."""
        for shard in self.shards():
            yield from self.read_shard(shard)

    def read_shard(self, shard: Path) -> Iterator[Proposals]:
        """The proposals of one shard, image by image."""
        table = _read(pq.read_table, shard)
        ids, cut_off = table["image_id"].to_numpy(), _cut_off(table.schema)
        bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        for start, stop in pairwise(bounds if len(ids) else []):
            yield _from_table(table.slice(start, stop - start), cut_off)

    def write_json(self) -> Path:
        """Writes all results to proposals.json, and returns its path.

        Writes images.json beside it, a COCO file that lists the images.
        """
        path = self.directory / "proposals.json"
        self.write_images(self.directory / "images.json", [{"id": 1, "name": "object"}])
        write_results(path, (result for proposals in self for result in results_of(proposals)))
        return path

    def write_images(self, path: Path, categories: list[dict]) -> None:
        """Writes a COCO file that lists the images, and categories."""
        images = sorted(self.images().values(), key=lambda image: image["id"])
        write_json(path, {"images": images, "annotations": [], "categories": categories})

    def box_rows(self) -> Iterator[Rows]:
        """Image ids, boxes and logits of the proposals, shard by shard, without reading a mask.

        Older shards have scores in place of logits.
        """
        for shard in self.shards():
            score = "logit" if "logit" in _read(pq.read_schema, shard).names else "score"
            table = _read(pq.read_table, shard, columns=["image_id", "box", score])
            yield table["image_id"].to_numpy(), _boxes(table), table[score].to_numpy()


def _read(reader: Callable, shard: Path, **options: Any) -> Any:
    """Calls a reader of Arrow's; its error on a torn or foreign file becomes one that names it."""
    try:
        return reader(shard, **options)
    except pa.ArrowInvalid:
        raise ValueError(
            f"{shard} is not a whole Parquet file; delete it, and propose again"
        ) from None


def _to_table(proposals: list[Proposals]) -> pa.Table:
    images, rows = [], []
    for p in proposals:
        size = {"height": p.height, "width": p.width}
        images.append({"id": p.image_id, "file_name": p.file_name, **size})
        if p.georeference is not None:
            images[-1]["georeference"] = p.georeference
        image = {"image_id": p.image_id, "file_name": p.file_name, **size}
        for score, logit, box, rle in zip(p.scores, p.logits, p.boxes, p.rles, strict=True):
            rows.append(image | {"score": score, "logit": logit, "box": box, "counts": rle})
    cut_off = {p.image_id: p.num_cut_off for p in proposals if p.num_cut_off}
    schema = SCHEMA.with_metadata(
        {IMAGES_KEY: json.dumps(images), CUT_OFF_KEY: json.dumps(cut_off)}
    )
    return pa.Table.from_pylist(rows, schema)


def _from_table(table: pa.Table, cut_off: dict[int, int]) -> Proposals:
    names = ("image_id", "file_name", "height", "width")
    image: dict[str, Any] = {name: table[name][0].as_py() for name in names}
    has_logits = "logit" in table.column_names
    return Proposals(
        **image,
        logits=table["logit"].to_numpy() if has_logits else logits_of(table["score"].to_numpy()),
        boxes=_boxes(table),
        rles=table["counts"].to_pylist(),
        num_cut_off=cut_off.get(image["image_id"], 0),
    )


def _cut_off(schema: pa.Schema) -> dict[int, int]:
    """`num_cut_off` of a shard's images by id, from its metadata; older shards have none."""
    counts = json.loads((schema.metadata or {}).get(CUT_OFF_KEY, b"{}"))
    return {int(image_id): count for image_id, count in counts.items()}


def _boxes(table: pa.Table) -> np.ndarray:
    """(N, 4) float32 xyxy."""
    boxes = table["box"].combine_chunks().flatten()
    return boxes.to_numpy(zero_copy_only=False).reshape(-1, 4)
