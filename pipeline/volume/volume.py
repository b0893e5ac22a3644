"""The vocabulary between reading and everything after it: a volume in HU and what is known of its source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.volume.geometry import Geometry


@dataclass(frozen=True)
class SeriesPointer:
    """Pointer to a series' slices, in ascending order along the slice normal. Private: names files.

    ``members`` holds one (source, member, frame) a slice: the archive's URL or path, the member's index in the central
    directory (names can be duplicated) and the frame number (0 but for enhanced multi-frame). ``even``: a series of
    uneven spacing is to be read at even positions (`even_spacing`).

    Numbers alone would name whatever is there now: ``series_uid`` is the SeriesInstanceUID and ``seal`` a hash over
    the SOPInstanceUID, size and CRC-32 (in a folder: modification time) of every slice, both as ingest found them.
    Either is empty where it is not known, and then says nothing.

    ``simulated`` is empty but for a thick series that was never scanned: the slices are then those of a thin one, and
    this says as JSON how the thick ones follow from it (`SimulatedThick`).
    """

    series_key: str
    members: tuple[tuple[str, int, int], ...]
    even: bool = False
    series_uid: str = ""
    seal: str = ""
    simulated: str = ""


@dataclass(frozen=True)
class SourceHeader:
    """Facts that a derived series carries on: acquisition facts from an allow-list, and, apart, the identity.

    Attributes:
        public: DICOM keyword to value; identifies nobody (KVP, ConvolutionKernel, Manufacturer, PatientPosition, ...).
        identity: DICOM keyword to value, for ``--restore-identity`` and UID derivation only; never leaves private/.
        sop_instance_uids: Original SOPInstanceUID of every slice, in slice order; private.
    """

    public: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    sop_instance_uids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Volume:
    """A series as HU.

    Attributes:
        hu: (z, y, x) int16 where every rescale is a whole number, else float32.
        geometry: The grid; slice i of ``hu`` is at ``geometry.z_mm[i]``.
        flags: Facts recorded by the reader, e.g. ``gantry-tilt``, ``padding``.
        source_digest: Over the CRC-32 (in a folder: modification time) and size of every slice, made while they were
            read; of the form that the catalog holds. Empty for a volume that was not read from an archive.
    """

    hu: NDArray[Any]
    geometry: Geometry
    header: SourceHeader = field(default_factory=SourceHeader)
    flags: tuple[str, ...] = ()
    source_digest: str = ""

    def __post_init__(self) -> None:
        if self.hu.shape != self.geometry.shape_zyx or len(self.geometry.z_mm) != self.hu.shape[0]:
            raise AssertionError(f"volume {self.hu.shape} does not fit its geometry {self.geometry.shape_zyx}")
        assert self.hu.dtype in (np.int16, np.float32)
