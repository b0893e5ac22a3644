"""Encode: read a series or a pair once, run the frozen VAE once per latent wanted, stage the bytes in the store."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentcache import (
    PAIR_ROLES,
    Encoding,
    InputError,
    LatentGrid,
    LatentMeta,
    LatentRecord,
    LatentRole,
    PairRecord,
)
from latentcache.maintenance import pair_digest
from pipeline.engines import StagedLatents, timed
from pipeline.vae import Autoencoder
from pipeline.volume import Geometry, SeriesPointer, Volume, Window, onto_field, resample_z

if TYPE_CHECKING:
    from pipeline.refiner import RefinerFile


PREPROCESSING_VERSION = 1
NUMERICS_VERSION = 2
"""2: on a CPU one slice at a time, so that free memory no longer shows in the low bits."""
PAD_MULTIPLE_ZYX = (4, 32, 32)
"""In-plane what the U-Net needs: 8 latents; 64 voxels with latent patch 2, which --pad-in-plane gives."""


@dataclass(frozen=True)
class Wanted:
    """One latent that is missing from the manifest. ``source_digest`` is what the catalog says of its source."""

    key: str
    role: LatentRole
    source_digest: str


@dataclass(frozen=True)
class EncodeTask:
    """Work on one study's pair, or on a lone series: every missing latent that its volumes give.

    ``name`` is the pair key or the series key; ``pair`` is set when the pixel proof is due.
    """

    name: str
    encode_key: str
    thin: SeriesPointer | None
    thick: SeriesPointer | None
    wanted: tuple[Wanted, ...]
    pair: PairRecord | None = None


@dataclass(frozen=True)
class Prepared:
    """Volumes in HU, read on a CPU worker, ready for the device."""

    task: EncodeTask
    thin: Volume | None
    thick: Volume | None


def make_encoding(
    vae: Autoencoder,
    window: Window,
    pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX,
    extra: Mapping[str, Any] | None = None,
    *,
    compute_dtype: str = "float32",
    device_kind: str = "cpu",
) -> Encoding:
    """The record whose hash is the encode key; ``extra`` holds what only some encodings have (`vae_tiling`).

    Args:
        compute_dtype, device_kind: What the workers compute in and on (`latentcache.numerics`).
    """
    return Encoding(
        vae_sha256=vae.sha256,
        vae_architecture=vae.architecture,
        window_center=window.center,
        window_width=window.width,
        preprocessing_version=PREPROCESSING_VERSION,
        numerics_version=NUMERICS_VERSION,
        pad_multiple_zyx=pad_multiple_zyx,
        extra=dict(extra or {}),
        compute_dtype=compute_dtype,
        device_kind=device_kind,
    )


def prepare(task: EncodeTask, *, threads: int = 2) -> Prepared:
    """Read the task's volumes from their archives (CPU).

    Raises:
        InputError: Pixels are broken, or what is in the archive now is not what the catalog describes.
    """
    from pipeline.reading import read_series

    thin = read_series(task.thin, threads=threads) if task.thin else None
    thick = read_series(task.thick, threads=threads) if task.thick else None
    prepared = Prepared(task, thin, thick)
    for want in task.wanted:
        read = _digest_read(prepared, want.role)
        if read and want.source_digest and read != want.source_digest:
            raise InputError(
                f"the {want.role.replace('_', ' ')} source of {want.key} is not the one that the catalog describes",
                expected="the archive as it was when it was ingested",
                remedy="Run `ctpipe ingest` again, then this command: it goes on with what the archive holds now.",
            )
    return prepared


def _digest_read(prepared: Prepared, role: LatentRole) -> str:
    """Digest of what was read for a latent; empty where the volumes come from no archive."""
    thin = prepared.thin.source_digest if prepared.thin else ""
    thick = prepared.thick.source_digest if prepared.thick else ""
    return {"thin": thin, "thick": thick}.get(role) or (pair_digest(thin, thick) if role == "thick_on_thin" else "")


def encode_one(
    vae: Autoencoder,
    window: Window,
    stage: Callable[[NDArray[np.float16], LatentMeta], LatentRecord],
    prepared: Prepared,
    *,
    round_trip_fraction: float = 0.02,
    pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX,
    refiner: RefinerFile | None = None,
    mirrored: str = "",
) -> StagedLatents:
    """Encode and stage every latent that the task wants. The only place where the encoder runs.

    ``thick_on_thin`` is the thick HU, linearly interpolated by physical position onto the thin grid (in plane too where
    the fields of view differ), encoded. ``refined_on_thin`` is what ``refiner`` makes of it, encoded. ``mirrored``
    turns what the encoder sees about: along ``x`` (columns) or ``y`` (rows), before it is padded.
    """
    task, thin, thick = prepared.task, prepared.thin, prepared.thick
    seconds: dict[str, float] = {}
    proved = timed(seconds, "proof", lambda: _prove(task, thin, thick))
    records = []
    for want in task.wanted:
        if want.role in PAIR_ROLES and proved is not None and proved.status != "ok":
            continue
        unit, geometry = timed(seconds, "window", functools.partial(_input, want.role, thin, thick, window, refiner))
        unit = mirror(unit, mirrored)
        latent = timed(seconds, "vae", functools.partial(_encoded, vae, unit, pad_multiple_zyx))
        psnr = None
        if _sampled(want, round_trip_fraction):
            psnr = timed(seconds, "round_trip", functools.partial(_round_trip_psnr, vae, latent, unit))
        grid = LatentGrid.of(geometry)
        meta = LatentMeta(
            encode_key=task.encode_key,
            key=want.key,
            role=want.role,
            z0_mm=grid.z0_mm,
            dz_mm=grid.dz_mm,
            valid_zyx=grid.valid_zyx,
            source_digest=_digest_read(prepared, want.role) or want.source_digest,
            round_trip_psnr=psnr,
        )
        staged = functools.partial(stage, latent.astype(np.float16), meta)
        records.append(timed(seconds, "store", staged))
    return StagedLatents(task.name, tuple(records), proved, seconds)


def _input(
    role: LatentRole, thin: Volume | None, thick: Volume | None, window: Window, refiner: RefinerFile | None
) -> tuple[NDArray[np.float32], Geometry]:
    """Return what the VAE sees for one role, on [-1, 1], and its grid."""
    if role in PAIR_ROLES:
        assert thin is not None
        assert thick is not None
        measured = onto_field(thick, thin.geometry)
        if role == "refined_on_thin":
            from pipeline.refiner import refined_volume

            assert refiner is not None, "planned only with a refiner"
            return window.to_unit(
                refined_volume(refiner, measured, np.asarray(thin.geometry.z_mm), window)
            ), thin.geometry
        hu = resample_z(measured.hu, np.array(measured.geometry.z_mm), np.array(thin.geometry.z_mm))
        return window.to_unit(hu), thin.geometry
    volume = thin if role == "thin" else thick
    assert volume is not None
    return window.to_unit(volume.hu), volume.geometry


def mirror(unit: NDArray[np.float32], axis: str) -> NDArray[np.float32]:
    """A volume (z, y, x) mirrored along ``x`` or ``y``; itself for an empty axis."""
    return np.flip(unit, {"x": 2, "y": 1}[axis]) if axis else unit


def _encoded(
    vae: Autoencoder, unit: NDArray[np.float32], pad_multiple_zyx: tuple[int, int, int]
) -> NDArray[np.float32]:
    return np.asarray(vae.encode(np.ascontiguousarray(unit), pad_multiple_zyx=pad_multiple_zyx), dtype=np.float32)


def _prove(task: EncodeTask, thin: Volume | None, thick: Volume | None) -> PairRecord | None:
    """The pair's row with the pixel proof in its evidence, quarantined when the pixels contradict the headers."""
    if task.pair is None or thin is None or thick is None:
        return None
    from pipeline.pairing import prove_pair

    proof = prove_pair(thick, thin)
    evidence = json.loads(task.pair.evidence or "{}") | {"pixel_proof": proof.evidence}
    row = replace(task.pair, evidence=json.dumps(evidence, sort_keys=True))
    return row if proof.ok else replace(row, status="quarantined", reason=proof.reason)


def _sampled(want: Wanted, fraction: float) -> bool:
    """Whether this latent's reconstruction is measured: decided by its key, so that a re-run decides alike."""
    return int(hashlib.sha256(f"{want.key}/{want.role}".encode()).hexdigest()[:8], 16) < fraction * 2**32


def _round_trip_psnr(vae: Autoencoder, latent: NDArray[np.float32], unit: NDArray[np.float32]) -> float:
    """PSNR in dB of decode(encode(x)) over the window, on [-1, 1] data (peak 2)."""
    shape = (int(unit.shape[0]), int(unit.shape[1]), int(unit.shape[2]))
    decoded = np.asarray(vae.decode(latent.astype(np.float16).astype(np.float32), shape))
    mse = float(np.mean((np.clip(decoded, -1, 1) - unit) ** 2, dtype=np.float64))
    return float("inf") if mse == 0 else float(10 * np.log10(4.0 / mse))
