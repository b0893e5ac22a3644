"""Consistency on a genuine pair (28 x 5 mm and 140 x 1 mm of one acquisition), the profile fitted on other slices.

    python infra/bench/consistency.py [--quick] [--real FOLDER] [--checkpoint RUN]

The profile A and its noise are fitted on one half of the slices and used on the other, and the other way round: no
slice that is judged took part in the fit. Per half: RMS(A x - y) of the true thin series, of the output before and
after, their ratio, and PSNR over 2000 HU and over the soft-tissue window with and without consistency. The output is
cubic interpolation; with --checkpoint also a run's own, decoded with residual detail.

Below that, answers of every quality on phantoms (no data needed): the truth plus a share of cubic's error, or smooth or
white noise, inside the window; profile and noise fitted on another phantom, as `ctpipe evaluate` does. PSNR inside the
window before and after, and the CPU seconds of consistency alone. No answer may lose.

Then operators that are wrong on purpose: what the figures say of each, blindly (from the thick slices and the
output alone), and against the fit. A profile that is assumed too narrow cannot be told from smooth slices without a
pair: the second column is what `ctpipe decode` has and `ctpipe interpolate` has not. Prints tables, then one JSON
object, which is also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
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
from scipy.ndimage import gaussian_filter

from pipeline.archive import open_archive
from pipeline.decode import ComposeSettings, compose
from pipeline.forward_model import (
    ProtocolFit,
    SliceProfile,
    enforce_data_consistency,
    fit_pair,
    residual_rms,
    slice_operator,
)
from pipeline.metrics import psnr
from pipeline.phantom import make_patient
from pipeline.reading import read_scanned, scan
from pipeline.volume import Volume, Window, common_slices, interpolated

ROOT = Path(__file__).resolve().parents[2]
WIDE, SOFT = Window.parse("maisi"), Window()
Pair = tuple[Volume, Volume]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fourth pixel")
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real"),
    )
    parser.add_argument("--checkpoint", type=Path, help="a run, whose output on the middle 192 x 192 pixels is added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = read_pair(options.real)
    stride = slice(None, None, 4 if options.quick else 1)
    halves = {name: part(whole, *at, stride) for name, at in {"lower": (0, 14), "upper": (14, 28)}.items()}
    rows, doubts = [], []
    for fitted, used in (("lower", "upper"), ("upper", "lower")):
        fit = fit_pair(*halves[fitted])
        thin, thick = halves[used]
        rows.append(agree(f"cubic, {used} half", interpolated(thick, thin.geometry, "cubic"), halves[used], fit))
        doubts += [doubt(used, halves[used], fit, name, assumed) for name, assumed in wrong(fit).items()]
        if options.checkpoint is not None:
            middle = part(halves[used], 0, 14, slice(160, 352) if not options.quick else slice(48, 80))
            rows.append(from_model(options.checkpoint, f"model, {used} half", middle, fit))
    report(rows, answers(options.quick), doubts, options)


def answers(quick: bool) -> list[dict[str, Any]]:
    """Consistency given answers from cubic interpolation to the truth itself, on two phantoms."""
    size, slices = (96, 60) if quick else (160, 100)
    patients = [make_patient(seed, size, slices) for seed in (1, 2)]
    found = []
    for number, (one, other) in enumerate(zip(patients, reversed(patients), strict=True), start=1):
        fit = fit_pair(other.thin, other.thick)
        inside = common_slices(one.thick.geometry, one.thin.geometry)
        target = one.thin.geometry.with_z(np.asarray(one.thin.geometry.z_mm)[inside])
        truth = one.thin.hu[inside]
        how = ComposeSettings("absolute", True, fit.profile, fit.noise_hu)
        measured = how.measured(one.thick, target)
        for name, decoded in of_every_quality(truth, interpolated(one.thick, target, "cubic")):
            given, _ = compose(decoded, SOFT, measured, replace(how, consistency=False))
            x = given.astype(np.float32)
            start = time.process_time()
            enforce_data_consistency(x, measured, window=None if name == "cubic" else SOFT, floor_hu=-1024)
            row = {"phantom": number, "answer": name, "cpu_s": round(time.process_time() - start, 3)}
            row |= {
                "before_db": round(in_window(given, truth, SOFT), 2),
                "after_db": round(in_window(x, truth, SOFT), 2),
            }
            found.append(row)
    return found


def of_every_quality(truth: NDArray[Any], cubic: NDArray[np.float32]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and decoded HU, (z, y, x) float32, as a decoder gives them: within the window."""
    yield "cubic", cubic
    seen = np.clip(truth, SOFT.lower, SOFT.upper).astype(np.float32)
    error = np.clip(cubic, SOFT.lower, SOFT.upper) - seen
    for share in (0.8, 0.65, 0.5, 0.35, 0.2, 0.1):
        yield f"truth + {share:g} of cubic's error", seen + np.float32(share) * error
    white = np.random.default_rng(7).standard_normal(truth.shape).astype(np.float32)
    smooth = gaussian_filter(white, 1.5)
    for name, noise in (("smooth", smooth / smooth.std()), ("white", white)):
        for hu in (12, 6):
            yield f"truth + {name} {hu} HU", np.clip(seen + np.float32(hu) * noise, SOFT.lower, SOFT.upper)
    yield "truth", seen


def read_pair(folder: Path) -> Pair:
    """(thin, thick), as scanned."""
    source = open_archive(folder / "ape-layout" / "non-APE" / "head-phantom.zip")
    found = {one.role_hint: read_scanned(source, one, threads=1) for one in scan(source).series}
    source.close()
    return found["thin"], found["thick"]


def part(pair: Pair, first: int, last: int, pixels: slice) -> Pair:
    """Thick slices first to last and the five thin ones of each, on some of the rows and columns."""

    def cut(volume: Volume, slices: slice) -> Volume:
        hu = np.ascontiguousarray(volume.hu[slices][:, pixels, pixels])
        at = volume.geometry.with_z(np.asarray(volume.geometry.z_mm)[slices])
        return replace(volume, hu=hu, geometry=replace(at, shape_zyx=hu.shape))

    return cut(pair[0], slice(5 * first, 5 * last)), cut(pair[1], slice(first, last))


def wrong(fit: ProtocolFit) -> dict[str, SliceProfile]:
    """The fitted profile, the stated one, and others that are clearly off."""
    return {
        "fitted": fit.profile,
        "stated box": SliceProfile("box", 5.0),
        "half as wide": SliceProfile("box", 2.5),
        "twice as wide": SliceProfile("box", 10.0),
        "1 mm off": fit.profile.shifted(1.0),
        "2 mm off": fit.profile.shifted(-2.0),
    }


def true_rms(pair: Pair, profile: SliceProfile) -> float:
    thin, thick = pair
    operator = slice_operator(profile, np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm))
    return residual_rms(thin.hu, thick.hu, operator)[0]


def agree(name: str, guess: NDArray[np.float32], pair: Pair, fit: ProtocolFit) -> dict[str, Any]:
    """With and without consistency, beside the true thin series."""
    thin, thick = pair
    hu: dict[bool, NDArray[Any]] = {}
    figures: Any = {}
    for on in (False, True):
        how = ComposeSettings("absolute", on, fit.profile, fit.noise_hu)
        hu[on], figures = compose(guess, WIDE, how.measured(thick, thin.geometry), how)
    truth = true_rms(pair, fit.profile)
    return {
        "output": name,
        "profile": str(fit.profile),
        "true_rms_hu": round(truth, 3),
        "before_rms_hu": figures["rms_before_hu"],
        "after_rms_hu": figures["rms_after_hu"],
        "ratio": round(figures["rms_after_hu"] / truth, 3),
        **{
            f"psnr_{window}_{'with' if on else 'without'}_db": round(in_window(hu[on], thin.hu, range_), 2)
            for window, range_ in (("2000", WIDE), ("400", SOFT))
            for on in (False, True)
        },
    }


def doubt(half: str, pair: Pair, fit: ProtocolFit, name: str, assumed: SliceProfile) -> dict[str, Any]:
    """What is said of an assumed profile, and what it does."""
    thin, thick = pair
    guess = interpolated(thick, thin.geometry, "cubic")
    how = ComposeSettings("absolute", True, assumed, fit.noise_hu)
    hu, figures = compose(guess, WIDE, how.measured(thick, thin.geometry), how)
    truth = true_rms(pair, assumed)
    return {
        "half": half,
        "assumed": name,
        "true_rms_hu": round(truth, 2),
        "ratio": round(figures["rms_after_hu"] / truth, 3),
        "psnr_2000_db": round(in_window(hu, thin.hu, WIDE), 2),
        "blind": figures["warning"],
        "with_a_pair": fit.said_of(assumed, true_rms((thin, thick), assumed)),
    }


def from_model(run: Path, name: str, pair: Pair, fit: ProtocolFit) -> dict[str, Any]:
    """A run's output, as `ctpipe interpolate` makes it."""
    from diffusion.sampling import Interpolator
    from latentcache import LatentGrid
    from pipeline.vae import load_vae
    from pipeline.workflows import condition_latent
    from pipeline.workflows.interpolation.interpolate import told_of

    thin, thick = pair
    vae, model = load_vae("tiny"), Interpolator.load(run)
    encoding = model.encoding
    assert encoding is not None
    window = Window(encoding.window_center, encoding.window_width)
    condition = condition_latent(thick, thin.geometry, window, vae, model.alignment)
    told = told_of(thick, LatentGrid.of(thin.geometry).positions())
    given, decoded = (
        window.from_unit(np.asarray(vae.decode(torch.from_numpy(z), thin.geometry.shape_zyx)))
        for z in (condition, model.generate_latent(condition, **told))
    )
    plain = ComposeSettings(consistency=False)
    guess, _ = compose(decoded, window, plain.measured(thick, thin.geometry), plain, condition_hu=given)
    return agree(name, guess.astype(np.float32), pair, fit)


def in_window(hu: NDArray[Any], truth: NDArray[Any], window: Window) -> float:
    a, b = (np.clip(np.asarray(v, np.float32), window.lower, window.upper) for v in (hu, truth))
    return psnr(a, b, data_range=window.width)


def report(
    rows: list[dict[str, Any]], given: list[dict[str, Any]], doubts: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    print("RMS(A x - y) in HU: true thin series, output before and after; PSNR in dB without -> with consistency")
    for row in rows:
        print(
            f"  {row['output']:20s} true {row['true_rms_hu']:5.2f}  {row['before_rms_hu']:6.2f} -> "
            f"{row['after_rms_hu']:5.2f}  ratio {row['ratio']:.2f}   2000 HU {row['psnr_2000_without_db']:.2f} -> "
            f"{row['psnr_2000_with_db']:.2f}   400 HU {row['psnr_400_without_db']:.2f} -> {row['psnr_400_with_db']:.2f}"
            f"   A: {row['profile']}"
        )
    print("answers of every quality on phantoms, PSNR over 400 HU")
    for row in given:
        print(
            f"  {row['phantom']} {row['answer']:30s} {row['before_db']:6.2f} -> {row['after_db']:6.2f}"
            f"   {row['cpu_s']:.2f} CPU s"
        )
    print("assumed operators, what they do to cubic interpolation, and what is said")
    for row in doubts:
        print(
            f"  {row['half']:6s} {row['assumed']:14s} true {row['true_rms_hu']:6.2f}  ratio {row['ratio']:.2f}  "
            f"{row['psnr_2000_db']:.2f} dB\n      blind: {row['blind'] or 'nothing'}\n"
            f"      with a pair: {row['with_a_pair'] or 'nothing'}"
        )
    found = {
        "bench": "consistency",
        "agreement": rows,
        "answers": given,
        "wrong_operators": doubts,
        "device": f"cpu-{platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy", "torch")},
    }
    if not options.quick:
        (Path(__file__).parent / "results" / "consistency-cpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
