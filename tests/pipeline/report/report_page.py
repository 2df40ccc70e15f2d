"""The page of a report as its tests read it."""

import base64
from html.parser import HTMLParser

import cv2
import numpy as np

from pipeline.report.report import write_report

VOID_ELEMENTS = {"meta", "img", "br"}


class Page(HTMLParser):
    """Elements with their attributes, the text, the rows of the tables, and the warning."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.rows, self.warning, self.text = html, [], [], "", ""
        self._open = []
        self.feed(html)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID_ELEMENTS:
            self._open.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        tags = [tag for tag, _ in self._open]
        if {"td", "th"} & set(tags):
            self.rows[-1][-1] += data
        if any(attributes.get("id") == "missing" for _, attributes in self._open):
            self.warning += data

    @property
    def missing(self):
        """A line for each missing part."""
        return [line for line in self.warning.splitlines() if line.endswith(")")]

    def all(self, tag, attribute):
        return [given[attribute] for name, given in self.elements if name == tag]


def decode_uri(uri):
    """The picture (H, W, 3) uint8 RGB in a data URI."""
    scheme, data = uri.split(",")
    assert scheme == "data:image/jpeg;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR_RGB)


def page_of(run, dataset):
    annotations, images = dataset
    path = write_report(run, annotations=annotations, images=images)
    assert path == run / "report.html"
    assert [p.name for p in run.glob(".*")] == [], "a temporary file is left"
    return Page(path.read_text())
