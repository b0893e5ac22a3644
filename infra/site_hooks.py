"""MkDocs hooks: pages made from the code, so that none is kept by hand.

``reference/commands.md`` comes from the typer commands, ``api/`` from each room's ``__init__.pyi``, ``decisions/`` from
the folder beside this file.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "diffusion", "latentcache")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation's places ``api/`` and ``decisions/`` with the pages that are generated."""
    config.nav = [_filled(entry) for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in generated().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Name the theme's search dialog for screen readers."""
    dialog = 'data-md-component="search" role="dialog"'
    return output.replace(dialog, f'{dialog} aria-label="Search"')


def generated() -> dict[str, str]:
    """Return every generated page's Markdown by its path."""
    pages = {"reference/commands.md": commands_page(), "api/ctpipe.md": _public_page()}
    pages |= {f"api/{room}.md": room_page(room) for room in rooms()}
    return pages | {f"decisions/{path.name}": path.read_text() for path in _decisions()}


def _filled(entry: Any) -> Any:
    if isinstance(entry, dict) and "api/" in entry.values():
        return {next(iter(entry)): ["api/ctpipe.md", *(f"api/{room}.md" for room in rooms())]}
    if isinstance(entry, dict) and "decisions/" in entry.values():
        return {next(iter(entry)): [f"decisions/{path.name}" for path in _decisions()]}
    return entry


def _decisions() -> list[Path]:
    return sorted((ROOT / "infra" / "decisions").glob("*.md"))


def rooms() -> list[str]:
    """Return the dotted names of packages and rooms that state what they export."""
    stubs = [stub for package in PACKAGES for stub in sorted((ROOT / package).rglob("__init__.pyi"))]
    return [".".join(stub.parent.relative_to(ROOT).parts) for stub in stubs]


def room_page(room: str) -> str:
    """Return a room's page: its docstring, then every exported name where it is defined."""
    folder = ROOT.joinpath(*room.split("."))
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    lines = [f"# {room}", "", docstring, ""]
    for home, name in exports(room):
        lines += [f"::: {home}.{name}", ""]
    return "\n".join(lines)


def exports(room: str) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of what a room's stub exports from its own modules; other rooms have pages of their own."""
    stub = ROOT.joinpath(*room.split("."), "__init__.pyi")
    for statement in ast.parse(stub.read_text()).body:
        if not isinstance(statement, ast.ImportFrom) or statement.level != 1 or statement.module is None:
            continue
        home = f"{room}.{statement.module}"
        if not (ROOT.joinpath(*home.split(".")) / "__init__.pyi").exists():
            yield from ((home, alias.name) for alias in statement.names)


def _public_page() -> str:
    sys.path.insert(0, str(ROOT))
    import ctpipe

    lines = ["# ctpipe", "", str(ctpipe.__doc__).split("::")[0] + ":", ""]
    for home, names in ctpipe.HOMES.items():
        lines += [f"- from [`{home}`]({home}.md): " + ", ".join(f"`{name}`" for name in names)]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """Return the command reference, from what ``ctpipe info --json`` prints."""
    sys.path.insert(0, str(ROOT))
    from cli.commands.info import describe_program
    from cli.main import app

    found = describe_program(app)
    lines = ["# Commands", "", "Made from the commands themselves. Exit codes of every command:", ""]
    lines += [f"- {code['code']}: {code['meaning']}" for code in found["exit_codes"]]
    for command in found["commands"]:
        lines += ["", f"## ctpipe {command['name']}", "", command["help"], ""]
        if command["examples"]:
            lines += ["```bash", *command["examples"], "```", ""]
        lines += ["| | type | default | |", "|---|---|---|---|"]
        lines += [_row(parameter) for parameter in command["parameters"]]
    return "\n".join(lines) + "\n"


def _row(parameter: dict[str, Any]) -> str:
    default = "required" if parameter["required"] else _spelled(parameter["default"])
    names = ", ".join(f"`{name}`" for name in parameter["names"])
    return f"| {names} | {parameter['type']} | {default} | {parameter['help'].replace('|', '&#124;')} |"


def _spelled(default: Any) -> str:
    return "" if default is None or default is False or default == [] else f"`{default}`"
