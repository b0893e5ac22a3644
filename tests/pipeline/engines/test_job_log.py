"""Structured logs: every line is JSON with keys and figures, from the driver and from the workers, and no free text."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from latentcache import InputError
from pipeline.engines import EngineOptions, Stage, job_log as log_lines, stream

LOG = logging.getLogger("ctpipe.test")
SECRET = "DOE^JANE"


@dataclass(frozen=True)
class Task:
    name: str


@pytest.fixture(autouse=True)
def plain_again() -> Iterator[None]:
    """Logging as it was: the process of the tests must not keep our handler."""
    root, ours = logging.getLogger(), logging.getLogger(log_lines.OURS)
    library = logging.getLogger("pydicom")  # which a service in this process may have silenced
    handlers, level, library_level = root.handlers[:], ours.level, library.level
    library.setLevel(logging.NOTSET)
    yield
    root.handlers[:] = handlers
    ours.setLevel(level)
    library.setLevel(library_level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_an_event_is_one_line_of_keys_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    log_lines.start()
    log_lines.start()
    log_lines.note(LOG, "stage", series_key="0123456789abcdef", stage="vae", seconds=1.25)
    (line,) = lines(capsys)
    assert {"time", "level", "event", "series_key", "stage", "seconds", "node", "process", "logger"} == set(line)
    assert (line["event"], line["series_key"], line["seconds"]) == ("stage", "0123456789abcdef", 1.25)
    assert line["time"].endswith("+00:00")


def test_what_could_be_a_name_is_withheld(capsys: pytest.CaptureFixture[str]) -> None:
    log_lines.start(debug=True)
    log_lines.note(LOG, "odd", logging.WARNING, f"for people: {SECRET}", patient=SECRET, path=f"/data/{SECRET}.zip")
    logging.getLogger("pydicom").warning("Invalid value for VR PN: %s", SECRET)
    try:
        raise ValueError(SECRET)
    except ValueError:
        LOG.exception("a worker failed")
    odd, library, failure = lines(capsys)
    assert SECRET not in json.dumps([odd, library, failure])
    assert odd["patient"] == odd["path"] == log_lines.WITHHELD
    assert (library["event"], library["logger"]) == ("library", "pydicom")
    assert (failure["error"], failure["message"]) == ("ValueError", "a worker failed")


def test_people_read_the_text(caplog: pytest.LogCaptureFixture) -> None:
    log_lines.note(LOG, "set_aside", logging.WARNING, "task set aside: too few slices", outcome="InputError")
    assert caplog.messages == ["task set aside: too few slices"]
    assert not log_lines.active()


def test_only_keys_are_keys() -> None:
    assert log_lines.key_of(Task("0123456789abcdef")) == "0123456789abcdef"
    assert log_lines.key_of(Task("patient one")) == ""
    assert log_lines.key_of(7) == ""


def prepare(task: Task) -> Task:
    if task.name.endswith("5"):
        raise InputError("a broken series", expected="a whole one", remedy="Export it again.")
    return task


def test_the_engine_tells_each_stage_of_each_series(capsys: pytest.CaptureFixture[str]) -> None:
    log_lines.start()
    stage = Stage(prepare=prepare, setup=lambda device: device, run=lambda state, task: task.name)
    list(stream([Task(f"{n:016x}") for n in range(8)], stage, EngineOptions()))
    told = [(line["series_key"], line["stage"], line["outcome"]) for line in lines(capsys) if line["event"] == "stage"]
    good = [f"{n:016x}" for n in range(8) if n != 5]
    assert sorted(told) == sorted(
        [(key, stage, "ok") for key in good for stage in ("prepare", "run")] + [(f"{5:016x}", "prepare", "InputError")]
    )


@pytest.mark.parametrize("how", ["option", "environment"])
def test_the_command_line_logs_json_alone(how: str, tmp_path: Path) -> None:
    words = ["--log-json"] if how == "option" else []
    environment = {**os.environ, **({log_lines.ENVIRONMENT: "json"} if how == "environment" else {})}
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words, "status", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1
    (line,) = [json.loads(line) for line in done.stderr.splitlines()]
    assert (line["level"], line["logger"]) == ("error", "ctpipe.main")
    assert "there is no store" in line["message"]
