"""Stores as earlier versions wrote them: a row a proposal, images in the metadata."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.inference.proposals import Proposals

FIELDS = [
    ("image_id", pa.int64()),
    ("file_name", pa.string()),
    ("score", pa.float32()),
    ("logit", pa.float32()),
    ("box", pa.list_(pa.float32(), 4)),
    ("counts", pa.binary()),
    ("height", pa.int32()),
    ("width", pa.int32()),
]


def write_older_shard(path: Path, proposals: list[Proposals], *, logits: bool = True) -> None:
    """Writes a shard; without logits, and numbers of what was cut off, as the first versions."""
    images, rows = [], []
    for p in proposals:
        size = {"height": p.height, "width": p.width}
        images.append({"id": p.image_id, "file_name": p.file_name, **size})
        if p.georeference is not None:
            images[-1]["georeference"] = p.georeference
        image = {"image_id": p.image_id, "file_name": p.file_name, **size}
        for score, logit, box, rle in zip(p.scores, p.logits, p.boxes, p.rles, strict=True):
            rows.append(image | {"score": score, "logit": logit, "box": box, "counts": rle})
    metadata = {"images": json.dumps(images)}
    if logits:
        metadata["cut_off"] = json.dumps({p.image_id: p.num_cut_off for p in proposals})
    table = pa.Table.from_pylist(rows, pa.schema(FIELDS))
    table = table if logits else table.drop_columns(["logit"])
    pq.write_table(table.replace_schema_metadata(metadata), path, compression="zstd")
