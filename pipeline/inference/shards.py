"""Shards of a proposal store: Parquet files of whole images, also as earlier versions wrote them.

A shard has one row an image. Those of earlier versions have one row a proposal, and their images in
the metadata; they are read as if they were of today's form.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from datasets.files import atomic_path
from datasets.remote import AnyPath, RemotePath, arrow_source
from pipeline.inference.proposals import Proposals, logits_of

# What is known of an image without its proposals.
IMAGE_FIELDS = [
    ("image_id", pa.int64()),
    ("file_name", pa.string()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("num_proposals", pa.int32()),
    ("num_cut_off", pa.int32()),  # see `Proposals`
    ("georeference", pa.string()),  # JSON, or null
]
# Lists, all of one length, best first.
PROPOSAL_FIELDS = [
    ("score", pa.list_(pa.float32())),
    ("logit", pa.list_(pa.float32())),  # scores near 1 are equal in float32
    ("box", pa.list_(pa.list_(pa.float32(), 4))),  # xyxy in pixels
    ("counts", pa.list_(pa.binary())),  # compressed RLE
]
SCHEMA = pa.schema([*IMAGE_FIELDS, *PROPOSAL_FIELDS])
IMAGE_COLUMNS = [name for name, _ in IMAGE_FIELDS]
GROUP_IMAGES = 16  # rows of a row group: what a reader holds in memory, and a detector does at once
# Of an older shard's metadata, as JSON: its images, also those without a proposal; `num_cut_off`
# by id.
IMAGES_KEY, CUT_OFF_KEY = b"images", b"cut_off"


def write_shard(path: AnyPath, rows: pa.Table) -> None:
    """Writes a shard of images, a table of `SCHEMA`, whole or not at all."""
    with atomic_path(path) as temporary:
        pq.write_table(rows, temporary, compression="zstd", row_group_size=GROUP_IMAGES)


def read_images(shard: AnyPath) -> pa.Table:
    """`IMAGE_FIELDS` of a shard's images, and "group", the number of each one's row group."""
    with _open(shard) as file:
        if IMAGES_KEY in (file.schema_arrow.metadata or {}):
            ids = _read(shard, file.read, columns=["image_id"])["image_id"].to_numpy()
            table = _images_of_older(shard, file.schema_arrow, ids).select(IMAGE_COLUMNS)
            groups = np.zeros(len(table), np.int32)
        else:
            table = _read(shard, file.read, columns=IMAGE_COLUMNS)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            groups = np.arange(len(sizes), dtype=np.int32).repeat(sizes)
    table = table.replace_schema_metadata(None)
    return table.append_column("group", pa.array(groups, pa.int32()))


def read_groups(
    shard: AnyPath, columns: Sequence[str] | None = None, *, groups: Sequence[int] | None = None
) -> Iterator[pa.Table]:
    """A shard's row groups, or those of given numbers, with these columns of `SCHEMA`."""
    names = SCHEMA.names if columns is None else list(columns)
    with _open(shard) as file:
        if IMAGES_KEY in (file.schema_arrow.metadata or {}):
            yield _modernize(shard, file, names)
            return
        for group in range(file.num_row_groups) if groups is None else groups:
            yield _read(shard, file.read_row_group, group, columns=names).select(names)


def to_proposals(table: pa.Table) -> Iterator[Proposals]:
    """The images of a table of `SCHEMA` that have proposals."""
    columns = {name: table[name].combine_chunks() for name, _ in PROPOSAL_FIELDS}
    starts = columns["logit"].offsets.to_numpy()
    logits = columns["logit"].values.to_numpy(zero_copy_only=False)
    boxes = flat_boxes(columns["box"])
    first = starts[0] if len(starts) else 0  # `flatten` heeds it, `values` does not
    counts = columns["counts"]
    images = table.select(["image_id", "file_name", "height", "width", "num_cut_off"]).to_pylist()
    for i, image in enumerate(images):
        if starts[i + 1] > starts[i]:
            rows = slice(starts[i], starts[i + 1])
            inner = slice(starts[i] - first, starts[i + 1] - first)
            yield Proposals(
                **image, logits=logits[rows], boxes=boxes[inner], rles=counts[i].as_py()
            )


def num_bytes(rows: pa.Table) -> int:
    """About how many bytes the proposals of a table of `SCHEMA` have before compression."""
    counts = pc.list_flatten(rows["counts"])
    return 24 * len(counts) + (pc.sum(pc.binary_length(counts)).as_py() or 0)


def flat_boxes(column: pa.ListArray) -> np.ndarray:
    """(N, 4) float32 xyxy of all images of a column "box"."""
    return column.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)


def to_rows(proposals: Sequence[Proposals]) -> pa.Table:
    """Images as a table of `SCHEMA`."""
    counts = [len(p) for p in proposals]
    for p in proposals:
        if not len(p) == len(p.boxes) == len(p.rles):
            raise ValueError(f"{p.file_name}: {len(p)} scores, {len(p.boxes)} boxes, {len(p.rles)}")
    places = [None if p.georeference is None else json.dumps(p.georeference) for p in proposals]
    columns = {
        "image_id": [p.image_id for p in proposals],
        "file_name": [p.file_name for p in proposals],
        "height": [p.height for p in proposals],
        "width": [p.width for p in proposals],
        "num_proposals": counts,
        "num_cut_off": [p.num_cut_off for p in proposals],
        "georeference": places,
        "score": _lists(counts, _joined([p.scores for p in proposals])),
        "logit": _lists(counts, _joined([p.logits for p in proposals])),
        "box": _lists(counts, _fours(_joined([p.boxes.ravel() for p in proposals]))),
        "counts": _lists(
            counts, pa.array(chain.from_iterable(p.rles for p in proposals), "binary")
        ),
    }
    return pa.table(columns, SCHEMA)


def _joined(arrays: list[np.ndarray]) -> pa.Array:
    return pa.array(np.concatenate([np.empty(0, np.float32), *arrays]), pa.float32())


def _fours(values: pa.Array) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(values, 4)


def _lists(counts: Sequence[int], values: pa.Array) -> pa.ListArray:
    """Lists of so many of the values each."""
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


# Shards of earlier versions.


def _images_of_older(shard: AnyPath, schema: pa.Schema, ids: np.ndarray) -> pa.Table:
    """The images (`IMAGE_FIELDS`) of an older shard, whose proposals are of the images `ids`."""
    images = json.loads(schema.metadata[IMAGES_KEY])
    cut_off = json.loads(schema.metadata.get(CUT_OFF_KEY, b"{}"))
    unique, numbers = np.unique(ids, return_counts=True)
    counts = dict(zip(unique.tolist(), numbers.tolist(), strict=True))
    if unknown := counts.keys() - {image["id"] for image in images}:
        raise ValueError(f"{shard} does not list the image {min(unknown)} of its proposals")
    for image in images:
        image["image_id"] = image["id"]
        image["num_proposals"] = counts.get(image["id"], 0)
        image["num_cut_off"] = cut_off.get(str(image["id"]), 0)
        place = image.get("georeference")
        image["georeference"] = None if place is None else json.dumps(place)
    return pa.Table.from_pylist(images, pa.schema(IMAGE_FIELDS))


def _modernize(shard: AnyPath, file: pq.ParquetFile, names: list[str]) -> pa.Table:
    """An older shard in today's form; the logits of those that have scores alone are float64."""
    stored = file.schema_arrow.names
    wanted = [n for n in ("score", "logit", "box", "counts") if n in names and n in stored]
    if "logit" in names and "logit" not in stored:
        wanted = list({*wanted, "score"})
    rows = _read(shard, file.read, columns=["image_id", *wanted])
    ids = rows["image_id"].to_numpy()
    table = _images_of_older(shard, file.schema_arrow, ids)
    place = {image_id: i for i, image_id in enumerate(table["image_id"].to_pylist())}
    order = np.argsort([place[image_id] for image_id in ids.tolist()], kind="stable")
    rows, counts = rows.take(order), table["num_proposals"].to_numpy()
    for name in wanted:
        values = rows[name].combine_chunks()
        table = table.append_column(name, _lists(counts, values))
    if "logit" in names and "logit" not in stored:
        scores = np.split(rows["score"].to_numpy(), np.cumsum(counts))[:-1]
        logits = np.concatenate([np.empty(0), *map(logits_of, scores)])
        table = table.append_column("logit", _lists(counts, pa.array(logits)))
    return table.select(names)


def _open(shard: AnyPath) -> pq.ParquetFile:
    # One request for what is read at once.
    file = _read(
        shard, pq.ParquetFile, arrow_source(shard), pre_buffer=isinstance(shard, RemotePath)
    )
    names = file.schema_arrow.names
    if IMAGES_KEY not in (file.schema_arrow.metadata or {}) and not {*SCHEMA.names} <= {*names}:
        file.close()
        raise ValueError(f"{shard} is not a shard of a proposal store; choose another --output")
    return file


def _read(shard: AnyPath, reader: Callable, *arguments: Any, **options: Any) -> Any:
    """Calls a reader of Arrow's; its error on a torn or foreign file becomes one that names it."""
    try:
        return reader(*arguments, **options)
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (error.errno or isinstance(shard, RemotePath)):
            raise  # the system's, or the store's: not there, or not ours to read
        raise ValueError(
            f"{shard} is not a whole Parquet file; delete it, and propose again"
        ) from None
