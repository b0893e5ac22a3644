"""The house stays in order: what ``infra/house.py`` counts is nothing."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("house", ROOT / "infra" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["house"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def house(script: Any) -> Any:
    return script.count()


@pytest.mark.parametrize(
    "rule",
    [
        "full_folders",
        "long_commands",
        "long_functions",
        "long_parameter_lists",
        "circles",
        "into_rooms",
        "untested",
        "unneeded_exceptions",
    ],
)
def test_the_rule_holds(house: Any, rule: str) -> None:
    assert getattr(house, rule) == []


RENAMES = {
    "diffusion.runs.checkpoint": "checkpoints are folders of synced files; `last` and `best` are links",
    "pipeline.serve.worker": "moves a folder that `interpolate` wrote and synced",
}
"""Modules outside `latentcache.storage` that rename by themselves, with the reason."""


def test_files_appear_whole_through_one_module(script: Any) -> None:
    """Whoever writes a file aside and renames it does so through `latentcache.storage`, which syncs."""
    renaming = re.compile(r"\bos\.(replace|rename)\(|aside\.replace\(|mkstemp|NamedTemporaryFile")
    modules = [module for module in script.modules() if not module.name.startswith("latentcache.storage.")]
    assert {module.name for module in modules if renaming.search(module.path.read_text())} == set(RENAMES)


def test_every_exception_names_a_test_that_is_there(script: Any) -> None:
    lines = [line for line in script.UNTESTED.read_text(encoding="utf-8").splitlines() if line[:1] not in ("", "#")]
    for line in lines:
        named = re.findall(r"tests/\S+\.py", line)
        assert named, f"{line}: name the test that covers it"
        assert all((ROOT / path).is_file() for path in named), line


def test_a_long_list_of_parameters_is_seen_and_a_kernel_is_none(script: Any) -> None:
    """The rules can fail: nine parameters are too many, except for a Triton kernel."""
    import ast

    many = ", ".join("abcdefghi")
    plain, kernel = ast.parse(f"def f({many}): ...\n@triton.jit\ndef g({many}): ...").body
    assert script.parameters(plain) == 9
    assert not script.is_kernel(plain)
    assert script.is_kernel(kernel)


def test_a_long_command_is_seen_with_the_helpers_it_uses(script: Any) -> None:
    """The rule can fail: a command's lines are its own and those of what it calls in its file, and no other's."""
    import ast

    body = "\n".join("    pass" for _ in range(9))
    tree = ast.parse(
        "TEXT = 1\n"
        "def register(app):\n    app.command('a')(a)\n    app.command('b')(b)\n"
        f"def a():\n    helper(TEXT)\n"
        f"def helper(x):\n{body}\n"
        "def b():\n    pass\n"
    )
    assert dict(script.command_lines(tree)) == {"a": 13, "b": 2}


def test_a_name_is_followed_through_an_inner_room_to_its_file(script: Any) -> None:
    """An import from a room depends on the file that defines the name, although an inner room passes it on."""
    graph = script.edges(script.modules())
    assert "pipeline.workflows.interpolation.thick_study" in graph["pipeline.serve.worker"]
