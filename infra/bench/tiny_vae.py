"""What the tiny VAE keeps: PSNR of its round trip, beside cubic interpolation of the thick series.

    python infra/bench/tiny_vae.py [--quick] [--real FOLDER]

Over the soft-tissue window (400 HU): thin series of phantoms that training never saw, against the same phantoms' thick
series interpolated by cubic splines (where the thick series has slices); the real head phantom's thin series, likewise;
the real chest volume. `noise` is the PSNR of the phantom's noise-free truth: what no method passes. Also round trips
under the maisi and lung windows, and CPU seconds per million voxels. Prints a table, then one JSON object, which is
kept in infra/bench/results/ too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.archive import open_archive
from pipeline.metrics import psnr
from pipeline.phantom import make_patient
from pipeline.reading import pointer_of, read_series, scan
from pipeline.vae import Vae, load_vae
from pipeline.volume import Volume, Window, resample_z

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).resolve().parents[2]
FIRST_SEED = 501  # neither training's seeds nor the demo's


class Clock:
    """CPU seconds and voxels of encode and decode."""

    def __init__(self) -> None:
        self.encode_s = self.decode_s = 0.0
        self.voxels = 0

    def round_trip(self, vae: Vae, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        """A volume in [-1, 1] through the posterior mean and back, clipped."""
        began = time.process_time()
        latent = vae.encode(unit)
        encoded = time.process_time()
        decoded = vae.decode(latent, unit.shape)
        self.encode_s += encoded - began
        self.decode_s += time.process_time() - encoded
        self.voxels += unit.size
        return np.clip(np.asarray(decoded.cpu().numpy(), dtype=np.float32), -1, 1)


def measure_pair(vae: Vae, clock: Clock, thin: Volume, thick: Volume, window: Window) -> dict[str, float]:
    """Round trip of the thin series and interpolations of the thick one, over the slices that the thick brackets."""
    thin_z, thick_z = np.asarray(thin.geometry.z_mm), np.asarray(thick.geometry.z_mm)
    inside = (thin_z >= thick_z[0]) & (thin_z <= thick_z[-1])
    unit = window.to_unit(thin.hu)
    row = {"vae": psnr(clock.round_trip(vae, unit)[inside], unit[inside], data_range=2.0)}
    for method in ("linear", "cubic"):
        guess = window.to_unit(resample_z(thick.hu, thick_z, thin_z[inside], method))  # type: ignore[arg-type]
        row[method] = psnr(guess, unit[inside], data_range=2.0)
    return row


def phantoms(vae: Vae, clock: Clock, size: int, n_thin: int, count: int) -> dict[str, float]:
    """Means over held-out phantoms."""
    rows = []
    for k in range(count):
        patient = make_patient(FIRST_SEED + k, size, n_thin, "APE" if k % 2 == 0 else "non-APE")
        row = measure_pair(vae, clock, patient.thin, patient.thick, Window())
        unit = Window().to_unit(patient.thin.hu)
        row["noise"] = psnr(Window().to_unit(patient.thin_truth), unit, data_range=2.0)
        for name in ("maisi", "lung") if k == 0 else ():
            unit = Window.parse(name).to_unit(patient.thin.hu)
            row[f"vae_{name}"] = psnr(clock.round_trip(vae, unit), unit, data_range=2.0)
        rows.append(row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in rows[0]}


def real_head(vae: Vae, clock: Clock, folder: Path, quick: bool) -> dict[str, float]:
    """The genuine pair of one acquisition: 28 x 5 mm and 140 x 1 mm."""
    source = open_archive(folder / "ape-layout" / "non-APE" / "head-phantom.zip")
    volumes = [read_series(pointer_of(one)) for one in scan(source).series]
    thick, thin = sorted(volumes, key=lambda v: v.hu.shape[0])
    if quick:
        geometry = thin.geometry.with_z(list(thin.geometry.z_mm[40:72]))
        thin = Volume(thin.hu[40:72], geometry)
    return measure_pair(vae, clock, thin, thick, Window())


def real_chest(vae: Vae, clock: Clock, folder: Path, quick: bool) -> dict[str, float]:
    """A human chest with contrast, 1.5 mm: the round trip under each window."""
    image = nibabel.load(folder / "chest-contrast-1p5mm.nii.gz")  # type: ignore[attr-defined]
    hu = np.ascontiguousarray(np.asanyarray(image.dataobj).transpose(2, 1, 0)).astype(np.float32)  # type: ignore[attr-defined]
    hu = hu[80:120] if quick else hu
    row = {}
    for key, window in (("vae", Window()), ("vae_maisi", Window.parse("maisi")), ("vae_lung", Window.parse("lung"))):
        unit = window.to_unit(hu)
        row[key] = psnr(clock.round_trip(vae, unit), unit, data_range=2.0)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller: under 60 s on 2 cores")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vae", default="tiny")
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real"),
        help="folder of genuine CT; left out when absent",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vae, clock = load_vae(options.vae), Clock()
    rows: dict[str, dict[str, float]] = {}
    for size in (128, 192):
        rows[f"phantom {size}"] = phantoms(vae, clock, size, 32 if options.quick else 64, 1 if options.quick else 3)
    if options.real.is_dir():
        rows["real head phantom"] = real_head(vae, clock, options.real, options.quick)
        rows["real chest 1.5 mm"] = real_chest(vae, clock, options.real, options.quick)
    columns = ["linear", "cubic", "vae", "noise", "vae_maisi", "vae_lung"]
    print(f"{'PSNR, dB over the window':<26}" + "".join(f"{c:>11}" for c in columns))
    for name, row in rows.items():
        print(f"{name:<26}" + "".join(f"{row[c]:>11.2f}" if c in row else " " * 11 for c in columns))
    million = clock.voxels / 1e6
    result: dict[str, Any] = {
        "bench": "tiny_vae",
        "quick": options.quick,
        "psnr_db": {name: {k: round(v, 2) for k, v in row.items()} for name, row in rows.items()},
        "vae_over_cubic_db": {n: round(r["vae"] - r["cubic"], 2) for n, r in rows.items() if "cubic" in r},
        "encode_cpu_s_per_mvoxel": round(clock.encode_s / million, 2),
        "decode_cpu_s_per_mvoxel": round(clock.decode_s / million, 2),
        "vae_sha256": vae.sha256,
        "device": f"cpu-{platform.machine()}",
        "threads": options.threads,
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy")},
    }
    RESULTS.mkdir(exist_ok=True)
    name = f"tiny_vae-cpu{'-quick' if options.quick else ''}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
