"""Compare the latents of two encode keys: what only one has, and how far apart the common ones are."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from latentcache import InputError, LatentRecord, LatentStore, valid_latents

Identity = tuple[str, str]


@dataclass(frozen=True)
class LatentDifference:
    """Of one latent under two encodings. ``relative`` is the L2 norm of a - b over that of a, over the valid region."""

    key: str
    role: str
    relative: float
    largest: float
    identical_bytes: bool


@dataclass(frozen=True)
class Difference:
    """Of two encodings: settings that differ (dotted name: (a, b)), latents of one only, and the common ones."""

    settings: dict[str, tuple[object, object]]
    only_a: tuple[Identity, ...]
    only_b: tuple[Identity, ...]
    common: int
    compared: tuple[LatentDifference, ...]
    incomparable: tuple[Identity, ...]
    """Common latents of unlike shape."""


def diff(store: LatentStore, a: str, b: str, sample: int | None = None) -> Difference:
    """Compare encode keys ``a`` and ``b``, worst latent first.

    Args:
        sample: Read at most this many common latents, spread evenly; all by default.

    Raises:
        StoreError: An unknown encode key.
        InputError: Twice the same key.
    """
    if a == b:
        raise InputError("one encode key given twice", expected="two", remedy="`ctpipe status STORE` lists them.")
    settings = _settings(json.loads(store.encoding(a).to_json()), json.loads(store.encoding(b).to_json()))
    rows_a, rows_b = ({(r.key, r.role): r for r in store.records(k)} for k in (a, b))
    common = sorted(rows_a.keys() & rows_b.keys())
    chosen = common
    if sample is not None and sample < len(common):
        chosen = [common[i] for i in np.unique(np.linspace(0, len(common) - 1, sample).round().astype(int))]
    compared, incomparable = [], []
    for identity in chosen:
        one, other = rows_a[identity], rows_b[identity]
        if one.shape != other.shape or one.valid_zyx != other.valid_zyx:
            incomparable.append(identity)
        else:
            compared.append(_compare(store, one, other))
    return Difference(
        settings,
        tuple(sorted(rows_a.keys() - rows_b.keys())),
        tuple(sorted(rows_b.keys() - rows_a.keys())),
        len(common),
        tuple(sorted(compared, key=lambda d: -d.relative)),
        tuple(incomparable),
    )


def _compare(store: LatentStore, a: LatentRecord, b: LatentRecord) -> LatentDifference:
    d, h, w = valid_latents(a.valid_zyx)
    one, other = (store.read(r)[:, :d, :h, :w].astype(np.float32) for r in (a, b))
    gap = one - other
    norm = float(np.linalg.norm(one))
    relative = float(np.linalg.norm(gap)) / norm if norm else float(np.any(gap))
    return LatentDifference(a.key, a.role, relative, float(np.abs(gap).max()), a.sha256 == b.sha256)


def _settings(a: object, b: object, name: str = "") -> dict[str, tuple[object, object]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: dict[str, tuple[object, object]] = {}
        for key in sorted(a.keys() | b.keys()):
            found |= _settings(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if a == b else {name: (a, b)}
