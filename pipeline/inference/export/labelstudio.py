"""Label Studio: tasks with predictions, masks as its brush labels.

https://labelstud.io/guide/predictions; the run lengths of brushes are those of rle-pack, which
`label_studio_converter.brush` decodes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from datasets.files import atomic_folder
from pipeline.inference.export.results import (
    Region,
    Results,
    describe,
    regions,
    row_runs,
    write_lines,
)

LOCAL_FILES = "/data/local-files/?d="
IMAGE, MASK, BOX = "image", "mask", "box"  # names of tags in the labeling config
CHANNELS, OPAQUE, VALUE_BITS = 4, 255, 8  # of a pixel: red, green, blue, alpha
RUN_BITS = (3, 4, 8, 16)  # sizes that a run's length may be written in


def write_labelstudio(results: Results, path: Path, crs: str) -> str:
    """Writes a folder: tasks.json to import, and config.xml, the labeling interface for it.

    Masks become brush labels, boxes without masks rectangles, each with its score. Images are named
    as files that Label Studio serves, see `image_prefix` of `Results`.

    Raises:
        ValueError: the folder holds something.
    """
    prefix = results.image_prefix
    if prefix is None:
        prefix = LOCAL_FILES
        if results.image_folder is not None:
            prefix += quote(results.image_folder.resolve().name) + "/"
    written = empty = 0

    def tasks() -> Iterator[str]:
        nonlocal written, empty
        for image, found in results.every_image():
            covered = regions(image, found)
            written, empty = written + len(covered), empty + len(found) - len(covered)
            drawn = [_result(results, image, region) for region in covered]
            task: dict = {"data": {IMAGE: prefix + quote(image["file_name"])}, "predictions": []}
            if drawn:
                score = sum(region["score"] for region in drawn) / len(drawn)
                prediction = {"model_version": "maskpath", "score": score, "result": drawn}
                task["predictions"] = [prediction]
            yield json.dumps(task, separators=(",", ":"), allow_nan=False)

    with atomic_folder(path) as folder:
        with (folder / "tasks.json").open("w") as file:
            file.write("[")
            count = write_lines(file, tasks())
            file.write("\n]\n")
        config = _labeling_config(dict.fromkeys(results.categories.values()))
        (folder / "config.xml").write_text(config, encoding="utf-8")
    example = prefix + "NAME"
    return f"{path}: {count:,} tasks, {describe(written, empty)}; images are {example}"


def _result(results: Results, image: dict, region: Region) -> dict:
    size = image["height"], image["width"]
    x0, y0, x1, y1 = region.box
    value: dict
    if region.mask is None:
        kind, name = "rectanglelabels", BOX
        sides = {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0}
        value = {k: 100 * v / size[k in ("x", "width")] for k, v in sides.items()} | {"rotation": 0}
    else:
        kind, name = "brushlabels", MASK
        runs = row_runs(region.mask, (int(x0), int(y0)), size)
        value = {"format": "rle", "rle": encode_brush(runs)}
    return {
        "type": kind,
        "from_name": name,
        "to_name": IMAGE,
        "original_width": image["width"],
        "original_height": image["height"],
        "image_rotation": 0,
        "score": region.result["score"],
        "value": value | {kind: [results.category(region.result)]},
    }


def encode_brush(runs: np.ndarray) -> list[int]:
    """Label Studio's bytes for a mask of these runs (r,), row by row, background first.

    They are a stream of bits: the number of values in 32, the bits of a value less 1 in 5, and each
    of `RUN_BITS` less 1 in 4. Then, for each run, a 1, which of `RUN_BITS` in 2, its length less 1
    in so many, and its value. All four channels of a pixel have one value, 0 or 255.
    """
    lengths = runs.astype(np.int64) * CHANNELS
    values = np.where(np.arange(len(lengths)) % 2, OPAQUE, 0)
    # Runs that are too long are several of one value.
    longest = 1 << RUN_BITS[-1]
    parts = -(-lengths // longest)
    rests = lengths - (parts - 1) * longest
    lengths, values = np.full(parts.sum(), longest), np.repeat(values, parts)
    lengths[np.cumsum(parts)[parts > 0] - 1] = rests[parts > 0]
    bits = np.array(RUN_BITS)
    kind = np.searchsorted(1 << bits, lengths)
    size = bits[kind]
    codes = (((1 << 2 | kind) << size | (lengths - 1)) << VALUE_BITS) | values
    head = [(runs.sum() * CHANNELS, 32), (VALUE_BITS - 1, 5), *((size - 1, 4) for size in RUN_BITS)]
    numbers = np.concatenate([[number for number, _ in head], codes])
    widths = np.concatenate([[width for _, width in head], 3 + size + VALUE_BITS])
    # Each number as 32 bits, of which its own are the last.
    rows = np.unpackbits(numbers.astype(">u4").view(np.uint8)).reshape(-1, 32)
    stream = rows[np.arange(32) >= 32 - widths[:, None]]
    return np.packbits(stream).tolist()


def _labeling_config(labels: dict[str, None]) -> str:
    """The interface: the image, a brush and a rectangle for each label."""
    lines = "".join(f"    <Label value={quoteattr(label)}/>\n" for label in labels)
    return (
        "<View>\n"
        f'  <Image name="{IMAGE}" value="${IMAGE}"/>\n'
        f'  <BrushLabels name="{MASK}" toName="{IMAGE}">\n{lines}  </BrushLabels>\n'
        f'  <RectangleLabels name="{BOX}" toName="{IMAGE}">\n{lines}  </RectangleLabels>\n'
        "</View>\n"
    )
