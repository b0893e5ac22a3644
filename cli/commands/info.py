"""``ctpipe info``: what this program can do, for programs and agents that call it."""

from __future__ import annotations

import re
from typing import Any

import typer

from cli.output import AsJson, Exit, emit, package_version

MEANINGS = {
    Exit.OK: "done",
    Exit.FAILED: "failed; the message on stderr has the remedy",
    Exit.USAGE: "usage error: an unknown command, option or value",
    Exit.QUARANTINED: "done, but some input was excluded; the result names it by key",
}
INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    def info(as_json: AsJson = False) -> int:
        """Print commands, options, defaults, formats, models and exit codes.

        Examples:

            ctpipe info

            ctpipe info --json
        """
        result = describe_program(app)
        names = ", ".join(command["name"] for command in result["commands"])
        emit(result, f"ctpipe {result['version']}\ncommands: {names}\nctpipe info --json has everything", as_json)
        return Exit.OK

    app.command("info")(info)


def describe_program(app: typer.Typer) -> dict[str, Any]:
    """Return everything that a caller of the command line needs, as plain JSON values."""
    from pipeline.workflows import formats, models

    group: Any = typer.main.get_command(app)
    return {
        "version": package_version(),
        "options": [describe_parameter(parameter) for parameter in group.params],
        "commands": [row for name in sorted(group.commands) for row in describe_command(name, group.commands[name])],
        "exit_codes": [
            *({"code": int(code), "meaning": meaning} for code, meaning in MEANINGS.items()),
            {"code": INTERRUPTED, "meaning": "interrupted; the same command resumes"},
        ],
        "formats": formats(),
        "models": models(),
    }


def describe_command(name: str, command: Any) -> list[dict[str, Any]]:
    """Return a command, and the commands below it where it is a group."""
    text, examples = split_help(command.help or "")
    found = [
        {
            "name": name,
            "help": text,
            "examples": examples,
            "parameters": [describe_parameter(parameter) for parameter in command.params],
        }
    ]
    for inner, below in sorted(getattr(command, "commands", {}).items()):
        found += describe_command(f"{name} {inner}", below)
    return found


def split_help(text: str) -> tuple[str, list[str]]:
    """Return a command's help without its examples, and the examples."""
    examples = re.findall(r"^ +((?:\w+=\S+ )*ctpipe .+)$", text, re.MULTILINE)
    return re.split(r"^Examples?:", text, flags=re.MULTILINE)[0].strip(), examples


def describe_parameter(parameter: Any) -> dict[str, Any]:
    """Return an argument or option: names, type, default, bounds and help."""
    described = getattr(parameter, "type_descriptor", None)
    kind = described.annotation.__name__ if described is not None else parameter.type.name
    found = {
        "kind": parameter.param_type_name,
        "names": [*parameter.opts, *parameter.secondary_opts],
        "type": "flag" if getattr(parameter, "is_flag", False) else kind.lower(),
        "required": bool(parameter.required),
        "multiple": bool(parameter.multiple) or parameter.nargs != 1,
        "default": parameter.default if isinstance(parameter.default, bool | int | float | str) else None,
        "help": getattr(parameter, "help", None) or "",
    }
    bounds = {name: getattr(parameter, name, None) for name in ("min", "max")}
    return found | {name: bound for name, bound in bounds.items() if bound is not None}
