"""Decode a store's latents, or sample thin from thick first, into DICOM series."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.workflows.job_progress import JobProgress, OnProgress, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.decode import DecodeSummary
    from pipeline.engines import EngineOptions


@dataclass(frozen=True)
class DecodeJob:
    """A user's order to decode.

    Attributes:
        store: URL or path of the latent store; ``private`` is its private part where that is elsewhere.
        out: Folder to write into, one folder a series below it.
        checkpoint: A training run whose model samples thin from thick first; None decodes stored thin latents.
        split, keys: Only these; None for all.
        vae: ``tiny`` or the path of the VAE that encoded the store.
        encode_key: Which encoding, where the store holds several.
        answer: ``mean``, ``sample`` or ``both``; how several samples become a series.
        uncertainty: The samples' standard deviation as a second series; as floats with ``uncertainty_map``.
        alarm_map: Where the written sample differs from the others, as a Parametric Map.
        texture: Whether a draw gets the texture of true thin slices; None where the answer is a sample.
        detail: ``residual`` or ``absolute``.
        consistency: Project onto the measured thick slices; None: where thin slices are sampled.
        refiner: A refiner's run; None: the checkpoint's own; ``none``: without.
        engine: How tasks are spread; one after the other in this process by default.
        threads: Arithmetic threads per device, pinned for equal bytes on every engine.
    """

    store: str
    out: Path
    checkpoint: Path | None = None
    split: str | None = None
    keys: Sequence[str] | None = None
    vae: str = "tiny"
    encode_key: str | None = None
    sampler: str | None = None
    steps: int | None = None
    samples: int = 1
    seed: int = 0
    answer: str = "mean"
    uncertainty: bool = False
    uncertainty_map: bool = False
    alarm_map: bool = False
    texture: bool | None = None
    detail: str = "residual"
    consistency: bool | None = None
    refiner: Path | None = None
    transfer_syntax: str = "explicit"
    enhanced: bool = False
    restore_identity: bool = False
    private: str | None = None
    device: str = "cpu"
    engine: EngineOptions | None = None
    threads: int = 2
    memory_gib: float | None = None
    precision: str = "auto"


def decode(job: DecodeJob, on_progress: OnProgress = silent) -> DecodeSummary:
    """Write every series wanted that is not in the output folder yet.

    A stored latent is written as the plain reconstruction through the VAE (with ``consistency`` it is composed with the
    measured thick slices as sampled ones are). Progress comes under ``sampling`` and ``decoding``.

    Raises:
        InputError: Settings that contradict each other, nothing that matches, or the wrong VAE.
    """
    from diffusion.sampling import change_gain
    from latentcache import LatentStore
    from pipeline.decode import ComposeSettings, parse_answer, parse_detail
    from pipeline.engines import EngineOptions
    from pipeline.workflows.sample import own_refiner, refiner_of, start_of, texture_of
    from pipeline.writing import transfer_syntax_uid

    transfer_syntax_uid(job.transfer_syntax)
    answer = parse_answer(job.answer, job.samples)
    _check_enhanced(job)
    composing = ComposeSettings(
        detail=parse_detail(job.detail),
        consistency=job.consistency is not False,
        refiner=refiner_of(job.refiner, job.device),
    )
    latents = LatentStore.open(job.store)
    engine = job.engine or EngineOptions("inline", devices=(job.device,))
    if job.checkpoint is None:
        return _decode_into_folder(job, latents, engine, composing, answer, None, on_progress)
    composing = replace(
        composing,
        start=start_of(job.checkpoint, job.device),
        change_gain=change_gain(job.checkpoint, job.steps),
        texture=texture_of(job.checkpoint, job.texture, job.steps, samples=job.samples, answer=answer),
    )
    sampled = _sampled(job, job.checkpoint, latents, engine, answer, on_progress)
    if job.refiner is None:
        own = own_refiner(job.checkpoint, sampled.facts["checkpoint_sha256"], job.device)
        composing = replace(composing, refiner=own)
    return _decode_into_folder(job, latents, engine, composing, answer, sampled, on_progress)


def _check_enhanced(job: DecodeJob) -> None:
    from latentcache import InputError

    if job.enhanced and job.checkpoint is None:
        raise InputError(
            "--enhanced for stored latents",
            expected="slices sampled from one thick series",
            remedy="Add --checkpoint RUN, or leave --enhanced away.",
        )


def _sampled(job: DecodeJob, run: Path, latents: Any, engine: Any, answer: str, on_progress: OnProgress) -> Any:
    """Sample the pairs wanted with the run's model; apart where single samples are needed."""
    from pipeline.workflows.sample import SampleJob, Spread, sample_pairs

    apart = job.uncertainty or job.uncertainty_map or job.alarm_map or answer != "mean"
    sampling = SampleJob(
        run, job.split, job.keys, job.sampler, job.steps, seed=job.seed, samples=job.samples, apart=apart
    )
    return sample_pairs(latents, sampling, Spread(engine, job.threads), on_progress)


def _decode_into_folder(
    job: DecodeJob,
    latents: Any,
    engine: Any,
    composing: Any,
    answer: Literal["mean", "sample", "both"],
    sampled: Any,
    on_progress: OnProgress,
) -> DecodeSummary:
    """Decode stored latents, or those in ``sampled``, with progress under ``decoding``."""
    from pipeline.decode import (
        DecodeSelection,
        DecodeSettings,
        VaeSettings,
        WriteSettings,
        decode_store,
    )
    from pipeline.identity import PrivateStore
    from pipeline.volume import Window

    private = PrivateStore.open(job.store, job.private)
    encoding = latents.encoding(sampled.encode_key) if sampled else latents.encoding_in_use(job.encode_key)
    facts: dict[str, Any] = sampled.facts if sampled else {"checkpoint_sha256": "", "sampling": {}}
    writing = WriteSettings(
        job.out.absolute(),
        Window.of(encoding),
        transfer_syntax=job.transfer_syntax,
        uncertainty=job.uncertainty or job.uncertainty_map,
        uncertainty_map=job.uncertainty_map,
        alarm_map=job.alarm_map,
        enhanced=job.enhanced,
        answer=answer,
        store_snapshot=latents.snapshot,
        **facts,
    )
    decoded = 0

    def count(_: Any, total: int) -> None:
        nonlocal decoded
        decoded += 1
        on_progress(JobProgress("decoding", decoded, total))

    return decode_store(
        latents,
        private,
        encoding.encode_key,
        DecodeSettings(
            writing, composing, restore_identity=job.restore_identity, compose_stored=job.consistency is True
        ),
        engine,
        vae=VaeSettings(job.vae, job.memory_gib, job.threads, job.precision),
        selection=DecodeSelection(
            sampled.stores if sampled else (), sampled.failed if sampled else {}, job.keys, job.split
        ),
        on_outcome=count,
    )
