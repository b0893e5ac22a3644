"""The whole way out on data that nothing was trained on: model, refiner and consistency beside interpolation.

    python infra/bench/refiner.py [--quick] [--work FOLDER] [--real FOLDER] [--refiner-steps 3600]

A diffusion model (preset tiny, objective bridge) and a refiner that corrects its output are trained on phantoms alone,
through `ctpipe ingest`, `encode --window maisi`, `train` and `train-refiner --checkpoint`: patients of two voxel sizes
and four noise levels. They are scored on phantoms with seeds of their own and on thick slices simulated from a human
chest (1.5 mm, averaged to 5 mm, as archives hold them, and to 7.5 mm, five slices to one as in the phantoms; no noise
is added, so the thick slices' noise is the thin ones' averaged), each under a box profile and under one that training
never drew (a box blurred by 0.6 of its width, a third of a spacing off).
The slice profile and its noise, which consistency needs, are fitted on another phantom simulated alike, as
`ctpipe decode` fits them on other patients.

PSNR in the window of the latents, [-1000, 1000] HU; the ceiling is the VAE's round trip of the thin series itself.
Bias: mean signed error in HU where the local mean (5 voxels a side) of the truth is lung (-950 to -700), fat (-120 to
-60) or soft tissue (0 to 80), eroded by a voxel: chosen by the voxel's own value instead, noise decides what is lung,
and the mean of all answers looks biased. Both are given. Prints a table, then one JSON object, which is also kept in
infra/bench/results/ (not with --quick). --work keeps store and runs, and takes up there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, uniform_filter

from cli.main import app
from diffusion.sampling import Interpolator
from latentcache import LatentGrid
from pipeline.decode import ComposeSettings, compose
from pipeline.forward_model import ProtocolFit, SliceProfile, apply, fit_pair, slice_operator, weights
from pipeline.metrics import TISSUE_CLASSES_HU, bias_by_tissue, psnr
from pipeline.phantom import PhantomSettings, make_patient, write_dataset
from pipeline.refiner import RefinerFile, held_out_operator, positions
from pipeline.vae import Vae, load_vae
from pipeline.volume import Geometry, Volume, Window, common_slices, interpolated
from pipeline.workflows import condition_latent
from pipeline.workflows.interpolation.interpolate import told_of

ROOT = Path(__file__).resolve().parents[2]
WINDOW = Window.parse("maisi")
TISSUES = ("lung", "fat", "soft_tissue")
GROUPS = ((1.5, 128, 64, 5.0), (1.5, 128, 64, 14.0), (1.0, 128, 80, 9.0), (1.0, 128, 80, 20.0))
"""Of each group of patients: thin spacing in mm (pixels have 1.5 or 2 mm), matrix, thin slices, thin noise in HU."""
FIT_SEED, HELD_OUT_SEEDS = 8_000, (9_001, 9_002)


@dataclass(frozen=True)
class Case:
    """A thick series to start from, the truth on the slices that it covers, and what is known of the operator."""

    name: str
    thick: Volume
    thin: Volume
    fit: ProtocolFit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small patients, a few steps: shows that it runs")
    parser.add_argument("--work", type=Path, help="folder for store and runs; kept, and taken up again")
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real"),
    )
    parser.add_argument("--patients", type=int, default=5, help="of each group")
    parser.add_argument("--train-seconds", type=float, default=180.0)
    parser.add_argument("--refiner-steps", type=int, default=3600)
    parser.add_argument("--chest-slices", type=int, default=80)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.patients, options.train_seconds, options.refiner_steps, options.chest_slices = 2, 2.0, 4, 20
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run, refiner, cpu_seconds = trained(options.work or Path(scratch), options)
        vae, model, file = load_vae("tiny"), Interpolator.load(run), RefinerFile.of(refiner)
        table = {case.name: scores(case, vae, model, file) for case in cases(options)}
    report(table, cpu_seconds, file, options)


def trained(work: Path, options: argparse.Namespace) -> tuple[Path, Path, dict[str, float]]:
    """The diffusion run and the refiner's, made where the folder has none; CPU seconds of what was done now."""
    work.mkdir(parents=True, exist_ok=True)
    store, run, refiner = work / "store", work / "run", work / "refiner"
    groups = GROUPS[:1] if options.quick else GROUPS
    seconds: dict[str, float] = {}

    def step(done: Path, *words: Any) -> None:
        if done.exists():
            return
        began = time.process_time()
        code = app([str(word) for word in words], standalone_mode=False)
        assert not code, f"{words[0]} ended with {code}"
        seconds[words[0]] = round(seconds.get(words[0], 0.0) + time.process_time() - began, 1)

    for number, group in enumerate(groups):
        data, size, slices = work / f"archive-{number}", *group[1:3]
        size, slices = (32, 44) if options.quick else (size, slices)
        patients = 4 if options.quick else options.patients
        write_dataset(data, patients=patients, size=size, n_thin=slices, seed=number, settings=protocol(*group))
        step(work / f"ingested-{number}", "ingest", data, store)
        (work / f"ingested-{number}").touch()
    step(work / "encoded", "encode", store, "--window", "maisi", "--roles", "thin,thick_on_thin", "--engine", "inline")
    (work / "encoded").touch()
    limit = f"max_seconds={options.train_seconds}"
    step(run / "checkpoints", "train", store, run, "--preset", "tiny", "--set", limit)
    steps = ("--steps", options.refiner_steps)
    step(refiner / "refiner.safetensors", "train-refiner", store, refiner, "--checkpoint", run, *steps)
    return run, refiner, seconds


def protocol(spacing_mm: float, size: int, _: int, noise_hu: float) -> PhantomSettings:
    """Five thin slices to a thick one; pixels of 1.5 mm, or 2 mm where slices are 1 mm."""
    pixel = 1.5 if spacing_mm == 1.5 else 2.0
    return PhantomSettings(
        field_of_view_mm=pixel * size,
        thin_spacing_mm=spacing_mm,
        thick_spacing_mm=5 * spacing_mm,
        thin_fwhm_mm=1.1 * spacing_mm,
        thick_fwhm_mm=5 * spacing_mm,
        thin_sigma_hu=noise_hu,
        thick_sigma_hu=noise_hu / 2,
    )


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Held-out phantoms as scanned and under the held-out operator, then the chest under a box and under that."""
    group = (1.5, 32, 44, 9.0) if options.quick else (1.5, 128, 64, 9.0)
    other = make_patient(FIT_SEED, *group[1:3], "APE", protocol(*group))
    for seed in HELD_OUT_SEEDS[: 1 if options.quick else 2]:
        patient = make_patient(seed, *group[1:3], "APE" if seed % 2 else "non-APE", protocol(*group))
        yield Case(
            f"phantom {seed % 10}, scanned", *covered(patient.thick, patient.thin), fit_pair(other.thin, other.thick)
        )
        if seed == HELD_OUT_SEEDS[0]:
            yield simulated("phantom 1, new profile", patient.thin, other.thin, 7.5, held_out=True)
    if (options.real / "chest-contrast-1p5mm.nii.gz").is_file():
        thin = chest(options.real, options.chest_slices)
        for thickness in (5.0, 7.5):
            yield simulated(f"chest, {thickness:g} mm box", thin, other.thin, thickness, held_out=False)
            yield simulated(f"chest, {thickness:g} mm new", thin, other.thin, thickness, held_out=True)


def simulated(name: str, thin: Volume, other: Volume, thickness: float, *, held_out: bool) -> Case:
    """Thick slices of ``thickness`` mm without noise of their own; the operator is fitted on ``other``, made alike."""

    def thick_of(volume: Volume) -> Volume:
        z = np.asarray(volume.geometry.z_mm)
        box = SliceProfile("box", thickness), positions(z, thickness, 0.0)
        profile, at = held_out_operator(z, thickness) if held_out else box
        hu = np.rint(slice_operator(profile, at, z).apply(volume.hu)).astype(np.int16)
        return Volume(hu, replace(volume.geometry.with_z(at), thickness_mm=thickness))

    return Case(name, *covered(thick_of(thin), thin), fit_pair(other, thick_of(other)))


def covered(thick: Volume, thin: Volume) -> tuple[Volume, Volume]:
    """The thick series, and the thin slices inside its extent."""
    inside = common_slices(thick.geometry, thin.geometry)
    at = thin.geometry.with_z(np.asarray(thin.geometry.z_mm)[inside])
    return thick, Volume(np.ascontiguousarray(thin.hu[inside]), at)


def chest(folder: Path, slices: int) -> Volume:
    """The middle of the human chest: lung, heart and the top of the abdomen."""
    import nibabel

    image: Any = nibabel.load(folder / "chest-contrast-1p5mm.nii.gz")
    hu = np.asanyarray(image.dataobj).transpose(2, 1, 0)
    start = (len(hu) - slices) // 2
    hu = np.clip(np.rint(hu[start : start + slices]), -1024, 3071).astype(np.int16)
    affine = ((0.0, 0.0, 1.5, 0.0), (0.0, 1.5, 0.0, 0.0), (1.5, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    return Volume(np.ascontiguousarray(hu), Geometry(hu.shape, affine, tuple(1.5 * np.arange(len(hu))), 1.5))


def scores(case: Case, vae: Vae, model: Interpolator, file: RefinerFile) -> dict[str, dict[str, float]]:
    """Figures of every way from the thick slices to the thin ones."""
    target, truth = case.thin.geometry, case.thin.hu
    profile, noise = case.fit.profile, case.fit.noise_hu
    condition = condition_latent(case.thick, target, WINDOW, vae, model.alignment)
    sample = model.generate_latent(condition, **told_of(case.thick, LatentGrid.of(target).positions()))

    def decoded(latent: NDArray[np.float32]) -> NDArray[np.float32]:
        return WINDOW.from_unit(np.asarray(vae.decode(torch.from_numpy(latent), target.shape_zyx)))

    given, generated = decoded(condition), decoded(sample)

    def composed(detail: Any, *, refiner: bool, consistency: bool) -> NDArray[Any]:
        how = ComposeSettings(detail, consistency, profile, noise, refiner=file if refiner else None)
        hu, figures = compose(generated, WINDOW, how.measured(case.thick, target), how, condition_hu=given)
        if consistency and refiner:
            agreement.update({k: figures[k] for k in ("rms_before_hu", "rms_after_hu", "noise_hu")})
        return hu

    agreement: dict[str, float] = {}
    z = np.asarray(case.thick.geometry.z_mm), np.asarray(target.z_mm)
    cubic = interpolated(case.thick, target, "cubic")
    only = ComposeSettings("absolute", True, profile, noise)
    ways: dict[str, NDArray[Any]] = {
        "linear": interpolated(case.thick, target, "linear"),
        "cubic": cubic,
        "cubic + back-projection": apply(weights("cubic_back_projection", *z, profile), case.thick.hu),
        "cubic + consistency": compose(cubic, WINDOW, only.measured(case.thick, target), only)[0],
        "decode only": composed("absolute", refiner=False, consistency=False),
        "decode, residual": composed("residual", refiner=False, consistency=False),
        "decode + consistency": composed("residual", refiner=False, consistency=True),
        "decode + refiner": composed("residual", refiner=True, consistency=False),
        "decode + refiner + consistency": composed("residual", refiner=True, consistency=True),
        "VAE ceiling": decoded(np.asarray(vae.encode(WINDOW.to_unit(truth)))),
    }
    found = {name: figures_of(hu, truth) for name, hu in ways.items()}
    found["decode + refiner + consistency"] |= agreement
    return found


def figures_of(hu: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """PSNR in the latents' window and in the soft-tissue window, and signed bias by tissue, chosen in two ways."""
    found = {}
    for name, window in (("psnr_db", WINDOW), ("psnr_soft_tissue_db", Window())):
        a, b = (np.clip(np.asarray(v, np.float32), window.lower, window.upper) for v in (hu, truth))
        found[name] = round(psnr(a, b, data_range=window.width), 3)
    a, b = (np.clip(np.asarray(v, np.float32), WINDOW.lower, WINDOW.upper) for v in (hu, truth))
    local = uniform_filter(b, 5)
    own = bias_by_tissue(a, b)
    for tissue in TISSUES:
        low, high = TISSUE_CLASSES_HU[tissue]
        mask = binary_erosion((local >= low) & (local < high))
        if mask.sum() >= 100:
            found[f"bias_{tissue}_hu"] = round(float((a[mask] - b[mask]).mean(dtype=np.float64)), 3)
        if tissue in own:
            found[f"bias_by_own_value_{tissue}_hu"] = round(own[tissue]["bias_hu"], 3)
    return found


def report(
    table: dict[str, dict[str, dict[str, float]]],
    cpu_seconds: dict[str, float],
    file: RefinerFile,
    options: argparse.Namespace,
) -> None:
    names = list(table)
    print(f"{'PSNR over [-1000, 1000] HU, dB':<34}" + "".join(f"{name:>24}" for name in names))
    for way in next(iter(table.values())):
        print(f"{way:<34}" + "".join(f"{table[name][way]['psnr_db']:>24.2f}" for name in names))
    for tissue in TISSUES:
        print(f"{f'bias in {tissue}, HU':<34}")
        for way in ("cubic", "decode only", "decode + refiner", "decode + refiner + consistency"):
            row = (table[name][way].get(f"bias_{tissue}_hu", float("nan")) for name in names)
            print(f"  {way:<32}" + "".join(f"{value:>+24.2f}" for value in row))
    best = {name: rows["decode + refiner + consistency"] for name, rows in table.items()}
    found = {
        "bench": "refiner",
        "table": table,
        "gain_over_cubic_db": {n: round(b["psnr_db"] - table[n]["cubic"]["psnr_db"], 3) for n, b in best.items()},
        "gain_over_decode_only_db": {
            n: round(b["psnr_db"] - table[n]["decode only"]["psnr_db"], 3) for n, b in best.items()
        },
        "gain_over_residual_decode_db": {
            n: round(b["psnr_db"] - table[n]["decode, residual"]["psnr_db"], 3) for n, b in best.items()
        },
        "largest_bias_hu": {n: max(abs(b.get(f"bias_{t}_hu", 0.0)) for t in TISSUES) for n, b in best.items()},
        "cpu_seconds": cpu_seconds,
        "refiner_bytes": Path(file.path).stat().st_size if Path(file.path).exists() else None,
        "settings": {k: v for k, v in vars(options).items() if k not in ("quick", "work", "real")},
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"torch": version("torch"), "python": platform.python_version()},
    }
    if not options.quick:
        out = Path(__file__).parent / "results" / "refiner-cpu.json"
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
