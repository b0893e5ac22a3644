"""Scanning and assembly: what a source holds, in order, with every deviation recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom import Dataset

from pipeline.archive import open_archive
from pipeline.reading import ScannedSeries, scan
from pipeline.reading.public_attributes import known_kernel, known_manufacturer, known_model
from tests.support.dicom_files import EXPLICIT, IMPLICIT, anatomy, series_files, zip_of


def scan_one(path: Path) -> ScannedSeries:
    (one,) = scan(open_archive(path)).series
    return one


def test_header_beyond_the_first_kilobytes(tmp_path: Path) -> None:
    """A private block of a megabyte before the geometry makes the scan read on, not give up."""

    def stuffed(ds: Dataset, index: int) -> None:
        ds.add_new(0x00190010, "LO", "MAKER")
        ds.add_new(0x00191001, "OB", bytes(1_000_000))

    assert scan_one(zip_of(tmp_path / "a.zip", series_files(anatomy(3, 8), tweak=stuffed))).role_hint == "thick"


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_nested_sequences_of_undefined_length_are_stepped_over(tmp_path: Path, syntax: str) -> None:
    def nested(ds: Dataset, index: int) -> None:
        inner = Dataset()
        inner.CodeValue = "X"
        outer = Dataset()
        outer.PurposeOfReferenceCodeSequence = [inner]
        outer.is_undefined_length_sequence_item = True
        ds.SourceImageSequence = [outer, outer]
        ds["SourceImageSequence"].is_undefined_length = True
        outer["PurposeOfReferenceCodeSequence"].is_undefined_length = True

    one = scan_one(zip_of(tmp_path / "a.zip", series_files(anatomy(3, 8), tweak=nested, syntax=syntax)))
    assert one.status == "ok"
    assert one.patient_id == "ID-4711"


FREE_TEXT = """
    Manufacturer ManufacturerModelName ConvolutionKernel BodyPartExamined PatientPosition ProtocolName SoftwareVersions
    StationName InstitutionName SeriesDescription StudyDescription FilterType ScanOptions RotationDirection RescaleType
"""


def test_public_facts_hold_no_planted_text(tmp_path: Path) -> None:
    """Every text attribute holds a planted name; none of it is public."""

    def plant(ds: Dataset, index: int) -> None:
        for keyword in FREE_TEXT.split():
            setattr(ds, keyword, "MUSTERMANN")
        ds.Manufacturer = "SIEMENS MUSTERMANN"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "MUSTERMANN"]
        ds.RescaleType = "HU"

    one = scan_one(zip_of(tmp_path / "a.zip", series_files(anatomy(3, 8), tweak=plant)))
    public = repr(
        [one.header.public, one.kernel, one.modality, one.flags, one.reason, one.transfer_syntax, one.geometry]
    )
    assert "MUSTERMANN" not in public.upper()
    assert one.kernel_text == "MUSTERMANN"
    assert one.header.public["Manufacturer"] == "Siemens Healthineers"
    assert one.header.public["ImageType"] == ["ORIGINAL", "PRIMARY", "AXIAL"]


LETTER_KERNELS = ["Br38f", "Br38f\\3", "B30f", "I31f\\2", "H30s", "J70h\\3", "Qr40", "Bv40f", "Ub44", "T20f", "D30f"]


@pytest.mark.parametrize("kernel", [*LETTER_KERNELS, "FC08", "FC18-H", "STANDARD", "STD+", "B", "YA", "UB", "EC"])
def test_vendors_kernels_are_known(kernel: str) -> None:
    assert known_kernel(kernel) == kernel


NAMES = [
    "Kim",
    "Li",
    "Wu",
    "Ng",
    "Eva",
    "Max",
    "Lee",
    "LEE",
    "Roe",
    "Kim+",
    "Al45",
    "Ma12",
    "Jo7",
    "M45",
    "F63",
    "Vu88",
]
DATES = ["1943", "12 10", "19430512", "4711", "0", "31", "Li 1943 1209", "1209 1943"]


@pytest.mark.parametrize("text", [*NAMES, "Br38f\\Kim", "B 30", "A1", "Br1943", "FC1209"])
def test_short_names_initials_ages_and_dates_are_no_kernel(text: str) -> None:
    assert known_kernel(text) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_beside_a_known_word_is_no_model(name: str) -> None:
    assert known_model(f"SOMATOM Force {name}") == ""
    assert known_model(f"{name} Force") == ""


@pytest.mark.parametrize("text", [*(f"Force {date}" for date in DATES), "Force19430512", "64", "16 64", ""])
def test_numbers_that_may_be_a_date_are_no_model(text: str) -> None:
    assert known_model(text) == known_model(f"Sensation 64 {text or 16}") == ""


@pytest.mark.parametrize("text", ["Doe^John", "JOHN", "19700101", "4711", "Br38f Doe", ""])
def test_other_text_is_no_kernel_and_no_model(text: str) -> None:
    assert known_kernel(text) == ""
    assert known_model(text) == ""
    assert known_manufacturer(text) == ""


def test_models() -> None:
    assert known_model("LightSpeed VCT") == "LightSpeed VCT"
    assert known_model("SOMATOM Definition AS+") == ""
    assert known_model("Biograph40_mCT 4R") == "Biograph40_mCT 4R"
    for name in ("SOMATOM Force", "Sensation 64", "Discovery CT750 HD", "Brilliance 64", "iCT 256", "Aquilion ONE",
                 "Revolution EVO", "uCT 760", "MX8000 IDT 16", "Emotion 16 (2007)", "NAEOTOM Alpha.Peak"):  # fmt: skip
        known = name if "IDT" not in name and "2007" not in name else ""
        assert known_model(name) == known


def test_character_sets_of_private_identity(tmp_path: Path) -> None:
    def named(ds: Dataset, index: int) -> None:
        ds.SpecificCharacterSet = "ISO_IR 192"
        ds.PatientName = "Größe^Zoë"

    assert scan_one(zip_of(tmp_path / "a.zip", series_files(anatomy(3, 8), tweak=named))).header.identity[
        "PatientName"
    ] == ("Größe^Zoë")


def test_problems_and_ignored_members_are_told_apart(tmp_path: Path) -> None:
    good = series_files(anatomy(4, 8))
    result = scan(
        open_archive(
            zip_of(
                tmp_path / "a.zip",
                {
                    "empty": b"",
                    "picture.jpg": b"\xff\xd8\xff\xe0" + bytes(500),
                    "cut": good[0][:200],
                    **{f"I{i}": f for i, f in enumerate(good)},
                },
            )
        )
    )
    assert [index for index, _ in result.ignored] == [0, 1]
    assert [index for index, _ in result.problems] == [2]
    assert "cut short" in result.problems[0][1]
    assert len(result.series) == 1


def test_source_digest_follows_the_pixels(tmp_path: Path) -> None:
    one = scan_one(zip_of(tmp_path / "a.zip", series_files(anatomy(4, 8))))
    same = scan_one(zip_of(tmp_path / "b.zip", series_files(anatomy(4, 8))[::-1]))
    differs = scan_one(zip_of(tmp_path / "c.zip", series_files(anatomy(4, 8, seed=1))))
    assert one.source_digest == same.source_digest != differs.source_digest


@pytest.mark.real
def test_real_head_phantom_gives_thick_and_thin(real_data: Path) -> None:
    source = open_archive(real_data / "ape-layout/non-APE/head-phantom.zip")
    found = {one.role_hint: one for one in scan(source).series}
    thick, thin = found["thick"].geometry, found["thin"].geometry
    assert thick is not None
    assert thin is not None
    assert (thick.shape_zyx, thin.shape_zyx) == ((28, 512, 512), (140, 512, 512))
    assert thick.spacing_mm_zyx[0] == pytest.approx(5.0)
    assert thin.spacing_mm_zyx[0] == pytest.approx(1.0)
    assert found["thick"].frame_uid == found["thin"].frame_uid


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "role", "flags", "aside"),
    [
        ("gantry-tilt-ge-variable-spacing", "other", {"gantry-tilt", "variable-spacing", "mixed-thickness"}, set()),
        ("gantry-tilt-philips", "thick", {"gantry-tilt"}, {"a localizer", "no CT image but a secondary capture"}),
        ("overlapping-3mm-every-2mm-jpeg2000", "thick", {"overlapping-slices", "surrogate-uid"}, set()),
        ("pacs-export-with-scouts", "thick", set(), {"a localizer", "no CT image but a secondary capture"}),
    ],
)
def test_real_odd_archives(real_data: Path, name: str, role: str, flags: set[str], aside: set[str]) -> None:
    result = scan(open_archive(real_data / "odd" / f"{name}.zip"))
    (volume,) = [one for one in result.series if one.geometry is not None]
    assert volume.role_hint == role
    assert volume.status == "ok"
    assert flags <= set(volume.flags)
    assert {one.reason for one in result.series if one is not volume} == aside
    assert not result.problems


def test_a_repacked_archive_does_not_exchange_the_keys_of_two_volumes(tmp_path: Path) -> None:
    """Two stacks of one UID that differ by a degree get one label and a number, which must not follow names."""

    def second_is_turned(ds: Dataset, index: int) -> None:
        if index >= 5:
            ds.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 0.9998, 0.02]

    files = series_files(
        anatomy(10, 16), z=[5.0 * (k % 5) + 100.0 * (k // 5) for k in range(10)], tweak=second_is_turned
    )
    found = []
    for name, order in (("a", files), ("b", files[5:] + files[:5]), ("c", files[::-1])):
        result = scan(open_archive(zip_of(tmp_path / f"{name}.zip", order)))
        assert len(result.series) == 2
        found.append({one.discriminator: frozenset(one.header.sop_instance_uids) for one in result.series})
    assert any("#2" in discriminator for discriminator in found[0])
    assert found[0] == found[1] == found[2]
