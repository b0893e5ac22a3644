"""Health and figures over HTTP: /health, /ready, and /metrics in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from latentcache import InputError
from pipeline.serve.config import MonitoringConfig

log = logging.getLogger("ctpipe.serve")


State = Callable[[], Mapping[str, Any]]
"""Function that returns the service's knowledge of itself; see ``Service.state``."""


_HELP = {
    "studies": "Studies by state.",
    "deliveries": "Deliveries by destination and state.",
    "oldest_waiting_seconds": "Age of the oldest study that is not finished.",
    "spool_bytes": "Bytes of images kept.",
    "disk_free_bytes": "Free bytes where images are kept.",
    "associations": "Associations open now.",
    "healthy": "1 while every part of the service works.",
}


def prometheus_text(state: Mapping[str, Any]) -> str:
    """Return the figures in Prometheus' text format; label values are the configuration's own names."""
    lines: list[str] = []

    def metric(name: str, kind: str, values: Mapping[tuple[tuple[str, str], ...], float], about: str) -> None:
        lines.append(f"# HELP ctpipe_serve_{name} {about}")
        lines.append(f"# TYPE ctpipe_serve_{name} {kind}")
        for labels, value in values.items():
            inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
            lines.append(f"ctpipe_serve_{name}{'{' + inner + '}' if inner else ''} {value:g}")

    metric("studies", "gauge", {(("state", s),): n for s, n in state["studies"].items()}, _HELP["studies"])
    deliveries: dict[tuple[tuple[str, str], ...], float] = {
        (("destination", name), ("state", s)): n
        for name, by_state in state["deliveries"].items()
        for s, n in by_state.items()
    }
    metric("deliveries", "gauge", deliveries, _HELP["deliveries"])
    for name in ("oldest_waiting_seconds", "spool_bytes", "disk_free_bytes", "associations"):
        metric(name, "gauge", {(): float(state[name])}, _HELP[name])
    metric("healthy", "gauge", {(): float(not state["problems"])}, _HELP["healthy"])
    for name, value in sorted(state["counters"].items()):
        metric(f"{name}_total", "counter", {(): value}, f"Since the state folder was made: {name.replace('_', ' ')}.")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class Monitoring:
    """A small HTTP server. It tells figures, keys and names of the configuration, and takes nothing."""

    def __init__(self, config: MonitoringConfig, state: State) -> None:
        class Handler(_Handler):
            read_state = staticmethod(state)

        try:
            self._server = ThreadingHTTPServer((config.host, config.port), Handler)
        except OSError as error:
            raise InputError(
                f"port {config.port} cannot be listened on ({error.strerror})",
                expected="a free port",
                remedy="Change monitoring.port.",
            ) from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    read_state: State
    timeout = 10.0
    server_version = "ctpipe"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer one of the three addresses."""
        path = self.path.partition("?")[0]
        if path not in ("/health", "/ready", "/metrics"):
            self._answer(404, "text/plain", "/health, /ready and /metrics are all there is\n")
            return
        state = type(self).read_state()
        problems = state["problems"]
        if path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4; charset=utf-8", prometheus_text(state))
        elif path == "/ready":
            ready = not problems
            self._answer(200 if ready else 503, "application/json", json.dumps({"ready": ready, "problems": problems}))
        else:
            alive = not state["dead"]
            shown = {"healthy": not problems, "problems": problems, "studies": state["studies"]}
            self._answer(200 if alive else 503, "application/json", json.dumps(shown))

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: a scrape every few seconds is no event."""
