"""The images that pages have opened, each with the network's maps of it, as many as fit."""

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from datasets.images import ImageError, open_image
from datasets.resize import resize_image
from pipeline.inference.clicks import ClickableImage
from pipeline.inference.detect import Detector
from pipeline.inference.proposals import Detections, Proposals
from pipeline.inference.propose import Proposer
from pipeline.serve.worker import Task, Worker

PAGE_PIXELS = 2_000_000  # of an image on the page: larger ones are reduced
JPEG_QUALITY = 90
MAPS_SHARE = 0.9  # of the time that an image takes; the rest are its proposals

_reading = threading.Lock()  # one image at a time: many decoded ones may not fit in memory


def read_page_image(
    path: Path, name: str, *, max_pixels: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """An image (H, W, 3) uint8 RGB of at most `PAGE_PIXELS`, and the file's height and width.

    Raises:
        ImageError: it cannot be read, or has more than `max_pixels`. The line has the name that the
            page knows, not the path.
    """
    try:
        with _reading:
            image = open_image(path, max_pixels=max_pixels)
            height, width = image.shape[:2]
            if height * width > max_pixels:
                raise ImageError(f"{path}: {width} x {height} pixels, more than {max_pixels:,}")
            scale = min(1.0, math.sqrt(PAGE_PIXELS / (height * width)))
            return resize_image(image, scale), (height, width)
    except ImageError as error:
        raise ImageError(str(error).replace(str(path), name)) from None


def encode_jpeg(image: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 RGB for the page."""
    ok, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert ok
    return data.tobytes()


@dataclass(eq=False)
class OpenedImage:
    """An image as pages see it.

    Attributes:
        image_id: of its file's content, so that who opens it again finds it.
        original_size: height and width of the file.
        pixels: (H, W, 3) uint8 RGB, as the page and the networks see it.
        clickable: the maps of them.
        jpeg: the picture that a page shows, whatever the file's format.
        running: the network's pass over it.
        proposals: when that has ended.
        detecting: the detector's, when somebody asked for it.
        detections: when that has ended.
    """

    image_id: str
    original_size: tuple[int, int]
    pixels: np.ndarray
    clickable: ClickableImage
    jpeg: bytes
    running: Task = field(init=False)
    proposals: Proposals | None = None
    detecting: Task | None = None
    detections: Detections | None = None

    @property
    def nbytes(self) -> int:
        """In memory."""
        return self.clickable.nbytes + self.pixels.nbytes + len(self.jpeg)

    def cancel(self) -> None:
        """Ends what is running."""
        for task in (self.running, self.detecting):
            if task is not None:
                task.cancel()


class ImageCache:
    """The images that were used last, as many as fit in so many bytes; at least one."""

    def __init__(self, proposer: Proposer, detector: Detector, worker: Worker, max_bytes: int):
        self.proposer, self.detector, self.worker = proposer, detector, worker
        self.max_bytes = max_bytes
        self._images: OrderedDict[str, OpenedImage] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, image_id: str) -> OpenedImage | None:
        """An image; None if it was never opened, or gave way to others."""
        with self._lock:
            if image_id not in self._images:
                return None
            self._images.move_to_end(image_id)
            self._make_room()
            return self._images[image_id]

    def open(
        self, content: bytes, read: Callable[[], tuple[np.ndarray, tuple[int, int]]]
    ) -> OpenedImage:
        """The image of a file, given what tells it from others; the network runs if it is new.

        Raises:
            ImageError: of `read`.
        """
        image_id = hashlib.sha256(content).hexdigest()[:32]
        known = self.get(image_id)
        if known is not None and not known.running.error:
            return known
        pixels, original_size = read()
        clickable = ClickableImage(self.proposer, pixels)
        opened = OpenedImage(image_id, original_size, pixels, clickable, encode_jpeg(pixels))
        with self._lock:
            known = self._images.get(image_id)
            if known is not None and not known.running.error:
                return known  # another page was faster
            opened.running = self.worker.add(lambda task: _propose(opened, task))
            self._images[image_id] = opened
            self._images.move_to_end(image_id)
            self._make_room()
        return opened

    def detect(self, opened: OpenedImage) -> Task:
        """The task that runs the detector on an image, once."""
        with self._lock:
            if opened.detecting is None or opened.detecting.error:
                opened.detecting = self.worker.add(
                    lambda task: _detect(opened, self.detector, task)
                )
            return opened.detecting

    def _make_room(self) -> None:
        """Drops the images that were not used for longest."""
        total = sum(opened.nbytes for opened in self._images.values())
        while total > self.max_bytes and len(self._images) > 1:
            _, oldest = self._images.popitem(last=False)
            oldest.cancel()
            total -= oldest.nbytes


def _propose(opened: OpenedImage, task: Task) -> Iterator[None]:
    def report(progress: float) -> None:
        task.progress = MAPS_SHARE * progress

    yield from opened.clickable.run(report)
    opened.proposals = opened.clickable.proposals()


def _detect(opened: OpenedImage, detector: Detector, task: Task) -> Iterator[None]:
    while opened.running.is_running:  # which comes first
        opened.running.ask()
        yield
    if opened.proposals is None:
        raise ValueError(opened.running.error)

    def report(progress: float) -> None:
        task.progress = progress

    opened.detections = detector(opened.pixels, opened.proposals, report=report)
