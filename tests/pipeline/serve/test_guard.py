"""Who is let in: this machine's own pages, or who has the token."""

import socket

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from pipeline.serve.guard import Guard, is_loopback
from pipeline.serve.run import choose_token, listen

TOKEN = "a-long-token"


def client_of(token: str | None, base_url: str) -> TestClient:
    app = FastAPI()
    app.add_api_route("/api/x", lambda: "in", methods=["GET", "POST"])
    return TestClient(Guard(app, token=token), base_url=base_url)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:9", "[::1]:80", "127.9.9.9"]
)
def test_names_of_this_machine_are_let_in(host):
    assert client_of(None, "http://localhost").get("/api/x", headers={"host": host}).text == '"in"'


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "[", "192.168.0.1"]
)
def test_a_domain_that_points_here_is_not(host):
    """DNS rebinding: the page of a domain whose name was made to mean 127.0.0.1."""
    answer = client_of(None, "http://localhost").get("/api/x", headers={"host": host})
    assert answer.status_code == 403 and "localhost" in answer.json()["error"]


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://localhost:8000", 200), (None, 200), ("http://localhost:9000", 403),
     ("https://evil.example", 403), ("null", 403)],
)  # fmt: skip
def test_what_changes_something_comes_from_the_page_itself(origin, status):
    client = client_of(None, "http://localhost:8000")
    headers = {} if origin is None else {"origin": origin}
    assert client.post("/api/x", headers=headers).status_code == status
    assert client.get("/api/x", headers=headers).status_code == 200


def test_with_a_token_every_request_needs_it():
    client = client_of(TOKEN, "http://192.168.0.1:8000")
    for path in ("/api/x", "/", "/page.js", f"/api/x?token={TOKEN}x", "/api/x?token="):
        for headers in ({}, {"authorization": "Bearer other"}, {"cookie": "maskpath_token=other"}):
            answer = client.get(path, headers=headers)
            assert answer.status_code == 403 and "?token=" in answer.json()["error"]
            assert "set-cookie" not in answer.headers
    assert client.get("/api/x", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    answer = client.get(f"/api/x?token={TOKEN}")
    assert answer.status_code == 200
    assert {"HttpOnly", "SameSite=Strict"} <= set(answer.headers["set-cookie"].split("; "))
    assert client.get("/api/x").status_code == 200  # by the cookie
    assert client.post("/api/x", headers={"origin": "http://evil.example"}).status_code == 403


def test_a_token_is_made_where_others_can_reach_the_server():
    assert choose_token("127.0.0.1", None) is None and choose_token("localhost", "x") == "x"
    made = {choose_token("0.0.0.0", None) for _ in range(3)}
    assert len(made) == 3 and min(map(len, made)) >= 32
    for wrong in ("", "two words", "a;b", "é"):
        with pytest.raises(ValueError, match="--token"):
            choose_token("0.0.0.0", wrong)
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "localhost.example")))


def test_an_address_that_is_taken_is_one_line():
    with listen("127.0.0.1", 0) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}: .*in use"):
            listen("127.0.0.1", port)
    with pytest.raises(ValueError, match="--port 99999"):
        listen("127.0.0.1", 99999)
    assert isinstance(server, socket.socket)
