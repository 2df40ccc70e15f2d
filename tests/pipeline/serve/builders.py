"""A page's service with tiny networks, clients that talk to it, and images for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from fastapi.testclient import TestClient

from pipeline.inference.detect import Detector, load_detector
from pipeline.inference.propose import Proposer, load_proposer
from pipeline.serve.app import create_app
from pipeline.serve.folder import ServedFiles
from pipeline.serve.guard import Guard
from pipeline.serve.service import Service

CPU = torch.device("cpu")
MAX_PIXELS = 200_000


def load_networks(sharpmask: Path, detector: Path) -> tuple[Proposer, Detector]:
    return load_proposer(sharpmask, CPU)[0], load_detector(detector, CPU)[0]


def random_image(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    """(H, W, 3) uint8 RGB of large random blocks."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


@contextmanager
def client_of(
    networks: tuple[Proposer, Detector],
    folder: list[Path] | None = None,
    token: str | None = None,
    **limits: int,
) -> Iterator[TestClient]:
    limits = {"max_pixels": MAX_PIXELS} | limits
    files = ServedFiles(folder or [], max_pixels=limits["max_pixels"])
    app = Guard(create_app(Service(*networks, files, **limits)), token=token)
    with TestClient(app, base_url="http://localhost:8000") as client:
        yield client


def upload(client: TestClient, image: np.ndarray, name: str = "a.png") -> dict:
    answer = client.post("/api/images", params={"name": name}, content=png(image))
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_for(client: TestClient, path: str, method: str = "GET") -> None:
    """Asks until a task has ended well."""
    for _ in range(600):
        status = client.request(method, path).json()
        if status["state"] != "running":
            break
        time.sleep(0.02)
    assert status == {"state": "done", "progress": 1.0, "error": ""}


def open_and_wait(client: TestClient, image: np.ndarray, name: str = "a.png") -> str:
    """The path of an image that the network has run over."""
    path = f"/api/images/{upload(client, image, name)['id']}"
    wait_for(client, path)
    return path


def error_of(answer) -> str:
    """The one line of a refusal."""
    content = answer.json()
    assert list(content) == ["error"] and "\n" not in content["error"] and content["error"]
    return content["error"]
