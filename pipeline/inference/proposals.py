"""Proposals of an image, and their store: Parquet shards and the COCO results JSON made from them.

A store is a directory. Every shard is written whole, under a name of its own, and says in its
metadata which image files it covers; so an interrupted run continues with the files that no shard
covers, and several processes can write into one store.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets.files import atomic_path, write_json
from datasets.proposal_boxes import ProposalBoxes

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("file_name", pa.string()),
        ("score", pa.float32()),
        ("box", pa.list_(pa.float32(), 4)),
        ("counts", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
    ]
)
SETTINGS, RESULTS, IMAGES = "settings.json", "proposals.json", "images.json"
# Shard metadata: JSON list of the images it covers, also those without a proposal.
FILES_KEY = b"images"
MAX_ROWS = 20_000  # of a shard


@dataclass
class Proposals:
    """Class-agnostic masks of one image, best first.

    Attributes:
        image_id, file_name, height, width: the image.
        scores: (N,) float32 in [0, 1]. boxes: (N, 4) float32 xyxy.
        counts: N compressed RLE strings of the masks.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    scores: np.ndarray
    boxes: np.ndarray
    counts: list[bytes]

    def __len__(self) -> int:
        return len(self.counts)

    def rle(self, n: int) -> dict:
        """Mask n as COCO's {"size", "counts"}."""
        return {"size": [self.height, self.width], "counts": self.counts[n]}

    def results(self) -> list[dict]:
        """COCO results: category 1, boxes as xywh, RLE counts as text."""
        size = [self.height, self.width]
        xywh = np.concatenate(
            [self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1
        ).tolist()
        return [
            {
                "image_id": self.image_id,
                "category_id": 1,
                "score": round(score, 6),
                "bbox": box,
                "segmentation": {"size": size, "counts": counts.decode("ascii")},
            }
            for score, box, counts in zip(self.scores.tolist(), xywh, self.counts, strict=True)
        ]


class ProposalStore:
    """Writes and reads a store."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)

    def open_for(self, settings: dict) -> None:
        """Makes the directory, or makes sure that what it holds was made with the same settings.

        Raises:
            ValueError: it was not; the settings that differ are named.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / SETTINGS
        if not path.exists():
            if self.shards():
                raise ValueError(f"{self.directory} holds proposals but no {SETTINGS}; delete it")
            write_json(path, settings)
        elif changed := self.changed_settings(settings):
            raise ValueError(
                f"{self.directory} holds proposals made with other settings "
                f"({', '.join(changed)}); choose another --output or delete it"
            )

    def changed_settings(self, settings: dict) -> list[str]:
        """What differs from the settings that the store was made with; none if there is no store.

        Raises:
            ValueError: the directory's settings file is not of a store.
        """
        if not (self.directory / SETTINGS).exists():
            return []
        found = {"backend": "torch"} | self.settings()  # before there was a choice
        return [f"{k} {found.get(k)!r} -> {v!r}" for k, v in settings.items() if found.get(k) != v]

    def settings(self) -> dict:
        """What the store was made with; empty if that is not known.

        Raises:
            ValueError: the directory's settings file is not of a store.
        """
        path = self.directory / SETTINGS
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(
                f"{path} is not of a proposal store; choose another --output"
            ) from None

    def shards(self) -> list[Path]:
        """The shards, by name."""
        return sorted(self.directory.glob("proposals-*.parquet"))

    def require_shards(self) -> list[Path]:
        """The shards, of which there must be one.

        Raises:
            ValueError: the directory is no store.
        """
        if not (shards := self.shards()):
            raise ValueError(f"{self.directory} is no proposal store: no proposals-*.parquet in it")
        return shards

    def images(self) -> dict[str, dict]:
        """The images that are done: file name to {"id", "file_name", "height", "width"}."""
        covered = {}
        for shard in self.shards():
            with _naming(shard):
                metadata = pq.read_schema(shard).metadata or {}
            if FILES_KEY not in metadata:
                raise ValueError(
                    f"{shard} is not a shard of a proposal store; choose another --output"
                )
            covered |= {image["file_name"]: image for image in json.loads(metadata[FILES_KEY])}
        return covered

    def write_shard(self, proposals: list[Proposals], *, writer: int = 0) -> None:
        """Adds a shard with the proposals of some images.

        Args:
            writer: the process, for a name of its own.
        """
        numbers = [
            int(p.stem.split("-")[2])
            for p in self.directory.glob(f"proposals-{writer:03d}-*.parquet")
        ]
        path = self.directory / f"proposals-{writer:03d}-{max(numbers, default=-1) + 1:06d}.parquet"
        table = _to_table(proposals)
        with atomic_path(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")

    def read(self, columns: tuple[str, ...] = tuple(SCHEMA.names)) -> Iterator[pa.Table]:
        """One table a shard; name only the columns needed (masks are most of the bytes)."""
        for shard in self.shards():
            with _naming(shard):
                table = pq.read_table(shard, columns=list(columns))
            yield table

    def __iter__(self) -> Iterator[Proposals]:
        """The proposals image by image; images without a proposal are left out."""
        for shard in self.shards():
            yield from self.read_shard(shard)

    def read_shard(self, shard: Path) -> Iterator[Proposals]:
        """The proposals of one shard, image by image."""
        with _naming(shard):
            table = pq.read_table(shard, columns=SCHEMA.names)
        ids = table["image_id"].to_numpy()
        bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
        for start, stop in pairwise(bounds if len(ids) else []):
            yield _from_table(table.slice(start, stop - start))

    def boxes(self) -> ProposalBoxes:
        """Boxes and scores of all images, without reading a mask.

        Raises:
            ValueError: the store holds no proposal.
        """
        tables = list(self.read(("image_id", "score", "box")))
        rows = pa.concat_tables(tables) if tables else []
        if len(rows) == 0:
            raise ValueError(f"{self.directory} holds no proposals")
        boxes = rows["box"].combine_chunks().flatten().to_numpy().reshape(-1, 4)
        return ProposalBoxes.from_rows(rows["image_id"].to_numpy(), boxes, rows["score"].to_numpy())

    def write_results(self) -> tuple[Path, int]:
        """Writes proposals.json (COCO results) and images.json (a COCO file that lists the images).

        Returns:
            The path of the results and how many proposals they hold.
        """
        images = sorted(self.images().values(), key=lambda image: image["id"])
        categories = [{"id": 1, "name": "object"}]
        write_json(
            self.directory / IMAGES, {"images": images, "annotations": [], "categories": categories}
        )
        path, count = self.directory / RESULTS, 0
        with atomic_path(path) as temporary, temporary.open("w") as file:
            file.write("[")
            for proposals in self:
                for result in proposals.results():
                    file.write(
                        (",\n" if count else "\n") + json.dumps(result, separators=(",", ":"))
                    )
                    count += 1
            file.write("\n]\n")
        return path, count


@contextmanager
def _naming(shard: Path) -> Iterator[None]:
    """Arrow's errors on a file that is torn or of another kind, as one that names it."""
    try:
        yield
    except pa.ArrowInvalid:
        raise ValueError(
            f"{shard} is not a whole Parquet file; delete it, and propose again"
        ) from None


def _to_table(proposals: list[Proposals]) -> pa.Table:
    lengths = [len(p) for p in proposals]

    def column(values: list, type: pa.DataType) -> pa.Array:
        return pa.array([v for v, n in zip(values, lengths, strict=True) for _ in range(n)], type)

    boxes = np.concatenate([np.empty((0, 4), np.float32), *(p.boxes for p in proposals)])
    covered = [
        {"id": p.image_id, "file_name": p.file_name, "height": p.height, "width": p.width}
        for p in proposals
    ]
    return pa.table(
        [
            column([p.image_id for p in proposals], pa.int64()),
            column([p.file_name for p in proposals], pa.string()),
            pa.array(np.concatenate([np.empty(0, np.float32), *(p.scores for p in proposals)])),
            pa.FixedSizeListArray.from_arrays(pa.array(boxes.ravel()), 4),
            pa.array([c for p in proposals for c in p.counts], pa.binary()),
            column([p.height for p in proposals], pa.int32()),
            column([p.width for p in proposals], pa.int32()),
        ],
        schema=SCHEMA.with_metadata({FILES_KEY: json.dumps(covered)}),
    )


def _from_table(table: pa.Table) -> Proposals:
    boxes = table["box"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, 4)
    first = table.slice(0, 1).to_pylist()[0]
    return Proposals(
        first["image_id"],
        first["file_name"],
        first["height"],
        first["width"],
        table["score"].to_numpy(),
        boxes,
        table["counts"].to_pylist(),
    )
