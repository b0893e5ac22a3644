"""A small LatentStore of made-up latents, for the self-test, the benchmarks and the tests; no VAE, no DICOM.

Thin latents are smooth noise of unlike scale a channel; the condition is their running mean along depth.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentcache import (
    Encoding,
    LatentMeta,
    LatentRecord,
    LatentRole,
    LatentStore,
    PairRecord,
    SeriesRecord,
    SeriesRole,
    Split,
)

Latent = NDArray[np.float64]
ENCODING = Encoding(vae_sha256="0" * 64, vae_architecture={"name": "made up"}, window_center=40.0, window_width=400.0)


def key_of(kind: int, patient: int) -> str:
    """16 hex digits: 1 study, 2 patient, 3 thin, 4 thick, 7 pair, and the patient's number."""
    return f"{kind:x}{patient:015x}"


def series(
    key: str, patient: int, role: SeriesRole, n_slices: int, split: Split, shape: tuple[int, int]
) -> SeriesRecord:
    """Return a catalog row; thin slices are 1 mm apart, thick ones 4 mm."""
    spacing = 1.0 if role == "thin" else 4.0
    return SeriesRecord(
        series_key=key,
        study_key=key_of(1, patient),
        patient_key=key_of(2, patient),
        category="APE" if patient % 2 else "non-APE",
        role=role,
        status="ok",
        reason="",
        n_slices=n_slices,
        shape_zyx=(n_slices, *shape),
        spacing_mm_zyx=(spacing, 1.0, 1.0),
        thickness_mm=spacing,
        affine_lps=(0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1),
        z_mm=tuple(spacing * np.arange(n_slices)),
        frame_key=key_of(5, patient),
        acquisition_key=key_of(6, patient),
        kernel="B",
        modality="CT",
        transfer_syntax="1.2.840.10008.1.2.1",
        split=split,
    )


def make_store(
    folder: Path,
    *,
    splits: tuple[Split, ...] = ("train", "train", "train", "val"),
    depths: tuple[int, ...] = (12,),
    side: int = 16,
    seed: int = 0,
    encoding: Encoding = ENCODING,
) -> LatentStore:
    """A store with one pair a patient; thin latents of depth ``depths[i % len]`` (4 slices of 1 mm each)."""
    store = LatentStore.create(folder, secret_fingerprint="f" * 16)
    encode_key = store.register_encoding(encoding)
    rng = np.random.default_rng(seed)
    catalog, pairs, records = [], [], []
    for patient, split in enumerate(splits):
        depth = depths[patient % len(depths)]
        thin_key, thick_key, pair_key = (key_of(kind, patient) for kind in (3, 4, 7))
        catalog += [
            series(thin_key, patient, "thin", 4 * depth, split, (4 * side, 4 * side)),
            series(thick_key, patient, "thick", depth, split, (4 * side, 4 * side)),
        ]
        overlap = (-0.5, 4 * depth - 0.5)
        pairs.append(
            PairRecord(
                pair_key,
                key_of(1, patient),
                key_of(2, patient),
                catalog[-1].category,
                thick_key,
                thin_key,
                overlap,
                split,
                "{}",
            )
        )
        thin = smooth(rng, depth, side)
        blurred = (np.roll(thin, 1, axis=1) + thin + np.roll(thin, -1, axis=1)) / 3
        records += [
            stage(store, encode_key, thin_key, "thin", thin, 4 * depth),
            stage(store, encode_key, pair_key, "thick_on_thin", blurred, 4 * depth),
            stage(store, encode_key, thick_key, "thick", blurred[:, ::4], depth, dz_mm=16.0),
        ]
    store.append_catalog(catalog, pairs)
    with store.writer() as writer:
        writer.commit(records)
    return LatentStore.open(folder)


def smooth(rng: np.random.Generator, depth: int, side: int) -> Latent:
    """(4, depth, side, side) correlated noise of unlike scale a channel, so that whitening matters."""
    white = rng.standard_normal((4, depth, side, side))
    for axis in (1, 2, 3):
        white = (np.roll(white, 1, axis) + 2 * white + np.roll(white, -1, axis)) / 2
    scaled: Latent = white * np.array([0.5, 1.0, 2.0, 4.0])[:, None, None, None] + 0.3
    return scaled


def stage(
    store: LatentStore, encode_key: str, key: str, role: LatentRole, latent: Latent, n_slices: int, dz_mm: float = 4.0
) -> LatentRecord:
    """Write one latent whose first slice's voxels begin at z = 0."""
    side = 4 * latent.shape[2]
    return store.stage(
        latent.astype(np.float16),
        LatentMeta(
            encode_key=encode_key,
            key=key,
            role=role,
            z0_mm=1.5 * dz_mm / 4,
            dz_mm=dz_mm,
            valid_zyx=(n_slices, side, side),
            source_digest="",
        ),
    )
