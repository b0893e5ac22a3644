"""The words that the service and whoever interpolates for it share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class InterpolateRequest:
    """One thick series to interpolate.

    Attributes:
        source: Folder with the DICOM files of exactly one series.
        out: Folder to write into; it does not exist yet. Every series becomes a folder below it, whole or absent.
        private: Folder whose ``private`` part holds the secret that pseudonyms are made with.
        model: The model's name or folder, as the rule gives it; empty for the service's default.
        spacing_mm: Slice spacing wanted.
        restore_identity: Whether the result carries the patient's own identity and StudyInstanceUID.
        transfer_syntax: ``explicit``, ``jpegls`` or ``htj2k``.
    """

    source: Path
    out: Path
    private: Path
    model: str = ""
    spacing_mm: float = 1.0
    restore_identity: bool = False
    transfer_syntax: str = "explicit"


@dataclass(frozen=True)
class InterpolateResult:
    """Names of the folders written below ``request.out``, and figures; nothing that names a patient."""

    folders: tuple[str, ...]
    series_uid: str
    n_slices: int
    figures: Mapping[str, Any] = field(default_factory=dict)


Interpolate = Callable[[InterpolateRequest], InterpolateResult]
"""Write the thin series of a request, or raise InputError where the series itself is at fault."""
