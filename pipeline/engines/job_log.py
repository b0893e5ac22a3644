"""Structured logs: one JSON object per line on stderr, on the driver and on every worker, with keys and figures only.

A line says when (UTC), how grave, on which node and in which process, and what (``event``); what more an event has to
say are numbers and short words: ``series_key``, ``stage``, ``seconds``. A text that could be more than a key or a word
is withheld, and of libraries that are not ours only the name and the level are kept: their messages may quote a header.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import sys
from datetime import UTC, datetime
from typing import Any

ENVIRONMENT = "CTPIPE_LOG"
"""Environment variable that asks for JSON lines when it is ``json``; ``ctpipe --log-json`` does the same."""


OURS = "ctpipe"
WORD = re.compile(r"[A-Za-z0-9_.:+-]{0,64}")
KEY = re.compile(r"[0-9a-f]{16}")
WITHHELD = "withheld"
_FIELDS = "ctpipe_fields"


class JsonLine(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        ours = record.name.split(".")[0] == OURS
        fields: dict[str, Any] = getattr(record, _FIELDS, {})
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "node": platform.node(),
            "process": record.process,
        }
        if fields:
            line |= fields
        elif ours:
            line |= {"event": "message", "message": record.getMessage()}
        else:
            line |= {"event": "library"}
        if record.exc_info and record.exc_info[0] is not None:  # a traceback names files, and values
            line["error"] = record.exc_info[0].__name__
        return json.dumps(line)


class _Handler(logging.StreamHandler[Any]):
    """Ours, to be recognised; writes to whatever stderr is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def start(debug: bool = False) -> None:
    """Log JSON lines from here on in this process; calling it again only sets the level."""
    root = logging.getLogger()
    if not active():
        handler = _Handler()
        handler.setFormatter(JsonLine())
        for other in root.handlers[:]:
            root.removeHandler(other)
        root.addHandler(handler)
    logging.getLogger(OURS).setLevel(logging.DEBUG if debug else logging.INFO)


def active() -> bool:
    """Whether this process logs JSON lines; an engine asks so that its workers do the same."""
    return any(isinstance(handler, _Handler) for handler in logging.getLogger().handlers)


def note(log: logging.Logger, event: str, /, level: int = logging.INFO, text: str = "", **fields: float | str) -> None:
    """Log an event with its figures. ``text`` is what people read instead, where lines are not JSON."""
    if log.isEnabledFor(level):
        safe = {name: _safe(value) for name, value in fields.items()}
        words = " ".join([event, *(f"{name}={value}" for name, value in safe.items())])
        log.log(level, "%s", text or words, extra={_FIELDS: {"event": event, **safe}})


def key_of(item: Any) -> str:
    """The key that a task goes by, empty where it has none. Never anything that is not a key."""
    for name in ("name", "key", "pair_key", "series_key"):
        value = getattr(item, name, None)
        if isinstance(value, str) and KEY.fullmatch(value):
            return value
    return ""


def _safe(value: Any) -> float | str:
    if isinstance(value, (int, float)):
        return value
    return value if isinstance(value, str) and WORD.fullmatch(value) else WITHHELD
