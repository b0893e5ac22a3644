"""Sampling on an engine: where `diffusion`'s stage meets `pipeline`'s engine. Imported by commands when they sample."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusion.sampling import (
    Interpolator,
    PreparedSample,
    SampleSettings,
    SampleTask,
    SampleWorker,
    draw,
    generation_key,
    open_generated,
    plan_samples,
    prepare,
    set_up,
)
from latentcache import PAIR_ROLES, LatentStore, PairRecord
from pipeline.engines import (
    EngineOptions,
    GroupCommit,
    Progress,
    Stage,
    StagedLatents,
    dashboard_of,
    pin,
    run_stage,
    timed,
)
from pipeline.workflows.job_progress import JobProgress, OnProgress


def refiner_of(run: Path | None, device: str) -> Any:
    """The refiner of a run, None for none; read once here, so that one that is no refiner is refused before work."""
    if run is None or str(run) == "none":
        return None
    from pipeline.refiner import RefinerFile

    file = RefinerFile.of(run, device)
    file.load()
    return file


def own_refiner(checkpoint: Path, checkpoint_sha256: str, device: str) -> Any:
    """The refiner that a diffusion run keeps because it won on held-out pairs.

    None where it keeps none, or one for weights that were trained on since.
    """
    from pipeline.refiner import FILE_NAME, RefinerFile

    if not (checkpoint / FILE_NAME).is_file():
        return None
    file = RefinerFile.of(checkpoint, device, optional=True)
    if file.load()[1].recipe.get("checkpoint_sha256") == checkpoint_sha256:
        return file
    log.warning("the run's refiner belongs to an earlier checkpoint and is left out: run `ctpipe train-refiner` again")
    return None


def start_of(checkpoint: Path, device: str) -> Any:
    """The refiner whose slices a diffusion run's model starts from; None where it starts from interpolated ones."""
    from diffusion.runs import RunCard
    from pipeline.refiner import start_refiner

    return start_refiner(checkpoint, RunCard.read(checkpoint).refiner_sha256, device)


TEXTURE_NAME = "texture.json"
"""In a run's folder: noise of the true thin slices of its pairs, measured when it began, and how
much more detail they have than its draws, measured at its end."""


def texture_of(run: Path, asked: bool | None, steps: int | None, *, samples: int, answer: str = "mean") -> Any:
    """The texture that a run's single draws are brought to, `pipeline.metrics.Texture`; None for none.

    Args:
        run: The training run's folder.
        asked: None leaves it to the answer: a sample, which is for measuring, gets it where the run knows it.
        steps: Sampling steps asked for.
        samples: Of several, the mean is composed unless the answer is a sample.
        answer: ``mean``, ``sample`` or ``both``.

    Raises:
        InputError: Texture asked for where a mean is composed, or from a run that has not measured it.
    """
    from diffusion.runs import RunCard
    from latentcache import InputError
    from pipeline.metrics import Texture

    if asked is False or (asked is None and answer == "mean"):
        return None
    path, mean = run / TEXTURE_NAME, RunCard.read(run).build_objective().steps(steps) == 1
    if asked and (mean or (samples > 1 and answer == "mean")):
        raise InputError(
            "--texture for " + ("a single step, which gives a mean" if mean else "the mean of several samples"),
            expected="a draw: noise in a mean is an error and nothing else",
            remedy="Give --steps 10 with one sample, or with --samples 4 --answer sample; or leave --texture away.",
        )
    if asked and not path.is_file():
        raise InputError(
            f"--texture of a run without {TEXTURE_NAME}",
            expected="a run that looked at its pairs' thin series in HU when it began",
            remedy="Train where the archives are at hand (--private), or leave --texture away.",
        )
    return None if mean or not path.is_file() else Texture.from_json(path.read_text(encoding="utf-8"))


def sampling_facts(model: Any, options: dict[str, Any], samples: int) -> dict[str, Any]:
    """Return the provenance's facts of sampling, the model's defaults spelled out."""
    return {
        "sampler": options["sampler"] or model.objective.samplers[0],
        "steps": model.objective.steps(options["num_inference_steps"]),
        "seed": options["seed"],
        "samples": samples,
        "alignment": model.alignment,
    }


log = logging.getLogger("ctpipe.sample")


VIEWED_SAMPLES = 8
"""Single samples whose spread an evaluation's viewer shows, at most."""


SampleStage = Stage[SampleTask, PreparedSample, SampleWorker, StagedLatents]


@dataclass(frozen=True)
class Spread:
    """Distribution of sampling: the engine's options, and arithmetic threads per device (None: as they are)."""

    engine: EngineOptions
    threads: int | None = None


@dataclass(frozen=True)
class Sampled:
    """Samples and their facts.

    Attributes:
        stores: One store of thin latents by pair key; one a sample where samples are kept apart.
        facts: What provenance says of it.
        failed: Pairs that could not be sampled, with the reason.
    """

    encode_key: str
    stores: list[LatentStore]
    facts: dict[str, Any]
    failed: dict[str, str] = field(default_factory=dict)


def load_run(device: str, *, run: Path) -> Interpolator:
    """A run's model on a device, on whatever node this is."""
    return Interpolator.load(run, device=device)


def sample_stage(
    latents: LatentStore, out: LatentStore, run: Path, settings: SampleSettings, key: str, threads: int | None
) -> SampleStage:
    """The engine's three functions for sampling from ``latents`` into ``out`` with a run's model."""
    return Stage(
        prepare=functools.partial(prepare, store_url=latents.url),
        setup=functools.partial(
            set_up,
            load=functools.partial(load_run, run=run.absolute()),
            out_url=out.url,
            fingerprint=out.secret_fingerprint,
            settings=settings,
            expected_key=key,
        ),
        run=functools.partial(_run, threads=threads),
    )


def _run(worker: SampleWorker, prepared: PreparedSample, *, threads: int | None) -> StagedLatents:
    """The stage's device part, with its threads pinned for equal bytes on every engine."""
    if threads is not None:
        pin(threads)
    seconds: dict[str, float] = {}
    record = timed(seconds, "sample", lambda: draw(worker, prepared))
    return StagedLatents(prepared.task.name, (record,), None, seconds)


def sample_store(
    latents: LatentStore,
    run: Path,
    model: Interpolator,
    keys: Sequence[str],
    settings: SampleSettings,
    spread: Spread,
    advance: Callable[[int], Any] = lambda done: None,
) -> tuple[LatentStore, dict[str, str]]:
    """Sample pairs into the store's own generated store; safe to kill and run again.

    Args:
        model: The run's model, or its description (loaded on the device ``meta``).
        advance: Called in the driver with the number of pairs that are done since.

    Returns:
        The generated store at its newest snapshot, and the pairs that could not be sampled with the reason.

    Raises:
        InputError: A key that is no pair, a store encoded otherwise than the model, no worker that can start, or
            another driver that holds the lease.
    """
    key = generation_key(model, settings)
    out = open_generated(latents, model, settings)
    tasks, already = plan_samples(latents, model, keys, out)
    advance(already)
    if not tasks:
        return out, {}
    stage = sample_stage(latents, out, run, settings, key, spread.threads)
    dashboard = dashboard_of(spread.engine)
    progress = Progress(latents.location, model.encode_key, len(tasks), "sample", dashboard)
    device = "cuda" if spread.engine.wants_gpu else "cpu"

    def count(_outcome: Any) -> dict[str, int]:
        advance(1)
        return {}

    with out.writer() as writer:
        commits = GroupCommit(writer, model.encode_key, device, progress.note, "sample")
        totals = run_stage(
            tasks, stage, spread.engine, name="sample", progress=progress, commit=commits, on_outcome=count
        )
    out.refresh()
    return out, totals.failed


@dataclass(frozen=True)
class SampleJob:
    """Pairs to sample with a run's model.

    Attributes:
        run: The training run.
        split: Only this split.
        keys: Pair or thick series keys wanted; None for all.
        samples: Samples a pair, of consecutive seeds from ``seed`` on where they are kept apart.
        apart: Every sample in a separate store, so that each can be decoded; else one store holds their mean.
    """

    run: Path
    split: str | None = None
    keys: Sequence[str] | None = None
    sampler: str | None = None
    steps: int | None = None
    seed: int = 0
    samples: int = 1
    apart: bool = False


def sample_pairs(latents: LatentStore, job: SampleJob, spread: Spread, on_progress: OnProgress) -> Sampled:
    """Sample the pairs wanted into the store's own generated stores, with progress under ``sampling``."""
    model = Interpolator.load(job.run, "meta")
    role = model.condition_role
    there = {r.key for r in latents.records(model.encode_key, role)}
    pairs = [
        pair.pair_key
        for pair in latents.pairs()
        if pair.status == "ok"
        and (job.split is None or pair.split == job.split)
        and (job.keys is None or {pair.pair_key, pair.thick_key} & set(job.keys))
        and (pair.pair_key if role in PAIR_ROLES else pair.thick_key) in there
    ]
    stores_wanted = job.samples if job.apart else 1
    advance = _counter(on_progress, stores_wanted * len(pairs))
    stores: list[LatentStore] = []
    failed: dict[str, str] = {}
    for number in range(stores_wanted):
        how = SampleSettings(
            sampler=job.sampler,
            num_inference_steps=job.steps,
            seed=job.seed + number,
            samples=1 if job.apart else job.samples,
        )
        left = [key for key in pairs if key not in failed]
        out, lost = sample_store(latents, job.run, model, left, how, spread, advance)
        stores.append(out)
        failed |= lost
    options = {"sampler": job.sampler, "num_inference_steps": job.steps, "seed": job.seed}
    facts = {"checkpoint_sha256": model.checkpoint_sha256, "sampling": sampling_facts(model, options, job.samples)}
    return Sampled(model.encode_key, stores, facts, failed)


def _counter(on_progress: OnProgress, total: int) -> Callable[[int], None]:
    """Count samples that are done since the last call, and report their sum."""
    done = 0

    def advance(since: int) -> None:
        nonlocal done
        done += since
        on_progress(JobProgress("sampling", done, total))

    advance(0)
    return advance


@dataclass(frozen=True)
class ForScoring:
    """Samples of pairs that are to be scored.

    Attributes:
        latent_of: A pair's latent: the mean of its samples.
        samples_of: Its single samples, where there are several; for the pairs that the viewer shows.
    """

    generation_key: str
    latent_of: Callable[[PairRecord], Any]
    samples_of: Callable[[PairRecord], Iterator[Any]] | None
    failed: dict[str, str]


def sample_for_scoring(
    latents: LatentStore,
    run: Path,
    model: Interpolator,
    pairs: Sequence[PairRecord],
    viewed: int,
    settings: SampleSettings,
    spread: Spread,
    on_progress: OnProgress,
) -> ForScoring:
    """Sample pairs, and single samples of the first ``viewed`` of them, with progress under ``sampling``.

    Single samples are stored like any other, so that workers that score need no model.
    """
    keys = [pair.pair_key for pair in pairs]
    single = min(settings.samples, VIEWED_SAMPLES) if settings.samples > 1 else 0
    advance = _counter(on_progress, len(keys) + single * len(keys[:viewed]))

    def draw(wanted: Sequence[str], how: SampleSettings) -> tuple[LatentStore, dict[str, str]]:
        return sample_store(latents, run, model, wanted, how, spread, advance)

    out, failed = draw(keys, settings)
    apart: list[LatentStore] = []
    for number in range(single):
        wanted = [key for key in keys[:viewed] if key not in failed]
        store, lost = draw(wanted, replace(settings, samples=1, seed=settings.seed + number))
        apart.append(store)
        failed |= lost
    latent_of = functools.partial(_stored, out, model.encode_key)
    samples_of = functools.partial(_stored_each, apart, model.encode_key) if apart else None
    return ForScoring(generation_key(model, settings), latent_of, samples_of, failed)


def _stored(store: LatentStore, encode_key: str, pair: PairRecord) -> Any:
    record = store.find(pair.pair_key, "thin", encode_key)
    assert record is not None, "only pairs that were sampled are scored"
    return store.read(record)


def _stored_each(stores: Sequence[LatentStore], encode_key: str, pair: PairRecord) -> Iterator[Any]:
    return (_stored(store, encode_key, pair) for store in stores)
