"""Samples thin latents for stored pairs: the stage that samples one pair, and all of them in this process.

The stage is three functions, as an engine wants them: ``prepare`` reads the condition, ``set_up`` loads the model on a
device, ``draw`` samples and stages the latent. Nothing here knows an engine: ``cli`` hands the functions to one, and
``generate_store`` calls them one pair after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.data import align_depth
from diffusion.sampling.interpolator import Interpolator
from diffusion.sampling.plan import (
    SampleSettings,
    SampleTask,
    condition_rows,
    generation_key,
    open_generated,
    plan_samples,
    thick_slices,
)
from latentcache import (
    PAIR_ROLES,
    InputError,
    LatentGrid,
    LatentMeta,
    LatentRecord,
    LatentStore,
    PairRecord,
    open_on_worker,
    store_of_worker,
)


@dataclass(frozen=True)
class SampleSummary:
    """Summary of a call of :func:`generate_store`."""

    generation_key: str
    generated: int
    already_there: int


@dataclass(frozen=True)
class PreparedSample:
    """A task with its condition, raw, (C, d, h, w) float32 on the grid."""

    task: SampleTask
    condition: NDArray[np.float32]


@dataclass(frozen=True)
class SampleWorker:
    """State of a worker: the model on its device, and the store of its samples."""

    model: Interpolator
    out: LatentStore
    settings: SampleSettings
    generation_key: str


def prepare(task: SampleTask, *, store_url: str) -> PreparedSample:
    """Read a task's condition and bring it onto the grid (CPU).

    Raises:
        InputError: The task's own problem, or a latent that cannot be read.
    """
    if task.problem is not None:
        raise task.problem
    assert task.condition is not None
    assert task.grid is not None
    return PreparedSample(task, _aligned(store_of_worker(store_url), task.condition, task.grid))


def set_up(
    device: str,
    *,
    load: Callable[[str], Interpolator],
    out_url: str,
    fingerprint: str,
    settings: SampleSettings,
    expected_key: str,
) -> SampleWorker:
    """A worker's state. Checks first that it has the driver's store and the driver's checkpoint.

    Args:
        load: The model on a device; must be picklable for workers of other processes.

    Raises:
        InputError: Another store or none, another checkpoint or none, or no CUDA device where one is asked for.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "no CUDA device in this process",
            expected="a GPU with its driver, because one is asked for",
            remedy="Sample on the CPU, or start the worker on a GPU node with the CUDA image.",
        )
    out = open_on_worker(out_url, fingerprint)
    model = load(device)
    if (found := generation_key(model, settings)) != expected_key:
        raise InputError(
            f"a worker's run gives generation key {found}",
            expected=f"the driver's, {expected_key}",
            remedy="Put the same run's folder at the same path on every node.",
        )
    return SampleWorker(model, out, settings, expected_key)


def draw(worker: SampleWorker, prepared: PreparedSample) -> LatentRecord:
    """Sample one pair's thin latent and stage it (the stage's device part)."""
    grid = prepared.task.grid
    assert grid is not None
    latent = worker.model.generate_latent(
        prepared.condition,
        thick=prepared.task.thick,
        z_mm=_positions(grid),
        **asdict(worker.settings),
    )
    return worker.out.stage(
        latent.astype(np.float16),
        LatentMeta(
            encode_key=worker.model.encode_key,
            key=prepared.task.name,
            role="thin",
            z0_mm=grid.z0_mm,
            dz_mm=grid.dz_mm,
            valid_zyx=grid.valid_zyx,
            source_digest=worker.generation_key,
        ),
    )


def generate_store(
    store: LatentStore,
    model: Interpolator,
    keys: Sequence[str] | None,
    out: LatentStore | None,
    settings: SampleSettings,
    progress: Callable[[int, int, str], None] | None = None,
) -> SampleSummary:
    """Samples the thin latents of pairs from their stored conditions, in this process, one after the other.

    Args:
        store: Where the conditions are.
        keys: As for :func:`plan_samples`.
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
        out = open_generated(store, model, settings)
    elif model.encoding is not None:
        out.register_encoding(model.encoding)
    tasks, already = plan_samples(store, model, keys, out)
    worker = SampleWorker(model, out, settings, key)
    with out.writer() as writer:
        for number, task in enumerate(tasks):
            writer.commit([draw(worker, prepare(task, store_url=store.url))])
            if progress is not None:
                progress(already + number + 1, already + len(tasks), task.name)
    return SampleSummary(key, len(tasks), already)


def condition_of(store: LatentStore, model: Interpolator, pair: PairRecord) -> tuple[NDArray[np.float32], LatentRecord]:
    """The pair's condition, raw, (C, d, h, w) float32 on the thin latent grid, and the record that describes the grid.

    Raises:
        InputError: A latent that is needed is not stored.
    """
    condition, grid = condition_rows(store, model, pair)
    return _aligned(store, condition, grid), grid


def generate_for(store: LatentStore, model: Interpolator, pair: PairRecord, **options: Any) -> NDArray[np.float32]:
    """A pair's thin latent, raw, from its stored condition; ``options`` as of ``Interpolator.generate_latent``.

    Raises:
        InputError: A latent that is needed is not stored.
    """
    condition, grid = condition_of(store, model, pair)
    thick = thick_slices(store, [pair]).get(pair.thick_key) if model.told else None
    return model.generate_latent(condition, thick=thick, z_mm=_positions(grid), **options)


def _aligned(store: LatentStore, condition: LatentRecord, grid: LatentRecord) -> NDArray[np.float32]:
    """The condition's latent on the grid; a thick latent is interpolated along z by position."""
    latent = np.asarray(store.read(condition), dtype=np.float32)
    if condition.role in PAIR_ROLES:
        return latent
    return align_depth(
        torch.from_numpy(latent),
        _positions(condition),
        _positions(grid),
    ).numpy()


def _positions(record: LatentRecord) -> NDArray[np.float64]:
    return LatentGrid.of_row(record).positions(record.shape[1])
