"""Interpolate: a thick-only study, as in the clinic, to a thin DICOM series, without a store.

The model comes in as a callable on latents, so that this module knows nothing of how thin latents are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from latentcache.errors import InputError
from latentcache.records import COMPRESSION
from pipeline.atomic_folder import refuse_existing
from pipeline.compose import ComposeSettings
from pipeline.derived import DerivedSeries, WriteSettings, average_samples, write_derived
from pipeline.dicom_provenance import Provenance
from pipeline.dicom_uids import SeriesIdentity
from pipeline.encode import PAD_MULTIPLE_ZYX
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.keys import Keys, is_placeholder_id
from pipeline.resample import resample_z, z_weights
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volume import SeriesPointer, Volume

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
    volume = average_samples((decoded(x) for x in latents), window, thick, target, settings.compose, condition_hu)
    provenance = Provenance(
        kind="generated",
        source_key=series_key,
        window=(window.center, window.width),
        spacing_mm=round(target.spacing_mm_zyx[0], 6),
        encode_key=settings.encode_key,
        vae_sha256=vae.sha256,
        notes=notes,
    )
    return write_derived(series_key, volume, target, thick.header, identity, provenance, settings.write)


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
