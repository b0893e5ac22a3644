"""A trained diffusion model on genuine CT that nothing learnt from: PSNR, SSIM, HU shift, LAA-950 and the certificate.

    python infra/bench/real.py [--run RUN | --work DIR] [--real FOLDER] [--quick]

The run is that of wide_model.py (window [-1000, 1000] HU, started from the shipped model's slices), trained into
``--work`` where no ``--run`` is given. Cases: a human chest of 1.5 mm, thick slices of 5 mm simulated by a box, with
profile and noise fitted on a phantom simulated alike; and a scanned head phantom, 28 x 5 mm beside 140 x 1 mm, each
half with profile and noise fitted on the other. Methods: cubic interpolation, the same made consistent, the shipped
model's slices made consistent (``refined``), the model's mean (one step of the bridge), a sample (ten steps), and the
same with the texture of the run's true thin slices, as `--answer sample` writes it.

Bias is the mean signed error where the truth's local mean (5 voxels a side) is lung, fat or soft tissue, eroded by a
voxel; LAA-950 in points (1% of the lung) against the true thin series in its own lung mask. Prints a table, then one
JSON object, also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from consistency import part, read_pair
from numpy.typing import NDArray
from refiner import ROOT, Case, chest, figures_of, protocol, simulated
from wide_model import SAMPLER_STEPS, WINDOW, WideModel, add_options, trained

from latentcache import InputError
from pipeline.decode import ComposeSettings, finish, textured
from pipeline.forward_model import certificate, fit_pair
from pipeline.metrics import LAA_THRESHOLD_HU, Texture, lung_mask, ssim
from pipeline.phantom import make_patient
from pipeline.volume import interpolated
from pipeline.workflows.sample import TEXTURE_NAME

FIT_SEED = 8_000
Rows = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run that is trained already")
    parser.add_argument("--work", type=Path, help="folder to train in; kept")
    parser.add_argument("--quick", action="store_true", help="a small model and a small phantom: shows that it runs")
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real"),
    )
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or trained(options.work or Path(scratch), options, quick=options.quick)
        model, table = WideModel.load(run), {}
        for case in cases(options):
            table[case.name] = scores(case, model)
            print(case.name, json.dumps(table[case.name]), flush=True)
        report(table, run, options)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The chest and the head's halves; a phantom where quick."""
    size, slices = (64, 44) if options.quick else (128, 64)
    other = make_patient(FIT_SEED, size, slices, "APE", protocol(1.5, size, slices, 9.0)).thin
    if options.quick:
        thin = make_patient(FIT_SEED + 1, size, slices, "APE", protocol(1.5, size, slices, 9.0)).thin
        yield simulated("phantom", thin, other, 7.5, held_out=False)
        return
    yield simulated("chest, 5 mm box", chest(options.real, 80), other, 5.0, held_out=False)
    pair = read_pair(options.real)
    for name, fitted, used in (("upper", (0, 14), (14, 28)), ("lower", (14, 28), (0, 14))):
        # The head fills the middle: a plane of 512 pixels is eight times the arithmetic and mostly air.
        thin, thick = part(pair, *used, slice(96, 416))
        yield Case(f"head pair, {name} half", thick, thin, fit_pair(*part(pair, *fitted, slice(None))))


def scores(case: Case, model: WideModel) -> Rows:
    """Figures of every method on a case."""
    target, fit = case.thin.geometry, case.fit
    base = model.base(case.thick, target, fit)
    plain = ComposeSettings("absolute", True, fit.profile, fit.noise_hu)
    measured = plain.measured(case.thick, target)
    cubic = np.asarray(interpolated(case.thick, target, "cubic"), np.float32)
    # The scanner's own thin series: where its certificate fails, the pair's two series do not agree to that.
    found: Rows = {"true thin series": {"certificate": certificate(case.thin.hu, measured).figures()["said"]}}
    found["cubic"] = judged(np.rint(cubic).astype(np.int16), case)
    for name, volume, window in (("cubic made consistent", cubic, None), ("refined", base, WINDOW)):
        hu, figures = finish(volume.copy(), measured, plain, window)
        found[name] = judged(hu, case, figures)
    answers = model.answers(case.thick, target, fit, steps=(1, SAMPLER_STEPS), base=base)
    for name, (hu, figures) in zip(("model, mean", "model, sample"), answers, strict=True):
        found[name] = judged(hu, case, figures)
    texture = model.run / TEXTURE_NAME
    if texture.is_file():  # as `--answer sample` writes the last of them
        how = replace(plain, texture=Texture.from_json(texture.read_text(encoding="utf-8")))
        finished, stated = textured(hu, figures, measured, how)
        found["model, sample with texture"] = judged(finished, case, dict(stated))
    return found


def judged(hu: NDArray[np.int16], case: Case, figures: dict[str, Any] | None = None) -> dict[str, Any]:
    """PSNR, SSIM, bias by tissue and of LAA-950, and what the certificate says."""
    truth = case.thin.hu
    row: dict[str, Any] = dict(figures_of(hu, truth))
    row = {name: value for name, value in row.items() if "own_value" not in name}
    clipped = (np.clip(v, WINDOW.lower, WINDOW.upper).astype(np.float32) for v in (hu, truth))
    row["ssim"] = round(ssim(*clipped, data_range=WINDOW.width), 4)
    try:
        mask = lung_mask(truth)
    except InputError:
        row["laa950"] = "not measured: no lung in the field"
    else:
        own, true = (100 * float(np.mean(v[mask] < LAA_THRESHOLD_HU)) for v in (hu, truth))
        row["laa950_percent"], row["laa950_bias_points"] = round(own, 3), round(own - true, 3)
    if figures is not None and figures.get("certificate"):
        row["certificate"] = figures["certificate"]["said"]
    return row


def report(table: dict[str, Rows], run: Path, options: argparse.Namespace) -> None:
    for case, rows in table.items():
        print(case)
        best = max(row.get("psnr_db", 0.0) for row in rows.values())
        print(f"  {'true thin series':<24} {rows['true thin series']['certificate']}")
        for name, row in rows.items():
            if name == "true thin series":
                continue
            bias = ", ".join(f"{key[5:-3]} {v:+.2f}" for key, v in row.items() if key.startswith("bias_"))
            density = row.get("laa950_bias_points")
            shown = "" if density is None else f"  LAA-950 {density:+.2f} points"
            below = row["psnr_db"] - best
            print(f"  {name:<24} {row['psnr_db']:.2f} dB ({below:+.2f})  SSIM {row['ssim']:.4f}  bias {bias}{shown}")
            if "certificate" in row:
                print(f"  {'':<24} {row['certificate']}")
    steps = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]).get("step")
    found = {
        "bench": "real",
        "table": table,
        "steps": steps,
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy")},
    }
    if not options.quick:
        out = Path(__file__).parent / "results" / "real-cpu.json"
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
