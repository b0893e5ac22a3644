"""Write a volume in HU as a CT Image Storage series: valid, saying what it is, whole or absent.

The dataset that all slices share is encoded once; a slice adds only the few elements that differ (UID, number and
position) and its pixels. DICOM PS3.3 A.3 (CT Image IOD), PS3.5 7.1 (explicit VR), PS3.10 7.1 (file meta).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from latentcache.storage import atomic_folder, refuse_existing, sync_file
from pipeline.volume import Geometry, SourceHeader
from pipeline.writing.dataset import SharedHeader, element, file_prefix, series_dataset, spell_number
from pipeline.writing.pixel_data import PixelFormat, pixel_element, transfer_syntax_uid
from pipeline.writing.provenance import Provenance
from pipeline.writing.series_identity import SeriesIdentity, derived_uid

SERIES_NUMBER = 9001
UNCERTAINTY_SERIES_NUMBER = 9002


_SOP_INSTANCE_UID = 0x00080018
_INSTANCE_NUMBER = 0x00200013
_IMAGE_POSITION = 0x00200032
_SLICE_LOCATION = 0x00201041


@dataclass(frozen=True)
class WrittenSeries:
    """A series on disk: its files in slice order and its UIDs."""

    paths: tuple[Path, ...]
    series_uid: str
    study_uid: str
    sop_instance_uids: tuple[str, ...]


def series_digest(hu: NDArray[np.int16], geometry: Geometry, identity: SeriesIdentity, provenance: Provenance) -> str:
    """SHA-256 over pixels, grid, study and settings: the same work always gives the same UIDs, other work others."""
    digest = hashlib.sha256(np.ascontiguousarray(hu).data.cast("B"))
    for text in (repr(geometry), identity.study_uid, identity.frame_uid, provenance.to_json()):
        digest.update(text.encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class FileOptions:
    """Options of storing slices.

    Attributes:
        transfer_syntax: ``explicit`` (native little endian), ``jpegls`` or ``htj2k``, all lossless.
        slope: RescaleSlope, below 1 for quantities finer than 1 HU.
        threads: Slices that are written at once.
    """

    transfer_syntax: str = "explicit"
    slope: float = 1.0
    threads: int = 2


def write_ct_series(
    hu: NDArray[np.int16],
    geometry: Geometry,
    header: SourceHeader,
    out_dir: Path,
    *,
    uids: SeriesIdentity,
    provenance: Provenance,
    files: FileOptions = FileOptions(),
    progress: Callable[[int], None] | None = None,
) -> WrittenSeries:
    """Write one CT Image Storage instance per slice into a new folder, which appears whole or not at all.

    Args:
        hu: (z, y, x) int16, in the order of ``geometry.z_mm``; values are HU / ``files.slope``.
        geometry: Grid of ``hu``; SliceThickness is ``geometry.thickness_mm``, spacing comes from the positions.
        header: Acquisition facts of the source series that stay true.
        out_dir: Folder to make; it must not exist.
        uids: Whose series this is and which slices it came from.
        provenance: How it was made.
        files: Transfer syntax, rescale slope and threads.
        progress: Called with the number of slices written since the last call.

    Raises:
        InputError: ``out_dir`` exists, or the transfer syntax is unknown.
    """
    if hu.dtype != np.int16 or hu.shape != geometry.shape_zyx:
        raise AssertionError(f"{hu.dtype} {hu.shape} does not fit {geometry.shape_zyx}")
    syntax = transfer_syntax_uid(files.transfer_syntax)
    refuse_existing(out_dir)
    pixels = PixelFormat.of(hu, files.transfer_syntax, files.slope)
    digest = series_digest(hu, geometry, uids, provenance)
    series_uid = derived_uid("series", digest)
    sop_uids = tuple(derived_uid("derived-instance", digest, str(i)) for i in range(len(hu)))
    shared = series_dataset(
        geometry,
        header,
        uids,
        provenance,
        pixels,
        series_uid=series_uid,
        series_number=UNCERTAINTY_SERIES_NUMBER if provenance.kind == "uncertainty" else SERIES_NUMBER,
    )
    woven = SharedHeader(shared, (_SOP_INSTANCE_UID, _INSTANCE_NUMBER, _IMAGE_POSITION, _SLICE_LOCATION))
    names = [f"{i + 1:05d}.dcm" for i in range(len(hu))]

    with atomic_folder(out_dir) as partial:

        def write_slice(i: int) -> None:
            position = "\\".join(spell_number(v) for v in geometry.slice_position(i))
            head = woven.weave(
                {
                    _SOP_INSTANCE_UID: element(0x0008, 0x0018, "UI", sop_uids[i]),
                    _INSTANCE_NUMBER: element(0x0020, 0x0013, "IS", str(i + 1)),
                    _IMAGE_POSITION: element(0x0020, 0x0032, "DS", position),
                    _SLICE_LOCATION: element(0x0020, 0x1041, "DS", spell_number(geometry.z_mm[i])),
                }
            )
            tag, value = pixel_element(pixels.stored(hu[i]), files.transfer_syntax)
            _write_file(partial / names[i], (file_prefix(syntax, sop_uids[i]), head, tag, value))
            if progress:
                progress(1)

        with ThreadPoolExecutor(max(1, files.threads)) as pool:
            for _ in pool.map(write_slice, range(len(hu))):
                pass
            # Synced after all are written: one flush of the file system then covers many files.
            for _ in pool.map(sync_file, (partial / name for name in names)):
                pass
    return WrittenSeries(tuple(out_dir / name for name in names), series_uid, uids.study_uid, sop_uids)


def _write_file(path: Path, parts: tuple[bytes | memoryview, ...]) -> None:
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), parts)


def _write_all(fd: int, parts: tuple[bytes | memoryview, ...]) -> None:
    for part in parts:
        rest = memoryview(part)
        while rest:
            rest = rest[os.write(fd, rest) :]


def is_written_series(folder: Path) -> bool:
    """Whether a folder is a series that decode wrote: slices numbered from 1 on, of a derived SeriesInstanceUID.

    A link is none, wherever it leads. Writing is atomic, so a folder that begins like a series is a whole one.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = sorted(entry.name for entry in folder.iterdir())
    if not names or names != [f"{number:05d}.dcm" for number in range(1, len(names) + 1)]:
        return False
    try:
        first = dcmread(folder / names[0], stop_before_pixels=True, specific_tags=["SeriesInstanceUID"])
    except (OSError, InvalidDicomError):
        return False
    return str(first.get("SeriesInstanceUID", "")).startswith("2.25.")
