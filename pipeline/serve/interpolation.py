"""The service's interpolation: every model that a rule names, loaded once, and one call per study."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.identity import PrivateStore
from pipeline.refiner import PretrainedModel
from pipeline.serve.config import ServeConfig
from pipeline.serve.contract import InterpolateRequest, InterpolateResult
from pipeline.workflows import InterpolateJob, LoadedModel, ThickStudy, interpolate_with, load_model, read_thick


def interpolation(settings: ServeConfig) -> Callable[[InterpolateRequest], InterpolateResult]:
    """Return what makes a thin series, with every model and its VAE loaded: a wrong one fails the start, no study.

    Raises:
        InputError: A model that cannot be loaded.
    """
    loaded: dict[str, LoadedModel | PretrainedModel] = {}
    for rule in settings.rules:
        model = rule.model or settings.model
        if model not in loaded:
            loaded[model] = load_model(model or None, vae=settings.vae, device=settings.device)

    def interpolate(request: InterpolateRequest) -> InterpolateResult:
        job = InterpolateJob(
            str(request.source),
            request.out,
            request.model or None,
            request.spacing_mm,
            transfer_syntax=request.transfer_syntax,
            restore_identity=request.restore_identity,
            device=settings.device,
            page=False,
        )
        scanned, thick = read_thick(job.source, job.spacing_mm)
        request.out.mkdir(parents=True, exist_ok=True)
        study = ThickStudy(scanned, thick, PrivateStore.open(str(request.private)).keys)
        done = interpolate_with(loaded[request.model], study, job)
        return InterpolateResult(done.folders, done.series_uid, done.slices, done.figures)

    return interpolate
