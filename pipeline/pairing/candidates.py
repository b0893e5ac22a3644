"""Pairing thick with thin: physical criteria from headers, scored and kept as evidence; pixels prove it at encode.

A pair is two reconstructions of one acquisition on one in-plane grid that differ in slice spacing. On request alone, a
thin series whose field of view is within the thick one's is taken where none has the same grid; such a pair is
marked, and the thick series is resampled in plane wherever the two meet. Folder names say nothing here. Every candidate
is scored, refused ones with the reason, and the whole list stays in the pair's evidence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from latentcache import PairRecord, SeriesRecord
from pipeline.identity import Keys
from pipeline.volume import SIMULATED_FLAG, Geometry, beyond_mm, geometry_of, grid_difference, grid_offset_pixels

UNKNOWN = 0.5
"""Similarity where either series names no kernel: neither proof nor objection."""
SAME_FAMILY = 0.75


_PARTS = re.compile(r"^([A-Z]+)\s*(\d+)?([A-Z]*)")


def kernel_similarity(one: str, other: str) -> float:
    r"""1 for the same kernel, down to 0 for another family; 0.5 where unknown.

    Spelling is compared without case and white space, and so are the parts of a multi-valued kernel (iterative
    strength such as ``I31f\2``). Numbered kernels of one family (Siemens ``B30f`` and ``B45f``, Canon ``FC03`` and
    ``FC51``) lose with the distance of their numbers, which order them from smooth to sharp.
    """
    a, b = _normalised(one), _normalised(other)
    if not a or not b:
        return UNKNOWN
    if a == b:
        return 1.0
    first, second = _PARTS.match(a.split("\\")[0]), _PARTS.match(b.split("\\")[0])
    if not first or not second or first[1] != second[1] or first[2] is None or second[2] is None:
        return 0.0
    return max(0.0, SAME_FAMILY - abs(int(first[2]) - int(second[2])) / 20.0)


def _normalised(kernel: str) -> str:
    return re.sub(r"\s+", "", kernel).upper()


MIN_SPACING_RATIO = 1.5
MIN_OVERLAP_SLICES = 3
"""Thick slices that must lie inside the common extent: fewer prove nothing and train nothing."""
MAX_ANGLE_DEG = 0.5
ON_REQUEST = "which --pair-across-fov would pair"


@dataclass(frozen=True)
class Candidate:
    """One thin series tried for one thick series; ``refused`` is empty when it may be paired. All lengths in mm.

    ``across_fields`` says that the in-plane grids differ, so that the thick series must be resampled in plane.
    """

    thin_key: str
    overlap_mm: tuple[float, float]
    spacing_ratio: float
    overlap_fraction: float
    kernel_similarity: float
    angle_deg: float
    grid_offset_pixels: float
    across_fields: bool = False
    refused: str = ""

    @property
    def score(self) -> float:
        """Kernel first, since another kernel is another image; then coverage; finer spacing breaks ties."""
        fineness = min(self.spacing_ratio, 10.0) / 10.0
        return round(2.0 * self.kernel_similarity + self.overlap_fraction + 0.5 * fineness, 6)

    def as_dict(self) -> dict[str, Any]:
        facts = {
            "thin_key": self.thin_key,
            "overlap_mm": [round(v, 4) for v in self.overlap_mm],
            "spacing_ratio": round(self.spacing_ratio, 4),
            "overlap_fraction": round(self.overlap_fraction, 4),
            "kernel_similarity": round(self.kernel_similarity, 4),
            "angle_deg": round(self.angle_deg, 4),
            "grid_offset_pixels": round(self.grid_offset_pixels, 4),
            "score": self.score,
            "same_grid": not self.across_fields,
        }
        return {**facts, "refused": self.refused} if self.refused else facts


def score_candidate(thick: SeriesRecord, thin: SeriesRecord, across_fields: bool = False) -> Candidate:
    """Compare two series of one study by their headers; other in-plane grids pass only with ``across_fields``."""
    g_thick, g_thin = geometry_of(thick), geometry_of(thin)
    low = max(g_thick.extent_mm[0], g_thin.extent_mm[0])
    high = min(g_thick.extent_mm[1], g_thin.extent_mm[1])
    extent = g_thick.extent_mm[1] - g_thick.extent_mm[0]
    candidate = Candidate(
        thin_key=thin.series_key,
        overlap_mm=(low, high),
        spacing_ratio=g_thick.spacing_mm_zyx[0] / g_thin.spacing_mm_zyx[0],
        overlap_fraction=max(0.0, high - low) / extent,
        kernel_similarity=kernel_similarity(thick.kernel, thin.kernel),
        angle_deg=_angle_deg(g_thick, g_thin),
        grid_offset_pixels=grid_offset_pixels(g_thick, g_thin),
        across_fields=bool(grid_difference(g_thick, g_thin)),
    )
    in_plane = _in_plane_refusal(g_thick, g_thin, across_fields) if candidate.across_fields else ""
    return replace(candidate, refused=_refusal(thick, thin, candidate, in_plane))


def _in_plane_refusal(thick: Geometry, thin: Geometry, across_fields: bool) -> str:
    """Why two differing in-plane grids cannot be paired, or nothing."""
    outside = beyond_mm(thin, thick)
    if outside > 0:
        return f"{grid_difference(thick, thin)}, and a field of view that reaches {outside:.1f} mm beyond the thick one"
    return "" if across_fields else f"{grid_difference(thick, thin)}, {ON_REQUEST}"


def _refusal(thick: SeriesRecord, thin: SeriesRecord, c: Candidate, in_plane: str) -> str:
    """Why two series cannot be a pair, or nothing."""
    overlapping = c.overlap_mm[1] - c.overlap_mm[0]
    checks = [
        (thick.frame_key != thin.frame_key and bool(thick.frame_key and thin.frame_key), "another frame of reference"),
        (
            thick.acquisition_key != thin.acquisition_key and bool(thick.acquisition_key and thin.acquisition_key),
            "another acquisition",
        ),
        (c.angle_deg > MAX_ANGLE_DEG, f"orientation differs by {c.angle_deg:.2f} degrees"),
        (c.spacing_ratio < MIN_SPACING_RATIO, f"spacing ratio {c.spacing_ratio:.2f} is below {MIN_SPACING_RATIO}"),
        (bool(in_plane), in_plane),
        (
            overlapping < MIN_OVERLAP_SLICES * thick.spacing_mm_zyx[0],
            f"they share {max(0.0, overlapping):.1f} mm, less than {MIN_OVERLAP_SLICES} thick slices",
        ),
    ]
    return next((reason for failed, reason in checks if failed), "")


def choose_pairs(
    series: Iterable[SeriesRecord], keys: Keys, across_fields: bool = False
) -> tuple[list[PairRecord], dict[str, str]]:
    """Pairs among the series of one study, and for every usable series left unpaired the reason.

    Each thick series takes its best thin one; a thin series may serve several thick ones. With ``across_fields`` a
    thin series of another field of view serves where none has the thick one's grid.
    """
    usable = sorted((s for s in series if s.status == "ok"), key=lambda s: s.series_key)
    thicks = [s for s in usable if s.role == "thick"]
    thins = [s for s in usable if s.role == "thin"]
    pairs: list[PairRecord] = []
    unpaired: dict[str, str] = {}
    for thick in thicks:
        tried = sorted(
            (score_candidate(thick, thin, across_fields) for thin in thins),
            key=lambda c: (c.across_fields, -c.score, c.thin_key),
        )
        fit = [c for c in tried if not c.refused]
        if fit:
            evidence = {"chosen_by": "score", "candidates": [c.as_dict() for c in tried]}
            pairs.append(_record(thick, fit[0], evidence, keys))
        else:
            unpaired[thick.series_key] = _unpaired_reason("thin", tried)
    served = {pair.thin_key for pair in pairs}
    for thin in thins:
        if thin.series_key not in served and not thicks:
            unpaired[thin.series_key] = "no thick series in the study"
    return pairs, unpaired


def override_pair(thick: SeriesRecord, thin: SeriesRecord, keys: Keys) -> PairRecord:
    """A pair that the user asked for; the verdict of the criteria stays in the evidence.

    Naming two series of different fields of view is a request to pair across them.
    """
    candidate = score_candidate(thick, thin, across_fields=True)
    evidence = {"chosen_by": "user", "candidates": [candidate.as_dict()]}
    return _record(thick, candidate, evidence, keys)


def _record(thick: SeriesRecord, chosen: Candidate, evidence: Mapping[str, Any], keys: Keys) -> PairRecord:
    if chosen.across_fields:
        evidence = {**evidence, "across_fields": True}
    if SIMULATED_FLAG in thick.flags:
        evidence = {**evidence, "simulated": True}
    return PairRecord(
        pair_key=keys.pair(thick.series_key, chosen.thin_key),
        study_key=thick.study_key,
        patient_key=thick.patient_key,
        category=thick.category,
        thick_key=thick.series_key,
        thin_key=chosen.thin_key,
        overlap_mm=chosen.overlap_mm,
        split=thick.split,
        evidence=json.dumps(evidence, sort_keys=True),
    )


def _unpaired_reason(role: str, tried: Sequence[Candidate]) -> str:
    if not tried:
        return f"no {role} series in the study"
    return f"no {role} series fits: " + "; ".join(sorted({c.refused for c in tried}))


def _angle_deg(one: Geometry, other: Geometry) -> float:
    """Largest angle between corresponding row and column directions, degrees."""
    angles = []
    for axis in (1, 2):
        a, b = one.affine[:3, axis], other.affine[:3, axis]
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        angles.append(float(np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))))
    return max(angles)
