"""The rows that ctpipe keeps: a series found, a thick/thin pair, a committed latent, and what an encode key hashes.

A row's fields are a table's columns: ``Annotated[type, meaning]``, with an Arrow type of the items where it is unusual.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from latentcache.errors import InputError


def valid_latents(valid_zyx: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latents (d, h, w) that hold at least one true voxel: the padding beyond is left out of statistics."""
    z, y, x = (-(-n // COMPRESSION) for n in valid_zyx)
    return (z, y, x)


SeriesRole = Literal["thick", "thin", "other"]
LatentRole = Literal["thin", "thick", "thick_on_thin", "refined_on_thin"]
LATENT_ROLES: tuple[LatentRole, ...] = ("thin", "thick", "thick_on_thin", "refined_on_thin")
PAIR_ROLES: tuple[LatentRole, ...] = ("thick_on_thin", "refined_on_thin")
"""Roles whose latents belong to a pair, on the thin series' grid, and are keyed by it."""
Split = Literal["train", "val", "test", ""]


FORMAT_VERSION = 2
LATENT_CHANNELS = 4
MIRRORS = {"flip-x": "x", "flip-y": "y"}
"""Augmentations by the axis along which the volume is mirrored: columns and rows."""
COMPRESSION = 4
"""Voxels per latent along each axis; latent slice j covers slices 4j..4j+3 and is centred at 4j+1.5."""


@dataclass(frozen=True)
class SeriesRecord:
    """A catalog row. Holds no patient data: keys, geometry and acquisition facts from an allow-list only.

    ``affine_lps`` maps homogeneous voxel indices in (z, y, x) order to LPS millimetres (x, y, z), row by row
    (16 numbers). ``z_mm`` are the projections of each slice's ImagePositionPatient on the slice normal, ascending.
    """

    series_key: Annotated[str, "first 16 hex of the HMAC of SeriesInstanceUID and discriminator"]
    study_key: Annotated[str, "HMAC of StudyInstanceUID"]
    patient_key: Annotated[str, "HMAC of PatientID and issuer"]
    category: Annotated[str, "label from the allow-list"]
    role: Annotated[SeriesRole, "thick, thin or other"]
    status: Annotated[Literal["ok", "quarantined"], "ok or quarantined"]
    reason: Annotated[str, "why quarantined; no patient data"]
    n_slices: Annotated[int, "slices"]
    shape_zyx: Annotated[tuple[int, int, int], "voxels"]
    spacing_mm_zyx: Annotated[tuple[float, float, float], "from positions, mm"]
    thickness_mm: Annotated[float, "SliceThickness as stated, mm"]
    affine_lps: Annotated[tuple[float, ...], "4x4, row by row: indices (z, y, x, 1) to LPS mm"]
    z_mm: Annotated[tuple[float, ...], "slice positions along the normal, mm, ascending"]
    frame_key: Annotated[str, "HMAC of FrameOfReferenceUID"]
    acquisition_key: Annotated[str, "one acquisition of a study"]
    kernel: Annotated[str, "reconstruction kernel"]
    modality: Annotated[str, "Modality"]
    transfer_syntax: Annotated[str, "transfer syntax of the source"]
    flags: Annotated[tuple[str, ...], "what is unusual but usable"] = ()
    split: Annotated[Split, "train, val, test or empty"] = ""
    source_digest: Annotated[str, "over every member's CRC-32 and size"] = ""
    """Hash over the CRC-32 and size of every member, so that a changed archive is noticed without reading pixels."""


ACROSS_FIELDS = '"across_fields": true'
"""Marker in the evidence (canonical JSON) of a pair whose in-plane grids differ, so that a column can be searched."""


SIMULATED = '"simulated": true'
"""Marker likewise of a pair whose thick series was computed from its thin one."""


@dataclass(frozen=True)
class PairRecord:
    """A thick and a thin series of one acquisition. ``overlap_mm`` is the common extent along the slice normal."""

    pair_key: Annotated[str, "HMAC of the two series"]
    study_key: Annotated[str, "HMAC of StudyInstanceUID"]
    patient_key: Annotated[str, "HMAC of PatientID and issuer"]
    category: Annotated[str, "label from the allow-list"]
    thick_key: Annotated[str, "series key of the thick series"]
    thin_key: Annotated[str, "series key of the thin series"]
    overlap_mm: Annotated[tuple[float, float], "common extent along the normal, mm: low, high"]
    split: Annotated[Split, "train, val, test or empty"]
    evidence: Annotated[str, "JSON: scores, other candidates, pixel proof"]
    """JSON object: scores of every criterion, other candidates, and the pixel proof once encoded."""
    status: Annotated[Literal["ok", "quarantined"], "ok, or quarantined by the pixel proof"] = "ok"
    """``quarantined`` once the pixels contradict the headers (the thin series does not average to the thick one)."""
    reason: Annotated[str, "why quarantined; no patient data"] = ""

    @property
    def across_fields(self) -> bool:
        """Whether the in-plane grids differ: only the thick HU resampled in plane, ``thick_on_thin``, fit the thin."""
        return ACROSS_FIELDS in self.evidence

    @property
    def simulated(self) -> bool:
        """Whether the thick series was never scanned: good to train on, never to be counted with real pairs."""
        return SIMULATED in self.evidence


@dataclass(frozen=True)
class LatentRecord:
    """A manifest row: one committed latent of shape (4, d, h, w), float16, raw posterior mean.

    ``key`` is the series key for roles ``thin`` and ``thick`` and the pair key for ``thick_on_thin`` and
    ``refined_on_thin``. The source digest of the latter also names its refiner (``refined_digest``).
    ``valid_zyx`` is the shape of the volume before padding; ``z0_mm`` the position of latent slice 0's centre and
    ``dz_mm`` the distance between latent slices. ``mean`` and ``std`` are per channel over the valid latents.
    """

    key: Annotated[str, "series key, or pair key for thick_on_thin"]
    encode_key: Annotated[str, "hash of the encoding"]
    role: Annotated[LatentRole, "thin, thick or thick_on_thin"]
    shape: Annotated[tuple[int, int, int, int], "channels, then latent slices, rows, columns"]
    dtype: Annotated[str, "float16"]
    path: Annotated[str, "of the Zarr array, relative to the store"]
    z0_mm: Annotated[float, "centre of latent slice 0 along the normal, mm"]
    dz_mm: Annotated[float, "distance between latent slices, mm"]
    valid_zyx: Annotated[tuple[int, int, int], "voxels of the volume before padding"]
    crc32c: Annotated[tuple[int, ...], "of every depth chunk, channels in turn", "uint32"]
    """One checksum for every inner chunk along depth, so that a window is checked without reading the whole."""
    sha256: Annotated[str, "of the shard object"]
    mean: Annotated[tuple[float, ...], "per channel over the valid latents"]
    std: Annotated[tuple[float, ...], "per channel over the valid latents, population"]
    round_trip_psnr: Annotated[float | None, "dB, where it was measured"]
    source_digest: Annotated[str, "of the series it was made from"]
    compute_dtype: Annotated[str, "float32 or bfloat16: what it was computed in"] = "float32"
    device_kind: Annotated[str, "cpu or cuda: what it was computed on"] = "cpu"
    """Arithmetic and device: two of these differ by 6e-3, where the pixels and the weights are the same."""


@dataclass(frozen=True)
class LatentMeta:
    """Description of a latent that is to be staged: its key, its place in the body and its source.

    Attributes:
        z0_mm: Position of latent slice 0's centre; ``dz_mm`` is the distance between latent slices.
        valid_zyx: Shape of the volume before padding, in voxels.
        source_digest: Digest of the archive members, or the generation key of a sampled latent.
        round_trip_psnr: PSNR of decode(encode(x)) in dB, where it was measured.
    """

    encode_key: str
    key: str
    role: LatentRole
    z0_mm: float
    dz_mm: float
    valid_zyx: tuple[int, int, int]
    source_digest: str
    round_trip_psnr: float | None = None


class SlicePositions(Protocol):
    """Slices of a volume: how many voxels, at which positions along the normal, in millimetres."""

    @property
    def shape_zyx(self) -> tuple[int, int, int]: ...

    @property
    def z_mm(self) -> tuple[float, ...]: ...

    @property
    def spacing_mm_zyx(self) -> tuple[float, float, float]: ...


class GridRow(Protocol):
    """The part of a manifest row that says where its latent is."""

    @property
    def z0_mm(self) -> float: ...

    @property
    def dz_mm(self) -> float: ...

    @property
    def valid_zyx(self) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class LatentGrid:
    """The grid of a latent along the slice normal: latent slice j covers slices 4j..4j+3, centred at 4j+1.5.

    Attributes:
        z0_mm: Position of latent slice 0's centre; ``dz_mm`` is the distance between latent slices.
        valid_zyx: Shape of the volume before padding, in voxels.
    """

    z0_mm: float
    dz_mm: float
    valid_zyx: tuple[int, int, int]

    @classmethod
    def of(cls, geometry: SlicePositions) -> LatentGrid:
        """Return the grid of a volume's latent, from the volume's own positions."""
        dz = geometry.spacing_mm_zyx[0]
        return cls(geometry.z_mm[0] + (COMPRESSION - 1) / 2 * dz, COMPRESSION * dz, geometry.shape_zyx)

    @classmethod
    def of_row(cls, row: GridRow) -> LatentGrid:
        """Return the grid that a manifest row states."""
        return cls(row.z0_mm, row.dz_mm, row.valid_zyx)

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        """Latents along depth, rows and columns that hold at least one voxel of the volume."""
        return valid_latents(self.valid_zyx)

    def positions(self, count: int | None = None) -> NDArray[np.float64]:
        """Return positions in mm of the latent slices, (count,) float64; of those that hold voxels by default."""
        return np.asarray(
            self.z0_mm + self.dz_mm * np.arange(self.shape_zyx[0] if count is None else count), np.float64
        )

    def offset_mm(self, row: GridRow) -> float:
        """Return how far apart the slices of this grid and of a row's are at most, in mm."""
        spacing = abs(row.dz_mm / COMPRESSION - self.dz_mm / COMPRESSION)
        return max(abs(row.z0_mm - self.z0_mm), spacing * self.valid_zyx[0])

    def matches(self, row: GridRow) -> bool:
        """Return whether a row's latent covers this grid's voxels, to a tenth of a slice.

        A latent slice is four slices deep: a tenth of a slice is far below what anyone can see, and far above rounding.
        """
        return row.valid_zyx == self.valid_zyx and self.offset_mm(row) <= 0.1 * self.dz_mm / COMPRESSION


class LatentPlace(Protocol):
    """The part of a manifest row that reading needs."""

    @property
    def key(self) -> str: ...

    @property
    def role(self) -> LatentRole: ...

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    @property
    def path(self) -> str: ...

    @property
    def crc32c(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Encoding:
    """Everything that changes a latent's bytes; its hash is the encode key and is kept in the store in clear."""

    vae_sha256: str
    vae_architecture: dict[str, Any]
    window_center: float
    window_width: float
    normalisation: str = "unit-symmetric"
    preprocessing_version: int = 1
    numerics_version: int = 1
    pad_multiple_zyx: tuple[int, int, int] = (4, 32, 32)
    posterior: Literal["mean", "mean+logvar"] = "mean"
    dtype: str = "float16"
    extra: dict[str, Any] = field(default_factory=dict)
    compute_dtype: str = "float32"
    device_kind: str = "cpu"

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space.

        Float32 on a CPU goes without saying, so that keys from before the arithmetic stood in them keep their meaning.
        """
        values = asdict(self)
        if (self.compute_dtype, self.device_kind) == ("float32", "cpu"):
            del values["compute_dtype"], values["device_kind"]
        return json.dumps(values, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Encoding:
        raw = json.loads(text)
        raw["pad_multiple_zyx"] = tuple(raw["pad_multiple_zyx"])
        return cls(**raw)

    @property
    def mirrored(self) -> str:
        """The axis along which volumes were mirrored before they were encoded, ``x`` or ``y``; empty for none."""
        return str(self.extra.get("mirrored", ""))

    def of_mirrored(self, axis: str) -> Encoding:
        """The same of volumes mirrored along ``x`` (columns) or ``y`` (rows), under another key."""
        return replace(self, extra={**self.extra, "mirrored": axis})

    @property
    def encode_key(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def mirror_axes(names: str) -> dict[str, str]:
    """Axes by the name of the augmentation, of a comma-separated list of ``flip-x`` and ``flip-y``.

    Raises:
        InputError: Another name.
    """
    found = list(filter(None, (name.strip() for name in names.split(","))))
    if unknown := [name for name in found if name not in MIRRORS]:
        raise InputError(
            f"augmentation {', '.join(unknown)}", expected=" and ".join(MIRRORS), remedy="For example flip-x."
        )
    return {name: MIRRORS[name] for name in found}
