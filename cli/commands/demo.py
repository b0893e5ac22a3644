"""``ctpipe demo``: the whole path on synthetic patients, as the commands a user would type."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import AsJson, Exit, emit, stderr
from cli.summaries import DEMO_METHODS, demo_text

REFINER = "default"
"""The shipped model whose slices the diffusion model starts from.

Its phantoms are numbers 0 to 9 (`infra/train_pretrained.py`), the demo's begin at 1001.
"""


def register(app: typer.Typer) -> None:
    def demo(
        out: Annotated[Path, typer.Argument(help="Folder to fill; it must be empty or a demo's own.")] = Path(
            "demo-out"
        ),
        patients: Annotated[int, typer.Option(min=4, help="Synthetic patients.")] = 20,
        size: Annotated[int, typer.Option(min=32, help="In-plane matrix size.")] = 192,
        slices: Annotated[int, typer.Option(min=36, help="Thin slices per patient.")] = 96,
        train_seconds: Annotated[float, typer.Option(min=1, help="Seconds of training the model.")] = 180.0,
        seed: Annotated[int, typer.Option(min=1, help="Seed of the patients and the training.")] = 1,
        as_json: AsJson = False,
    ) -> int:
        """Synthetic archive to thin-slice DICOM and a report, on this machine's CPU.

        Example:

            ctpipe demo demo-out
        """
        from pipeline.workflows import claim_folder

        claim_folder(out)
        result = run_demo(app, out, (patients, size, slices), train_seconds, seed)
        emit(result, demo_text(result, out), as_json)
        return Exit.OK

    app.command("demo")(demo)


def run_demo(
    app: typer.Typer, out: Path, phantoms: tuple[int, int, int], train_seconds: float, seed: int
) -> dict[str, Any]:
    """Run the commands one after the other; returns what is in metrics.json.

    Args:
        phantoms: Patients, in-plane size and thin slices.
    """
    from latentcache.storage import write_text
    from pipeline.workflows import demo_figures

    started = time.monotonic()
    data, store, run, dicom = out / "archive", out / "store", out / "run", out / "dicom"
    patients, size, slices = phantoms
    steps: list[list[Any]] = [
        ["phantom", data, "--patients", patients, "--size", size, "--thin-slices", slices, "--seed", seed],
        ["interpolate", lambda: sorted(data.rglob("*.zip"))[0], out / "at-once", "--model", "fast"],
        ["ingest", data, store],
        ["encode", store, "--vae", "tiny", "--refiner", REFINER],
        ["train", store, run, "--preset", "tiny", "--refiner", REFINER, "--set", f"max_seconds={train_seconds}",
         "--set", f"seed={seed}"],
        ["evaluate", store, run, "--split", "test", "--vae", "tiny"],
        ["report", run, "--split", "test", "--out", out / "report.html"],
        ["decode", store, dicom, "--to-dicom", "--checkpoint", run, "--split", "test", "--vae", "tiny"],
    ]  # fmt: skip
    seconds: dict[str, float] = {}
    for step in steps:
        words = [str(word() if callable(word) else word) for word in step]
        stderr.print(f"$ ctpipe {shlex.join(words)}", style="bold", markup=False)
        start = time.monotonic()
        code = app(words, standalone_mode=False)
        seconds[words[0]] = round(seconds.get(words[0], 0.0) + time.monotonic() - start, 1)
        if code:
            raise typer.Exit(code)
    result = demo_figures(run, DEMO_METHODS, {**seconds, "total": round(time.monotonic() - started, 1)})
    write_text(out / "metrics.json", json.dumps(result, indent=1))
    return result
