from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from latentcache import SeriesRecord
from pipeline.identity import Keys
from pipeline.pairing import override_pair
from pipeline.pairing.candidates import UNKNOWN, choose_pairs, kernel_similarity, score_candidate

KEYS = Keys(b"0123456789abcdef")


def row(key: str, spacing: float, n: int, z0: float = 0.0, tilt: float = 0.0, **changes: Any) -> SeriesRecord:
    """A catalog row of ``n`` axial slices; under a gantry tilt (degrees) the lattice is sheared along y."""
    z = tuple(z0 + spacing * i for i in range(n))
    # The slices lean by the tilt while the table moves along patient z, so the lattice is sheared.
    t = np.radians(tilt)
    column = np.array([0.0, np.cos(t), np.sin(t)]) * 0.5
    table = np.array([0.0, 0.0, spacing / np.cos(t)])
    origin = np.array([-120.0, -120.0, 0.0]) + np.array([0.0, 0.0, 1.0]) * (z0 / np.cos(t))
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2], affine[:3, 3] = table, column, (0.5, 0.0, 0.0), origin
    role = "thick" if spacing >= 2.5 else "thin"
    base = SeriesRecord(
        series_key=key,
        study_key="study",
        patient_key="patient",
        category="APE",
        role=role,  # type: ignore[arg-type]
        status="ok",
        reason="",
        n_slices=n,
        shape_zyx=(n, 512, 512),
        spacing_mm_zyx=(spacing, 0.5, 0.5),
        thickness_mm=spacing,
        affine_lps=tuple(affine.ravel().tolist()),
        z_mm=z,
        frame_key="f",
        acquisition_key="a",
        kernel="B30f",
        modality="CT",
        transfer_syntax="1.2.840.10008.1.2.1",
    )
    return replace(base, **changes)


THICK = row("thick", 5.0, 54, z0=2.0)
THIN = row("thin", 1.0, 306)


def zoomed(series: SeriesRecord, factor: float, shift_mm: float = 0.0) -> SeriesRecord:
    """The series on pixels ``factor`` times as large, about the same centre, moved along x."""
    affine = np.array(series.affine_lps).reshape(4, 4)
    middle = affine @ np.array([0.0, 255.5, 255.5, 1.0])
    affine[:3, 1:3] *= factor
    affine[:3, 3] += (middle - affine @ np.array([0.0, 255.5, 255.5, 1.0]))[:3] + np.array([shift_mm, 0.0, 0.0])
    pixel = 0.5 * factor
    spacing = (series.spacing_mm_zyx[0], pixel, pixel)
    return replace(series, affine_lps=tuple(affine.ravel().tolist()), spacing_mm_zyx=spacing)


def refusal(thin: SeriesRecord, thick: SeriesRecord = THICK) -> str:
    return score_candidate(thick, thin).refused


def test_a_plain_pair_is_accepted_with_its_evidence() -> None:
    (pair,), alone = choose_pairs([THICK, THIN], KEYS)
    assert not alone
    assert (pair.thick_key, pair.thin_key) == ("thick", "thin")
    assert pair.pair_key == KEYS.pair("thick", "thin")
    assert pair.overlap_mm == (-0.5, 269.5)
    evidence = json.loads(pair.evidence)
    assert evidence["chosen_by"] == "score"
    assert evidence["candidates"][0]["spacing_ratio"] == 5.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"frame_key": "g"}, "another frame of reference"),
        ({"acquisition_key": "b"}, "another acquisition"),
        ({"shape_zyx": (306, 512, 600)}, "another in-plane matrix"),
        ({"affine_lps": zoomed(THIN, 1.2).affine_lps}, "another pixel spacing"),
    ],
)
def test_another_scan_or_grid_is_refused(change: dict[str, Any], reason: str) -> None:
    assert refusal(replace(THIN, **change)).startswith(reason)


@pytest.mark.parametrize("change", [{"frame_key": ""}, {"acquisition_key": ""}])
def test_what_is_unknown_is_no_objection(change: dict[str, Any]) -> None:
    assert refusal(replace(THIN, **change)) == ""


def test_a_shifted_field_of_view_is_refused() -> None:
    moved = list(THIN.affine_lps)
    moved[3] += 0.4
    assert "0.80 pixels apart" in refusal(replace(THIN, affine_lps=tuple(moved)))


def test_a_smaller_field_is_paired_on_request_alone_and_marked() -> None:
    small = zoomed(THIN, 0.6)
    pairs, alone = choose_pairs([THICK, small], KEYS)
    assert not pairs
    assert alone == {"thick": "no thin series fits: another pixel spacing, which --pair-across-fov would pair"}
    (pair,), alone = choose_pairs([THICK, small], KEYS, across_fields=True)
    assert not alone
    assert pair.across_fields
    assert json.loads(pair.evidence)["candidates"][0]["same_grid"] is False
    (plain,), _ = choose_pairs([THICK, THIN], KEYS, across_fields=True)
    assert not plain.across_fields


def test_a_series_of_the_same_grid_goes_before_any_other_field() -> None:
    small = replace(zoomed(THIN, 0.6), series_key="small")
    sharp = replace(THIN, series_key="sharp", kernel="B70f")
    (pair,), _ = choose_pairs([THICK, small, sharp], KEYS, across_fields=True)
    assert pair.thin_key == "sharp"
    assert not pair.across_fields


@pytest.mark.parametrize(("factor", "shift_mm", "beyond"), [(1.2, 0.0, 25.3), (0.6, 60.35, 9.0)])
def test_a_field_beyond_the_thick_one_is_never_paired(factor: float, shift_mm: float, beyond: float) -> None:
    wide = zoomed(THIN, factor, shift_mm)
    said = f"a field of view that reaches {beyond:.1f} mm beyond the thick one"
    assert [said in score_candidate(THICK, wide, across).refused for across in (False, True)] == [True, True]


def test_a_thin_series_beside_the_thick_one_is_refused() -> None:
    assert "share 0.0 mm" in refusal(row("thin", 1.0, 100, z0=500.0))
    assert "share 10.5 mm" in refusal(row("thin", 1.0, 100, z0=260.0 - 0.5))


def test_equal_spacing_is_no_pair() -> None:
    assert "spacing ratio 1.25" in refusal(row("x", 2.0, 100), row("y", 2.5, 100))


def test_extents_may_differ() -> None:
    """49 x 5 mm against 388 x 1 mm, as met in the field: only the overlap counts."""
    thick, thin = row("thick", 5.0, 49, z0=40.0), row("thin", 1.0, 388)
    assert score_candidate(thick, thin).overlap_mm == (37.5, 282.5)


@settings(max_examples=50, deadline=None)
@given(st.floats(-30, 30), st.floats(-20, 20))
def test_a_tilted_pair_lies_on_one_grid(tilt: float, offset: float) -> None:
    thick, thin = row("thick", 5.0, 28, z0=2.0 + offset, tilt=tilt), row("thin", 1.0, 140, z0=offset, tilt=tilt)
    candidate = score_candidate(thick, thin)
    assert candidate.refused == ""
    assert candidate.grid_offset_pixels < 1e-6


def test_another_tilt_is_refused() -> None:
    assert "orientation differs" in refusal(row("thin", 1.0, 306, tilt=4.0))


def test_the_thin_series_of_the_same_kernel_is_chosen() -> None:
    sharp, finer = replace(THIN, series_key="s", kernel="B70f"), row("f", 0.6, 510, kernel="B60s")
    (pair,), _ = choose_pairs([THICK, sharp, finer, THIN], KEYS)
    assert pair.thin_key == "thin"
    assert len(json.loads(pair.evidence)["candidates"]) == 3


def test_each_thick_series_takes_the_thin_one_of_its_kernel() -> None:
    thick_sharp = replace(THICK, series_key="thick_sharp", kernel="B70f")
    thin_sharp = replace(THIN, series_key="thin_sharp", kernel="B70f")
    pairs, _ = choose_pairs([THICK, thick_sharp, THIN, thin_sharp], KEYS)
    assert {(p.thick_key, p.thin_key) for p in pairs} == {("thick", "thin"), ("thick_sharp", "thin_sharp")}


def test_between_equal_kernels_coverage_then_fineness_decide() -> None:
    short, coarse = row("short", 1.0, 100, z0=100.0), row("coarse", 2.0, 153)
    (pair,), _ = choose_pairs([THICK, short, coarse, THIN], KEYS)
    assert pair.thin_key == "thin"


def test_quarantined_series_and_other_roles_do_not_take_part() -> None:
    pairs, alone = choose_pairs([THICK, replace(THIN, status="quarantined"), replace(THIN, role="other")], KEYS)
    assert not pairs
    assert alone == {"thick": "no thin series in the study"}


def test_why_a_series_stays_alone_is_told() -> None:
    _, alone = choose_pairs([THICK, replace(THIN, frame_key="g")], KEYS)
    assert alone == {"thick": "no thin series fits: another frame of reference"}
    assert choose_pairs([THIN], KEYS)[1] == {"thin": "no thick series in the study"}


def test_the_users_pair_may_cross_fields() -> None:
    assert override_pair(THICK, zoomed(THIN, 0.6), KEYS).across_fields
    assert not override_pair(THICK, THIN, KEYS).across_fields


def test_the_users_pair_keeps_what_the_criteria_say() -> None:
    pair = override_pair(THICK, replace(THIN, frame_key="g"), KEYS)
    evidence = json.loads(pair.evidence)
    assert evidence["chosen_by"] == "user"
    assert evidence["candidates"][0]["refused"] == "another frame of reference"


@pytest.mark.parametrize(
    ("one", "other", "similarity"),
    [
        ("B30f", "b30F ", 1.0),
        ("I31f\\2", "I31f\\2", 1.0),
        ("B30f", "B31f", 0.7),
        ("B30f", "B70f", 0.0),
        ("STANDARD", "BONE", 0.0),
        ("", "BONE", UNKNOWN),
        ("FC03", "FC51", 0.0),
        ("#0123abcd", "#0123abcd", 1.0),
        ("#0123abcd", "#9123abcd", 0.0),
    ],
)
def test_kernels_are_compared_by_family_and_number(one: str, other: str, similarity: float) -> None:
    assert kernel_similarity(one, other) == pytest.approx(similarity)
    assert kernel_similarity(other, one) == kernel_similarity(one, other)
