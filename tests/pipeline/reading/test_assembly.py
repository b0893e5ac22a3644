"""Loose slices to volumes: one test per policy that ``pipeline.reading.assembly`` states."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pipeline.reading import parse_header
from pipeline.reading.assembly import assemble
from pipeline.reading.instance import Instance, instance_of
from pipeline.reading.stacks import Stack
from tests.support.dicom_files import dataset, file_bytes

AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def instances(
    positions: list[tuple[float, float, float]], orientation: list[float], **values: object
) -> list[Instance]:
    """Parsed headers at these positions; a tuple gives every slice its own value."""
    found = []
    for index, where in enumerate(positions):
        ds = dataset(np.zeros((8, 8), np.uint16), position=where, number=index)
        ds.ImageOrientationPatient = orientation
        for keyword, value in values.items():
            setattr(ds, keyword, value[index] if isinstance(value, tuple) else value)
        data = file_bytes(ds, np.zeros((8, 8), np.uint16))
        found.append(instance_of(parse_header(data, whole=True), index, len(data), index))
    return found


def never_same(a: Instance, b: Instance) -> bool:
    return False


def at(*z_mm: float, x_mm: float = 0.0, **values: object) -> list[Instance]:
    """Axial slices at these positions along z."""
    return instances([(x_mm, 0.0, z) for z in z_mm], AXIAL, **values)


def only(found: list[Instance], same: bool = False) -> Stack:
    (stack,) = assemble(found, lambda a, b: same)
    return stack


@given(
    st.floats(-25, 25),
    st.floats(0.5, 8),
    st.integers(3, 12),
    st.randoms(use_true_random=False),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_order_any_tilt_gives_one_lattice(
    tilt: float, step: float, count: int, shuffle: object, feet: bool
) -> None:
    """Positions come back exactly from the lattice, whatever the order of files, the tilt or the direction."""
    angle = math.radians(tilt)
    sign = -1 if feet else 1
    orientation = [1, 0, 0, 0, sign * math.cos(angle), sign * math.sin(angle)]
    positions = [(-10.0, 5.0, round(step * k, 4)) for k in range(count)]
    shuffle.shuffle(positions)  # type: ignore[attr-defined]
    (stack,) = assemble(instances(positions, [round(v, 9) for v in orientation]), never_same)
    assert stack.status == "ok"
    assert stack.role in ("thick", "thin")
    geometry = stack.geometry
    assert geometry is not None
    assert ("gantry-tilt" in stack.flags) == (abs(tilt) > 0.1)
    assert np.all(np.diff(geometry.z_mm) > 0)
    for index, one in enumerate(stack.instances):
        assert geometry.slice_position(index) == pytest.approx(one.position, abs=1e-3)
    assert geometry.spacing_mm_zyx[0] == pytest.approx(step * math.cos(angle), rel=1e-2)


@given(st.integers(5, 15), st.data())
@settings(max_examples=40, deadline=None)
def test_a_gap_is_never_stretched_over(count: int, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(1, count - 2), min_size=1, max_size=2))
    kept = [k for k in range(count) if k not in gone]
    if len(kept) < 3 or len(set(np.diff(kept))) == 1:
        return
    (stack,) = assemble(instances([(0, 0, 5.0 * k) for k in kept], [1, 0, 0, 0, 1, 0]), never_same)
    assert stack.status == "quarantined" or "variable-spacing" in stack.flags
    assert stack.role == "other"


def test_sequential_scans_that_number_every_slice_stay_one_series() -> None:
    found = instances([(0, 0, 5.0 * k) for k in range(6)], [1, 0, 0, 0, 1, 0], AcquisitionNumber=(1, 2, 3, 4, 5, 6))
    (stack,) = assemble(found, never_same)
    assert stack.role == "thick"
    assert stack.discriminator == ""


def test_interleaved_acquisitions_part_even_without_shared_positions() -> None:
    z = [5.0 * k for k in range(5)] + [5.0 * k + 2 for k in range(5)]
    found = instances([(0, 0, v) for v in z], [1, 0, 0, 0, 1, 0], AcquisitionNumber=(1,) * 5 + (2,) * 5)
    stacks = assemble(found, never_same)
    assert [len(s.instances) for s in stacks] == [5, 5]
    assert [s.role for s in stacks] == ["thick", "thick"]
    assert len({s.discriminator for s in stacks}) == 2
    assert all("split" in s.flags for s in stacks)


def test_one_uid_for_two_patients_is_refused() -> None:
    found = instances([(0, 0, 5.0 * k) for k in range(6)], [1, 0, 0, 0, 1, 0], PatientID=("a",) * 3 + ("b",) * 3)
    (stack,) = assemble(found, never_same)
    assert stack.status == "quarantined"
    assert "several patients" in stack.reason


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}, "MR image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.67"}, "structured report"),
        ({"SOPClassUID": "1.2.3"}, "another kind"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"RescaleType": "Z_EFF"}, "Hounsfield"),
        ({"BitsStored": 0}, "contradict"),
        ({"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}, "32 bits"),
        ({"RescaleSlope": 0}, "no usable number"),
        ({"PixelSpacing": [0.7, 0]}, "PixelSpacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.5, 0]}, "orientation missing or no number"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0.9, -0.436], "ImageType": ["DERIVED", "SECONDARY"]}, "oblique"),
        ({"NumberOfFrames": 7}, "7 frames"),
    ],
)
def test_what_is_set_aside_or_quarantined_says_why(values: dict[str, object], reason: str) -> None:
    (stack,) = assemble(instances([(0, 0, 5.0 * k) for k in range(4)], [1, 0, 0, 0, 1, 0], **values), never_same)
    assert reason in stack.reason
    assert stack.role == "other"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "SCOUT"]}, "localizer"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "projection"),
        ({"ImageOrientationPatient": [0, 1, 0, 0, 0, -1]}, "sagittal or coronal"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "grey levels"),
    ],
)
def test_set_aside_what_is_no_axial_ct(values: dict[str, object], reason: str) -> None:
    stack = only(at(0, 5, 10, 15, **values))
    assert (stack.role, stack.status) == ("other", "ok"), "a part of a normal study, not a fault"
    assert reason in stack.reason


@pytest.mark.parametrize("count", [1, 2])
def test_set_aside_a_lone_slice_or_two(count: int) -> None:
    stack = only(at(*range(count)))
    assert (stack.role, stack.status) == ("other", "ok")
    assert "too few" in stack.reason


@pytest.mark.parametrize(
    "values",
    [
        {"ImageOrientationPatient": ([1, 0, 0, 0, 1, 0],) * 4 + ([1, 0, 0, 0, 0.98, 0.199],) * 4},
        {"PixelSpacing": ([0.7, 0.7],) * 4 + ([0.8, 0.8],) * 4},
        {"FrameOfReferenceUID": ("1.2.3",) * 4 + ("1.2.4",) * 4},
        {"ConvolutionKernel": ("Br38f",) * 4 + ("Br59f",) * 4},
    ],
    ids=["orientation", "grid", "frame", "kernel"],
)
def test_split_what_no_single_volume_can_hold(values: dict[str, object]) -> None:
    stacks = assemble(at(*(5.0 * k for k in range(8)), **values), never_same)
    assert [len(stack.instances) for stack in stacks] == [4, 4]
    assert all("split" in stack.flags for stack in stacks)
    assert len({stack.discriminator for stack in stacks}) == 2


def test_split_energies_at_the_same_positions_but_not_after_each_other() -> None:
    z = (0.0, 5.0, 10.0, 15.0)
    together = assemble(at(*z, *z, KVP=(80,) * 4 + (140,) * 4), never_same)
    assert [len(stack.instances) for stack in together] == [4, 4]
    after = only(at(*(5.0 * k for k in range(8)), AcquisitionNumber=(1,) * 4 + (2,) * 4))
    assert len(after.instances) == 8


def test_a_frame_of_reference_for_every_slice_says_nothing() -> None:
    stack = only(at(0, 5, 10, 15, 20, FrameOfReferenceUID=tuple(f"1.2.{k}" for k in range(5))))
    assert stack.role == "thick"
    assert "frame-of-reference-per-slice" in stack.flags


def test_keep_with_a_flag_a_tilted_gantry() -> None:
    cosine, sine = round(math.cos(0.2), 9), round(math.sin(0.2), 9)
    stack = only(instances([(0, 0, 5.0 * k) for k in range(4)], [1, 0, 0, 0, cosine, sine]))
    assert stack.role == "thick"
    assert "gantry-tilt" in stack.flags


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"RescaleIntercept": (-1024, -1024, -1000, -1000)}, "mixed-rescale"),
        ({"SliceThickness": (5.0, 5.0, 4.0, 5.0)}, "mixed-thickness"),
        ({"BitsStored": (12, 12, 16, 16), "HighBit": (11, 11, 15, 15)}, "mixed-pixel-form"),
        ({"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]}, "derived"),
        ({"SliceThickness": 8.0}, "overlapping-slices"),
        ({"SliceThickness": 3.0}, "gaps-between-slices"),
    ],
)
def test_keep_with_a_flag(values: dict[str, object], flag: str) -> None:
    stack = only(at(0, 5, 10, 15, **values))
    assert stack.status == "ok"
    assert stack.role == "thick"
    assert flag in stack.flags


def test_variable_spacing_is_flagged_and_waits_for_a_request() -> None:
    stack = only(at(0, 5, 11, 14, 21))
    assert (stack.role, stack.status) == ("other", "ok")
    assert "variable-spacing" in stack.flags
    assert "only on request" in stack.reason


def test_identical_duplicates_are_dropped_and_conflicting_ones_refused() -> None:
    dropped = only(at(0, 5, 5, 10, 15), same=True)
    assert len(dropped.instances) == 4
    assert dropped.role == "thick"
    assert "duplicates-dropped" in dropped.flags
    refused = only(at(0, 5, 5, 10, 15), same=False)
    assert refused.status == "quarantined"
    assert "different images" in refused.reason


def test_quarantine_missing_slices_with_their_number() -> None:
    stack = only(at(0, 5, 10, 20, 25, 30))
    assert stack.status == "quarantined"
    assert stack.reason.startswith("1 slices missing")


def test_quarantine_slices_that_shift_in_plane() -> None:
    where = [(0.0, 0.0, 0.0), (0.0, 0.0, 5.0), (3.0, 0.0, 10.0), (0.0, 0.0, 15.0)]
    stack = only(instances(where, AXIAL))
    assert stack.status == "quarantined"
    assert "3.00 mm" in stack.reason


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ImagePositionPatient": ""}, "position or orientation missing"),
        ({"RescaleSlope": -1}, "below zero"),
        ({"RescaleSlope": 1e4}, "far outside of any CT"),
        ({"RescaleSlope": ""}, "HU are unknown"),
    ],
)
def test_quarantine_what_cannot_be_read_as_hu_in_space(values: dict[str, object], reason: str) -> None:
    stack = only(at(0, 5, 10, 15, **values))
    assert stack.status == "quarantined"
    assert reason in stack.reason


@pytest.mark.parametrize(("spacing", "role"), [(1.0, "thin"), (2.4, "thin"), (2.5, "thick"), (5.0, "thick")])
def test_thin_is_below_two_and_a_half_millimetres(spacing: float, role: str) -> None:
    assert only(at(*(spacing * k for k in range(5)), SliceThickness=spacing)).role == role
