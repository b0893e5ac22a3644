"""``ctpipe report``: one offline HTML page about a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="A training run's folder that `ctpipe evaluate` has been run on.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the page; RUN/report.html by default.")] = None,
    split: Annotated[str, typer.Option(help="The evaluated split to report.")] = "test",
    as_json: AsJson = False,
) -> int:
    """Write the report of a run's evaluation: viewer, tables, curves, provenance, in one file without network.

    Examples:

        ctpipe report RUN

        ctpipe report RUN --split val --out val.html
    """
    path = write_run_report(run, split, out or run / "report.html")
    emit({"report": str(path), "bytes": path.stat().st_size}, f"written {path}", as_json)
    return Exit.OK


def write_run_report(run: Path, split: str, path: Path) -> Path:
    """Build the page from RUN/evaluation/<split>, RUN/log.jsonl and RUN/run.json."""
    from importlib.metadata import version

    from latentcache.errors import InputError
    from pipeline.evaluate_store import load_views
    from pipeline.hu import Window
    from pipeline.report import write_report

    folder = run / "evaluation" / split
    if not (folder / "metrics.json").is_file():
        raise InputError(
            f"no evaluation of split {split!r} in this run",
            expected=f"evaluation/{split}/metrics.json",
            remedy=f"Run ctpipe evaluate STORE RUN --split {split} first.",
        )
    document = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    low, high = document["window_hu"]
    window = Window((low + high) / 2, high - low)
    provenance = {
        "ctpipe": version("ctpipe"),
        "split": split,
        "checkpoint SHA-256": document["checkpoint_sha256"],
        "encode key": document["encode_key"],
        "generation key": document["generation_key"],
        "store snapshot": document["snapshot"],
        "sampling and composition": json.dumps(document["settings"]),
    }
    write_report(
        path,
        title="Thick to thin: what the model adds",
        lead=lead_paragraph(document),
        document=document,
        window=window,
        views=load_views(folder),
        training=_log_rows(run / "log.jsonl"),
        provenance=provenance,
    )
    return path


def lead_paragraph(document: dict[str, Any]) -> str:
    """What a radiologist wants to know first, in plain words and honest about losses."""
    methods = document["methods"]
    low, high = document["window_hu"]

    def psnr(name: str) -> float | None:
        value = methods.get(name, {}).get("psnr_db")
        return None if value is None else float(value)

    model, cubic, linear, ceiling = (psnr(n) for n in ("model", "cubic", "linear", "vae_ceiling"))
    count = document["cases"]
    patients = "1 held-out pair" if count == 1 else f"{count} held-out pairs"
    if model is None or cubic is None or linear is None:
        return f"On {patients} the model's output could not be compared with interpolation; see the table of cases."

    def against(other: float) -> str:
        return f"{abs(model - other):.2f} dB {'more' if model >= other else 'less'}"

    text = (
        f"On {patients}, between {low:g} and {high:g} HU, the generated thin slices reach {model:.2f} dB PSNR against "
        f"the true ones: {against(cubic)} than cubic, {against(linear)} than linear interpolation of the thick slices."
    )
    if ceiling is not None:
        text += (
            f" Sending the true thin slices through the VAE and back gives {ceiling:.2f} dB: "
            "the most that its decoder alone allows."
        )
    if model < max(cubic, linear):
        text += " Interpolation is better here: do not use this model for these data."
    return text


def _log_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
