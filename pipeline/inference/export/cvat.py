"""CVAT for images 1.1: an XML with masks as they are, holes included.

https://docs.cvat.ai/docs/dataset_management/formats/xml_format; a mask's runs go row by row within
its box, background first.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from datasets.files import atomic_path
from pipeline.inference.export.results import Region, Results, describe, regions, row_runs

NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n'


def write_cvat(results: Results, path: Path, crs: str) -> str:
    """Writes masks, and boxes of results without one, each with its score as an attribute.

    CVAT finds an image by its name in the task. Coordinates are pixels, whatever `crs`.
    """
    numbers = {name: i for i, name in enumerate(sorted(_names(results)))}  # as CVAT orders frames
    written = empty = 0
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(HEAD + _meta(results))
        for image, found in results.every_image():
            name = image["file_name"]
            file.write(
                f'<image id="{numbers[name]}" name={quoteattr(_allowed(name))} '
                f'width="{image["width"]}" height="{image["height"]}">\n'
            )
            covered = regions(image, found)
            written, empty = written + len(covered), empty + len(found) - len(covered)
            file.writelines(_shape(results, region) for region in covered)
            file.write("</image>\n")
        file.write("</annotations>\n")
    return f"{path}: {len(results.images):,} images, {describe(written, empty)}"


def _names(results: Results) -> Iterator[str]:
    return (image["file_name"] for image in results.images.values())


def _allowed(text: str) -> str:
    return NO_XML.sub("\ufffd", text)


def _meta(results: Results) -> str:
    """The labels that a task needs, with the attribute that takes the score."""
    score = (
        "<attributes><attribute><name>score</name><mutable>False</mutable>"
        "<input_type>text</input_type><default_value></default_value><values></values>"
        "</attribute></attributes>"
    )
    labels = "".join(
        f"<label><name>{escape(_allowed(name))}</name><type>any</type>{score}</label>\n"
        for name in dict.fromkeys(results.categories.values())
    )
    size = f"<size>{len(results.images)}</size><mode>annotation</mode>"
    return f"<meta><task>{size}\n<labels>\n{labels}</labels>\n</task></meta>\n"


def _shape(results: Results, region: Region) -> str:
    x0, y0, x1, y1 = region.box
    label = quoteattr(_allowed(results.category(region.result)))
    common = f'label={label} source="auto" occluded="0"'
    if region.mask is None:
        tag = "box"
        place = f'xtl="{x0:.2f}" ytl="{y0:.2f}" xbr="{x1:.2f}" ybr="{y1:.2f}"'
    else:
        tag, runs = "mask", ", ".join(map(str, row_runs(region.mask).tolist()))
        place = f'rle="{runs}" left="{x0}" top="{y0}" width="{x1 - x0}" height="{y1 - y0}"'
    score = f'<attribute name="score">{region.result["score"]}</attribute>'
    return f'  <{tag} {common} {place} z_order="0">{score}</{tag}>\n'
