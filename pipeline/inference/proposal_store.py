"""A store of proposals: Parquet shards in a directory or object store, and COCO results.

Every shard is written whole, never over another one. So an interrupted run continues with the
images that no shard covers, and several processes can write into one store.

Which images those are is said by the shards alone. The index repeats it, for stores of so many that
opening each one takes long: where it lacks a shard, or has one of another size or time, the shard
is read.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import feather

from datasets.files import TEMPORARY, atomic_path, write_json
from datasets.images import APPLY
from datasets.proposal_boxes import Rows
from datasets.remote import AnyPath, list_files, remove_folder, to_path
from pipeline.inference.proposals import Proposals, results_of, write_results
from pipeline.inference.shards import (
    IMAGE_FIELDS,
    SCHEMA,
    flat_boxes,
    num_bytes,
    read_groups,
    read_images,
    to_proposals,
    to_rows,
    write_shard,
)

SETTINGS = "settings.json"
INDEX = "index.arrow"
STAMPS_KEY = b"shards"  # of the index's metadata: size and time of each shard, as JSON
MIN_UNINDEXED = 64  # shards that are read at every start rather than written into the index
READERS = 8  # threads
SHARD_BYTES = 96 * 2**20  # of proposals, uncompressed; files are about two thirds
SHARD_SECONDS = 60  # of work that a kill may lose
CATALOG = pa.schema([*IMAGE_FIELDS, ("group", pa.int32()), ("shard", pa.int32())])


class ResumableDirectory:
    """A directory of results that an interrupted run continues, and the settings of that run."""

    def __init__(self, directory: str | AnyPath):
        self.directory = to_path(directory)
        self.path = self.directory / SETTINGS

    def open_for(self, settings: dict, *, discard: bool = False) -> None:
        """Makes the directory, or makes sure that what it holds was made with the same settings.

        Settings are of JSON's types. What was made with other ones is deleted with `discard`.

        Raises:
            ValueError: other settings, each of them named; or, with `discard`, files of another
                origin.
        """
        if discard:
            self._check_origin(settings)
        changed = self.changed_settings(settings)
        if changed and not discard:
            raise ValueError(
                f"{self.directory} holds results of other settings ({', '.join(changed)}); "
                "choose another --output or delete it"
            )
        if changed:
            remove_folder(self.directory)
        if not self.path.exists():
            write_json(self.path, settings)

    def changed_settings(self, settings: dict) -> list[str]:
        """The settings that differ from those of the directory; none if it is new."""
        if not self.path.exists():
            return []
        found, settings = self.settings(), json.loads(json.dumps(settings))  # tuples become lists
        return [f"{k} {found.get(k)!r} -> {v!r}" for k, v in settings.items() if found.get(k) != v]

    def _check_origin(self, settings: dict) -> None:
        """Raises a ValueError if the directory holds files of another origin than such a run."""
        if self.path.exists():
            is_own = settings.keys() <= self.settings().keys()
        elif isinstance(self.directory, Path) and self.directory.is_dir():
            is_own = all(TEMPORARY.fullmatch(entry.name) for entry in self.directory.iterdir())
        else:
            is_own = not list_files(self.directory)
        if not is_own:
            raise ValueError(
                f"{self.directory} holds other files; it would be used and then deleted: choose "
                "another --output or move them"
            )

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


class Part(NamedTuple):
    """Some images of a shard that are read at once: a row group."""

    shard: AnyPath
    group: int


class ProposalStore(ResumableDirectory):
    """Writes and reads a store of proposals."""

    def __init__(self, directory: str | AnyPath):
        super().__init__(directory)
        self._next: dict[int, int] = {}  # number of the next shard, by writer
        self._num_indexed = 0  # shards
        self._catalog = CATALOG.empty_table().replace_schema_metadata({STAMPS_KEY: "{}"})

    def open_for(self, settings: dict, *, discard: bool = False) -> None:
        """As `ResumableDirectory.open_for`; shards of unknown settings are refused."""
        if not self.path.exists() and self.shards():
            raise ValueError(f"{self.directory} holds proposals but no {SETTINGS}; delete it")
        super().open_for(settings, discard=discard)

    def shards(self) -> list[AnyPath]:
        """The shards, by name."""
        return [self.directory / name for name in self.stamps()]

    def stamps(self) -> dict[str, list[int]]:
        """Size in bytes and time of last change in ns of each shard, by name."""
        files = list_files(self.directory).items()
        return {name: stamp for name, stamp in files if fnmatchcase(name, "proposals-*.parquet")}

    def exif(self) -> str:
        """How the images were read, see `datasets.images.read_image`."""
        return self.settings().get("exif") or APPLY

    def require_shards(self) -> list[AnyPath]:
        """The shards; ValueError if there is none, as in a directory that is no store."""
        if not (shards := self.shards()):
            raise ValueError(f"{self.directory} is no proposal store: no proposals-*.parquet in it")
        return shards

    # Which images there are.

    def catalog(self) -> pa.Table:
        """A row for each image that is done, in the order of the shards.

        Columns are `IMAGE_FIELDS`, "shard", a number in `shards()`, and "group", its row group.
        """
        stamps = self.stamps()
        known = self._catalog if len(self._catalog) else self._read_index()
        covered = json.loads(known.schema.metadata[STAMPS_KEY])
        if covered == stamps:
            self._catalog = known
            return known
        # Shards that have gone, or are others than those covered, do not count.
        number_of = {name: number for number, name in enumerate(stamps)}
        current = [number_of[n] if stamps.get(n) == stamp else -1 for n, stamp in covered.items()]
        numbers = np.array(current, np.int32)[known["shard"].to_numpy()]
        tables = [_numbered(known.drop_columns("shard"), numbers).filter(pa.array(numbers >= 0))]
        new = [name for name, stamp in stamps.items() if covered.get(name) != stamp]
        with ThreadPoolExecutor(READERS) as pool:
            added = pool.map(read_images, (self.directory / name for name in new))
            for name, table in zip(new, added, strict=True):
                tables.append(_numbered(table, np.full(len(table), number_of[name], np.int32)))
        table = pa.concat_tables(tables).combine_chunks()
        numbers = table["shard"].to_numpy()
        if (np.diff(numbers) < 0).any():
            table = table.take(np.argsort(numbers, kind="stable"))
        self._catalog = table.replace_schema_metadata({STAMPS_KEY: json.dumps(stamps)})
        return self._catalog

    def _read_index(self) -> pa.Table:
        """The catalog as far as the index has it."""
        try:
            table = feather.read_table(pa.BufferReader((self.directory / INDEX).read_bytes()))
        except (OSError, pa.ArrowException):  # none, or torn: the shards say all
            return self._catalog
        if not table.schema.equals(CATALOG) or STAMPS_KEY not in (table.schema.metadata or {}):
            return self._catalog  # of another version
        self._num_indexed = len(json.loads(table.schema.metadata[STAMPS_KEY]))
        return table

    def write_index(self) -> None:
        """Brings the index up to date if many shards have come since it was written."""
        catalog = self.catalog()
        covered = len(json.loads(catalog.schema.metadata[STAMPS_KEY]))
        if covered - self._num_indexed >= MIN_UNINDEXED:
            with atomic_path(self.directory / INDEX) as temporary:
                feather.write_feather(catalog, temporary, compression="lz4")
            self._num_indexed = covered

    def images(self) -> dict[int, dict]:
        """The images that are done: id to {"id", "file_name", "height", "width"}.

        GeoTIFFs have "georeference" as well.
        """
        return {image["id"]: image for image in _images(self.catalog())}

    def times(self, image_ids: np.ndarray) -> dict[int, int]:
        """When the shards of some images were last changed, in ns, by image id."""
        catalog = self.catalog()
        # Those of the catalog's own shards: another process may have written more since.
        stamps = json.loads(catalog.schema.metadata[STAMPS_KEY])
        written = [time for _, time in stamps.values()]
        rows = catalog.select(["image_id", "shard"]).filter(
            np.isin(catalog["image_id"].to_numpy(), image_ids)
        )
        return {row["image_id"]: written[row["shard"]] for row in rows.to_pylist()}

    def images_of(self, part: AnyPath | Part) -> list[dict]:
        """The images that a shard, or a part of one, covers, also those without a proposal."""
        shard, group = part if isinstance(part, Part) else (part, None)
        table = read_images(shard)
        return _images(table if group is None else table.filter(pc.field("group") == group))

    def parts(self) -> list[Part]:
        """The parts of all shards, in their order."""
        catalog, shards = self.catalog(), self.shards()
        pairs = zip(catalog["shard"].to_pylist(), catalog["group"].to_pylist(), strict=True)
        return [Part(shards[shard], group) for shard, group in dict.fromkeys(pairs)]

    def cut_off(self) -> dict[int, int]:
        """`num_cut_off` of the images where it is not 0, by their ids."""
        found = self.catalog().filter(pc.field("num_cut_off") > 0)
        ids, counts = found["image_id"].to_pylist(), found["num_cut_off"].to_pylist()
        return dict(zip(ids, counts, strict=True))

    def count(self) -> int:
        """How many proposals the store holds."""
        return pc.sum(self.catalog()["num_proposals"].cast(pa.int64())).as_py() or 0

    # Proposals.

    def write_shard(self, proposals: list[Proposals], *, writer: int = 0) -> None:
        """Adds a shard of some images, see `write_rows`."""
        self.write_rows(to_rows(proposals), writer=writer)

    def write_rows(self, rows: pa.Table, *, writer: int = 0) -> None:
        """Adds a shard of some images, a table of `shards.SCHEMA`.

        `writer` is the process's number: no two write one file.
        """
        if writer not in self._next:
            earlier = [n for n in self.stamps() if n.startswith(f"proposals-{writer:03d}-")]
            last = max((int(PurePath(name).stem.split("-")[2]) for name in earlier), default=-1)
            self._next[writer] = last + 1
        path = self.directory / f"proposals-{writer:03d}-{self._next[writer]:06d}.parquet"
        write_shard(path, rows)
        self._next[writer] += 1

    def __iter__(self) -> Iterator[Proposals]:
        """The proposals image by image; images without a proposal are left out."""
        for shard in self.shards():
            yield from self.read_shard(shard)

    def read_shard(self, part: AnyPath | Part) -> Iterator[Proposals]:
        """The proposals of one shard, or a part of one, image by image."""
        shard, group = part if isinstance(part, Part) else (part, None)
        for table in read_groups(shard, groups=None if group is None else [group]):
            yield from to_proposals(table)

    def read(
        self, *, image_ids: Iterable[int] | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """A row for each image, or for those of some ids; only their row groups are read.

        Args:
            columns: of `shards.SCHEMA`.
        """
        names, catalog, shards = list(columns or SCHEMA.names), self.catalog(), self.shards()
        schema = pa.schema([SCHEMA.field(name) for name in names])
        wanted = None if image_ids is None else pa.array(list(image_ids), pa.int64())
        if wanted is not None:
            catalog = catalog.filter(pc.is_in(catalog["image_id"], wanted))
        groups: dict[int, dict[int, None]] = defaultdict(dict)  # by shard, in order
        pairs = zip(catalog["shard"].to_pylist(), catalog["group"].to_pylist(), strict=True)
        for shard, group in pairs:
            groups[shard][group] = None
        tables = [schema.empty_table()]
        for shard, numbers in groups.items():
            read = list(dict.fromkeys([*names, "image_id"]))
            for table in read_groups(shards[shard], read, groups=list(numbers)):
                if wanted is not None:
                    table = table.filter(pc.is_in(table["image_id"], wanted))
                tables.append(table.select(names).cast(schema))
        return pa.concat_tables(tables)

    def write_json(self) -> AnyPath:
        """Writes all results to proposals.json, and returns its path.

        Writes images.json beside it, a COCO file that lists the images.
        """
        path = self.directory / "proposals.json"
        self.write_images(self.directory / "images.json", [{"id": 1, "name": "object"}])
        write_results(path, (result for proposals in self for result in results_of(proposals)))
        return path

    def write_images(self, path: AnyPath, categories: list[dict]) -> None:
        """Writes a COCO file that lists the images, and categories."""
        images = sorted(self.images().values(), key=lambda image: image["id"])
        write_json(path, {"images": images, "annotations": [], "categories": categories})

    def box_rows(self) -> Iterator[Rows]:
        """Image ids, boxes and logits of the proposals, by row groups, without reading a mask."""
        for shard in self.shards():
            for table in read_groups(shard, ["image_id", "num_proposals", "box", "logit"]):
                ids = table["image_id"].to_numpy().repeat(table["num_proposals"].to_numpy())
                logits = table["logit"].combine_chunks().flatten()
                boxes = flat_boxes(table["box"].combine_chunks())
                yield ids, boxes, logits.to_numpy(zero_copy_only=False)


class ShardWriter:
    """Gathers the proposals of images and writes a shard when they are many or a minute old.

    As a context it writes what is left, also on Ctrl-C.
    """

    def __init__(self, store: ProposalStore, writer: int = 0):
        self._store, self._writer = store, writer
        self._pending: list[pa.Table] = []
        self._bytes, self._since = 0, time.monotonic()

    def add(self, proposals: Proposals) -> None:
        """Adds an image."""
        self.add_rows(to_rows([proposals]))

    def add_rows(self, rows: pa.Table) -> None:
        """Adds images, a table of `shards.SCHEMA`."""
        self._pending.append(rows)
        self._bytes += num_bytes(rows)
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self._write()

    def _write(self) -> None:
        pending, self._pending = self._pending, []
        self._store.write_rows(pa.concat_tables(pending), writer=self._writer)
        self._bytes, self._since = 0, time.monotonic()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pending:
            self._write()


def _images(table: pa.Table) -> list[dict]:
    """COCO's images."""
    names = ["image_id", "file_name", "height", "width", "georeference"]
    images = []
    for image_id, name, height, width, place in zip(
        *(table[name].to_pylist() for name in names), strict=True
    ):
        image = {"id": image_id, "file_name": name, "height": height, "width": width}
        images.append(image if place is None else image | {"georeference": json.loads(place)})
    return images


def _numbered(table: pa.Table, numbers: np.ndarray) -> pa.Table:
    """With the numbers of the images' shards."""
    table = table.replace_schema_metadata(None)
    return table.append_column(CATALOG.field("shard"), pa.array(numbers))
