"""What the page asks for is what the networks say; requests that make no sense are one line."""

import sys

import numpy as np
import pytest
from fastapi.testclient import TestClient

from pipeline.inference.clicks import ClickableImage
from pipeline.inference.nms import mask_nms
from pipeline.serve import images
from tests.pipeline.serve.builders import (
    MAX_PIXELS,
    client_of,
    error_of,
    open_and_wait,
    png,
    random_image,
    upload,
    wait_for,
)

SIZE = {"size": [96, 128], "original_size": [96, 128]}


@pytest.fixture(scope="module")
def client(networks):
    with client_of(networks) as client:
        yield client


def rles(answer) -> list[str]:
    return [mask["counts"] for mask in answer.json()]


def texts(found) -> list[str]:
    return [rle.decode() for rle in found.rles]


def test_answers_are_those_of_the_networks(client, networks):
    proposer, detector = networks
    image = random_image(1)
    path = open_and_wait(client, image)
    expected = proposer(image)
    assert rles(client.get(f"{path}/proposals")) == texts(expected) != []
    distinct = client.get(f"{path}/distinct", params={"iou": 0.5}).json()
    assert [texts(expected)[i] for i in distinct] == texts(mask_nms(expected, 0.5))
    clickable = ClickableImage(proposer, image)
    assert list(clickable.run())
    for x, y in ((64, 48), (3.5, 90), (127.9, 0)):
        masks, at_point = (
            client.get(f"{path}/masks", params={"x": x, "y": y}),
            clickable.masks_at(x, y),
        )
        assert rles(masks) == texts(at_point) != []
        assert [mask["contains"] for mask in masks.json()] == at_point.contain.tolist()
    assert client.get(f"{path}/masks?x=-1&y=5").json() == []
    assert client.get(f"{path}/masks?x=nan&y=5").json() == []
    wait_for(client, f"{path}/detections", "POST")
    detections, found = client.get(f"{path}/detections").json(), detector(image, expected)
    assert [each["counts"] for each in detections] == texts(found) != []
    names = [detector.category_names[label] for label in found.labels]
    assert [each["name"] for each in detections] == names


def test_two_images_do_not_disturb_each_other(client, networks):
    """Both run at once, and each answers for itself."""
    pictures = [random_image(seed, 90, 120) for seed in (2, 3)]
    paths = [f"/api/images/{upload(client, each)['id']}" for each in pictures]
    for path in paths:
        client.post(f"{path}/detections")
    for path in paths:
        wait_for(client, path)
        wait_for(client, f"{path}/detections", "POST")
    for _ in range(2):
        for path, picture in zip(paths, pictures, strict=True):
            assert rles(client.get(f"{path}/proposals")) == texts(networks[0](picture))


def test_a_file_opened_again_is_the_same_image(client):
    first, again = (upload(client, random_image(1), name) for name in ("a.png", "b.png"))
    assert first == again and {**first, "id": 0} == {**SIZE, "id": 0}
    assert upload(client, random_image(4))["id"] != first["id"]


def test_images_give_way_to_others_and_come_back(networks):
    with client_of(networks, kept_bytes=1) as client:
        first = open_and_wait(client, random_image(1))
        masks = client.get(f"{first}/proposals").json()
        other = open_and_wait(client, random_image(2))
        answer = client.get(f"{first}/masks?x=5&y=5")
        assert answer.status_code == 404 and "any more" in error_of(answer)
        assert client.get(f"{other}/masks?x=5&y=5").status_code == 200
        assert open_and_wait(client, random_image(1)) == first
        assert client.get(f"{first}/proposals").json() == masks


def test_a_large_image_is_reduced_for_the_page(client, monkeypatch):
    monkeypatch.setattr(images, "PAGE_PIXELS", 5000)
    found = upload(client, random_image(5, 100, 200))
    assert found["original_size"] == [100, 200] and found["size"] == [50, 100]
    picture = client.get(f"/api/images/{found['id']}/picture")
    assert picture.headers["content-type"] == "image/jpeg" and len(picture.content) > 500


def test_before_the_network_has_run_there_is_no_answer(networks):
    with client_of(networks) as client:
        client.app.app.state.service.worker.close()
        path = f"/api/images/{upload(client, random_image(1))['id']}"
        assert client.get(path).json()["state"] == "running"
        for end in ("masks?x=1&y=1", "proposals", "distinct?iou=.5", "detections"):
            answer = client.get(f"{path}/{end}")
            assert answer.status_code == 409 and "run" in error_of(answer)


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"no image", 422, "bad.png: not an image"),
        (b"", 422, "bad.png: the file is empty"),
        (png(random_image(0))[:-20], 422, "bad.png: the image is truncated"),
        (
            png(np.zeros((500, MAX_PIXELS // 500 + 1, 3), np.uint8)),
            422,
            "bad.png: 401 x 500 pixels",
        ),
    ],
    ids=["text", "empty", "truncated", "pixels"],
)
def test_a_file_that_cannot_be_used_is_one_line(client, data, status, words):
    answer = client.post("/api/images", params={"name": "bad.png"}, content=data)
    assert answer.status_code == status and words in error_of(answer)
    assert "/tmp" not in answer.text


def send_in_parts(client: TestClient, path: str):
    """Without a Content-Length: the limit holds for what really comes."""
    return client.post(path, content=(bytes(600) for _ in range(3)))


@pytest.mark.parametrize("path", ["/api/images", "/api/downloads/coco"])
def test_too_many_bytes_are_not_read(networks, path):
    with client_of(networks, max_bytes=1000) as client:
        for answer in (client.post(path, content=bytes(1001)), send_in_parts(client, path)):
            assert answer.status_code == 413 and "1,000 bytes (--max-bytes)" in error_of(answer)
        assert client.post(path, content=bytes(1000)).status_code == 422


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/images/0123", 404),
        ("/api/images/0123/masks?x=1&y=1", 404),
        ("/api/images/0123/masks?x=1", 422),
        ("/api/images/0123/masks?x=one&y=1", 422),
        ("/api/images/0123/distinct?iou=2", 422),
        ("/api/nothing", 404),
        ("/../service.py", 404),
        ("/%2e%2e/service.py", 404),
        ("/static/../../service.py", 404),
    ],
)
def test_requests_that_make_no_sense_are_one_line(client, path, status):
    answer = client.get(path)
    assert answer.status_code == status
    error_of(answer)


def test_without_fastapi_a_line_says_what_to_install(networks, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ValueError, match="pip install fastapi uvicorn"), client_of(networks):
        pass


def test_the_page_is_served_with_what_it_needs_and_loads_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "https://" not in page.text
    for name in ("page.css", "page.js", "stage.js", "panels.js", "kept.js", "mask.js", "server.js"):
        content = client.get(f"/{name}")
        assert content.status_code == 200
        assert len(content.text.splitlines()) <= 400
