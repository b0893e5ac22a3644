"""Interpolate: a thick-only study, as in the clinic, to a thin DICOM series, without a store.

The model comes in as a callable on latents, so that this module knows nothing of how thin latents are made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentcache import Encoding, LatentGrid
from latentcache.storage import refuse_existing
from pipeline.decode import (
    ComposeSettings,
    DerivedSeries,
    WriteSettings,
    average_samples,
    base_volume,
    note_certificates,
    parse_answer,
    parse_detail,
    write_derived,
)
from pipeline.encode import PAD_MULTIPLE_ZYX
from pipeline.engines import resolve_device
from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.identity import Keys, PrivateStore
from pipeline.refiner import DEFAULT, PretrainedModel, load_pretrained
from pipeline.vae import Autoencoder, load_decoder, own_decoder
from pipeline.volume import Geometry, Volume, Window, resample_z, z_weights
from pipeline.workflows.interpolation.job import Interpolated, InterpolateJob, Sampling
from pipeline.workflows.interpolation.shipped import interpolate_shipped
from pipeline.workflows.interpolation.thick_study import Scanned, ThickStudy, identity_of, read_thick
from pipeline.workflows.job_progress import JobProgress, OnProgress, silent
from pipeline.workflows.sample import own_refiner, refiner_of, sampling_facts, start_of, texture_of
from pipeline.writing import Provenance

log = logging.getLogger("ctpipe.interpolate")

if TYPE_CHECKING:
    from pipeline.refiner import RefinerFile


@dataclass(frozen=True)
class LoadedModel:
    """A run's :class:`diffusion.Interpolator`, its VAE, how its latents were encoded, and its folder."""

    model: Any
    codec: Any
    encoding: Encoding
    run: Path


def interpolate_study(
    source: str | Path, out: str | Path, *, model: str | Path | None = None, **options: Any
) -> Interpolated:
    """Return a thin series written from a thick study: DICOM, or NIfTI where the study is.

    Args:
        source: A zip, folder, DICOMDIR or NIfTI file that holds a thick CT series.
        out: Folder to write into.
        model: Name or path of a model that ships or is like one, or a training run's folder; None for the default one.
        options: Any other field of :class:`InterpolateJob`, ``spacing_mm=1.0`` say.

    Raises:
        InputError: No usable series, a model without encoding, another VAE than the model's, or a folder that exists.
    """
    return run_interpolation(InterpolateJob(str(source), Path(out), model, **options))


def run_interpolation(
    job: InterpolateJob,
    on_progress: OnProgress = silent,
    on_estimate: Callable[[float, tuple[int, ...]], None] = lambda seconds, shape: None,
) -> Interpolated:
    """Do an :class:`InterpolateJob`.

    Args:
        on_estimate: Called before the work with the seconds that it will take and the thick volume's (z, y, x).
    """
    from pipeline.writing import check_enhanced, transfer_syntax_uid

    transfer_syntax_uid(job.transfer_syntax)
    job = replace(job, device=resolve_device(job.device))
    on_progress(JobProgress("interpolate", step="read"))
    scanned, thick = read_thick(job.source, job.spacing_mm)
    study = ThickStudy(scanned, thick, PrivateStore.open(str(job.private or job.out), create=True).keys)
    if job.enhanced and study.layout is None:
        check_enhanced(thick.header)
    loaded = load_model(job.model, vae=job.vae, device=job.device, memory_gib=job.memory_gib, precision=job.precision)
    return interpolate_with(loaded, study, job, on_progress, on_estimate)


def load_model(
    model: str | Path | None = None,
    *,
    vae: str = "tiny",
    device: str = "auto",
    memory_gib: float | None = None,
    precision: str = "auto",
) -> LoadedModel | PretrainedModel:
    """Return a model ready for any number of studies: a shipped one, or a run's with the VAE that it was trained with.

    Args:
        model: As :class:`InterpolateJob` takes it.

    Raises:
        InputError: No such model or run, a run without encoding, or another VAE than the run's.
    """
    if model is None or not Path(model).is_dir():
        return load_pretrained(DEFAULT if model is None else model)
    from diffusion.sampling import Interpolator

    device = resolve_device(device)
    run = Interpolator.load(Path(model), device=device)
    encoding = encoding_of(run)
    codec = load_decoder(device, spec=vae, encoding=encoding, precision=precision, memory_gib=memory_gib)
    return LoadedModel(run, codec, encoding, Path(model))


def interpolate_with(
    loaded: LoadedModel | PretrainedModel,
    study: ThickStudy,
    job: InterpolateJob,
    on_progress: OnProgress = silent,
    on_estimate: Callable[[float, tuple[int, ...]], None] = lambda seconds, shape: None,
) -> Interpolated:
    """Do an :class:`InterpolateJob` whose study has been read and whose model has been loaded."""
    job = replace(job, device=resolve_device(job.device))
    if isinstance(loaded, PretrainedModel):
        return interpolate_shipped(loaded, study, job, on_progress)
    model, codec, thick = loaded.model, loaded.codec, study.volume
    settings = _settings(job, loaded)
    settings = replace(settings, write=replace(settings.write, layout=study.layout))
    shape = thick.geometry.thin_grid(settings.trained_spacing_mm).shape_zyx
    expected = estimate_seconds(
        model, codec, shape, job.sampling.samples, job.sampling.options, settings.write.samples_apart
    )
    on_estimate(expected, thick.hu.shape)
    start = time.perf_counter()
    done = generate_series(study, codec, model, settings, job.sampling, on_progress)
    return Interpolated(
        done.key,
        job.out / done.key,
        tuple(done.folders),
        done.series_uid,
        done.n_slices,
        len(thick.hu),
        job.spacing_mm,
        round(time.perf_counter() - start, 2),
        round(expected, 2),
        dict(done.figures),
        loaded.run.name,
        (str(done.figures["warning"]),) if done.figures.get("warning") else (),
    )


def _settings(job: InterpolateJob, loaded: LoadedModel) -> InterpolateSettings:
    """Return the settings of composing and writing, from the job and the model's card."""
    from diffusion.sampling import change_gain

    model, encoding, steps = loaded.model, loaded.encoding, job.sampling.options["num_inference_steps"]
    answer = parse_answer(job.answer, job.sampling.samples)
    return InterpolateSettings(
        WriteSettings(
            job.out,
            Window.of(encoding),
            transfer_syntax=job.transfer_syntax,
            uncertainty=job.uncertainty or job.uncertainty_map,
            uncertainty_map=job.uncertainty_map,
            alarm_map=job.alarm_map,
            enhanced=job.enhanced,
            answer=answer,
            checkpoint_sha256=model.checkpoint_sha256,
            sampling=sampling_facts(model, job.sampling.options, job.sampling.samples),
        ),
        ComposeSettings(
            detail=parse_detail(job.detail),
            consistency=job.consistency,
            profile=SliceProfile("gaussian", job.fwhm_mm) if job.fwhm_mm else None,
            start=start_of(loaded.run, job.device),
            change_gain=change_gain(loaded.run, steps),
            texture=texture_of(loaded.run, job.texture, steps, samples=job.sampling.samples, answer=answer),
            refiner=refiner_of(job.refiner, job.device)
            if job.refiner
            else own_refiner(loaded.run, model.checkpoint_sha256, job.device),
        ),
        spacing_mm=job.spacing_mm,
        trained_spacing_mm=job.trained_spacing_mm or learnt_spacing(model) or 1.0,
        alignment=model.alignment,
        encode_key=model.encode_key,
        pad_multiple_zyx=encoding.pad_multiple_zyx,
        restore_identity=job.restore_identity,
    )


def estimate_seconds(
    model: Any, codec: Any, shape_zyx: tuple[int, int, int], samples: int, options: dict[str, Any], apart: bool
) -> float:
    """Seconds of sampling and coding a volume, from one step and one decode of a small piece on this very device.

    Both are nearly proportional to the voxels. Encoding costs about a third of decoding; with residual detail the
    condition is decoded too. Reading, composing and writing are left out: they are small beside a full model.
    """
    import numpy as np

    from diffusion.networks import ThickSlices

    depth, side = 8, 16
    piece = np.zeros((4, depth, side, side), np.float32)
    told = {"thick": ThickSlices(0.0, 5.0, depth, 5.0), "z_mm": 4.0 * np.arange(depth)}

    def timed(work: Any) -> float:
        work()  # the first call pays for loading kernels
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    one_step = timed(lambda: model.generate_latent(piece, **told, **{**options, "num_inference_steps": 1}))
    one_decode = timed(lambda: codec.decode(piece, (4 * depth, 4 * side, 4 * side)))
    times_larger = float(np.prod(shape_zyx)) / (64.0 * depth * side * side)
    steps = model.objective.steps(options["num_inference_steps"])
    decodes = (samples if apart else 1) + 1 + 1 / 3
    return float(times_larger * (samples * steps * one_step + decodes * one_decode))


def encoding_of(model: Any) -> Any:
    """Return the encoding of the run's latents. Raises InputError where the run does not state it."""
    from latentcache import InputError

    if model.encoding is None:
        raise InputError(
            "a run that does not say how its latents were encoded",
            expected="run.json with the encoding",
            remedy="Train it again with this version.",
        )
    return model.encoding


def generate_series(
    study: ThickStudy,
    codec: Any,
    model: Any,
    settings: InterpolateSettings,
    sampling: Sampling,
    on_progress: OnProgress,
) -> DerivedSeries:
    """Run the interpolation; the model goes in as a callable on latents."""
    done, samples, options = 0, sampling.samples, sampling.options

    def say(step: str) -> None:
        nonlocal done
        done += 1
        on_progress(JobProgress("interpolate", done, 2 + samples, step))

    thick = study.volume
    grid = thick.geometry.thin_grid(settings.trained_spacing_mm)
    told = told_of(thick, LatentGrid.of(grid).positions(), settings.compose.profile)

    def generate(condition: Latent) -> Iterator[Latent]:
        if not settings.write.samples_apart:
            yield model.generate_latent(condition, samples=samples, **told, **options)
            return
        for number in range(samples):
            say(f"generate {number + 1}/{samples}")
            yield model.generate_latent(condition, **told, **{**options, "seed": options["seed"] + number})

    on_progress(JobProgress("interpolate", 0, 2 + samples, "encode"))
    return interpolate(study.volume, study.scanned, study.keys, codec, generate, settings, progress=say)


def told_of(thick: Volume, latent_z_mm: Any, profile: SliceProfile | None = None) -> dict[str, Any]:
    """Return what a model may know of a thick volume: its slices, and the places of its thin grid's latent slices.

    Args:
        profile: The measured slice profile; None where the thickness is used for it.
    """
    from diffusion.networks import ThickSlices

    had = thick.geometry
    width = profile.fwhm_mm if profile else 0.0
    slices = ThickSlices(had.z_mm[0], had.spacing_mm_zyx[0], len(had.z_mm), had.thickness_mm or 0.0, width)
    return {"thick": slices, "z_mm": latent_z_mm}


def learnt_spacing(model: Any) -> float | None:
    """The thin spacing that a run was trained on, where its card says so."""
    card = getattr(model, "card", None)
    value = card.extra.get("thin_spacing_mm") if card is not None else None
    return None if value is None else float(value)


Latent = NDArray[np.float32]
Generate = Callable[[Latent], Iterable[Latent]]
"""Condition (4, d, h, w), raw, on the thin latent grid, to one or more samples of the same shape."""


@dataclass(frozen=True)
class InterpolateSettings:
    """Settings of the way from a thick series to a thin one.

    Attributes:
        spacing_mm: Spacing wanted.
        trained_spacing_mm: Spacing of the thin series that the model learnt from.
        pad_multiple_zyx: As the latents that the model learnt from were padded.
        alignment: ``pixel``: interpolate HU, then encode; ``latent``: encode, then interpolate along z. As trained.
    """

    write: WriteSettings
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    spacing_mm: float = 1.0
    trained_spacing_mm: float = 1.0
    alignment: Literal["pixel", "latent"] = "pixel"
    encode_key: str = ""
    pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX
    restore_identity: bool = False
    reader_threads: int = 2


def interpolate(
    thick: Volume,
    scanned: Scanned,
    keys: Keys,
    vae: Autoencoder,
    generate: Generate,
    settings: InterpolateSettings,
    progress: Callable[[str], None] | None = None,
) -> DerivedSeries:
    """Generate, decode, compose and write the thin series that fills the thick one's extent.

    Args:
        thick: The chosen series in HU.
        keys: Derives the pseudonyms; the output folder is named by the series key.
        generate: The model, on latents.
        progress: Called with the step that begins: ``encode``, ``generate``, ``decode and write``.

    Raises:
        InputError: The output folder exists, or the original identity is wanted and incomplete.
    """
    say = progress or (lambda step: None)
    series_key = keys.series(scanned.series_uid, scanned.discriminator)
    refuse_existing(settings.write.out_dir / series_key)
    identity = identity_of(thick, scanned, keys, settings.restore_identity)
    window = settings.write.window
    trained = thick.geometry.thin_grid(settings.trained_spacing_mm)
    target = thick.geometry.thin_grid(settings.spacing_mm)
    say("encode")
    condition = condition_latent(
        thick, trained, window, vae, settings.alignment, settings.pad_multiple_zyx, settings.compose.start
    )
    say("generate")
    latents = list(generate(condition))
    say("decode and write")
    notes: tuple[str, ...] = ()
    if abs(settings.spacing_mm - settings.trained_spacing_mm) > 1e-6:
        notes = (f"resampled along z from the model's {settings.trained_spacing_mm:g} mm",)

    def decoded(latent: Latent) -> NDArray[np.float32]:
        hu = window.from_unit(np.asarray(vae.decode(latent, trained.shape_zyx)))
        return onto_spacing(hu, trained, target) if notes else hu

    condition_hu = decoded(condition) if settings.compose.detail == "residual" else None
    measured = settings.compose.measured(thick, target)
    base = None
    if settings.compose.start is not None:
        base = base_volume(thick, np.asarray(trained.z_mm), settings.compose, window)
        base = onto_spacing(base, trained, target) if notes else base
    volume = average_samples(
        (decoded(x) for x in latents), window, measured, target, settings.compose, condition_hu, base,
        alarm=settings.write.alarm_map,
    )  # fmt: skip
    provenance = Provenance(
        kind="generated",
        source_key=series_key,
        window=(window.center, window.width),
        spacing_mm=round(target.spacing_mm_zyx[0], 6),
        encode_key=settings.encode_key,
        vae_sha256=vae.sha256,
        decoder_sha256=own_decoder(vae),
        notes=notes,
    )
    written = write_derived(series_key, volume, target, thick.header, identity, provenance, settings.write)
    note_certificates(log, written, "interpolate")
    return written


def condition_latent(
    thick: Volume,
    target: Geometry,
    window: Window,
    vae: Autoencoder,
    alignment: Literal["pixel", "latent"],
    pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX,
    start: RefinerFile | None = None,
) -> Latent:
    """The model's condition on the thin latent grid, (4, d, h, w) float32, made as encode and training make it.

    ``pixel``: thick HU linearly interpolated onto the target's slices, encoded. ``latent``: the thick latent linearly
    interpolated along z; latent slice j is centred between volume slices 4j+1 and 4j+2 on either grid. With ``start``
    the slices that this refiner makes on the target's positions are encoded instead.
    """
    if start is not None:
        from pipeline.refiner import refined_volume

        unit = window.to_unit(refined_volume(start, thick, np.asarray(target.z_mm), window))
        return np.asarray(vae.encode(unit, pad_multiple_zyx=pad_multiple_zyx), dtype=np.float32)
    z_thick, z_thin = np.asarray(thick.geometry.z_mm), np.asarray(target.z_mm)
    hu = resample_z(thick.hu, z_thick, z_thin) if alignment == "pixel" else thick.hu
    latent = np.asarray(vae.encode(window.to_unit(hu), pad_multiple_zyx=pad_multiple_zyx), dtype=np.float32)
    if alignment == "pixel":
        return latent
    z_from = LatentGrid.of(thick.geometry).positions(latent.shape[1])
    weights = z_weights(z_from, LatentGrid.of(target).positions(), "linear")
    return np.ascontiguousarray(np.einsum("nd,cdhw->cnhw", weights.astype(np.float32), latent))


def onto_spacing(hu: NDArray[np.float32], have: Geometry, want: Geometry) -> NDArray[np.float32]:
    """(z, y, x) HU on another spacing: averaged over the wanted slice's extent when coarser, cubic when finer."""
    z_have, z_want = np.asarray(have.z_mm), np.asarray(want.z_mm)
    spacing = want.spacing_mm_zyx[0]
    if spacing > have.spacing_mm_zyx[0]:
        return slice_operator(SliceProfile("box", spacing), z_want, z_have).apply(hu)
    return resample_z(hu, z_have, z_want, "cubic")
