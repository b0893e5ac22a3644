"""Which pairs of a store can be trained on: their latents, and the run of thin latents that the overlap contains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion.config import DataConfig
from latentcache.errors import InputError
from latentcache.records import LATENT_CHANNELS, LatentRecord, LatentRole, PairRecord, Split
from latentcache.store import LatentStore

EDGE_MM = 1e-3


@dataclass(frozen=True)
class PlannedPair:
    """A pair whose latents are in the store, and the run of thin latents that its overlap wholly contains."""

    pair: PairRecord
    thin: LatentRecord
    condition: LatentRecord
    first: int
    depth: int
    num_thick_slices: int


def whole_latents_inside(record: LatentRecord, overlap_mm: tuple[float, float]) -> tuple[int, int]:
    """First index and number of latent slices that lie wholly in a range of z; slice j spans z0 + (j -/+ 1/2) dz."""
    low = (overlap_mm[0] - EDGE_MM - record.z0_mm) / record.dz_mm + 0.5
    high = (overlap_mm[1] + EDGE_MM - record.z0_mm) / record.dz_mm - 0.5
    first = max(0, int(np.ceil(low)))
    last = min(record.shape[1] - 1, int(np.floor(high)))
    return first, max(0, last - first + 1)


def choose_encode_key(store: LatentStore, wanted: str | None) -> str:
    """The encode key to train on: the one asked for, else the store's only one with thin latents."""
    present = sorted({record.encode_key for record in store.records(role="thin")})
    if wanted is not None and wanted not in present:
        raise InputError(
            f"encode key {wanted}",
            expected=f"one of {', '.join(present) or 'none yet'}",
            remedy="See `ctpipe status STORE`.",
        )
    if not present:
        raise InputError(
            "a store without thin latents", expected="encoded pairs", remedy="Run `ctpipe encode STORE` first."
        )
    if wanted is None and len(present) > 1:
        raise InputError(
            f"latents of {len(present)} encode keys ({', '.join(present)})",
            expected="one, since latents of different VAEs or windows must never meet in one run",
            remedy="Choose with --set data.encode_key=KEY.",
        )
    return wanted or present[0]


def plan_pairs(
    store: LatentStore, encode_key: str, data: DataConfig, split: Split | Literal["all"]
) -> tuple[list[PlannedPair], dict[str, int]]:
    """The split's pairs whose latents are committed, in key order, and how many were left out for which reason."""
    role: LatentRole = "thick_on_thin" if data.alignment == "pixel" else "thick"
    thin = {record.key: record for record in store.records(encode_key=encode_key, role="thin")}
    conditions = {record.key: record for record in store.records(encode_key=encode_key, role=role)}
    slices = {series.series_key: series.n_slices for series in store.series()}
    planned: list[PlannedPair] = []
    left_out: dict[str, int] = {}
    for pair in sorted(store.pairs(), key=lambda p: p.pair_key):
        if split not in ("all", pair.split):
            continue
        if pair.status != "ok":
            left_out["quarantined"] = left_out.get("quarantined", 0) + 1
            continue
        target = thin.get(pair.thin_key)
        condition = conditions.get(pair.pair_key if data.alignment == "pixel" else pair.thick_key)
        first, depth = whole_latents_inside(target, pair.overlap_mm) if target else (0, 0)
        if target is None or condition is None:
            reason = f"no {'thin' if target is None else role} latent yet"
        elif depth == 0:
            reason = "the overlap holds no whole latent"
        else:
            check_shapes(target, condition, data.alignment)
            planned.append(
                PlannedPair(pair, target, condition, first, depth, slices.get(pair.thick_key, condition.valid_zyx[0]))
            )
            continue
        left_out[reason] = left_out.get(reason, 0) + 1
    return planned, left_out


def check_shapes(thin: LatentRecord, condition: LatentRecord, alignment: str) -> None:
    """Refuse latents that cannot be one sample."""
    for record in (thin, condition):
        if record.shape[0] not in (LATENT_CHANNELS, 2 * LATENT_CHANNELS):
            raise InputError(
                f"a latent of {record.shape[0]} channels (series {record.key})",
                expected=f"{LATENT_CHANNELS} channels of means, or as many of log-variance after them",
                remedy="Choose another data.encode_key; see `ctpipe status STORE`.",
            )
    differ = thin.shape != condition.shape if alignment == "pixel" else thin.shape[2:] != condition.shape[2:]
    if differ:
        raise InputError(
            f"a thin latent of shape {thin.shape} beside a {condition.role} latent of shape {condition.shape} "
            f"(series {thin.key})",
            expected="latents of one grid",
            remedy="Run `ctpipe verify STORE`; encode the pair again or exclude it.",
        )
