"""LAA-950 by method on phantoms whose emphysema is known, 0 to 40% of the lung, at several noise levels and kernels.

    python infra/bench/densitometry.py [--quick] [--phantoms 2] [--refiner RUN]

Holes are cut into the noise-free thin lung until its LAA-950 is the wanted one; the thick series sees them through the
slice profile. Both get noise of 0.5, 1 and 2 times the usual, under a soft and a sharp kernel (where the noise is
strongest: 0.05 and 0.1 line pairs a mm). LAA-950 is measured in one mask, that of the noise-free lung, on the slices
that the thick series covers:

    thick             the thick series itself, each slice over its own extent
    linear, cubic     interpolation along z
    cubic_consistent  the same, made to agree with the thick slices within their noise
    refiner           with --refiner: a run of `ctpipe train-refiner`, then made consistent (over the window it knows)
    thin              the true thin series: what noise alone does to the figure

Bias is a method's LAA-950 minus the known one, in points (1% of the lung); against "thin" minus that of the true thin
series, which is what a reader of thin slices would have had. Diffusion samples are not measured here: no model is
trained by this bench. Prints tables, then one JSON object, also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.decode import ComposeSettings, compose
from pipeline.forward_model import SliceProfile, ThickMeasurement, apply, weights
from pipeline.metrics import LAA_THRESHOLD_HU, lung_mask
from pipeline.phantom import PhantomPatient, make_patient, with_emphysema
from pipeline.phantom.rasterise import slice_noise
from pipeline.volume import Window, common_slices, interpolated

EXTENTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
NOISE = (0.5, 1.0, 2.0)
KERNELS = {"soft": 0.05, "sharp": 0.1}
"""Where noise is strongest, line pairs a mm; 2.5 mm pixels show no more than 0.1."""
SEED = 900
METHODS = ("thin", "thick", "linear", "cubic", "cubic_consistent", "refiner")
WIDE = Window.parse("maisi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small phantom: shows that it runs")
    parser.add_argument("--phantoms", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--slices", type=int, default=80)
    parser.add_argument("--refiner", type=Path, help="a run of ctpipe train-refiner")
    options = parser.parse_args()
    if options.quick:
        options.phantoms, options.size, options.slices = 1, 64, 60
    torch.set_num_threads(1)
    start = time.process_time()
    rows = []
    for number in range(options.phantoms):
        patient = make_patient(SEED + number, options.size, options.slices)
        for scanned in scans(patient, SEED + number):
            rows += measured_by_method(*scanned, options.refiner)
        print(f"phantom {number + 1}: {time.process_time() - start:.0f} CPU s", flush=True)
    report(rows, options, time.process_time() - start)


def scans(
    patient: PhantomPatient, seed: int
) -> Iterator[tuple[dict[str, Any], NDArray[np.bool_], NDArray[np.float32], ThickMeasurement]]:
    """Each extent, noise and kernel: what it is, the lung, the noisy thin series, and the thick one's measurement."""
    settings, truth = patient.settings, patient.thin_truth
    pixel = patient.thin.geometry.spacing_mm_zyx[1]
    lung = lung_mask(truth)
    profile = SliceProfile("box", settings.thick_fwhm_mm)
    whole = ThickMeasurement.of(patient.thick, patient.thin.geometry.z_mm, profile)
    own = float(np.mean(truth[lung] < LAA_THRESHOLD_HU))
    inside = common_slices(patient.thick.geometry, patient.thin.geometry)
    for extent in EXTENTS:
        made = with_emphysema(truth, lung, patient.thin.geometry.spacing_mm_zyx, max(extent, own), seed)
        thick_truth = patient.thick_truth + whole.operator.apply(made.hu - truth)
        for times in NOISE:
            for kernel, peak in KERNELS.items():
                rng = np.random.default_rng([seed, int(100 * extent), int(10 * times), int(100 * peak)])
                thin, thick = (
                    np.rint(hu + slice_noise(rng, len(hu), hu.shape[1], pixel, times * sigma, peak)).clip(-1024, 3071)
                    for hu, sigma in ((made.hu, settings.thin_sigma_hu), (thick_truth, settings.thick_sigma_hu))
                )
                volume = replace(patient.thick, hu=thick.astype(np.int16))
                z = np.asarray(patient.thin.geometry.z_mm)[inside]
                known = float(np.mean(made.hu[inside][lung[inside]] < LAA_THRESHOLD_HU))
                facts = {"seed": seed, "wanted": extent, "known": known, "noise": times, "kernel": kernel}
                yield facts, lung[inside], thin[inside].astype(np.float32), ThickMeasurement.of(volume, z, profile)


def measured_by_method(
    facts: dict[str, Any],
    lung: NDArray[np.bool_],
    thin: NDArray[np.float32],
    measured: ThickMeasurement,
    refiner: Path | None,
) -> list[dict[str, Any]]:
    """LAA-950 of every method in the mask."""
    z_thick, z_thin = np.asarray(measured.thick_z_mm), np.asarray(measured.thin_z_mm)
    geometry = measured.volume.geometry.with_z(z_thin, thickness_mm=measured.spacing_mm)
    target = replace(geometry, shape_zyx=measured.shape_zyx)
    cubic = interpolated(measured.volume, target, "cubic")
    volumes: dict[str, Any] = {"thin": thin, "cubic": cubic}
    for name, method in (("thick", "nearest"), ("linear", "linear")):
        volumes[name] = apply(weights(method, z_thick, z_thin, measured.profile), measured.hu)  # type: ignore[arg-type]
    plain = ComposeSettings("absolute", True, measured.profile, measured.noise_hu)
    volumes["cubic_consistent"] = compose(cubic, WIDE, measured, plain)[0]
    if refiner is not None:
        from pipeline.workflows import refiner_of

        file = refiner_of(refiner, "cpu")
        assert file is not None
        volumes["refiner"] = compose(cubic, WIDE, measured, replace(plain, refiner=file))[0]
    return [
        {**facts, "method": name, "laa950": float(np.mean(hu[lung] < LAA_THRESHOLD_HU))} for name, hu in volumes.items()
    ]


def report(rows: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> None:
    reference = {_scan(row): row["laa950"] for row in rows if row["method"] == "thin"}
    methods = [m for m in METHODS if any(r["method"] == m for r in rows)]

    def bias(method: str, against_thin: bool = False, **only: Any) -> dict[str, float]:
        own = [r for r in rows if r["method"] == method and all(r[k] == v for k, v in only.items())]
        points = 100 * np.array([r["laa950"] - (reference[_scan(r)] if against_thin else r["known"]) for r in own])
        return {"mean": round(float(points.mean()), 2), "worst": round(float(points[np.argmax(np.abs(points))]), 2)}

    scans_of: list[dict[str, Any]] = [{"noise": n, "kernel": k} for n in NOISE for k in KERNELS]
    found: dict[str, Any] = {
        "bench": "densitometry",
        "bias_points": {m: bias(m) for m in methods},
        "bias_points_against_thin": {m: bias(m, True) for m in methods},
        "by_extent": {f"{e:g}": {m: bias(m, wanted=e) for m in methods} for e in EXTENTS},
        "by_scan": {f"{s['kernel']}, noise x {s['noise']:g}": {m: bias(m, **s) for m in methods} for s in scans_of},
        "against_thin_by_scan": {
            f"{s['kernel']}, noise x {s['noise']:g}": {m: bias(m, True, **s) for m in methods} for s in scans_of
        },
        "known": sorted({(r["seed"], r["wanted"], round(r["known"], 4)) for r in rows}),
        "settings": {k: str(v) for k, v in vars(options).items() if k != "quick"},
        "cpu_s": round(seconds, 1),
        "device": f"cpu-{platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy", "torch")},
    }
    print("LAA-950 bias in points of the lung, mean (worst), against the known extent")
    head = f"{'':22s}" + "".join(f"{m:>20s}" for m in methods)
    for title, part in (("extent", found["by_extent"]), ("scan", found["by_scan"])):
        print(f"by {title}\n{head}")
        for name, cells in part.items():
            print(f"{name:22s}" + "".join(f"{c['mean']:+11.2f} ({c['worst']:+6.2f})" for c in cells.values()))
    print("all, against the known extent and against the true thin series")
    for name in ("bias_points", "bias_points_against_thin"):
        print(f"{'':22s}" + "".join(f"{c['mean']:+11.2f} ({c['worst']:+6.2f})" for c in found[name].values()))
    if not options.quick:
        (Path(__file__).parent / "results" / "densitometry-cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


def _scan(row: dict[str, Any]) -> tuple[Any, ...]:
    return (row["seed"], row["wanted"], row["noise"], row["kernel"])


if __name__ == "__main__":
    main()
