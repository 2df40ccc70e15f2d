"""Only images in the folders are served, whatever name is asked for."""

import os

import pytest

from tests.pipeline.serve.builders import (
    client_of,
    error_of,
    png,
    random_image,
    wait_for,
)


@pytest.fixture
def folder(tmp_path):
    """Two images, a file that is none, and links: within the folder and out of it."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "a.png").write_bytes(png(random_image(1)))
    (folder / "more" / "b.png").write_bytes(png(random_image(2)))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("secret")
    (tmp_path / "secret.png").write_bytes(png(random_image(3)))
    (folder / "inside.png").symlink_to("a.png")
    (folder / "outside.png").symlink_to("../secret.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "c.png").write_bytes(png(random_image(3)))
    (folder / "out").symlink_to("../elsewhere")
    return folder


def test_the_images_are_listed_opened_and_have_thumbnails(networks, folder):
    with client_of(networks, [folder]) as client:
        names = client.get("/api/files").json()
        assert names == ["a.png", "broken.jpg", "inside.png", "more/b.png"]
        for name in ("a.png", "inside.png", "more/b.png"):
            answer = client.post("/api/files/open", params={"name": name})
            wait_for(client, f"/api/images/{answer.json()['id']}")
            thumbnail = client.get("/api/files/thumbnail", params={"name": name})
            assert thumbnail.content.startswith(b"\xff\xd8")
        for ask in (client.get, client.post):
            path = "thumbnail" if ask == client.get else "open"
            answer = ask(f"/api/files/{path}", params={"name": "broken.jpg"})
            assert answer.status_code == 422
            assert error_of(answer).startswith("broken.jpg: not an image")


def test_nothing_outside_is_served(networks, folder):
    inside = ["notes.txt", "out", "out/c.png", "outside.png", "", "."]
    above = ["../secret.png", "more/../../secret.png", str(folder.parent / "secret.png"), "a.png\0"]
    with client_of(networks, [folder]) as client:
        client.get("/api/files")
        for name in inside + above:
            for answer in (
                client.get("/api/files/thumbnail", params={"name": name}),
                client.post("/api/files/open", params={"name": name}),
            ):
                assert answer.status_code == 422 and "no such image" in error_of(answer)


def test_a_file_that_becomes_a_link_later_is_not_followed(networks, folder):
    with client_of(networks, [folder]) as client:
        assert "a.png" in client.get("/api/files").json()
        (folder / "a.png").unlink()
        os.symlink(folder.parent / "secret.png", folder / "a.png")
        answer = client.post("/api/files/open", params={"name": "a.png"})
        assert answer.status_code == 422 and "no such image" in error_of(answer)


def test_without_a_folder_there_are_no_files(networks):
    with client_of(networks) as client:
        assert client.get("/api/files").json() == []
        assert client.post("/api/files/open", params={"name": "/etc/hostname"}).status_code == 422
