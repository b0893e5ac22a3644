"""Scan a source: read every member's first kilobytes, sort the instances into series, and say what each series is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from latentcache import InputError, SeriesRole
from latentcache.storage import local_path
from pipeline.archive import Source, StorageError, is_nifti
from pipeline.reading.assembly import assemble
from pipeline.reading.codecs import LOSSY_SYNTAXES
from pipeline.reading.header import Header
from pipeline.reading.instance import Instance
from pipeline.reading.nifti import read_nifti
from pipeline.reading.public_attributes import known_kernel
from pipeline.reading.read_headers import read_instances, source_header
from pipeline.reading.stacks import THIN_BELOW_MM, Stack
from pipeline.volume import RESAMPLED_FLAG, UNEVEN_FLAG, Geometry, SeriesPointer, SourceHeader, even_geometry


def as_requested(one: ScannedSeries) -> ScannedSeries:
    """A scanned series that was excluded for its spacing, as what it is once sampled evenly; others as they are."""
    geometry = one.geometry
    if one.status != "ok" or geometry is None or UNEVEN_FLAG not in one.flags:
        return one
    even = even_geometry(geometry)
    thick = max(even.spacing_mm_zyx[0], even.thickness_mm) >= THIN_BELOW_MM
    return replace(
        one, geometry=even, role_hint="thick" if thick else "thin", reason="", flags=(*one.flags, RESAMPLED_FLAG)
    )


NIFTI_FLAG = "nifti"
"""Of a series from a NIfTI file, which states neither what was measured nor how thick slices are, nor of whom."""
AIR_HU = -200
"""CT shows air around or in the patient; values that never fall below this are no HU, or are cut from within."""
_MODALITIES = frozenset({"CT", "MR", "PT", "NM", "US", "CR", "DX", "XA", "MG", "SR", "PR", "KO", "SEG"})


@dataclass(frozen=True)
class ScannedSeries:
    """One series, or one of several volumes under one SeriesInstanceUID, as its headers describe it.

    ``status`` is ``quarantined`` for faults only; what is no axial CT volume by nature (localizers, captures, reports)
    is ``ok`` with the role ``other`` and a ``reason``. ``geometry`` is None where positions are unusable. UIDs, ids,
    ``kernel_text`` and ``folder_hint`` are private; ``kernel`` is empty unless it is a vendor's known spelling.
    """

    pointer_members: tuple[tuple[str, int, int], ...]
    geometry: Geometry | None
    header: SourceHeader
    status: Literal["ok", "quarantined"]
    reason: str
    flags: tuple[str, ...]
    role_hint: SeriesRole
    series_uid: str
    discriminator: str
    study_uid: str
    patient_id: str
    frame_uid: str
    acquisition: str
    kernel: str
    kernel_text: str
    modality: str
    folder_hint: str
    transfer_syntax: str
    source_digest: str
    seal: str = field(default="", repr=False)
    """See `SeriesPointer.seal`."""
    instances: tuple[Instance, ...] = field(default=(), repr=False, compare=False)
    """Parsed headers, kept only on request, so that pixels can be read without parsing them again."""
    simulated: str = ""
    """See `SeriesPointer.simulated`."""

    @property
    def pointer(self) -> SeriesPointer:
        """Return the pointer to the slices, as `read_series` takes it."""
        return pointer_of(self)


@dataclass(frozen=True)
class ScanResult:
    """Everything that a source holds.

    Attributes:
        series: Volumes and what is excluded.
        problems: Members that look like DICOM, or should be read, and cannot be: (member index, reason).
        ignored: Members that are no DICOM image, such as viewers or a DICOMDIR: (member index, what it is).
    """

    series: list[ScannedSeries]
    problems: list[tuple[int, str]]
    ignored: list[tuple[int, str]]


def scan(source: Source, *, keep_instances: bool = False) -> ScanResult:
    """Read headers only and assemble series. Never raises for bad content: that ends in ``problems`` or a status.

    Args:
        source: An open archive or folder.
        keep_instances: Keep parsed headers on each series, for `volume_reader.read_scanned`.

    Raises:
        StorageError: The place of the source fails to answer.
    """
    if is_nifti(source.url):
        return _scan_nifti(source)
    problems: list[tuple[int, str]] = []
    ignored: list[tuple[int, str]] = []
    instances = read_instances(source, problems, ignored)
    names = {member.index: member.name for member in source.members()}
    by_uid: dict[str, list[Instance]] = {}
    for one in instances:
        if not one.series_uid or not one.study_uid:
            _give_uids(one, source, names)
        by_uid.setdefault(one.series_uid, []).append(one)
    found: list[ScannedSeries] = []
    for group in by_uid.values():
        stacks = assemble(group, lambda a, b: _same_pixels(source, a, b))
        found.extend(_describe(source, stack, names, keep_instances) for stack in stacks)
    return ScanResult(found, problems, ignored)


def _scan_nifti(source: Source) -> ScanResult:
    """The volume of a NIfTI file, whose keys derive from its bytes; what shows no air, such as a mask, is no CT."""
    try:
        found = read_nifti(local_path(source.url))
    except InputError as error:
        return ScanResult([], [(0, error.found)], [])
    geometry, digest = found.volume.geometry, found.digest[:32]
    uid = _surrogate("nifti", found.digest)
    is_ct = found.volume.hu.min() <= AIR_HU
    thick = geometry.spacing_mm_zyx[0] >= THIN_BELOW_MM
    one = ScannedSeries(
        pointer_members=tuple((source.url, 0, slot) for slot in range(geometry.shape_zyx[0])),
        geometry=geometry,
        header=found.volume.header,
        status="ok",
        reason="" if is_ct else "values without air, so a mask or no CT in HU",
        flags=(*found.volume.flags, NIFTI_FLAG),
        role_hint="other" if not is_ct else "thick" if thick else "thin",
        series_uid=uid,
        discriminator="",
        study_uid=uid,
        patient_id="",
        frame_uid=uid,
        acquisition="",
        kernel="",
        kernel_text="",
        modality="CT" if is_ct else "OT",
        folder_hint="",
        transfer_syntax="",
        source_digest=digest,
        seal=digest,
    )
    return ScanResult([one], [], [])


def pointer_of(scanned: ScannedSeries, series_key: str = "") -> SeriesPointer:
    """Return the pointer to a scanned series' slices."""
    return SeriesPointer(
        series_key,
        scanned.pointer_members,
        series_uid=scanned.series_uid,
        seal=scanned.seal,
        simulated=scanned.simulated,
    )


def _give_uids(one: Instance, source: Source, names: dict[int, str]) -> None:
    """Surrogate UIDs where careless anonymisation emptied them, from what still tells studies and series apart.

    The frame of reference does; without one, the archive's own digest keeps two patients from becoming one study.
    """
    header = one.header
    anchor = one.frame_uid or source.digest
    if not one.study_uid:
        one.study_uid = _surrogate(anchor, one.patient_id, header.text(0x00080020), header.text(0x00080030))
    if not one.series_uid:
        folder = names[one.member].rpartition("/")[0]
        number, time = header.text(0x00200011), header.text(0x00080031)
        one.series_uid = _surrogate(one.study_uid, anchor, number, time, folder)
    header.notes = (*header.notes, "surrogate-uid")


def _surrogate(*parts: str) -> str:
    """A UUID-derived UID (PS3.5 B.2) from a hash of the parts."""
    return f"2.25.{int.from_bytes(hashlib.sha256('|'.join(parts).encode()).digest()[:16], 'big')}"


def _same_pixels(source: Source, one: Instance, other: Instance) -> bool:
    """Whether two slices hold the same image in HU; a slice that cannot be read is the same as none."""
    if one.crc32 is not None and (one.crc32, one.size) == (other.crc32, other.size) and one.frame == other.frame:
        return True
    from pipeline.reading.pixels import read_slice

    try:
        a, b = read_slice(source, one), read_slice(source, other)
    except StorageError:
        raise
    except InputError:
        return False
    return a.shape == b.shape and bool((a == b).all())


def digest_and_seal(slices: Sequence[tuple[Source, Instance]]) -> tuple[str, str]:
    """Return the identity of slices, whatever their numbers: the catalog's digest, and `SeriesPointer.seal`.

    Both hash the CRC-32 of the zip's directory, which reading holds the bytes against, or a file's modification time
    where there is none, with size and frame; the seal hashes the SOPInstanceUID too.
    """
    digest, seal = hashlib.sha256(), hashlib.sha256()
    stamps: dict[int, dict[int, int]] = {}
    for source, one in slices:
        mark = one.crc32
        if mark is None:
            if id(source) not in stamps:
                stamps[id(source)] = {member.index: member.stamp for member in source.members()}
            mark = -stamps[id(source)][one.member]
        line = f"{mark}:{one.size}:{one.frame}\n"
        digest.update(line.encode())
        seal.update(f"{one.sop_uid}:{line}".encode())
    return digest.hexdigest()[:32], seal.hexdigest()[:32]


def _describe(source: Source, stack: Stack, names: dict[int, str], keep_instances: bool) -> ScannedSeries:
    first = stack.instances[0]
    header = first.header
    syntaxes = {one.header.syntax for one in stack.instances}
    flags = list(stack.flags)
    if syntaxes & LOSSY_SYNTAXES or header.text(0x00282110) == "01":
        flags.append("lossy-compressed")
    if len(syntaxes) > 1:
        flags.append("mixed-transfer-syntax")
    digest, seal = digest_and_seal([(source, one) for one in stack.instances])
    return ScannedSeries(
        pointer_members=tuple((source.url, one.member, one.frame) for one in stack.instances),
        geometry=stack.geometry,
        header=source_header(stack.instances),
        status="quarantined" if stack.status == "quarantined" else "ok",
        reason=stack.reason,
        flags=tuple(flags),
        role_hint="thick" if stack.role == "thick" else "thin" if stack.role == "thin" else "other",
        series_uid=first.series_uid,
        discriminator=stack.discriminator,
        study_uid=first.study_uid,
        patient_id=first.patient_id,
        frame_uid=first.frame_uid,
        acquisition=first.acquisition,
        kernel=known_kernel(first.kernel),
        kernel_text=first.kernel,
        modality=_modality(header),
        folder_hint=names.get(first.member, "").rpartition("/")[0],
        transfer_syntax=header.syntax,
        source_digest=digest,
        seal=seal,
        instances=tuple(stack.instances) if keep_instances else (),
    )


def _modality(header: Header) -> str:
    modality = header.text(0x00080060).upper()
    return modality if modality in _MODALITIES else "OT"
