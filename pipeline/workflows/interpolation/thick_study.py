"""The thick study that is interpolated: which series it is, its volume in HU, and what its keys derive from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentcache import InputError
from pipeline.archive import is_nifti, open_archive
from pipeline.identity import Keys, is_placeholder_id
from pipeline.reading import ScannedSeries, read_nifti, read_series, scan
from pipeline.volume import Geometry, NiftiLayout, SeriesPointer, Volume
from pipeline.writing import SeriesIdentity

MIN_SLICES = 3


@dataclass(frozen=True)
class NiftiScanned:
    """A NIfTI file's volume as a scanned series: it names nobody, so that its keys derive from its bytes."""

    geometry: Geometry
    digest: str
    layout: NiftiLayout
    pointer_members: tuple[tuple[str, int, int], ...] = ()
    status: str = "ok"
    reason: str = ""
    role_hint: str = "thick"
    discriminator: str = ""
    patient_id: str = ""

    @property
    def series_uid(self) -> str:
        return f"nifti {self.digest}"

    study_uid = frame_uid = series_uid


Scanned = ScannedSeries | NiftiScanned
"""The series that is interpolated, as its headers or its NIfTI file describe it."""


@dataclass(frozen=True)
class ThickStudy:
    """The thick series that was chosen, its volume in HU, and what makes its pseudonyms."""

    scanned: Scanned
    volume: Volume
    keys: Keys

    @property
    def layout(self) -> NiftiLayout | None:
        """Return the layout of its NIfTI file; None where it came as DICOM."""
        return self.scanned.layout if isinstance(self.scanned, NiftiScanned) else None

    @property
    def series_key(self) -> str:
        return self.keys.series(self.scanned.series_uid, self.scanned.discriminator)

    def identity(self, restore: bool) -> SeriesIdentity:
        """Whose the derived series is. Raises InputError where the original identity is wanted and incomplete."""
        return identity_of(self.volume, self.scanned, self.keys, restore)


def read_thick(source: str, spacing_mm: float) -> tuple[Scanned, Volume]:
    """The thick series of an archive, folder, DICOMDIR or NIfTI file: what was found, and its volume in HU.

    Raises:
        InputError: Nothing usable; says of each series why.
    """
    if is_nifti(source):
        found = read_nifti(source)
        one = NiftiScanned(found.volume.geometry, found.digest, found.layout)
        return choose_thick([one], spacing_mm=spacing_mm), found.volume
    opened = open_archive(_folder_of_directory(source))
    try:
        chosen = choose_thick(scan(opened).series, spacing_mm=spacing_mm)
    finally:
        opened.close()
    return chosen, read_series(pointer_of(chosen, "interpolated"), threads=2)


def _folder_of_directory(source: str) -> str:
    """The folder that a DICOMDIR file describes (PS3.10 8.6); anything else as it is."""
    path = Path(source)
    return str(path.parent) if path.name.upper() == "DICOMDIR" and path.is_file() else source


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


def pointer_of(scanned: Scanned, series_key: str) -> SeriesPointer:
    """Return the pointer to the series' slices, for ``read_series``."""
    return SeriesPointer(series_key, tuple(scanned.pointer_members))


def identity_of(thick: Volume, scanned: Scanned, keys: Keys, restore: bool) -> SeriesIdentity:
    """Pseudonymous by the keys, or the original."""
    series_key = keys.series(scanned.series_uid, scanned.discriminator)
    if restore:
        return SeriesIdentity.original(thick.header)
    anonymous = is_placeholder_id(scanned.patient_id)
    named = keys.patient(scanned.patient_id, str(thick.header.identity.get("IssuerOfPatientID") or ""))
    return SeriesIdentity.pseudonymous(
        patient_key=keys.patient_of_study(scanned.study_uid) if anonymous else named,
        study_key=keys.study(scanned.study_uid),
        frame_key=keys.frame(scanned.frame_uid) or series_key,
        source_key=series_key,
        source_slices=len(thick.hu),
    )
