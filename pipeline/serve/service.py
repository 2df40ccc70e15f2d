"""What a page may ask for, without HTTP.

An image is opened, by its name in the folder or by its content, and has an id then. The network
runs over it in the background; every click is answered from the maps that it leaves. The server
keeps nothing else: what was kept on a page is the page's, and no image is the present one.
"""

import tempfile
from pathlib import Path

from pipeline.inference.detect import Detector
from pipeline.inference.nms import kept_by_nms
from pipeline.inference.proposals import Proposals, round_scores
from pipeline.inference.propose import Proposer
from pipeline.serve.downloads import DOWNLOADS, read_kept, results_of_kept, write_download
from pipeline.serve.folder import ServedFiles
from pipeline.serve.images import PAGE_PIXELS, ImageCache, OpenedImage, read_page_image
from pipeline.serve.worker import Worker

MAX_BYTES = 2**26  # of an upload, by default
MAX_PIXELS = 2**26  # of an image, by default
KEPT_BYTES = 2**31  # of images and maps, by default
SCORE_DIGITS = 4
GONE, NOT_YET, TOO_LARGE = 404, 409, 413  # of HTTP


class Refusal(Exception):
    """A request that cannot be met, with HTTP's status and one line for the page."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Service:
    """The networks, the files and the opened images; every method may run in any thread.

    Methods raise ValueError on a request that makes no sense and `Refusal` on one that comes too
    early or too late.
    """

    def __init__(
        self,
        proposer: Proposer,
        detector: Detector,
        files: ServedFiles,
        *,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        kept_bytes: int = KEPT_BYTES,
    ):
        """
        Args:
            files: what may be opened by name.
            max_bytes, max_pixels: of an image; larger ones are refused.
            kept_bytes: of images and their maps in memory; those used last stay.
        """
        self.detector, self.files = detector, files
        self.max_bytes, self.max_pixels = max_bytes, max_pixels
        self.worker = Worker()
        self.images = ImageCache(proposer, detector, self.worker, kept_bytes)

    def settings(self) -> dict:
        """What the page has to know of the server."""
        return {
            "names": sorted(self.detector.category_names.values()),
            "formats": list(DOWNLOADS),
            "max_bytes": self.max_bytes,
            "page_pixels": PAGE_PIXELS,
        }

    def list_files(self) -> list[str]:
        """The names of the images in the folder."""
        return self.files.names()

    def thumbnail(self, name: str) -> bytes:
        """A small JPEG of an image in the folder."""
        return self.files.thumbnail(name)

    def open_file(self, name: str) -> dict:
        """Opens an image in the folder."""
        path = self.files.path(name)
        found = path.stat()
        identity = f"{path.resolve()} {found.st_size} {found.st_mtime_ns}"
        return self._open(identity.encode(), path, name)

    def open_upload(self, data: bytes, name: str) -> dict:
        """Opens the image that a file of this name has in it."""
        with tempfile.NamedTemporaryFile(prefix="maskpath-") as file:
            file.write(data)
            file.flush()
            return self._open(data, Path(file.name), name)

    def _open(self, identity: bytes, path: Path, name: str) -> dict:
        image = self.images.open(
            identity, lambda: read_page_image(path, name, max_pixels=self.max_pixels)
        )
        return {
            "id": image.image_id,
            "size": image.clickable.size,
            "original_size": image.original_size,
        }

    def status(self, image_id: str) -> dict:
        """How far the network is with an image, see `Task.ask`; it goes on as long as one asks."""
        return self._image(image_id).running.ask()

    def picture(self, image_id: str) -> bytes:
        """The image as a JPEG."""
        return self._image(image_id).jpeg

    def masks(self, image_id: str, x: float, y: float) -> list[dict]:
        """The masks at a point, see `ClickableImage.masks_at`."""
        self._proposals(image_id)
        found = self._image(image_id).clickable.masks_at(x, y)
        return describe_masks(found, contains=found.contain.tolist())

    def proposals(self, image_id: str) -> list[dict]:
        """All proposals, best first."""
        return describe_masks(self._proposals(image_id))

    def distinct(self, image_id: str, iou: float) -> list[int]:
        """The indices of the proposals that do not repeat a better one, by their masks' IoU."""
        if not 0 < iou <= 1:
            raise ValueError(f"iou must be above 0 and at most 1, got {iou}")
        return kept_by_nms(self._proposals(image_id), iou).tolist()

    def detect(self, image_id: str) -> dict:
        """Has the detector run on an image, once; how far it is, as `status`."""
        return self.images.detect(self._image(image_id)).ask()

    def detections(self, image_id: str) -> list[dict]:
        """What the detector found."""
        found = self._image(image_id).detections
        if found is None:
            raise Refusal(NOT_YET, "the detector has not run on this image")
        names = [self.detector.category_names[label] for label in found.labels.tolist()]
        return describe_masks(found, name=names)

    def download(self, body: bytes, format: str) -> tuple[bytes, str]:
        """A file of what a page has kept, see `read_kept`, and its name."""
        categories = self.detector.categories
        results = results_of_kept(read_kept(body), categories, max_pixels=self.max_pixels)
        return write_download(results, format)

    def _image(self, image_id: str) -> OpenedImage:
        image = self.images.get(image_id)
        if image is None:
            raise Refusal(GONE, "the server does not have this image any more")
        return image

    def _proposals(self, image_id: str) -> Proposals:
        image = self._image(image_id)
        if image.proposals is None:
            raise Refusal(NOT_YET, image.running.error or "the network still runs on this image")
        return image.proposals


def describe_masks(found: Proposals, **columns: list) -> list[dict]:
    """Masks for the page: score, box xyxy, RLE, and what the columns add to each."""
    boxes = found.boxes.round(1).tolist()
    counts = [rle.decode("ascii") for rle in found.rles]
    rows = zip(round_scores(found, SCORE_DIGITS), boxes, counts, *columns.values(), strict=True)
    names = ("score", "box", "counts", *columns)
    return [dict(zip(names, row, strict=True)) for row in rows]
