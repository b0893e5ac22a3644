"""A diffusion model over [-1000, 1000] HU that starts from the shipped model's slices; real.py judges it.

    python infra/bench/wide_model.py --work DIR [--data FOLDER] [--cpu-seconds 600]

Lung and its density lie outside the soft-tissue window of `quality.py`, so this run has the window `maisi`. It learns
from phantoms (seeds that the shipped model did not learn from) and, where the folder of genuine training CT is at hand,
from pieces of those, with thick slices simulated by a 5 mm box. All through `ctpipe ingest`, `encode --refiner default`
and `train --refiner default`; ``--work`` is kept, and a run again takes up there. The shipped model did learn from the
genuine volumes, so it errs less on them than on others: what is judged with this model is none of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from refiner import protocol

from cli.main import app
from diffusion.sampling import Interpolator, change_gain
from latentcache import LatentGrid
from pipeline.decode import ComposeSettings, base_volume, compose
from pipeline.forward_model import ProtocolFit, SliceProfile, slice_operator
from pipeline.phantom import patient_zip, write_dataset
from pipeline.refiner import positions
from pipeline.vae import load_vae
from pipeline.volume import Geometry, Volume, Window
from pipeline.workflows import condition_latent
from pipeline.workflows.interpolation.interpolate import told_of
from pipeline.workflows.sample import start_of

sys.path.append(str(Path(__file__).resolve().parents[1]))
from pretrained_data import read_source

ROOT = Path(__file__).resolve().parents[2]
TRAINING_DATA = Path(os.environ.get("CTPIPE_TRAINING_DATA") or ROOT.parent / "shared" / "data" / "train")
WINDOW = Window.parse("maisi")
GROUPS = ((1.5, 128, 64, 9.0), (1.0, 160, 100, 9.0), (1.0, 160, 100, 14.0))
"""Of each group of phantoms: thin spacing in mm, matrix, thin slices, thin noise in HU."""
FIRST_SEED = 40
SIDE, SLICES, LEAST_PIXEL_MM = 160, 96, 1.3
"""Of a piece of a genuine volume: matrix, slices, and the pixel that it is averaged to at least."""
SAMPLER_STEPS = 10
Array = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for archive, store and run; kept")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(trained(options.work, options))


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `trained` takes, for the benches that train such a model where none is given."""
    parser.add_argument("--data", type=Path, default=TRAINING_DATA, help="genuine training CT, NIfTI")
    parser.add_argument("--cpu-seconds", type=float, default=600.0, help="processor seconds of the training")
    parser.add_argument("--patients", type=int, default=4, help="of each group of phantoms")
    parser.add_argument("--threads", type=int, default=1)


def trained(work: Path, options: argparse.Namespace, *, quick: bool = False) -> Path:
    """The run's folder, made where ``work`` has none."""
    work.mkdir(parents=True, exist_ok=True)
    archive, store, run = work / "archive", work / "store", work / "run"
    for number, (spacing, size, slices, noise) in enumerate(GROUPS[:1] if quick else GROUPS):
        size, slices = (64, 44) if quick else (size, slices)
        # Pixels of 2 mm in every group.
        settings = replace(protocol(spacing, size, slices, noise), field_of_view_mm=2.0 * size)
        folder, count = archive / f"phantoms-{number}", 5 if quick else options.patients
        write_dataset(folder, patients=count, size=size, n_thin=slices, seed=FIRST_SEED + number, settings=settings)
    if not quick and options.data.is_dir():
        for name, thick, thin in genuine(options.data):
            path = archive / "genuine" / f"{name}.zip"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_suffix(".part")
                draft.write_bytes(patient_zip(thick, thin, name))
                draft.rename(path)
    words: list[list[Any]] = [
        ["ingest", archive, store],
        ["encode", store, "--vae", "tiny", "--window", "maisi", "--refiner", "default", "--engine", "inline",
         "--roles", "thin,refined_on_thin"],
        ["train", store, run, "--preset", "tiny", "--refiner", "default",
         "--set", f"budget.max_cpu_seconds={2.0 if quick else options.cpu_seconds}",
         "--set", "budget.max_seconds=null"],
    ]  # fmt: skip
    for one in words:
        if one[0] == "train" and (run / "checkpoints").exists():
            continue
        code = app([str(word) for word in one], standalone_mode=False)
        if code:
            raise SystemExit(f"ctpipe {one[0]} ended with {code}")
    return run


def genuine(folder: Path) -> Iterator[tuple[str, Volume, Volume]]:
    """Pieces of genuine volumes: a name, thick slices simulated from it (5 mm box, 5 mm apart), and the thin ones."""
    for path in sorted(folder.glob("*.nii.gz")):
        source = read_source(path)
        dz, dy, dx = source.spacing
        factor = max(1, int(np.ceil(LEAST_PIXEL_MM / dx - 1e-6)))
        rows, columns = (n // factor for n in source.hu.shape[1:])
        hu = source.hu[:, : rows * factor, : columns * factor].reshape(-1, rows, factor, columns, factor).mean((2, 4))
        top, left = (max(0, n - SIDE) // 2 for n in (rows, columns))
        hu = hu[:, top : top + SIDE, left : left + SIDE]
        hu = hu[:, : hu.shape[1] // 4 * 4, : hu.shape[2] // 4 * 4]
        for number, first in enumerate(range(0, len(hu) - SLICES + 1, max(SLICES, (len(hu) - SLICES) // 2))):
            piece = np.clip(np.rint(hu[first : first + SLICES]), -1024, 3071).astype(np.int16)
            z = np.round(np.arange(SLICES) * dz, 4)
            affine = (
                (0.0, 0.0, dx * factor, 0.0),
                (0.0, dy * factor, 0.0, 0.0),
                (dz, 0.0, 0.0, 0.0),
                (0.0,) * 3 + (1.0,),
            )
            thin = Volume(piece, Geometry(piece.shape, affine, tuple(z.tolist()), round(dz, 4)))
            at = positions(z, 5.0, 0.0)
            thick = np.rint(slice_operator(SliceProfile("box", 5.0), at, z).apply(piece)).astype(np.int16)
            yield (
                f"{path.name.removesuffix('.nii.gz')}_{number}",
                Volume(thick, replace(thin.geometry.with_z(at), thickness_mm=5.0)),
                thin,
            )


@dataclass(frozen=True)
class WideModel:
    """The trained run, and what a volume's samples are composed with."""

    run: Path
    model: Interpolator
    vae: Any
    start: Any

    @classmethod
    def load(cls, run: Path) -> WideModel:
        return cls(run, Interpolator.load(run), load_vae("tiny"), start_of(run, "cpu"))

    def base(self, thick: Volume, target: Geometry, fit: ProtocolFit) -> Array:
        """The slices that the model starts from, (z, y, x) HU."""
        return np.asarray(base_volume(thick, np.asarray(target.z_mm), self._composing(fit), WINDOW), np.float32)

    def answers(
        self,
        thick: Volume,
        target: Geometry,
        fit: ProtocolFit,
        *,
        steps: Sequence[int],
        base: Array,
        seeds: Sequence[int] = (0,),
    ) -> Iterator[tuple[NDArray[np.int16], dict[str, Any]]]:
        """Answers as `ctpipe interpolate` composes them, (z, y, x) HU and figures, by number of steps, then by seed."""
        composing = self._composing(fit)
        measured = composing.measured(thick, target)
        condition = condition_latent(thick, target, WINDOW, self.vae, self.model.alignment, start=self.start)
        told = told_of(thick, LatentGrid.of(target).positions())
        given = self._decoded(condition, target)
        for number, seed in product(steps, seeds):
            latent = self.model.generate_latent(condition, **told, seed=seed, num_inference_steps=number)
            how = replace(composing, change_gain=change_gain(self.run, number))
            hu, figures = compose(
                self._decoded(latent, target), WINDOW, measured, how, condition_hu=given, base_hu=base
            )
            yield hu, dict(figures)

    def _composing(self, fit: ProtocolFit) -> ComposeSettings:
        return ComposeSettings("residual", True, fit.profile, fit.noise_hu, start=self.start)

    def _decoded(self, latent: Array, target: Geometry) -> Array:
        return np.asarray(WINDOW.from_unit(np.asarray(self.vae.decode(torch.from_numpy(latent), target.shape_zyx))))


if __name__ == "__main__":
    main()
