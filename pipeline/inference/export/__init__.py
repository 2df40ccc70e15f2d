"""Results in the formats of other programs; see tools/export_results.py."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.inference.export.coco import write_coco, write_supervision
from pipeline.inference.export.cvat import write_cvat
from pipeline.inference.export.geojson import write_geojson
from pipeline.inference.export.labelstudio import write_labelstudio
from pipeline.inference.export.results import Results
from pipeline.inference.export.yolo import write_yolo


@dataclass(frozen=True)
class Format:
    """A format of another program.

    Attributes:
        write: takes results, the path of the output and --crs; returns a line on what it wrote.
        suffix: of the file's name; none where a folder is written.
    """

    write: Callable[[Results, Path, str], str]
    suffix: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return not self.suffix


FORMATS = {
    "coco": Format(write_coco, ".json"),
    "cvat": Format(write_cvat, ".xml"),
    "geojson": Format(write_geojson, ".geojson"),
    "labelstudio": Format(write_labelstudio),
    "supervision": Format(write_supervision, ".json"),
    "yolo-seg": Format(write_yolo),
}
