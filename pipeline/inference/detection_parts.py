"""What an interrupted run has detected: a file for each shard of proposals, until all are there.

Every part is written whole; a run that is started again makes those that are missing.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets.files import write_atomically, write_json

SETTINGS, PARTS = "settings.json", "parts"


class DetectionParts:
    """Parts of a run's detections, below its output directory."""

    def __init__(self, output: Path):
        self.directory = output / PARTS

    def open_for(self, settings: dict) -> None:
        """Keeps the parts that were made with the same settings, and no others."""
        path = self.directory / SETTINGS
        if not path.exists() or json.loads(path.read_text()) != settings:
            self.remove()
            write_json(path, settings)

    def missing(self, shards: Iterable[Path]) -> list[Path]:
        """The shards that have no part yet."""
        return [shard for shard in shards if not self._path(shard).exists()]

    def write(self, shard: Path, results: list[dict], broken: list[str]) -> None:
        """The part of a shard.

        Args:
            results: COCO's. broken: messages on images left out.
        """
        lines = (json.dumps(line, separators=(",", ":")) for line in (broken, *results))
        write_atomically(self._path(shard), "\n".join(lines).encode())

    def results(self, shards: Iterable[Path]) -> Iterator[dict]:
        """Of all parts, in order."""
        for shard in shards:
            with self._path(shard).open() as lines:
                next(lines)
                yield from map(json.loads, lines)

    def broken(self, shards: Iterable[Path]) -> list[str]:
        """Messages on images left out, of all parts."""
        messages = []
        for shard in shards:
            with self._path(shard).open() as lines:
                messages += json.loads(next(lines))
        return messages

    def remove(self) -> None:
        """They have become one file."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, shard: Path) -> Path:
        return self.directory / f"{shard.stem}.jsonl"
