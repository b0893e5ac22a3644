"""Plan of sampling: pairs whose condition is stored, under a key that says how their thin latents are drawn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from diffusion.networks import ThickSlices
from diffusion.sampling.interpolator import Interpolator
from latentcache import PAIR_ROLES, InputError, LatentRecord, LatentStore, PairRecord
from latentcache.maintenance import refiner_of_digest


@dataclass(frozen=True)
class SampleSettings:
    """Settings for drawing thin latents; None takes the model's default. Part of the generation key."""

    sampler: str | None = None
    num_inference_steps: int | None = None
    seed: int = 0
    samples: int = 1
    depth_window: int | None = None
    overlap: int | None = None


@dataclass(frozen=True)
class SampleTask:
    """One pair to sample: whose it is, and the rows of its condition and of the grid that the sample is on.

    ``name`` is the pair key; ``thick`` is for a model that takes it. ``problem`` is why the pair cannot be
    sampled, reported where it would have been.
    """

    name: str
    condition: LatentRecord | None = None
    grid: LatentRecord | None = None
    thick: ThickSlices | None = None
    problem: InputError | None = None


def generation_key(model: Interpolator, settings: SampleSettings) -> str:
    """16 hex digits of SHA-256 over checkpoint, encode key and settings: equal keys mean equal latents."""
    content = {
        "checkpoint_sha256": model.checkpoint_sha256,
        "encode_key": model.encode_key,
        "alignment": model.alignment,
        "settings": asdict(_resolved(model, settings)),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def open_generated(store: LatentStore, model: Interpolator, settings: SampleSettings) -> LatentStore:
    """The store's own ``generated/<generation_key>``, made where it is not there yet, with the model's encoding."""
    out = store.generated(generation_key(model, settings), create=True)
    if model.encoding is not None:
        out.register_encoding(model.encoding)
    return out


def plan_samples(
    store: LatentStore, model: Interpolator, keys: Sequence[str] | None, out: LatentStore
) -> tuple[list[SampleTask], int]:
    """The tasks that are left for ``out``, and how many pairs it holds already.

    Args:
        keys: Pair keys; None takes every pair whose condition is stored, except quarantined ones and those whose
            fields of view differ where the model aligns latents. A pair named here that cannot be sampled is a task
            with a problem.

    Raises:
        InputError: A key that is no pair, or a store encoded otherwise than the model.
    """
    pairs = _pairs(store, model, keys)
    present = {record.key for record in out.records(encode_key=model.encode_key, role="thin")}
    left = [pair for pair in pairs if pair.pair_key not in present]
    told = thick_slices(store, left) if model.told else {}
    tasks = [_task(store, model, pair, told.get(pair.thick_key)) for pair in left]
    return tasks, len(pairs) - len(tasks)


def thick_slices(store: LatentStore, pairs: Sequence[PairRecord]) -> dict[str, ThickSlices]:
    """Return the slices of the pairs' thick series, by series key."""
    wanted = {pair.thick_key for pair in pairs}
    return {
        s.series_key: ThickSlices(s.z_mm[0], s.spacing_mm_zyx[0], s.n_slices, s.thickness_mm)
        for s in store.series()
        if s.series_key in wanted and s.z_mm
    }


def _task(store: LatentStore, model: Interpolator, pair: PairRecord, thick: ThickSlices | None) -> SampleTask:
    try:
        return SampleTask(pair.pair_key, *condition_rows(store, model, pair), thick)
    except InputError as error:
        return SampleTask(pair.pair_key, problem=error)


def condition_rows(store: LatentStore, model: Interpolator, pair: PairRecord) -> tuple[LatentRecord, LatentRecord]:
    """The rows of a pair's condition and of the grid that its sample is on.

    Raises:
        InputError: A latent that is needed is not stored, or the fields of view differ where latents are aligned.
    """
    thin = store.find(pair.thin_key, "thin", encode_key=model.encode_key)
    role = model.condition_role
    if role in PAIR_ROLES:
        record = store.find(pair.pair_key, role, encode_key=model.encode_key)
        if record is None:
            raise _missing(pair, role, model)
        check_refiner(record, model)
        return record, thin or record
    if _unaligned(pair, model):
        raise InputError(
            f"pair {pair.pair_key}, whose thick and thin series differ in their fields of view",
            expected="one field of view for alignment `latent`, which moves latents along z alone",
            remedy="Leave the pair out, or use a model trained with alignment `pixel`.",
        )
    record = store.find(pair.thick_key, "thick", encode_key=model.encode_key)
    if record is None or thin is None:
        raise _missing(pair, "thick" if record is None else "thin", model)
    return record, thin


def _pairs(store: LatentStore, model: Interpolator, keys: Sequence[str] | None) -> list[PairRecord]:
    if model.encode_key not in store.encode_keys():
        raise InputError(
            f"a store encoded as {', '.join(store.encode_keys()) or 'nothing yet'}",
            expected=f"encode key {model.encode_key}, which the model was trained on",
            remedy="Encode with the VAE and window of the training run (see RUN/run.json).",
        )
    known = {pair.pair_key: pair for pair in store.pairs()}
    if keys is None:
        role = model.condition_role
        stored = {r.key for r in store.records(encode_key=model.encode_key, role=role)}
        usable = [p for _, p in sorted(known.items()) if p.status == "ok" and not _unaligned(p, model)]
        return [p for p in usable if (p.pair_key if role in PAIR_ROLES else p.thick_key) in stored]
    if unknown := [k for k in keys if k not in known]:
        raise InputError(
            f"{len(unknown)} keys that are no pairs, the first {unknown[0]}",
            expected="pair keys of this store",
            remedy="`ctpipe status STORE` lists them.",
        )
    return [known[k] for k in keys]


def _unaligned(pair: PairRecord, model: Interpolator) -> bool:
    """Whether the model's kind of alignment cannot bring the pair's condition onto its thin grid."""
    return model.condition_role == "thick" and pair.across_fields


def check_refiner(record: LatentRecord, model: Interpolator) -> None:
    """Refuse a condition that another refiner made than the one whose slices the model learnt to start from."""
    found = refiner_of_digest(record.source_digest)
    if found != model.refiner_sha256:
        raise InputError(
            f"a refined latent of pair {record.key} by the refiner {found[:12]}",
            expected=f"one by the refiner that the model was trained with, {model.refiner_sha256[:12]}",
            remedy="Encode with the one that the run's folder keeps: `ctpipe encode STORE --refiner FILE --refresh`.",
        )


def _resolved(model: Interpolator, settings: SampleSettings) -> SampleSettings:
    """The settings with the model's defaults spelled out, so that naming a default does not change the key."""
    return SampleSettings(
        settings.sampler or model.objective.samplers[0],
        model.objective.steps(settings.num_inference_steps),
        settings.seed,
        settings.samples,
        settings.depth_window or model.depth_window,
        settings.overlap,
    )


def _missing(pair: PairRecord, role: str, model: Interpolator) -> InputError:
    return InputError(
        f"pair {pair.pair_key} has no {role} latent",
        expected=f"alignment {model.alignment!r} encoded under {model.encode_key}",
        remedy="Run `ctpipe encode STORE` with the alignment that the run was trained with."
        if role != "refined_on_thin"
        else "Run `ctpipe encode STORE --refiner FILE` with the refiner that the run's folder keeps.",
    )
