"""``ctpipe demo``: the whole path on synthetic patients, as the commands a user would type."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import AsJson, Exit, emit, stderr

METHODS = ("nearest", "linear", "cubic", "vae_ceiling", "model")


def register(app: typer.Typer) -> None:
    def demo(
        out: Annotated[Path, typer.Argument(help="Folder to fill; it must be empty or a demo's own.")] = Path(
            "demo-out"
        ),
        patients: Annotated[int, typer.Option(min=4, help="Synthetic patients.")] = 20,
        size: Annotated[int, typer.Option(min=64, help="In-plane matrix size.")] = 192,
        slices: Annotated[int, typer.Option(min=40, help="Thin slices a patient.")] = 96,
        train_seconds: Annotated[float, typer.Option(min=1, help="Seconds of training.")] = 240.0,
        seed: Annotated[int, typer.Option(help="Seed of the patients and the training.")] = 0,
        as_json: AsJson = False,
    ) -> int:
        """Synthetic archive to thin-slice DICOM and a report, on this machine's CPU.

        Example:

            ctpipe demo demo-out
        """
        _claim(out)
        result = run_demo(app, out, patients, size, slices, train_seconds, seed)
        emit(result, _text(result, out), as_json)
        return Exit.OK

    app.command("demo")(demo)


def run_demo(
    app: typer.Typer, out: Path, patients: int, size: int, slices: int, train_seconds: float, seed: int
) -> dict[str, Any]:
    """Run the commands one after the other; returns what stands in metrics.json."""
    from latentcache.storage import write_text

    started = time.monotonic()
    data, store, run, dicom = out / "archive", out / "store", out / "run", out / "dicom"
    steps: list[list[Any]] = [
        ["phantom", data, "--patients", patients, "--size", size, "--thin-slices", slices, "--seed", seed],
        ["ingest", data, store],
        ["encode", store, "--vae", "tiny"],
        ["train", store, run, "--preset", "tiny", "--set", f"max_seconds={train_seconds}", "--set", f"seed={seed}"],
        ["evaluate", store, run, "--split", "test", "--vae", "tiny"],
        ["report", run, "--split", "test", "--out", out / "report.html"],
        ["decode", store, dicom, "--to-dicom", "--checkpoint", run, "--split", "test", "--vae", "tiny"],
    ]
    seconds: dict[str, float] = {}
    for step in steps:
        words = [str(word) for word in step]
        stderr.print(f"$ ctpipe {shlex.join(words)}", style="bold", markup=False)
        start = time.monotonic()
        code = app(words, standalone_mode=False)
        seconds[words[0]] = round(time.monotonic() - start, 1)
        if code:
            raise typer.Exit(code)
    document = json.loads((run / "evaluation" / "test" / "metrics.json").read_text(encoding="utf-8"))
    methods = document["methods"]
    result = {
        "psnr_db": {name: methods[name]["psnr_db"] for name in METHODS},
        "gain_over_cubic_db": methods["model"]["psnr_db"] - methods["cubic"]["psnr_db"],
        "gain_over_linear_db": methods["model"]["psnr_db"] - methods["linear"]["psnr_db"],
        "held_out_pairs": document["cases"],
        "window_hu": document["window_hu"],
        "seconds": {**seconds, "total": round(time.monotonic() - started, 1)},
        "peak_rss_gib": _peak_rss_gib(),
        "methods": methods,
    }
    write_text(out / "metrics.json", json.dumps(result, indent=1))
    return result


def _claim(out: Path) -> None:
    """Start afresh in a folder that is empty or that a demo filled; never touch anyone else's files."""
    from latentcache import InputError

    mark = out / ".ctpipe-demo"
    if out.exists() and any(out.iterdir()):
        if not mark.is_file():
            raise InputError(
                f"the folder {out}, which is not empty", expected="an empty folder", remedy="Name another, e.g. demo-2."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _peak_rss_gib() -> float:
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def _text(result: dict[str, Any], out: Path) -> str:
    psnr = result["psnr_db"]
    lines = [f"PSNR in the window (dB), mean over {result['held_out_pairs']} held-out patients:"]
    lines += [f"  {name:12s} {psnr[name]:.2f}" for name in METHODS]
    lines.append(f"  model against cubic {result['gain_over_cubic_db']:+.2f} dB")
    lines.append(f"{result['seconds']['total']:.0f} s, peak {result['peak_rss_gib']} GiB")
    lines.append(f"open {out / 'report.html'}; thin-slice DICOM is in {out / 'dicom'}")
    return "\n".join(lines)
