"""Options inside of an S3 URL, as a store's own files might hold them, never decide which host is asked."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest

from latentcache import CtpipeError
from latentcache.storage import open_location
from pipeline.archive import open_archive

OPTIONS = [
    "?endpoint={trap}",
    "?endpoint_url={trap}",
    "?aws_endpoint={trap}&aws_allow_http=true",
    "?aws_endpoint_url={trap}&allow_http=true",
    "?proxy_url={trap}",
    "#endpoint={trap}",
    ";endpoint={trap}",
    "?X-Amz-Endpoint={trap}",
]


@pytest.fixture
def trap() -> Iterator[tuple[str, list[str]]]:
    """A listening port that notes every caller; what must not be asked."""
    callers: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        done = threading.Event()

        def answer() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = listening.accept()
                    callers.append(connection.recv(200).decode("latin-1").partition("\r\n")[0])
                    connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", callers
        done.set()
        thread.join()


@pytest.fixture(autouse=True)
def real_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The endpoint of the user's environment: it refuses everything, and it is the only one that may be asked."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        done = threading.Event()

        def refuse() -> None:
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = listening.accept()
                    asked.append(connection.recv(2000).decode("latin-1").partition("\r\n")[0])
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    connection.close()

        thread = threading.Thread(target=refuse)
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield asked
        done.set()
        thread.join()


@pytest.mark.parametrize("options", OPTIONS)
def test_an_archives_url_asks_only_the_users_endpoint(
    options: str, trap: tuple[str, list[str]], real_endpoint: list[str]
) -> None:
    where, callers = trap
    for url in (
        "s3://bucket/a.zip" + options.format(trap=where),
        f"s3://bucket{options.format(trap=where)}/a.zip",
        f"s3://user:word@{where.removeprefix('http://')}/a.zip",
    ):
        with pytest.raises(CtpipeError):
            open_archive(url)
    assert callers == []


@pytest.mark.parametrize("options", OPTIONS)
def test_a_stores_url_asks_only_the_users_endpoint(
    options: str, trap: tuple[str, list[str]], real_endpoint: list[str]
) -> None:
    where, callers = trap
    for url in ("s3://bucket/store" + options.format(trap=where), f"s3://bucket{options.format(trap=where)}"):
        with pytest.raises(CtpipeError):
            open_location(url).read("store.json")
    assert callers == []
