"""Interpolate: a thick-only study, as in the clinic, to a thin DICOM series, without a store.

The model comes in as a callable on latents, so that this module knows nothing of how thin latents are made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from latentcache import COMPRESSION, Encoding, InputError
from latentcache.storage import refuse_existing
from pipeline.decode import (
    ComposeSettings,
    DerivedSeries,
    WriteSettings,
    average_samples,
    note_certificates,
    parse_answer,
    parse_detail,
    write_derived,
)
from pipeline.encode import PAD_MULTIPLE_ZYX
from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.identity import Keys, PrivateStore, is_placeholder_id
from pipeline.volume import Geometry, SeriesPointer, Volume, Window, resample_z, z_weights
from pipeline.workflows.job_progress import JobProgress, OnProgress, silent
from pipeline.workflows.sample import load_codec, own_refiner, refiner_of, sampling_facts
from pipeline.writing import Provenance, SeriesIdentity

log = logging.getLogger("ctpipe.interpolate")


@dataclass(frozen=True)
class Sampling:
    """How the model is sampled; None leaves a choice to its objective.

    Attributes:
        samples: Samples whose mean is the output.
    """

    sampler: str | None = None
    steps: int | None = None
    samples: int = 1
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``Interpolator.generate``."""
        return {"sampler": self.sampler, "num_inference_steps": self.steps, "seed": self.seed}


@dataclass(frozen=True)
class InterpolateJob:
    """A thick study to a thin DICOM series.

    Attributes:
        source: A zip or a folder that holds a thick CT series.
        out: Folder to write into; the series gets a folder named by its key.
        model: A training run's folder.
        spacing_mm: Slice spacing wanted.
        trained_spacing_mm: Spacing that the model learnt; by default the run's own, else 1.
        vae: The VAE that the run was trained with: ``tiny`` or a path.
        detail: ``absolute`` or ``residual``: how decoded slices become HU.
        fwhm_mm: Measured width of the slice profile; by default the thickness.
        refiner: A run of ``ctpipe train-refiner``, ``none``, or None for the model's own.
        restore_identity: Keep the patient's identity, for use inside the hospital.
        memory_gib: Memory budget of the VAE.
        private: Where the secret of the pseudonyms is kept; by default ``out``.
        answer: ``mean`` of the samples for viewing, one ``sample`` for measuring, or ``both``.
        alarm_map: Where the written sample stands out from the others, as a Parametric Map.
    """

    source: str
    out: Path
    model: Path
    spacing_mm: float = 1.0
    trained_spacing_mm: float | None = None
    vae: str = "tiny"
    sampling: Sampling = field(default_factory=Sampling)
    uncertainty: bool = False
    uncertainty_map: bool = False
    detail: str = "residual"
    consistency: bool = True
    fwhm_mm: float | None = None
    refiner: Path | None = None
    transfer_syntax: str = "explicit"
    enhanced: bool = False
    restore_identity: bool = False
    device: str = "cpu"
    memory_gib: float | None = None
    private: Path | None = None
    answer: str = "mean"
    alarm_map: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A run's :class:`diffusion.Interpolator`, its VAE, and how its latents were encoded."""

    model: Any
    codec: Any
    encoding: Encoding


@dataclass(frozen=True)
class ThickStudy:
    """The thick series that was chosen, its volume in HU, and what makes its pseudonyms."""

    scanned: Scanned
    volume: Volume
    keys: Keys


@dataclass(frozen=True)
class Interpolated:
    """A thin series that was written.

    Attributes:
        folder: Where its slices are.
        folders: The same, and that of the spread over samples where there is one.
        figures: RMS against the measured slices in HU before and after, and whatever else was measured.
    """

    key: str
    folder: Path
    folders: tuple[str, ...]
    series_uid: str
    slices: int
    source_slices: int
    spacing_mm: float
    seconds: float
    estimated_seconds: float
    figures: dict[str, Any]


def interpolate_study(source: str | Path, out: str | Path, *, model: str | Path, **options: Any) -> Interpolated:
    """Return a thin DICOM series written from a thick study.

    Args:
        source: A zip or a folder that holds a thick CT series.
        out: Folder to write into.
        model: A training run's folder.
        options: Any other field of :class:`InterpolateJob`, ``spacing_mm=1.0`` say.

    Raises:
        InputError: No usable series, a model without encoding, another VAE than the model's, or a folder that exists.
    """
    return run_interpolation(InterpolateJob(str(source), Path(out), Path(model), **options))


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
    scanned, thick = read_thick(job.source, job.spacing_mm)
    if job.enhanced:
        check_enhanced(thick.header)
    keys = PrivateStore.open(str(job.private or job.out), create=True).keys
    loaded = load_model(job.model, vae=job.vae, device=job.device, memory_gib=job.memory_gib)
    return interpolate_with(loaded, ThickStudy(scanned, thick, keys), job, on_progress, on_estimate)


def load_model(run: Path, *, vae: str = "tiny", device: str = "cpu", memory_gib: float | None = None) -> LoadedModel:
    """Return a run's model with the VAE that it was trained with, ready for any number of studies.

    Raises:
        InputError: No run, a run without encoding, or another VAE than the run's.
    """
    from diffusion.sampling import Interpolator

    model = Interpolator.load(run, device=device)
    encoding = encoding_of(model)
    return LoadedModel(model, load_codec(vae, device, memory_gib, encoding), encoding)


def interpolate_with(
    loaded: LoadedModel,
    study: ThickStudy,
    job: InterpolateJob,
    on_progress: OnProgress = silent,
    on_estimate: Callable[[float, tuple[int, ...]], None] = lambda seconds, shape: None,
) -> Interpolated:
    """Do an :class:`InterpolateJob` whose study has been read and whose model has been loaded."""
    model, codec, thick = loaded.model, loaded.codec, study.volume
    settings = _settings(job, model, loaded.encoding)
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
    )


def _settings(job: InterpolateJob, model: Any, encoding: Encoding) -> InterpolateSettings:
    """What the job and the model's card say of composing and writing."""
    return InterpolateSettings(
        WriteSettings(
            job.out,
            Window(encoding.window_center, encoding.window_width),
            transfer_syntax=job.transfer_syntax,
            uncertainty=job.uncertainty or job.uncertainty_map,
            uncertainty_map=job.uncertainty_map,
            alarm_map=job.alarm_map,
            enhanced=job.enhanced,
            answer=parse_answer(job.answer, job.sampling.samples),
            checkpoint_sha256=model.checkpoint_sha256,
            sampling=sampling_facts(model, job.sampling.options, job.sampling.samples),
        ),
        ComposeSettings(
            detail=parse_detail(job.detail),
            consistency=job.consistency,
            profile=SliceProfile("gaussian", job.fwhm_mm) if job.fwhm_mm else None,
            refiner=refiner_of(job.refiner, job.device)
            if job.refiner
            else own_refiner(job.model, model.checkpoint_sha256, job.device),
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

    depth, side = 8, 16
    piece = np.zeros((4, depth, side, side), np.float32)

    def timed(work: Any) -> float:
        work()  # the first call pays for loading kernels
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    one_step = timed(lambda: model.generate(piece, **{**options, "num_inference_steps": 1}))
    one_decode = timed(lambda: codec.decode(piece, (4 * depth, 4 * side, 4 * side)))
    times_larger = float(np.prod(shape_zyx)) / (64.0 * depth * side * side)
    steps = options["num_inference_steps"] or model.objective.default_steps
    decodes = (samples if apart else 1) + 1 + 1 / 3
    return float(times_larger * (samples * steps * one_step + decodes * one_decode))


def read_thick(source: str, spacing_mm: float) -> tuple[Any, Any]:
    """The thick series of an archive or folder: what was found, and its volume in HU."""
    from pipeline.archive import open_archive
    from pipeline.reading import read_series, scan

    opened = open_archive(source)
    try:
        chosen: Any = choose_thick(scan(opened).series, spacing_mm=spacing_mm)
    finally:
        opened.close()
    return chosen, read_series(pointer_of(chosen, "interpolated"), threads=2)


def encoding_of(model: Any) -> Any:
    """How the run's latents were encoded. Raises InputError where the run does not say."""
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

    def generate(condition: Latent) -> Iterator[Latent]:
        if not settings.write.samples_apart:
            yield model.generate(condition, samples=samples, **options)
            return
        for number in range(samples):
            say(f"generate {number + 1}/{samples}")
            yield model.generate(condition, **{**options, "seed": options["seed"] + number})

    on_progress(JobProgress("interpolate", 0, 2 + samples, "encode"))
    return interpolate(study.volume, study.scanned, study.keys, codec, generate, settings, progress=say)


def learnt_spacing(model: Any) -> float | None:
    """The thin spacing that a run was trained on, where its card says so."""
    card = getattr(model, "card", None)
    value = card.extra.get("thin_spacing_mm") if card is not None else None
    return None if value is None else float(value)


MIN_SLICES = 3
Latent = NDArray[np.float32]
Generate = Callable[[Latent], Iterable[Latent]]
"""Condition (4, d, h, w), raw, on the thin latent grid, to one or more samples of the same shape."""


class Codec(Protocol):
    """The VAE as interpolation needs it; volumes are (D, H, W) in [-1, 1]."""

    sha256: str

    def encode(self, unit: Any, *, pad_multiple_zyx: tuple[int, int, int]) -> Any: ...

    def decode(self, latent: Any, valid_zyx: tuple[int, int, int]) -> Any: ...


class Scanned(Protocol):
    """A series that ``series.scan`` found, as far as it matters here."""

    @property
    def pointer_members(self) -> Sequence[tuple[str, int, int]]: ...
    @property
    def geometry(self) -> Geometry | None: ...
    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def role_hint(self) -> str: ...
    @property
    def series_uid(self) -> str: ...
    @property
    def discriminator(self) -> str: ...
    @property
    def study_uid(self) -> str: ...
    @property
    def patient_id(self) -> str: ...
    @property
    def frame_uid(self) -> str: ...


@dataclass(frozen=True)
class InterpolateSettings:
    """How a thick series becomes a thin one.

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


def choose_thick(found: Sequence[Scanned], *, spacing_mm: float) -> Scanned:
    """The series to interpolate: of those with a sound geometry the one with most slices that is coarser than wanted.

    Raises:
        InputError: None is usable; says why each is not, without naming anyone.
    """
    reasons: list[str] = []
    usable: list[tuple[int, Scanned]] = []
    for number, one in enumerate(found, start=1):
        if one.status != "ok" or one.geometry is None or one.role_hint == "other":
            reasons.append(f"series {number}: {one.reason or 'no geometry'}")
        elif len(one.geometry.z_mm) < MIN_SLICES:
            reasons.append(f"series {number}: {len(one.geometry.z_mm)} slices, at least {MIN_SLICES} are needed")
        elif one.geometry.spacing_mm_zyx[0] <= spacing_mm * 1.01:
            reasons.append(f"series {number}: spacing {one.geometry.spacing_mm_zyx[0]:.2f} mm is as fine already")
        else:
            usable.append((len(one.geometry.z_mm), one))
    if not usable:
        raise InputError(
            "no series to interpolate" + (": " + "; ".join(reasons[:8]) if reasons else " in this input"),
            expected=f"an axial CT series with positions and slices coarser than {spacing_mm:g} mm",
            remedy="Check the input, or ask for a finer --spacing-mm.",
        )
    return max(usable, key=lambda pair: pair[0])[1]


def interpolate(
    thick: Volume,
    scanned: Scanned,
    keys: Keys,
    vae: Codec,
    generate: Generate,
    settings: InterpolateSettings,
    progress: Callable[[str], None] | None = None,
) -> DerivedSeries:
    """Generate, decode, compose and write the thin series that fills the thick one's extent.

    Args:
        thick: The chosen series in HU.
        keys: Derives the pseudonyms; the output folder is named by the series key.
        generate: The model, on latents.
        progress: Told the step that begins: ``encode``, ``generate``, ``decode and write``.

    Raises:
        InputError: The output folder exists, or the original identity is wanted and incomplete.
    """
    say = progress or (lambda step: None)
    series_key = keys.series(scanned.series_uid, scanned.discriminator)
    refuse_existing(settings.write.out_dir / series_key)
    identity = _identity(thick, scanned, keys, series_key, settings.restore_identity)
    window = settings.write.window
    trained = thick.geometry.thin_grid(settings.trained_spacing_mm)
    target = thick.geometry.thin_grid(settings.spacing_mm)
    say("encode")
    condition = condition_latent(thick, trained, window, vae, settings.alignment, settings.pad_multiple_zyx)
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
    volume = average_samples(
        (decoded(x) for x in latents), window, measured, target, settings.compose, condition_hu,
        alarm=settings.write.alarm_map,
    )  # fmt: skip
    provenance = Provenance(
        kind="generated",
        source_key=series_key,
        window=(window.center, window.width),
        spacing_mm=round(target.spacing_mm_zyx[0], 6),
        encode_key=settings.encode_key,
        vae_sha256=vae.sha256,
        notes=notes,
    )
    written = write_derived(series_key, volume, target, thick.header, identity, provenance, settings.write)
    note_certificates(log, written, "interpolate")
    return written


def condition_latent(
    thick: Volume,
    target: Geometry,
    window: Window,
    vae: Codec,
    alignment: Literal["pixel", "latent"],
    pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX,
) -> Latent:
    """The model's condition on the thin latent grid, (4, d, h, w) float32, made as encode and training make it.

    ``pixel``: thick HU linearly interpolated onto the target's slices, encoded. ``latent``: the thick latent linearly
    interpolated along z; latent slice j is centred between volume slices 4j+1 and 4j+2 on either grid.
    """
    z_thick, z_thin = np.asarray(thick.geometry.z_mm), np.asarray(target.z_mm)
    hu = resample_z(thick.hu, z_thick, z_thin) if alignment == "pixel" else thick.hu
    latent = np.asarray(vae.encode(window.to_unit(hu), pad_multiple_zyx=pad_multiple_zyx), dtype=np.float32)
    if alignment == "pixel":
        return latent
    count = -(-len(z_thin) // COMPRESSION)
    weights = z_weights(_latent_z(thick.geometry, latent.shape[1]), _latent_z(target, count), "linear")
    return np.ascontiguousarray(np.einsum("nd,cdhw->cnhw", weights.astype(np.float32), latent))


def _latent_z(geometry: Geometry, count: int) -> NDArray[np.float64]:
    dz = geometry.spacing_mm_zyx[0]
    return np.asarray(
        geometry.z_mm[0] + dz * ((COMPRESSION - 1) / 2 + COMPRESSION * np.arange(count)), dtype=np.float64
    )


def onto_spacing(hu: NDArray[np.float32], have: Geometry, want: Geometry) -> NDArray[np.float32]:
    """(z, y, x) HU on another spacing: averaged over the wanted slice's extent when coarser, cubic when finer."""
    z_have, z_want = np.asarray(have.z_mm), np.asarray(want.z_mm)
    spacing = want.spacing_mm_zyx[0]
    if spacing > have.spacing_mm_zyx[0]:
        return slice_operator(SliceProfile("box", spacing), z_want, z_have).apply(hu)
    return resample_z(hu, z_have, z_want, "cubic")


def pointer_of(scanned: Scanned, series_key: str) -> SeriesPointer:
    """Where the series' slices are, for ``read_series``."""
    return SeriesPointer(series_key, tuple(scanned.pointer_members))


def _identity(thick: Volume, scanned: Scanned, keys: Keys, series_key: str, restore: bool) -> SeriesIdentity:
    if restore:
        return SeriesIdentity.original(thick.header)
    anonymous = is_placeholder_id(scanned.patient_id)
    return SeriesIdentity.pseudonymous(
        patient_key=keys.patient_of_study(scanned.study_uid) if anonymous else keys.patient(scanned.patient_id),
        study_key=keys.study(scanned.study_uid),
        frame_key=keys.frame(scanned.frame_uid) or series_key,
        source_key=series_key,
        source_slices=len(thick.hu),
    )
