"""The page of a report as its tests read it."""

import base64
from html.parser import HTMLParser

import cv2
import numpy as np

from pipeline.report.report import write_report

VOID_ELEMENTS = {"meta", "img", "br"}


class Html(HTMLParser):
    """Elements with their attributes, the text, and the rows of the tables."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.rows, self.text, self._open = html, [], [], "", []
        self.feed(html)
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID_ELEMENTS:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def all(self, tag, attribute):
        return [given[attribute] for name, given in self.elements if name == tag]

    def shows(self, expected):
        """Whether a text is on the page, or a list of cells begins a row."""
        if isinstance(expected, str):
            return expected in self.text
        return expected in [row[: len(expected)] for row in self.rows]


class Page(Html):
    """The report of a run."""

    def __init__(self, run, dataset):
        path = write_report(run, annotations=dataset[0], images=dataset[1])
        assert path == run / "report.html"
        assert [p.name for p in run.glob(".*")] == [], "a temporary file is left"
        super().__init__(path.read_text())

    @property
    def missing(self):
        """The missing parts, a line each."""
        warning = self.html.partition('id="missing">')[2].partition("</div>")[0]
        return [line for line in warning.splitlines() if line.startswith("<li>")]


def decode_uri(uri):
    """The picture (H, W, 3) uint8 RGB in a data URI."""
    scheme, data = uri.split(",")
    assert scheme == "data:image/webp;base64"
    return cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR_RGB)
