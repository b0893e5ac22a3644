"""Encode: read a series or a pair once, run the frozen VAE once per latent wanted, stage the bytes in the store."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from latentcache.records import COMPRESSION, Encoding, LatentRecord, LatentRole, PairRecord
from pipeline.engine import timed
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.resample import resample_z
from pipeline.volume import SeriesPointer, Volume

PREPROCESSING_VERSION = 1
NUMERICS_VERSION = 1
PAD_MULTIPLE_ZYX = (4, 32, 32)
"""In-plane what the U-Net needs: 8 latents; 64 voxels with latent patch 2, which --pad-in-plane gives."""


class Encoder(Protocol):
    """The part of the VAE that encoding needs."""

    sha256: str
    architecture: dict[str, Any]

    def encode(self, unit: Any, *, pad_multiple_zyx: tuple[int, int, int]) -> Any: ...

    def decode(self, latent: Any, valid_zyx: tuple[int, int, int]) -> Any: ...


class CatalogSeries(Protocol):
    """The part of a catalog row that planning needs; a million of them fit in memory, whole rows do not."""

    @property
    def series_key(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def status(self) -> str: ...

    @property
    def source_digest(self) -> str: ...


class Staging(Protocol):
    """The part of the store that a worker needs."""

    def stage(
        self,
        array: NDArray[np.float16],
        *,
        encode_key: str,
        key: str,
        role: LatentRole,
        z0_mm: float,
        dz_mm: float,
        valid_zyx: tuple[int, int, int],
        source_digest: str,
        round_trip_psnr: float | None = None,
    ) -> LatentRecord: ...


@dataclass(frozen=True)
class Wanted:
    """One latent that is missing from the manifest."""

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


@dataclass(frozen=True)
class Encoded:
    """What a worker hands to the committing driver. ``pair`` is the pair's row with the pixel proof, if it was due.

    ``seconds`` splits the device part: ``proof``, ``window`` (with interpolation), ``vae``, ``round_trip``, ``store``.
    """

    name: str
    records: tuple[LatentRecord, ...]
    pair: PairRecord | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def make_encoding(vae: Encoder, window: Window, pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX) -> Encoding:
    """The record whose hash is the encode key."""
    return Encoding(
        vae_sha256=vae.sha256,
        vae_architecture=vae.architecture,
        window_center=window.center,
        window_width=window.width,
        preprocessing_version=PREPROCESSING_VERSION,
        numerics_version=NUMERICS_VERSION,
        pad_multiple_zyx=pad_multiple_zyx,
    )


def plan(
    series: Iterable[CatalogSeries],
    pairs: Sequence[PairRecord],
    have: Set[tuple[str, str]],
    encode_key: str,
    pointer: Callable[[str], SeriesPointer],
    roles: Sequence[LatentRole] = ("thin", "thick", "thick_on_thin"),
) -> Iterator[EncodeTask]:
    """Tasks for every latent not in ``have`` (a set of (key, role)), one task a pair and one a lone series.

    A pair's volumes are read once for its up to three latents. A pair that the pixel proof quarantined gives no
    ``thick_on_thin``; its series still give their own latents.
    """
    usable = {s.series_key: s for s in series if s.status == "ok" and s.role in ("thin", "thick")}
    claimed: set[str] = set()

    def missing(key: str, role: LatentRole, digest: str) -> list[Wanted]:
        return [Wanted(key, role, digest)] if role in roles and (key, role) not in have else []

    for pair in pairs:
        if pair.status != "ok" or pair.thin_key not in usable or pair.thick_key not in usable:
            continue
        thin, thick = usable[pair.thin_key], usable[pair.thick_key]
        wanted = missing(pair.pair_key, "thick_on_thin", pair_digest(thin, thick))
        for one, role in ((thin, "thin"), (thick, "thick")):
            if one.series_key not in claimed:
                wanted += missing(one.series_key, role, one.source_digest)  # type: ignore[arg-type]
                claimed.add(one.series_key)
        if wanted:
            task = EncodeTask(
                pair.pair_key, encode_key, pointer(thin.series_key), pointer(thick.series_key), tuple(wanted)
            )
            yield replace(task, pair=None if "pixel_proof" in json.loads(pair.evidence or "{}") else pair)
    for one in usable.values():
        if one.series_key in claimed:
            continue
        wanted = missing(one.series_key, one.role, one.source_digest)  # type: ignore[arg-type]
        if wanted:
            where = pointer(one.series_key)
            thin_at, thick_at = (where, None) if one.role == "thin" else (None, where)
            yield EncodeTask(one.series_key, encode_key, thin_at, thick_at, tuple(wanted))


def pair_digest(thin: CatalogSeries, thick: CatalogSeries) -> str:
    """Digest of both sources, for the latent that depends on both."""
    return hashlib.sha256(f"{thin.source_digest}|{thick.source_digest}".encode()).hexdigest()[:16]


def prepare(task: EncodeTask, *, threads: int = 2) -> Prepared:
    """Read the task's volumes from their archives (CPU). Raises InputError when pixels are broken or have changed."""
    from pipeline.volume_reader import read_series

    thin = read_series(task.thin, threads=threads) if task.thin else None
    thick = read_series(task.thick, threads=threads) if task.thick else None
    return Prepared(task, thin, thick)


def encode_one(
    vae: Encoder,
    window: Window,
    store: Staging,
    prepared: Prepared,
    *,
    round_trip_fraction: float = 0.02,
    pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX,
) -> Encoded:
    """Encode and stage every latent that the task wants. The only place where the encoder runs.

    ``thick_on_thin`` is the thick HU, linearly interpolated by physical position onto the thin grid, encoded.
    """
    task, thin, thick = prepared.task, prepared.thin, prepared.thick
    seconds: dict[str, float] = {}
    proved = timed(seconds, "proof", lambda: _prove(task, thin, thick))
    records = []
    for want in task.wanted:
        if want.role == "thick_on_thin" and proved is not None and proved.status != "ok":
            continue
        unit, geometry = timed(seconds, "window", functools.partial(_input, want.role, thin, thick, window))
        latent = timed(seconds, "vae", functools.partial(_encoded, vae, unit, pad_multiple_zyx))
        psnr = None
        if _sampled(want, round_trip_fraction):
            psnr = timed(seconds, "round_trip", functools.partial(_round_trip_psnr, vae, latent, unit))
        staged = functools.partial(
            store.stage,
            latent.astype(np.float16),
            encode_key=task.encode_key,
            key=want.key,
            role=want.role,
            z0_mm=geometry.z_mm[0] + (COMPRESSION - 1) / 2 * geometry.spacing_mm_zyx[0],
            dz_mm=COMPRESSION * geometry.spacing_mm_zyx[0],
            valid_zyx=geometry.shape_zyx,
            source_digest=want.source_digest,
            round_trip_psnr=psnr,
        )
        records.append(timed(seconds, "store", staged))
    return Encoded(task.name, tuple(records), proved, seconds)


def _input(
    role: LatentRole, thin: Volume | None, thick: Volume | None, window: Window
) -> tuple[NDArray[np.float32], Geometry]:
    """What the VAE sees for one role, on [-1, 1], and the lattice it lies on."""
    if role == "thick_on_thin":
        assert thin is not None
        assert thick is not None
        hu = resample_z(thick.hu, np.array(thick.geometry.z_mm), np.array(thin.geometry.z_mm))
        return window.to_unit(hu), thin.geometry
    volume = thin if role == "thin" else thick
    assert volume is not None
    return window.to_unit(volume.hu), volume.geometry


def _encoded(vae: Encoder, unit: NDArray[np.float32], pad_multiple_zyx: tuple[int, int, int]) -> NDArray[np.float32]:
    return np.asarray(vae.encode(unit, pad_multiple_zyx=pad_multiple_zyx), dtype=np.float32)


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
    """Whether this latent's round trip is measured: decided by its key, so that a re-run decides alike."""
    return int(hashlib.sha256(f"{want.key}/{want.role}".encode()).hexdigest()[:8], 16) < fraction * 2**32


def _round_trip_psnr(vae: Encoder, latent: NDArray[np.float32], unit: NDArray[np.float32]) -> float:
    """PSNR in dB of decode(encode(x)) over the window, on [-1, 1] data (peak 2)."""
    shape = (int(unit.shape[0]), int(unit.shape[1]), int(unit.shape[2]))
    decoded = np.asarray(vae.decode(latent.astype(np.float16).astype(np.float32), shape))
    mse = float(np.mean((np.clip(decoded, -1, 1) - unit) ** 2, dtype=np.float64))
    return float("inf") if mse == 0 else float(10 * np.log10(4.0 / mse))
