"""Samples thin latents for stored pairs and commits them to a generated store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.alignment import align_depth
from diffusion.model import Interpolator
from latentcache.errors import InputError
from latentcache.records import LatentRecord, LatentRole, PairRecord
from latentcache.store import LatentStore


@dataclass(frozen=True)
class SampleSettings:
    """How thin latents are drawn; None takes the model's default. Part of the generation key."""

    sampler: str | None = None
    num_inference_steps: int | None = None
    seed: int = 0
    samples: int = 1
    depth_window: int | None = None
    overlap: int | None = None


@dataclass(frozen=True)
class SampleSummary:
    """What a call of :func:`generate_store` did."""

    generation_key: str
    generated: int
    already_there: int


def generation_key(model: Interpolator, settings: SampleSettings) -> str:
    """16 hex digits of SHA-256 over checkpoint, encode key and settings: equal keys mean equal latents."""
    content = {
        "checkpoint_sha256": model.checkpoint_sha256,
        "encode_key": model.encode_key,
        "alignment": model.alignment,
        "settings": asdict(_resolved(model, settings)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def generate_store(
    store: LatentStore,
    model: Interpolator,
    keys: Sequence[str] | None,
    out: LatentStore | None,
    settings: SampleSettings,
    progress: Callable[[int, int, str], None] | None = None,
) -> SampleSummary:
    """Samples the thin latents of pairs from their stored conditions.

    Args:
        store: Where the conditions are.
        keys: Pair keys; None takes every pair whose condition is stored, except quarantined ones and those whose
            fields of view differ where the model aligns latents.
        out: Where role ``thin`` is committed under the pair key; None takes ``store``'s own
            ``generated/<generation_key>``. Pairs that are there already are left alone, so that a re-run resumes.
        progress: Called with (done, total, pair key) after each pair.

    The record's grid is the thin latent's where that is stored, else (pixel alignment) the condition's own; with
    ``latent`` alignment the thin latent's positions are needed.

    Raises:
        InputError: A key that is no pair, a pair without its latents, a store encoded otherwise than the model.
    """
    key = generation_key(model, settings)
    if out is None:
        out = store.generated(key, create=True)
    if model.encoding is not None:
        out.register_encoding(model.encoding)
    pairs = _pairs(store, model, keys)
    present = {record.key for record in out.records(encode_key=model.encode_key, role="thin")}
    generated = 0
    with out.writer() as writer:
        for number, pair in enumerate(pairs):
            if pair.pair_key not in present:
                writer.commit([_generate_pair(store, out, model, pair, settings, key)])
                generated += 1
            if progress is not None:
                progress(number + 1, len(pairs), pair.pair_key)
    return SampleSummary(key, generated, len(pairs) - generated)


def condition_of(store: LatentStore, model: Interpolator, pair: PairRecord) -> tuple[NDArray[np.float32], LatentRecord]:
    """The pair's condition, raw, (C, d, h, w) float32 on the thin latent grid, and the record that describes the grid.

    Raises:
        InputError: A latent that is needed is not stored.
    """
    thin = store.find(pair.thin_key, "thin", encode_key=model.encode_key)
    if model.alignment == "pixel":
        record = store.find(pair.pair_key, "thick_on_thin", encode_key=model.encode_key)
        if record is None:
            raise _missing(pair, "thick_on_thin", model)
        return np.asarray(store.read(record), dtype=np.float32), thin or record
    if _unaligned(pair, model):
        raise InputError(
            f"pair {pair.pair_key}, whose thick and thin series differ in their fields of view",
            expected="one field of view for alignment `latent`, which moves latents along z alone",
            remedy="Leave the pair out, or use a model trained with alignment `pixel`.",
        )
    record = store.find(pair.thick_key, "thick", encode_key=model.encode_key)
    if record is None or thin is None:
        raise _missing(pair, "thick" if record is None else "thin", model)
    latent = torch.from_numpy(np.asarray(store.read(record), dtype=np.float32))
    return align_depth(latent, _positions(record), _positions(thin)).numpy(), thin


def _generate_pair(
    store: LatentStore,
    out: LatentStore,
    model: Interpolator,
    pair: PairRecord,
    settings: SampleSettings,
    key: str,
) -> LatentRecord:
    condition, grid = condition_of(store, model, pair)
    latent = model.generate(condition, **asdict(settings))
    return out.stage(
        latent.astype(np.float16),
        encode_key=model.encode_key,
        key=pair.pair_key,
        role="thin",
        z0_mm=grid.z0_mm,
        dz_mm=grid.dz_mm,
        valid_zyx=grid.valid_zyx,
        source_digest=key,
    )


def _pairs(store: LatentStore, model: Interpolator, keys: Sequence[str] | None) -> list[PairRecord]:
    if model.encode_key not in store.encode_keys():
        raise InputError(
            f"a store encoded as {', '.join(store.encode_keys()) or 'nothing yet'}",
            expected=f"encode key {model.encode_key}, which the model was trained on",
            remedy="Encode with the VAE and window of the training run (see RUN/run.json).",
        )
    known = {pair.pair_key: pair for pair in store.pairs()}
    if keys is None:
        role: LatentRole = "thick_on_thin" if model.alignment == "pixel" else "thick"
        stored = {r.key for r in store.records(encode_key=model.encode_key, role=role)}
        usable = [p for _, p in sorted(known.items()) if p.status == "ok" and not _unaligned(p, model)]
        return [p for p in usable if (p.pair_key if role == "thick_on_thin" else p.thick_key) in stored]
    if unknown := [k for k in keys if k not in known]:
        raise InputError(
            f"{len(unknown)} keys that are no pairs, the first {unknown[0]}",
            expected="pair keys of this store",
            remedy="`ctpipe status STORE` lists them.",
        )
    return [known[k] for k in keys]


def _unaligned(pair: PairRecord, model: Interpolator) -> bool:
    """Whether the model's kind of alignment cannot bring the pair's condition onto its thin grid."""
    return model.alignment == "latent" and pair.across_fields


def _positions(record: LatentRecord) -> NDArray[np.float64]:
    return record.z0_mm + record.dz_mm * np.arange(record.shape[1], dtype=np.float64)


def _resolved(model: Interpolator, settings: SampleSettings) -> SampleSettings:
    """The settings with the model's defaults spelled out, so that naming a default does not change the key."""
    return SampleSettings(
        settings.sampler or model.objective.samplers[0],
        settings.num_inference_steps or model.objective.default_steps,
        settings.seed,
        settings.samples,
        settings.depth_window or model.depth_window,
        settings.overlap,
    )


def _missing(pair: PairRecord, role: str, model: Interpolator) -> InputError:
    return InputError(
        f"pair {pair.pair_key} has no {role} latent",
        expected=f"alignment {model.alignment!r} encoded under {model.encode_key}",
        remedy="Run `ctpipe encode STORE` with the alignment that the run was trained with.",
    )
