"""Phantom patients encoded by the tiny VAE, and a LatentStore of them; used by objectives.py."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.data import key_of, series, stage
from latentcache import Encoding, LatentStore, PairRecord, Split
from pipeline.phantom import make_patient
from pipeline.vae import Vae
from pipeline.volume import Window, resample_z

WINDOW = Window()
FIRST_SEED: dict[Split, int] = {"train": 1000, "val": 2000, "test": 3000}


@dataclass(frozen=True)
class Case:
    """One patient: the thin volume and its linear interpolation in [-1, 1], and both encoded, raw."""

    thin: NDArray[np.float32]
    linear: NDArray[np.float32]
    thin_latent: NDArray[np.float32]
    condition: NDArray[np.float32]


def load_case(keep: Path, vae: Vae, split: Split, number: int, size: int, slices: int) -> Case:
    """The split's patient of that number: read if it was made before."""
    path = keep / "cases" / f"{split}-{number}-{size}-{slices}-{vae.sha256[:8]}.npz"
    if not path.exists():
        case = make_case(vae, FIRST_SEED[split] + number, size, slices)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(aside, **vars(case))
        aside.rename(path)
    with np.load(path) as kept:
        return Case(**kept)


def make_case(vae: Vae, seed: int, size: int, slices: int) -> Case:
    """A phantom, cropped to what the thick series covers so that nothing is extrapolated."""
    patient = make_patient(seed, size, slices, "APE" if seed % 2 else "non-APE")
    z_thin, z_thick = np.asarray(patient.thin.geometry.z_mm), np.asarray(patient.thick.geometry.z_mm)
    inside = (z_thin >= z_thick[0] - 2.5) & (z_thin <= z_thick[-1] + 2.5)
    first = int(np.argmax(inside))
    last = first + int(inside.sum()) // 4 * 4
    thin = WINDOW.to_unit(patient.thin.hu[first:last])
    linear = WINDOW.to_unit(resample_z(patient.thick.hu, z_thick, z_thin[first:last]))
    return Case(thin, linear, vae.encode(thin).numpy(), vae.encode(linear).numpy())


def make_store(folder: Path, cases: list[Case], vae: Vae) -> LatentStore:
    """A LatentStore of the cases' latents, all in the training split."""
    store = LatentStore.create(folder, secret_fingerprint="f" * 16)
    encoding = Encoding(vae.sha256, vae.architecture, WINDOW.center, WINDOW.width)
    encode_key = store.register_encoding(encoding)
    catalog, pairs, records = [], [], []
    for number, case in enumerate(cases):
        depth, *plane = case.thin.shape
        thin_key, thick_key, pair_key = (key_of(kind, number) for kind in (3, 4, 7))
        catalog += [
            series(thin_key, number, "thin", depth, "train", (plane[0], plane[1])),
            series(thick_key, number, "thick", depth // 5, "train", (plane[0], plane[1])),
        ]
        overlap = (-0.5, depth - 0.5)
        keys = (pair_key, key_of(1, number), key_of(2, number), catalog[-1].category, thick_key, thin_key)
        pairs.append(PairRecord(*keys, overlap, "train", "{}"))
        records += [
            stage(store, encode_key, thin_key, "thin", case.thin_latent.astype(np.float64), depth),
            stage(store, encode_key, pair_key, "thick_on_thin", case.condition.astype(np.float64), depth),
        ]
    store.append_catalog(catalog, pairs)
    with store.writer() as writer:
        writer.commit(records)
    return LatentStore.open(folder)


def decode(vae: Vae, latent: NDArray[np.float32], case: Case) -> NDArray[np.float32]:
    """The latent's volume in [-1, 1]."""
    shape = (case.thin.shape[0], case.thin.shape[1], case.thin.shape[2])
    return np.asarray(vae.decode(torch.from_numpy(latent), shape))


def psnr(predicted: NDArray[np.float32], case: Case) -> float:
    """Over the window, dB, of a volume in [-1, 1]."""
    return 10 * math.log10(4 / float(np.square(np.clip(predicted, -1, 1) - case.thin).mean()))
