"""``ctpipe models``: what ships, with card and hash; ``ctpipe models show NAME``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    models = typer.Typer()
    models.callback(invoke_without_command=True)(list_models)
    models.command("show")(show_model)
    app.add_typer(models, name="models")


def list_models(context: typer.Context, as_json: AsJson = False) -> int | None:
    """List the models that `ctpipe interpolate --model` takes by name.

    Examples:

        ctpipe models

        ctpipe models show default
    """
    if context.invoked_subcommand is not None:
        return None
    from pipeline.refiner import shipped_models

    found = [
        {"name": model.name, "sha256": model.sha256, "path": model.path, "card": model.card.raw}
        for model in shipped_models()
    ]
    emit({"models": found}, "\n".join(_line(row) for row in found), as_json)
    return Exit.OK


def show_model(
    name: Annotated[str, typer.Argument(help="A model's name, or the path of its weights.")], as_json: AsJson = False
) -> int:
    """Print a model's card: its data and their licences, what it was trained for, and the figures it reached.

    Example:

        ctpipe models show fast --json
    """
    from pipeline.refiner import load_pretrained

    model = load_pretrained(name)
    emit(dict(model.card.raw), "\n".join(_spelled(model.card.raw)), as_json)
    return Exit.OK


def _line(row: dict[str, Any]) -> str:
    card = row["card"]
    known = card["trained_for"]
    return (
        f"{row['name']:10s} {card.get('parameters', 0) / 1e6:.2f}M parameters, "
        f"{known['thickness_mm'][0]:g} to {known['thickness_mm'][1]:g} mm in, "
        f"{known['thin_spacing_mm'][0]:g} to {known['thin_spacing_mm'][1]:g} mm out, sha256 {row['sha256'][:12]}"
    )


def _spelled(card: Any, depth: int = 0) -> list[str]:
    """A card as indented lines."""
    space, lines = "  " * depth, []
    for key, value in card.items():
        name = str(key).replace("_", " ")
        if isinstance(value, dict):
            lines += [f"{space}{name}:", *_spelled(value, depth + 1)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{space}{name}:")
            for one in value:
                first, *rest = _spelled(one, depth + 2)
                lines += [f"{space}  - {first.strip()}", *rest]
        else:
            lines.append(f"{space}{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return lines
