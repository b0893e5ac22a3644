"""The shipped refiner beside classical interpolation, on genuine CT that it never saw, and how long it takes.

    python infra/bench/pretrained.py [--quick] [--real FOLDER] [--models default,fast] [--no-speed]

Quality: thick slices are simulated from a human chest (1.5 mm isotropic; 3, 5 and 7.5 mm, a box, and a box blurred by
0.6 of its width, a third of a spacing off, which training never draws; and the same chest under a sharper and a softer
kernel), averaged from every two slices of another chest (2.5 mm), scanned as a pair with the thin ones (a head phantom,
28 x 5 mm and 140 x 1 mm), and simulated from held-out synthetic chests. The slice profile and its noise are fitted on a
phantom simulated alike, or on the other half of the pair's slices. PSNR and SSIM over [-1000, 1000] HU; bias in HU
where the truth's local mean (5 voxels a side) is lung, fat or soft tissue, eroded by a voxel.

Speed: 60 slices of 512 x 512, 5 mm apart, to 300, in a process of its own: seconds of every stage, peak memory;
SimpleITK's and scipy's cubic resampling of the same volume beside it. Prints a table, then one JSON object, also kept
in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from consistency import part, read_pair
from numpy.typing import NDArray
from refiner import FIT_SEED, HELD_OUT_SEEDS, Case, chest, covered, figures_of, protocol, simulated
from scipy.ndimage import gaussian_filter1d

from pipeline.archive import open_archive
from pipeline.forward_model import (
    ProtocolFit,
    SliceProfile,
    ThickMeasurement,
    apply,
    enforce_data_consistency,
    fit_pair,
    residual_rms,
    slice_operator,
    weights,
)
from pipeline.metrics import ssim
from pipeline.phantom import PhantomPatient, make_patient
from pipeline.reading import read_scanned, scan
from pipeline.refiner import PretrainedModel, RunSettings, load_pretrained, native_bfloat16, thin_slices
from pipeline.volume import Volume, Window, interpolated

ROOT = Path(__file__).resolve().parents[2]
WINDOW = Window.parse("maisi")
FLOOR_HU = -1024.0
STUDY = (60, 512, 512)
Answer = Callable[[Case], NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small phantom and a small study: shows that it runs")
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real"),
    )
    parser.add_argument("--models", default="default,fast", help="names or paths, by comma")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--chest-slices", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stage:
        print(json.dumps(timed(options.stage, options)))
        return
    models = {name: load_pretrained(name) for name in options.models.split(",")}
    found = {}
    for name, make in cases(options).items():
        if name.startswith(options.only):
            found[name] = scores(make(), models, options.threads)
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    report(found, {} if options.no_speed else speed(options), models, options)


def cases(options: argparse.Namespace) -> dict[str, Callable[[], Case]]:
    """Everything that can be scored, by name, made when it is asked for; nothing of it was trained on."""
    group = (1.5, 32, 44, 9.0) if options.quick else (1.5, 128, 64, 9.0)

    @functools.cache
    def other() -> PhantomPatient:
        return make_patient(FIT_SEED, *group[1:3], "APE", protocol(*group))

    def phantom(seed: int) -> Case:
        patient = make_patient(seed, *group[1:3], "APE" if seed % 2 else "non-APE", protocol(*group))
        return Case("phantom", *covered(patient.thick, patient.thin), fit_pair(other().thin, other().thick))

    def of_chest(thickness: float, sharpen: float, *, held_out: bool) -> Case:
        thin = kernel(chest(options.real, options.chest_slices), sharpen)
        return simulated("chest", thin, other().thin, thickness, held_out=held_out)

    def half(fitted: tuple[int, int], used: tuple[int, int]) -> Case:
        pair = read_pair(options.real)
        thin, thick = part(pair, *used, slice(None))
        return Case("head", thick, thin, fit_pair(*part(pair, *fitted, slice(None))))

    seeds = HELD_OUT_SEEDS[: 1 if options.quick else 2]
    found: dict[str, Callable[[], Case]] = {f"phantom {s % 10}, scanned": partial(phantom, s) for s in seeds}
    if options.quick:
        return found
    if (options.real / "chest-contrast-1p5mm.nii.gz").is_file():
        for thickness in (5.0, 7.5, 3.0):
            for name, held_out in (("box", False), ("new", True)):
                found[f"chest, {thickness:g} mm {name}"] = partial(of_chest, thickness, 0.0, held_out=held_out)
        found["chest, sharp kernel, 5 mm box"] = partial(of_chest, 5.0, 1.0, held_out=False)
        found["chest, soft kernel, 5 mm box"] = partial(of_chest, 5.0, -0.7, held_out=False)
    if (options.real / "ape-layout").is_dir():
        found["head pair, upper half"] = partial(half, (0, 14), (14, 28))
        found["head pair, lower half"] = partial(half, (14, 28), (0, 14))
    if (options.real / "chest-lidc-2p5mm.zip").is_file():
        found["second chest, 2 x 2.5 mm"] = lambda: averaged_by_two(largest(options.real / "chest-lidc-2p5mm.zip"))
    return found


def kernel(thin: Volume, sharpen: float) -> Volume:
    """In-plane, the image plus so much of what a blur of 0.8 pixels takes away: a sharper kernel, below 0 a softer."""
    hu = thin.hu.astype(np.float32)
    smooth = gaussian_filter1d(gaussian_filter1d(hu, 0.8, axis=1), 0.8, axis=2)
    return replace(thin, hu=np.clip(np.rint(hu + sharpen * (hu - smooth)), -1024, 3071).astype(np.int16))


def largest(path: Path) -> Volume:
    """The series of most slices in an archive."""
    source = open_archive(path)
    most = max((s for s in scan(source).series if s.status == "ok"), key=lambda s: len(s.pointer_members))
    volume = read_scanned(source, most, threads=1)
    source.close()
    return volume


def averaged_by_two(thin: Volume) -> Case:
    """Thick slices that are the mean of two thin ones each; the operator is then known."""
    z, pairs = np.asarray(thin.geometry.z_mm), len(thin.hu) // 2
    at = z[: 2 * pairs].reshape(-1, 2).mean(axis=1)
    thickness = 2 * thin.geometry.spacing_mm_zyx[0]
    hu = np.rint(thin.hu[: 2 * pairs].reshape(pairs, 2, *thin.hu.shape[1:]).mean(axis=1)).astype(np.int16)
    thick = Volume(hu, replace(thin.geometry.with_z(at), thickness_mm=thickness))
    known = ProtocolFit(SliceProfile("box", thickness), noise_hu=1.0)
    return Case("", thick, Volume(thin.hu[: 2 * pairs], thin.geometry.with_z(z[: 2 * pairs])), known)


def answers(models: dict[str, PretrainedModel], threads: int) -> dict[str, Answer]:
    """Every way from thick slices to thin ones, by name."""

    def plain(method: Any) -> Answer:
        return lambda case: interpolated(case.thick, case.thin.geometry, method)

    def back_projected(case: Case) -> NDArray[np.float32]:
        z = np.asarray(case.thick.geometry.z_mm), np.asarray(case.thin.geometry.z_mm)
        return apply(weights("cubic_back_projection", *z, case.fit.profile), case.thick.hu)

    def refined(model: PretrainedModel) -> Answer:
        how = RunSettings(threads=threads)
        return lambda case: thin_slices(model, case.thick, case.thin.geometry, case.fit.profile, how)

    ways: dict[str, Answer] = {name: plain(name) for name in ("linear", "cubic", "lanczos")}
    ways |= {"back-projected": back_projected, "cubic consistent": consistent(plain("cubic"))}
    for name, model in models.items():
        ways |= {name: refined(model), f"{name} consistent": consistent(refined(model))}
    return ways


def consistent(answer: Answer) -> Answer:
    """An answer made to agree with the measured slices."""

    def both(case: Case) -> NDArray[np.float32]:
        hu = np.array(answer(case), np.float32)
        z = case.thin.geometry.z_mm
        enforce_data_consistency(
            hu, ThickMeasurement.of(case.thick, z, case.fit.profile, case.fit.noise_hu), floor_hu=FLOOR_HU
        )
        return hu

    return both


def scores(case: Case, models: dict[str, PretrainedModel], threads: int) -> dict[str, dict[str, float]]:
    """PSNR, SSIM, bias by tissue and agreement of every way."""
    found = {}
    z = np.asarray(case.thick.geometry.z_mm), np.asarray(case.thin.geometry.z_mm)
    operator = slice_operator(case.fit.profile, *z)
    truth = np.clip(case.thin.hu, WINDOW.lower, WINDOW.upper)
    for name, way in answers(models, threads).items():
        hu = way(case)
        found[name] = figures_of(hu, case.thin.hu)
        found[name]["ssim"] = round(ssim(np.clip(hu, WINDOW.lower, WINDOW.upper), truth, data_range=WINDOW.width), 4)
        found[name]["rms_to_thick_hu"] = round(residual_rms(hu, case.thick.hu, operator)[0], 2)
    return found


def study(quick: bool) -> Volume:
    """A made-up thick study of the size that speed is stated for: a phantom, in-plane four times side by side."""
    count, rows, columns = (6, 64, 64) if quick else STUDY
    patient = make_patient(
        1, columns // 4, 2 * count, "APE", replace(protocol(1.5, 128, 64, 9.0), thick_spacing_mm=3.0)
    )
    hu = np.tile(patient.thin.hu, (1, 4, 4))[:count, :rows, :columns]
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (5.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    at = replace(patient.thin.geometry, shape_zyx=hu.shape, affine_lps=affine, z_mm=tuple(5.0 * np.arange(count)))
    return Volume(np.ascontiguousarray(hu), replace(at, thickness_mm=5.0))


def timed(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one way on the study, stage by stage, and what it held at most; in a process of its own."""
    thick = study(options.quick)
    target = thick.geometry.thin_grid(1.0)
    profile = SliceProfile("box", 5.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    if stage == "scipy cubic":
        from scipy.ndimage import zoom

        zoom(thick.hu.astype(np.float32), (5, 1, 1), order=3)
    elif stage == "SimpleITK cubic":
        simple_itk(thick.hu)
    else:
        model = load_pretrained(stage)
        model.network()
        seconds["load"] = time.perf_counter() - start
        hu = thin_slices(model, thick, target, profile, RunSettings(threads=options.threads))
        seconds["network"] = time.perf_counter() - start - seconds["load"]
        enforce_data_consistency(hu, ThickMeasurement.of(thick, target.z_mm, profile, 5.0), floor_hu=FLOOR_HU)
        seconds["consistency"] = time.perf_counter() - start - sum(seconds.values())
    total = time.perf_counter() - start
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": round(total, 2),
        "cpu_seconds_of_process": round(cpu.ru_utime + cpu.ru_stime, 2),
        **{f"{name}_seconds": round(value, 2) for name, value in seconds.items()},
        "peak_gib": round(cpu.ru_maxrss / 2**20, 2),
        "before_gib": round(before, 2),
    }


def simple_itk(hu: NDArray[np.int16]) -> None:
    """B-spline resampling of order 3 to five times the slices."""
    import SimpleITK

    image = SimpleITK.GetImageFromArray(hu.astype(np.float32))
    image.SetSpacing((0.7, 0.7, 5.0))
    size = (hu.shape[2], hu.shape[1], 5 * hu.shape[0])
    SimpleITK.Resample(
        image, size, SimpleITK.Transform(), SimpleITK.sitkBSpline, (0.0, 0.0, -2.0), (0.7, 0.7, 1.0),
        image.GetDirection(), -1024.0, SimpleITK.sitkFloat32,
    )  # fmt: skip


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """`timed` of every way, one process each."""
    found: dict[str, Any] = {}
    for stage in (*options.models.split(","), "scipy cubic", "SimpleITK cubic"):
        words = [sys.executable, __file__, "--stage", stage, "--threads", str(options.threads)]
        done = subprocess.run([*words, *(["--quick"] if options.quick else [])], capture_output=True, text=True)
        lines = done.stdout.strip().splitlines()
        found[stage] = json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr.strip()[-200:]}
    return found


def report(
    table: dict[str, dict[str, dict[str, float]]],
    times: dict[str, Any],
    models: dict[str, PretrainedModel],
    options: argparse.Namespace,
) -> None:
    for figure, title in (("psnr_db", "PSNR over [-1000, 1000] HU, dB"), ("ssim", "SSIM")):
        print(title)
        for name, rows in table.items():
            print(f"  {name:<28}" + "  ".join(f"{way} {row[figure]:.4g}" for way, row in rows.items()))
    for name, rows in table.items():
        best = rows[f"{next(iter(models))} consistent"]
        bias = ", ".join(f"{k[5:-3]} {v:+.2f}" for k, v in best.items() if k.startswith("bias_") and "own" not in k)
        print(f"  bias, {name:<28} {bias}")
    for name, row in times.items():
        print(f"  {name:<20} {row}")
    found = {
        "bench": "pretrained",
        "table": table,
        "gain_over_cubic_db": {
            f"{case}: {name}": round(rows[f"{name} consistent"]["psnr_db"] - rows["cubic"]["psnr_db"], 3)
            for case, rows in table.items()
            for name in models
        },
        "speed_300x512x512": times,
        "models": {
            name: {"sha256": model.sha256, "bytes": Path(model.path).stat().st_size} for name, model in models.items()
        },
        "arithmetic": "bfloat16" if native_bfloat16("cpu") else "float32",
        "settings": {"threads": options.threads, "chest_slices": options.chest_slices},
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "versions": {name: installed(name) for name in ("torch", "numpy", "scipy", "SimpleITK")},
    }
    if not options.quick and not options.only:
        out = Path(__file__).parent / "results" / "pretrained-cpu.json"
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


def installed(name: str) -> str:
    """A package's version, or that it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
