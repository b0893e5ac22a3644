"""The README and the documentation pages: their commands and Python run as they stand, on a small phantom archive.

Commands run in process, in the order of the page. What makes them small enough for a test (image size, steps) is added
by ``small``; nothing else is changed. Pages that need a cluster or a service are parsed by the command line itself
instead, so that a command, option or argument that is not there is found. Programs other than ctpipe are not run.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from cli.main import app
from tests.support.small_site import BRIEF, Phantoms

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "infra" / "docs"

SEQUENCES = {
    "README": [ROOT / "README.md"],
    "quickstart": [DOCS / "quickstart.md"],
    "how-to": [DOCS / "how-to" / name for name in ("build-a-cache.md", "train.md", "evaluate.md", "thin-one-study.md")]
    + [DOCS / "store-format.md"],
}
PARSED = [
    DOCS / name
    for name in ("how-to/run-on-ray.md", "how-to/run-on-kubernetes.md", "how-to/measure-on-a-gpu.md", "serve.md")
]
OTHER_PROGRAMS = {"python", "pip", "ray", "docker", "kubectl", "make"}

NETWORK = ["model.width=8", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.groups=4", "model.heads=2",
           "model.time_embedding=16", "data.readers=0", "optimiser.samples_per_step=2", *BRIEF]  # fmt: skip
SMALL = {
    "phantom": ["--size", "32", "--thin-slices", "36"],
    "ingest": ["--workers", "1"],
    **{key: ["--threads", "1"] for key in ("encode", "decode", "evaluate")},
    "train": [word for setting in NETWORK for word in ("--set", setting)],
    "train-regression": ["--width", "8", "--blocks", "1", "--patch", "10,16,16"],
}
STEPS = ["--max-steps", "2"]


def small(words: list[str]) -> list[str]:
    """A command with what makes it small; of an option that is given twice the last counts."""
    more = [*SMALL.get(words[0], [])]
    if words[0] == "train" and "--max-steps" not in words:
        more += STEPS
    if words[0] == "train-regression" and "--seconds" in words:
        more += ["--seconds", "2"]
    return [*words, *more]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Fenced blocks of a page: (language, text)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every ctpipe command of a shell block."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    found = [words for words in lines if words]
    assert all(words[0] in OTHER_PROGRAMS | {"ctpipe"} for words in found), found
    return [words[1:] for words in found if words[0] == "ctpipe"]


def parse(words: list[str]) -> None:
    """Let the command line parse a command without running it; raises a usage error."""
    group: Any = typer.main.get_command(app)
    with group.make_context("ctpipe", list(words)) as whole:
        name, command, rest = group.resolve_command(whole, [*whole._protected_args, *whole.args])
        with command.make_context(name, rest, parent=whole):
            pass


@pytest.fixture(scope="module")
def archive(phantoms: Phantoms) -> Path:
    """Four phantom patients, as a hospital's export would be."""
    return phantoms(4, 32, 36)


@pytest.mark.parametrize("name", SEQUENCES)
def test_commands_and_python_run_as_they_stand(
    name: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if name != "quickstart":
        shutil.copytree(archive, tmp_path / "archive")
        shutil.copy(next(archive.rglob("*.zip")), tmp_path / "thick.zip")
    ran = 0
    for page in SEQUENCES[name]:
        for language, text in blocks(page):
            if language == "python":
                exec(compile(text, page.name, "exec"), {"__name__": "__main__"})
                assert capsys.readouterr().out
                ran += 1
            for words in commands(text) if language == "bash" else []:
                code = app(small(words), standalone_mode=False)
                assert code in (0, None), f"{page.name}: ctpipe {shlex.join(words)} ended with {code}"
                ran += 1
    assert ran >= 3


@pytest.mark.parametrize("page", PARSED, ids=lambda page: page.stem)
def test_pages_that_need_a_cluster_or_a_service_are_accepted_by_the_command_line(page: Path) -> None:
    found = [words for language, text in blocks(page) if language == "bash" for words in commands(text)]
    found += [
        shlex.split(line, comments=True)[1:]
        for line in re.findall(r"^ {4}(ctpipe .+)$", page.read_text(), re.MULTILINE)
    ]
    assert found
    for words in found:
        parse(words)


def test_every_how_to_page_is_run_or_parsed() -> None:
    covered = {page for pages in SEQUENCES.values() for page in pages} | set(PARSED)
    assert set((DOCS / "how-to").glob("*.md")) <= covered


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=lambda page: page.stem)
def test_commands_mentioned_in_the_text_exist(page: Path) -> None:
    """Command and options of inline code such as `ctpipe gc STORE`; the words in capitals are the reader's."""
    group: Any = typer.main.get_command(app)
    for mentioned in re.findall(r"`ctpipe ([a-z][^`]*)`", page.read_text()):
        name, *rest = shlex.split(mentioned)
        assert name in group.commands, mentioned
        options = {option for parameter in group.commands[name].params for option in parameter.opts} | {"--help"}
        assert {word for word in rest if word.startswith("-")} <= options, mentioned


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_pages_keep_their_length() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    decisions = sorted((ROOT / "infra" / "decisions").glob("*.md"))
    assert {page.name for page in decisions if len(page.read_text().splitlines()) > 80} == set()
