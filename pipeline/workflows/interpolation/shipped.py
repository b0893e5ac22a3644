"""A thick study to a thin series by a model that ships: no store, no autoencoder, no training run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache.storage import refuse_existing
from pipeline.decode import ComposeSettings, DerivedVolume, WriteSettings, finish, write_derived
from pipeline.forward_model import SliceProfile
from pipeline.refiner import HU_RANGE, PretrainedModel, RunSettings, thin_slices
from pipeline.report import StudyPage, write_study_page
from pipeline.volume import Geometry, Volume, Window
from pipeline.workflows.interpolation.job import Interpolated, InterpolateJob
from pipeline.workflows.interpolation.suitability import check_suitable
from pipeline.workflows.interpolation.thick_study import ThickStudy
from pipeline.workflows.job_progress import JobProgress, OnProgress, silent
from pipeline.writing import Provenance

WINDOW = Window((HU_RANGE[0] + HU_RANGE[1]) / 2, HU_RANGE[1] - HU_RANGE[0])
"""Range of HU in which the network answers."""
PERCENT = 100
REFINED, AGREED = 70, 85
"""Percent done after each stage, by the times of 300 x 512 x 512 on two cores."""


@dataclass(frozen=True)
class Answer:
    """Thin slices (z, y, x) int16 HU, the profile that was assumed, figures of agreement, and seconds by stage."""

    hu: NDArray[np.int16]
    profile: SliceProfile
    figures: dict[str, Any]
    seconds: dict[str, float]


def interpolate_shipped(
    model: PretrainedModel, study: ThickStudy, job: InterpolateJob, on_progress: OnProgress = silent
) -> Interpolated:
    """Do an :class:`InterpolateJob` on a study that was read, by a shipped model or one like it.

    Raises:
        InputError: Values that are no HU, or an output that exists.
    """
    started = time.perf_counter()
    report = _percent(on_progress)
    thick = study.volume
    refuse_existing(job.out / study.series_key)
    identity = study.identity(job.restore_identity)
    target = thick.geometry.thin_grid(job.spacing_mm)
    warnings = check_suitable(thick, model.card, target, stated=study.layout is None)
    answer = answer_of(thick, target, model, job, report)
    report(AGREED, "write")
    begun = time.perf_counter()
    figures = {**answer.figures, "refiner_sha256": model.sha256, "model": model.name, "profile": str(answer.profile)}
    done = write_derived(
        study.series_key,
        DerivedVolume(answer.hu, None, 1, figures),
        target,
        thick.header,
        identity,
        provenance_of(study.series_key, target, warnings),
        WriteSettings(
            job.out,
            WINDOW,
            transfer_syntax=job.transfer_syntax,
            enhanced=job.enhanced,
            sampling={"model": model.name},
            layout=study.layout,
        ),
    )
    doubt = (str(figures["warning"]),) if figures.get("warning") else ()
    if answer.figures["certificate"]["failing"]:
        doubt = (*doubt, f"{answer.figures['certificate']['said']}: mean HU of these tissues are shifted")
    seconds = {**answer.seconds, "write": time.perf_counter() - begun}
    result = Interpolated(
        done.key,
        job.out / done.key,
        tuple(done.folders),
        done.series_uid,
        done.n_slices,
        len(thick.hu),
        job.spacing_mm,
        round(time.perf_counter() - started, 2),
        0.0,
        {**figures, "stage_seconds": {name: round(value, 2) for name, value in seconds.items()}},
        model.name,
        (*warnings, *doubt),
    )
    if job.page:
        page = job.out / f"{done.key}.html"
        shown = StudyPage(thick, answer.hu, target, model.name, model.card.raw, figures, result.warnings)
        write_study_page(page, shown)
        result = replace(result, page=page)
    report(PERCENT, "done")
    return result


def answer_of(
    thick: Volume, target: Geometry, model: PretrainedModel, job: InterpolateJob, report: Callable[[float, str], None]
) -> Answer:
    """The thin slices that fill a thick series' extent, refined and brought into agreement with it."""
    settings = ComposeSettings(
        consistency=job.consistency, profile=SliceProfile("gaussian", job.fwhm_mm) if job.fwhm_mm else None
    )
    measured = settings.measured(thick, target)
    begun = time.perf_counter()
    how = RunSettings(job.device, on_progress=lambda share: report(share * REFINED, "refine"))
    x = thin_slices(model, thick, target, measured.profile, how)
    refined = time.perf_counter()
    report(REFINED, "agree with the thick slices")
    hu, figures = finish(x, measured, settings, WINDOW)
    return Answer(hu, measured.profile, figures, {"refine": refined - begun, "agree": time.perf_counter() - refined})


def provenance_of(series_key: str, target: Geometry, warnings: tuple[str, ...]) -> Provenance:
    """Return the provenance of the thin series; figures and hashes are added as it is written."""
    return Provenance(
        kind="generated",
        source_key=series_key,
        window=(WINDOW.center, WINDOW.width),
        spacing_mm=round(target.spacing_mm_zyx[0], 6),
        notes=warnings,
    )


def _percent(on_progress: OnProgress) -> Callable[[float, str], None]:
    return lambda done, step: on_progress(JobProgress("interpolate", round(done), PERCENT, step))
