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

METHODS = ("nearest", "linear", "cubic", "cubic_consistent", "refined", "model", "vae_ceiling")


def register(app: typer.Typer) -> None:
    def demo(
        out: Annotated[Path, typer.Argument(help="Folder to fill; it must be empty or a demo's own.")] = Path(
            "demo-out"
        ),
        patients: Annotated[int, typer.Option(min=4, help="Synthetic patients.")] = 20,
        size: Annotated[int, typer.Option(min=64, help="In-plane matrix size.")] = 192,
        slices: Annotated[int, typer.Option(min=40, help="Thin slices a patient.")] = 96,
        refine_seconds: Annotated[float, typer.Option(min=1, help="Seconds of training the refiner.")] = 180.0,
        train_seconds: Annotated[float, typer.Option(min=1, help="Seconds of training the model.")] = 120.0,
        seed: Annotated[int, typer.Option(help="Seed of the patients and the training.")] = 0,
        as_json: AsJson = False,
    ) -> int:
        """Synthetic archive to thin-slice DICOM and a report, on this machine's CPU.

        Example:

            ctpipe demo demo-out
        """
        _claim(out)
        result = run_demo(app, out, (patients, size, slices), refine_seconds, train_seconds, seed)
        emit(result, _text(result, out), as_json)
        return Exit.OK

    app.command("demo")(demo)


def run_demo(
    app: typer.Typer, out: Path, phantoms: tuple[int, int, int], refine_seconds: float, train_seconds: float, seed: int
) -> dict[str, Any]:
    """Run the commands one after the other; returns what stands in metrics.json.

    Args:
        phantoms: Patients, in-plane size and thin slices.
    """
    from latentcache.storage import write_text

    started = time.monotonic()
    data, store, run, dicom = out / "archive", out / "store", out / "run", out / "dicom"
    refiner, (patients, size, slices) = out / "refiner", phantoms
    steps: list[list[Any]] = [
        ["phantom", data, "--patients", patients, "--size", size, "--thin-slices", slices, "--seed", seed],
        ["interpolate", lambda: sorted(data.rglob("*.zip"))[0], out / "at-once", "--model", "fast"],
        ["ingest", data, store],
        ["encode", store, "--vae", "tiny"],
        ["train-regression", store, refiner, "--seconds", refine_seconds, "--seed", seed],
        ["encode", store, "--vae", "tiny", "--refiner", refiner],
        ["train", store, run, "--preset", "tiny", "--refiner", refiner, "--set", f"max_seconds={train_seconds}",
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
    document = json.loads((run / "evaluation" / "test" / "metrics.json").read_text(encoding="utf-8"))
    methods = document["methods"]
    result = {
        "psnr_db": {name: methods[name]["psnr_db"] for name in METHODS},
        "ssim": {name: methods[name]["ssim"] for name in METHODS},
        "gain_over_consistent_db": methods["model"]["psnr_db"] - methods["cubic_consistent"]["psnr_db"],
        "gain_over_consistent_ssim": methods["model"]["ssim"] - methods["cubic_consistent"]["ssim"],
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
    from latentcache import peak_bytes

    return round(peak_bytes() / 2**30, 2)


def _text(result: dict[str, Any], out: Path) -> str:
    psnr, ssim = result["psnr_db"], result["ssim"]
    lines = [f"PSNR in the window (dB) and SSIM, mean over {result['held_out_pairs']} held-out patients:"]
    lines += [f"  {name:16s} {psnr[name]:.2f}  {ssim[name]:.4f}" for name in METHODS]
    lines.append(
        f"  model against cubic made consistent, which no learning takes: {result['gain_over_consistent_db']:+.2f} dB, "
        f"SSIM {result['gain_over_consistent_ssim']:+.4f}; against plain cubic {result['gain_over_cubic_db']:+.2f} dB"
    )
    lines.append(f"{result['seconds']['total']:.0f} s, peak {result['peak_rss_gib']} GiB")
    lines.append(f"without training: open {next((out / 'at-once').glob('*.html'), out / 'at-once')}")
    lines.append(f"open {out / 'report.html'}; thin-slice DICOM is in {out / 'dicom'}")
    return "\n".join(lines)
