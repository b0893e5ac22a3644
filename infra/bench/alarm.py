"""Fabrication alarm: nodules of 3 to 8 mm planted in, or deleted from, the null space of A on phantoms.

    python infra/bench/alarm.py [--quick] [--phantoms 8] [--samples 8] [--work DIR]

Per phantom, sites are drawn in even lung (the same for the same seed). At half of the empty ones a nodule's part in ker
A is added to one sample; at half of those where the truth holds a nodule (which the thick series sees) its part in ker
A is taken away from that sample. The other sites stay as they are. The alarm of that sample against the other samples
is read at every site: AUC of planted against empty sites, and of deleted against kept ones, by diameter too. The same
plants in every sample show what no alarm can find. Intervals (mean +- scale * spread) are calibrated on other phantoms;
their 90% coverage of the noisy true thin series is measured, overall and by tissue.

With ``--work`` the samples are those of a diffusion model too, over [-1000, 1000] HU from the shipped model's slices
(wide_model.py, trained there where it is not yet). Trained for minutes, it changes little: its samples agree more than
they are right, which the intervals' scale shows, and which makes what is planted in one of them easy to find.

The other samples are a STAND-IN, not a diffusion model's: a mean, made consistent, and Gaussian errors about it, whose
size at a voxel follows the steps between thick slices and the noise, correlated along z and in-plane, conditioned on
the thick slices by the same solver as consistency. The mean is cubic interpolation's or the shipped model's slices
(phantoms that it did not learn from); the errors are as large as that mean's are on the calibration phantoms. So what
is shown is that the alarm finds what differs from samples whose spread is about right, the better the more the
mean knows, and that intervals can be calibrated. How a diffusion model's samples spread, and how much they invent
alike, is not shown by them. Prints a table for each, then one JSON object, also kept in infra/bench/results/ (not with
--quick).
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from wide_model import WideModel, add_options, trained

from pipeline.evaluation import Intervals, auc
from pipeline.forward_model import ProtocolFit, SliceProfile, ThickMeasurement, enforce_data_consistency
from pipeline.forward_model.column_solver import ColumnSolver, hat_correlation
from pipeline.forward_model.error_prior import error_prior, steps
from pipeline.metrics import OtherSamples, alarm_map, null_part, score_at
from pipeline.phantom import Site, choose_sites, make_patient, nodule
from pipeline.refiner import RunSettings, load_pretrained, thin_slices
from pipeline.volume import Window, interpolated

Array = NDArray[np.float32]
SITES = {"planted": 34, "empty": 34, "deleted": 34, "kept": 34}
"""A phantom: two kinds of plant and as many places without."""
CALIBRATION_SEED, TEST_SEED = 700, 800
TISSUES_HU = {"lung": (-1000.0, -700.0), "fat": (-150.0, -50.0), "soft tissue": (0.0, 100.0), "bone": (300.0, 1500.0)}
MEANS = {"cubic": "cubic interpolation made consistent", "shipped": "the shipped model's slices made consistent"}
DRAW_STEPS = 4
DIAMETERS = ((3.0, 4.5), (4.5, 6.0), (6.0, 8.0))


@dataclass(frozen=True)
class Scene:
    """A phantom's noisy truth (z, y, x) HU with the nodules that are real, its measurement, and all sites by kind."""

    truth: Array
    measured: ThickMeasurement
    spacing: tuple[float, float, float]
    sites: dict[str, tuple[Site, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small phantom of each kind: shows that it runs")
    parser.add_argument("--phantoms", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--size", type=int, default=176)
    parser.add_argument("--slices", type=int, default=110)
    parser.add_argument("--work", type=Path, help="folder of wide_model.py: a trained model's samples too")
    parser.add_argument("--only-trained", action="store_true", help="keep the figures of the stand-ins as they are")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    counts = dict(SITES)
    if options.quick:
        options.phantoms, options.size, options.slices, options.samples = 1, 112, 70, 4
        counts = dict.fromkeys(SITES, 4)
    path = Path(__file__).parent / "results" / "alarm-cpu.json"
    kept = json.loads(path.read_text()) if options.only_trained else {}
    if not options.only_trained:
        found = {mean: measured_about(stand_in(mean, options, counts), options, counts) for mean in MEANS}
        kept = {"bench": "alarm", **found["shipped"], "about_cubic": found["cubic"]}
    if options.work is not None:
        run = trained(options.work, options, quick=options.quick)
        kept["trained"] = measured_about(Trained(WideModel.load(run)), options, counts)
    if not options.quick:
        path.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(kept))


def measured_about(source: Source, options: argparse.Namespace, counts: dict[str, int]) -> dict[str, Any]:
    """The table of one source of samples."""
    start = time.process_time()
    intervals = calibrated(source, options, counts)
    scores: dict[str, list[float]] = {kind: [] for kind in (*SITES, "planted in every sample")}
    diameters: dict[str, list[float]] = {kind: [] for kind in SITES}
    coverage: dict[str, list[float]] = {}
    for number in range(options.phantoms):
        one = scene(TEST_SEED + number, options, counts)
        drawn = source.samples(one, options.samples, number)
        for name, share in covered(one, drawn, intervals).items():
            coverage.setdefault(name, []).append(share)
        judge(one, drawn, scores, diameters)
        print(f"{source.described}, phantom {number + 1}: {time.process_time() - start:.0f} CPU s", flush=True)
    found = summary(scores, diameters, coverage, intervals, options) | {
        "samples": source.described,
        **({"error_over_prior": round(source.error_over_prior, 3)} if isinstance(source, StandIn) else {}),
        "cpu_s": round(time.process_time() - start, 1),
    }
    show(found)
    return found


def scene(seed: int, options: argparse.Namespace, counts: dict[str, int]) -> Scene:
    """A phantom whose "deleted" and "kept" nodules are real: in the thin series, and in the thick one through A."""
    patient = make_patient(seed, options.size, options.slices)
    thick, thin = patient.thick, patient.thin
    spacing = thin.geometry.spacing_mm_zyx
    measured = ThickMeasurement.of(thick, thin.geometry.z_mm, SliceProfile("box", thick.geometry.thickness_mm))
    covered = np.flatnonzero(measured.operator.matrix[measured.operator.judged].any(axis=0))
    lung = np.where(_within(len(thin.hu), covered)[:, None, None], patient.thin_truth, 0)
    chosen = choose_sites(np.random.default_rng([seed, 77]), lung, spacing, sum(counts.values()))
    sites, first = {}, 0
    for kind, count in counts.items():
        sites[kind], first = chosen[first : first + count], first + count
    real = rendered((*sites["deleted"], *sites["kept"]), measured, spacing)
    seen = replace(thick, hu=(thick.hu + measured.operator.apply(real)).astype(np.float32))
    return Scene((thin.hu + real).astype(np.float32), replace(measured, volume=seen), spacing, sites)


def _within(count: int, covered: NDArray[np.intp]) -> NDArray[np.bool_]:
    inside = np.zeros(count, bool)
    inside[covered.min() : covered.max() + 1] = True
    return inside


def rendered(sites: tuple[Site, ...], measured: ThickMeasurement, spacing: tuple[float, float, float]) -> Array:
    """What the nodules add, (z, y, x) HU."""
    added = np.zeros(measured.shape_zyx, np.float32)
    for site in sites:
        block, hu = nodule(site, added.shape, spacing)
        added[block] += hu
    return added


@dataclass(frozen=True)
class StandIn:
    """Samples about a mean, with errors of ``error_over_prior`` times the error prior of interpolation."""

    mean: str
    error_over_prior: float

    @property
    def described(self) -> str:
        return f"stand-in: Gaussian errors about {MEANS[self.mean]}, conditioned on the thick slices"

    def centre(self, one: Scene) -> Array:
        """The mean, made consistent, (z, y, x) HU."""
        measured = one.measured
        if self.mean == "cubic":
            mean = np.asarray(interpolated(measured.volume, replace_z(measured), "cubic"), np.float32)
        else:
            how = RunSettings(threads=torch.get_num_threads())
            mean = thin_slices(load_pretrained(), measured.volume, replace_z(measured), measured.profile, how)
        enforce_data_consistency(mean, measured, floor_hu=-1024)
        return mean

    def prior(self, one: Scene, mean: Array) -> tuple[Array, float]:
        """What interpolation errs by, (z, pixels) HU, and the thin slices' noise."""
        measured, covered = one.measured, one.measured.operator.covered
        thick = np.asarray(measured.hu[covered], np.float32).reshape(int(covered.sum()), -1)
        wrong = error_prior(mean, measured, Window.parse("maisi")).interpolation_error(steps(thick), len(mean))
        # A thin slice is noisier than a thick one by the root of the thin slices that it averages.
        return wrong, float(measured.noise_hu * np.sqrt(measured.profile.fwhm_mm / measured.spacing_mm))

    def samples(self, one: Scene, count: int, seed: int) -> Array:
        """(count, z, y, x) HU: the mean + e, with e drawn and conditioned on A e = 0."""
        mean, operator = self.centre(one), one.measured.operator
        prior, noise = self.prior(one, mean)
        sigma = np.hypot(np.float32(self.error_over_prior) * prior, np.float32(noise))
        a = operator.matrix[operator.covered]
        solver = ColumnSolver(a, operator.thin_z_mm, np.full(len(a), 1e-3))
        root = np.linalg.cholesky(hat_correlation(operator.thin_z_mm) + 1e-6 * np.eye(len(mean))).astype(np.float32)
        rng = np.random.default_rng([seed, 5])
        out = np.empty((count, *mean.shape), np.float32)
        for k in range(count):
            white = rng.standard_normal(mean.shape, dtype=np.float32)
            white = gaussian_filter1d(gaussian_filter1d(white, 0.6, axis=1), 0.6, axis=2)
            error = sigma * (root @ (white / white.std()).reshape(len(mean), -1))
            wanted = (-(a.astype(np.float32) @ error)).astype(np.float32)
            unbounded = np.float32(np.inf)
            error = solver.solve(error, wanted, sigma, -unbounded, unbounded, one.measured.noise_hu**2)
            out[k] = mean + error.reshape(mean.shape)
        return out


@dataclass(frozen=True)
class Trained:
    """Samples of a diffusion model, composed as `ctpipe interpolate` composes them."""

    model: WideModel

    @property
    def described(self) -> str:
        return f"a diffusion model's, {DRAW_STEPS} steps each, from the shipped model's slices"

    def samples(self, one: Scene, count: int, seed: int) -> Array:
        """(count, z, y, x) HU."""
        measured, target = one.measured, replace_z(one.measured)
        fit = ProtocolFit(measured.profile, measured.noise_hu)
        base = self.model.base(measured.volume, target, fit)
        seeds = range(1000 * seed, 1000 * seed + count)
        drawn = self.model.answers(measured.volume, target, fit, steps=(DRAW_STEPS,), base=base, seeds=seeds)
        return np.stack([hu.astype(np.float32) for hu, _ in drawn])


Source = StandIn | Trained


def replace_z(measured: ThickMeasurement) -> Any:
    """The thin grid of a measurement."""
    geometry = measured.volume.geometry.with_z(measured.thin_z_mm, thickness_mm=measured.spacing_mm)
    return replace(geometry, shape_zyx=measured.shape_zyx)


def others_of(samples: Array) -> OtherSamples:
    return OtherSamples(samples.mean(axis=0), samples.std(axis=0, ddof=1), len(samples))


def judge(one: Scene, drawn: Array, scores: dict[str, list[float]], diameters: dict[str, list[float]]) -> None:
    """Plant and delete in the first sample, and read the alarm at every site."""
    operator = one.measured.operator
    planted = null_part(rendered(one.sites["planted"], one.measured, one.spacing), operator)
    deleted = null_part(rendered(one.sites["deleted"], one.measured, one.spacing), operator)
    others = others_of(drawn[1:])
    alarm = alarm_map(drawn[0] + planted - deleted, others, one.measured)
    for kind, sites in one.sites.items():
        scores[kind] += [score_at(alarm, site.center_zyx, one.spacing) for site in sites]
        diameters[kind] += [site.diameter_mm for site in sites]
    alike = alarm_map(drawn[0] + planted, replace(others, mean=others.mean + planted), one.measured)
    scores["planted in every sample"] += [score_at(alike, s.center_zyx, one.spacing) for s in one.sites["planted"]]


def inside_of(one: Scene) -> NDArray[np.bool_]:
    """Thin slices that the judged thick slices see."""
    return np.asarray(one.measured.operator.matrix[one.measured.operator.judged].any(axis=0))


def stand_in(mean: str, options: argparse.Namespace, counts: dict[str, int]) -> StandIn:
    """Samples about a mean, with errors of the size that it has on the calibration phantoms."""
    scenes = calibration_scenes(options, counts)
    plain = StandIn(mean, 1.0)
    wrong = prior = 0.0
    for one in scenes:
        inside, centre = inside_of(one), plain.centre(one)
        expected, noise = plain.prior(one, centre)
        wrong += float(np.mean(np.square((one.truth - centre)[inside], dtype=np.float64))) - noise**2
        prior += float(np.mean(np.square(expected.reshape(centre.shape)[inside], dtype=np.float64)))
    return StandIn(mean, float(np.sqrt(max(wrong, 0.0) / prior)))


def calibration_scenes(options: argparse.Namespace, counts: dict[str, int]) -> list[Scene]:
    """Phantoms that nothing else is measured on."""
    return [scene(CALIBRATION_SEED + k, options, counts) for k in range(max(1, options.phantoms // 2))]


def calibrated(source: Source, options: argparse.Namespace, counts: dict[str, int]) -> Intervals:
    """Intervals from the calibration phantoms."""
    scenes = calibration_scenes(options, counts)
    errors, spreads, means = [], [], []
    for number, one in enumerate(scenes):
        drawn = source.samples(one, options.samples, 1000 + number)
        inside, middle = inside_of(one), drawn.mean(axis=0)
        errors.append((one.truth - middle)[inside, ::3, ::3].ravel())
        spreads.append(drawn.std(axis=0, ddof=1)[inside, ::3, ::3].ravel())
        means.append(middle[inside, ::3, ::3].ravel())
    return Intervals.calibrated(np.concatenate(errors), np.concatenate(spreads), np.concatenate(means))


def covered(one: Scene, drawn: Array, intervals: Intervals) -> dict[str, float]:
    """Coverage of the truth, overall, by tissue of the mean, and by tissue of the truth, which no interval can know."""
    inside = inside_of(one)
    mean, truth, spread = drawn.mean(axis=0)[inside], one.truth[inside], drawn.std(axis=0, ddof=1)[inside]
    error = truth - mean
    found = {"all": intervals.coverage(error, spread, mean)}
    for by, volume in (("", mean), (" of the truth", truth)):
        for name, (low, high) in TISSUES_HU.items():
            chosen = (volume >= low) & (volume < high)
            found[name + by] = intervals.coverage(error[chosen], spread[chosen], mean[chosen])
    return found


def summary(
    scores: dict[str, list[float]],
    diameters: dict[str, list[float]],
    coverage: dict[str, list[float]],
    intervals: Intervals,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """AUC, coverage and what they were measured with."""
    at = {kind: np.asarray(values) for kind, values in scores.items()}
    size = {kind: np.asarray(values) for kind, values in diameters.items()}
    return {
        "plants": len(at["planted"]) + len(at["deleted"]),
        "auc": {
            "planted": round(auc(at["planted"], at["empty"]), 4),
            "deleted": round(auc(at["deleted"], at["kept"]), 4),
            "both": round(auc(np.r_[at["planted"], at["deleted"]], np.r_[at["empty"], at["kept"]]), 4),
            "planted in every sample": round(auc(at["planted in every sample"], at["empty"]), 4),
        },
        "auc_by_diameter_mm": {
            f"{low:g} to {high:g}": {
                kind: round(auc(at[kind][(size[kind] >= low) & (size[kind] <= high)], at[rest]), 4)
                for kind, rest in (("planted", "empty"), ("deleted", "kept"))
            }
            for low, high in DIAMETERS
            if all(((size[k] >= low) & (size[k] <= high)).any() for k in ("planted", "deleted"))
        },
        "coverage_90": {
            name: {"mean": round(float(np.mean(v)), 4), "least": round(min(v), 4), "most": round(max(v), 4)}
            for name, v in coverage.items()
        },
        "interval_scale": np.round(intervals.scale, 3).tolist(),
        "settings": {k: vars(options)[k] for k in ("phantoms", "samples", "size", "slices")},
        "device": f"cpu-{platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy", "torch")},
    }


def show(found: dict[str, Any]) -> None:
    """The figures for people."""
    print(f"{found['plants']} plants, {found['samples']}")
    print("AUC " + ", ".join(f"{k} {v:.3f}" for k, v in found["auc"].items()))
    for name, one in found["auc_by_diameter_mm"].items():
        print(f"  {name} mm: planted {one['planted']:.3f}, deleted {one['deleted']:.3f}")
    for name, one in found["coverage_90"].items():
        print(f"  90% interval, {name:24s} {one['mean']:.1%} ({one['least']:.1%} to {one['most']:.1%} by phantom)")


if __name__ == "__main__":
    main()
