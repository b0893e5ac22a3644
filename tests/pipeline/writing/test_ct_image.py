"""Derived series through real referees: dciodvfy, dcm2niix, SimpleITK, highdicom and pydicom."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.volume import Geometry, SourceHeader
from pipeline.writing import FileOptions, Provenance, SeriesIdentity, read_provenance, write_ct_series
from pipeline.writing.ct_image import WrittenSeries

HEADER = SourceHeader(
    public={"Manufacturer": "Maker", "KVP": "120", "PatientPosition": "HFS", "ConvolutionKernel": "B30f"},
    identity={
        "PatientID": "SECRET-ID",
        "PatientName": "Secret^Name",
        "StudyInstanceUID": "1.2.3.4",
        "FrameOfReferenceUID": "1.2.3.5",
        "StudyDate": "20200102",
    },
    sop_instance_uids=tuple(f"1.2.3.6.{i}" for i in range(4)),
)
IDENTITY = SeriesIdentity.pseudonymous(
    patient_key="a" * 16, study_key="b" * 16, frame_key="c" * 16, source_key="d" * 16, source_slices=4
)
PROVENANCE = Provenance(
    "generated",
    "d" * 16,
    (40.0, 400.0),
    1.25,
    encode_key="e" * 16,
    vae_sha256="f" * 64,
    checkpoint_sha256="0" * 64,
    sampling={"sampler": "ddim", "steps": 50, "seed": 3},
    consistency={"rms_after_hu": 3.25, "per_slice_after_hu": [3.0, 3.5]},
)


def geometry(tilt_deg: float = 0.0, n: int = 7) -> Geometry:
    """Slices 1.25 mm apart; under gantry tilt the slice plane leans and the stack stays along the table: sheared."""
    tilt = np.radians(tilt_deg)
    down = np.array([0.0, np.cos(tilt), np.sin(tilt)])
    affine = np.eye(4)
    affine[:3, 0] = [0.0, 0.0, 1.25]
    affine[:3, 1] = 0.75 * down
    affine[:3, 2] = [0.75, 0.0, 0.0]
    affine[:3, 3] = [-12.125, -13.33333333, -301.57]
    normal = np.cross([1.0, 0.0, 0.0], down)
    z = [float((affine[:3, 3] + i * affine[:3, 0]) @ normal) for i in range(n)]
    return Geometry((n, 18, 20), tuple(tuple(map(float, row)) for row in affine), tuple(z), 5.0)


def pixels(n: int = 7) -> NDArray[np.int16]:
    hu = np.random.default_rng(0).integers(-1024, 3071, (n, 18, 20)).astype(np.int16)
    hu[0, 0, 0], hu[-1, -1, -1] = -1100, 12000
    return hu


def write(out: Path, hu: NDArray[np.int16], at: Geometry, **options: Any) -> WrittenSeries:
    files = FileOptions(
        **{name: options.pop(name) for name in ("transfer_syntax", "slope", "threads") if name in options}
    )
    options = {"uids": IDENTITY, "provenance": PROVENANCE, "files": files} | options
    return write_ct_series(hu, at, HEADER, out, **options)


def validator_errors(path: Path) -> list[str]:
    tool = Path(sys.executable).with_name("dciodvfy")
    done = subprocess.run([tool, "-new", path], capture_output=True, text=True, check=False)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("syntax", ["explicit", "jpegls", "htj2k"])
def test_the_validator_finds_no_error(tmp_path: Path, syntax: str) -> None:
    written = write(tmp_path / "s", pixels(), geometry(), transfer_syntax=syntax)
    assert validator_errors(written.paths[3]) == []


def test_the_validator_can_find_one(tmp_path: Path) -> None:
    ds = pydicom.dcmread(write(tmp_path / "s", pixels(), geometry()).paths[0])
    del ds.PixelSpacing
    ds.save_as(tmp_path / "broken.dcm")
    assert any("PixelSpacing" in line for line in validator_errors(tmp_path / "broken.dcm"))


@pytest.mark.parametrize("syntax", ["explicit", "jpegls", "htj2k"])
def test_pixels_come_back_exactly(tmp_path: Path, syntax: str) -> None:
    hu = pixels()
    written = write(tmp_path / "s", hu, geometry(), transfer_syntax=syntax)
    for expected, path in zip(hu, written.paths, strict=True):
        ds = pydicom.dcmread(path)
        if syntax == "htj2k":
            import imagecodecs

            frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
            stored = imagecodecs.htj2k_decode(frame)
        else:
            stored = ds.pixel_array
        got = stored.astype(np.float64) * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("tilt", [0.0, 17.0])
def test_pydicom_and_highdicom_agree_on_geometry(tmp_path: Path, tilt: float) -> None:
    at = geometry(tilt)
    written = write(tmp_path / "s", pixels(), at)
    for i, path in enumerate(written.paths):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        np.testing.assert_allclose(ds.ImagePositionPatient, at.slice_position(i), atol=1e-4)
        row, column = np.split(np.asarray(ds.ImageOrientationPatient, float), 2)
        np.testing.assert_allclose(row * ds.PixelSpacing[1], at.affine[:3, 2], atol=1e-6)
        np.testing.assert_allclose(column * ds.PixelSpacing[0], at.affine[:3, 1], atol=1e-6)
        assert float(ds.SliceThickness) == 5.0
        assert float(ds.SpacingBetweenSlices) == pytest.approx(at.spacing_mm_zyx[0])
        assert float(ds.SliceLocation) == pytest.approx(at.z_mm[i])
    if not tilt:
        import highdicom

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = highdicom.get_volume_from_series([pydicom.dcmread(p) for p in written.paths])
        order = np.argsort([volume.affine[2, 3] + k * volume.affine[2, 0] for k in range(7)])
        positions = np.array([volume.affine[:3, 3] + k * volume.affine[:3, 0] for k in order])
        np.testing.assert_allclose(positions, [at.slice_position(i) for i in range(7)], atol=1e-4)


def test_simpleitk_agrees_on_geometry_and_pixels(tmp_path: Path) -> None:
    import SimpleITK

    at, hu = geometry(), pixels()
    write(tmp_path / "s", hu, at)
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s"))
    image = SimpleITK.ReadImage(names)
    np.testing.assert_allclose(image.GetOrigin(), at.slice_position(0), atol=1e-4)
    np.testing.assert_allclose(image.GetSpacing(), at.spacing_mm_zyx[::-1], atol=1e-4)
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(image), hu)


def test_dcm2niix_agrees_on_geometry_and_pixels(tmp_path: Path) -> None:
    import nibabel

    at, hu = geometry(), np.clip(pixels(), -1024, 3071)
    write(tmp_path / "s", hu, at)
    tool = Path(sys.executable).with_name("dcm2niix")
    subprocess.run([tool, "-o", tmp_path, "-f", "out", tmp_path / "s"], check=True, capture_output=True)
    image = nibabel.load(tmp_path / "out.nii")
    data = np.asarray(image.dataobj)
    assert data.shape == (20, 18, 7)
    # NIfTI is RAS and dcm2niix flips rows; its first voxel is our last row's.
    corner = image.affine @ [0, data.shape[1] - 1, 0, 1]
    np.testing.assert_allclose(corner[:3] * [-1, -1, 1], at.slice_position(0), atol=1e-4)
    step = image.affine[:3, 2] * [-1, -1, 1]
    np.testing.assert_allclose(step, at.affine[:3, 0], atol=1e-4)
    np.testing.assert_array_equal(data[:, ::-1, :].transpose(2, 1, 0), hu)


def test_what_each_tool_makes_of_a_tilted_lattice(tmp_path: Path) -> None:
    """Under a tilt of 17 degrees slices 1.25 mm apart along the table are 1.25 cos 17 = 1.195 mm apart along their
    normal. Positions and spacing are written exactly. A NIfTI affine of dcm2niix and an ITK image have no shear: one
    takes the 1.195 mm along the table, the other the 1.25 mm along the normal, so that both are right in the first
    slice alone and drift from there. (dcm2niix also writes a resampled volume, ``_Tilt``, which is no referee.)"""
    import nibabel
    import SimpleITK

    at = geometry(17.0)
    along_normal = 1.25 * np.cos(np.radians(17.0))
    assert at.spacing_mm_zyx[0] == pytest.approx(along_normal, abs=1e-9)
    write(tmp_path / "s", np.clip(pixels(), -1024, 3071), at)
    tool = Path(sys.executable).with_name("dcm2niix")
    said = subprocess.run([tool, "-o", tmp_path, "-f", "out", tmp_path / "s"], capture_output=True, text=True)
    assert "gantry tilt of -17 degrees" in said.stdout
    image = nibabel.load(tmp_path / "out.nii")
    assert image.header.get_zooms()[2] == pytest.approx(along_normal, abs=1e-4)
    corners = [(image.affine @ [0, image.shape[1] - 1, k, 1])[:3] * [-1, -1, 1] for k in (0, 6)]
    names = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "s"))
    itk = SimpleITK.ReadImage(names)
    assert itk.GetSpacing()[2] == pytest.approx(1.25, abs=1e-4)
    last = np.asarray(at.slice_position(6))
    for first, sixth, drift in (
        (corners[0], corners[1], 6 * (1.25 - along_normal)),
        (itk.GetOrigin(), itk.TransformIndexToPhysicalPoint((0, 0, 6)), 6 * 1.25 * 2 * np.sin(np.radians(17.0) / 2)),
    ):
        np.testing.assert_allclose(first, at.slice_position(0), atol=1e-4)
        assert np.linalg.norm(sixth - last) == pytest.approx(drift, abs=1e-3)


def test_provenance_is_complete_and_the_sources_are_named(tmp_path: Path) -> None:
    ds = pydicom.dcmread(write(tmp_path / "s", pixels(), geometry()).paths[0])
    assert ds.SyntheticData == "YES"
    assert list(ds.ImageType) == ["DERIVED", "SECONDARY", "AXIAL"]
    assert [i.ReferencedSOPInstanceUID for i in ds.SourceImageSequence] == list(IDENTITY.source_sop_uids)
    assert ds.ContributingEquipmentSequence[0].Manufacturer == "ctpipe"
    assert ds.DerivationCodeSequence[0].CodeValue == "113085"
    assert "SYNTHETIC" in ds.DerivationDescription
    assert "3.2 HU RMS" in ds.DerivationDescription
    assert read_provenance(ds) == json.loads(PROVENANCE.to_json())


def test_by_default_nothing_of_the_patient_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "s", pixels(), geometry()).paths[0]
    raw = path.read_bytes()
    for value in HEADER.identity.values():
        assert str(value).encode() not in raw
    assert b"1.2.3.6." not in raw
    ds = pydicom.dcmread(path)
    assert (ds.PatientID, ds.PatientIdentityRemoved) == ("a" * 16, "YES")
    assert ds.StudyInstanceUID.startswith("2.25.")


def test_restored_identity_joins_the_original_study(tmp_path: Path) -> None:
    identity = SeriesIdentity.original(HEADER)
    path = write(tmp_path / "s", pixels(), geometry(), uids=identity).paths[0]
    ds = pydicom.dcmread(path)
    assert (ds.PatientID, str(ds.PatientName), ds.StudyDate) == ("SECRET-ID", "Secret^Name", "20200102")
    assert (ds.StudyInstanceUID, ds.FrameOfReferenceUID) == ("1.2.3.4", "1.2.3.5")
    assert ds.SourceImageSequence[2].ReferencedSOPInstanceUID == "1.2.3.6.2"
    assert "PatientIdentityRemoved" not in ds
    assert validator_errors(path) == []


def test_identity_that_is_not_there_is_not_made_up() -> None:
    with pytest.raises(InputError, match="StudyInstanceUID"):
        SeriesIdentity.original(replace(HEADER, identity={"PatientID": "x"}))


def test_uids_follow_input_settings_and_pixels(tmp_path: Path) -> None:
    one = write(tmp_path / "1", pixels(), geometry())
    again = write(tmp_path / "2", pixels(), geometry())
    changed = pixels()
    changed[3, 3, 3] += 1
    other = write(tmp_path / "3", changed, geometry())
    resampled = write(tmp_path / "4", pixels(), geometry(), provenance=replace(PROVENANCE, sampling={"seed": 4}))
    assert one.sop_instance_uids == again.sop_instance_uids
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(one.paths, again.paths, strict=True)] == [True] * 7
    assert len({one.series_uid, other.series_uid, resampled.series_uid}) == 3
    assert len(set(one.sop_instance_uids)) == 7


@pytest.mark.parametrize("syntax", ["explicit", "jpegls"])
def test_a_finer_slope_is_kept(tmp_path: Path, syntax: str) -> None:
    stored = np.abs(pixels())
    ds = pydicom.dcmread(write(tmp_path / "s", stored, geometry(), slope=0.1, transfer_syntax=syntax).paths[2])
    got = ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
    np.testing.assert_allclose(got, stored[2] * 0.1, atol=1e-9)


def test_an_output_folder_that_exists_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="exists"):
        write(tmp_path / "s", pixels(), geometry())
    assert [p.name for p in tmp_path.rglob("*")] == ["s", "mine.txt"]


def test_an_unknown_transfer_syntax_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="explicit, jpegls, htj2k"):
        write(tmp_path / "s", pixels(), geometry(), transfer_syntax="jpeg")
    assert list(tmp_path.iterdir()) == []


def test_an_error_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "s", pixels(), geometry(), progress=fail)
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.pipeline.writing.test_ct_image import geometry, pixels, write
def tell(n):
    print("slice", flush=True)
    time.sleep(0.02)
write(Path({out!r}), pixels(40), geometry(n=40), threads=1, progress=tell)
print("done", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("after", [1, 17, 39, 41])
def test_killed_at_any_slice_the_folder_is_whole_or_absent(tmp_path: Path, repo_root: Path, after: int) -> None:
    out = tmp_path / "s"
    code = _KILLED.format(root=str(repo_root), out=str(out))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=repo_root)
    assert child.stdout is not None
    for _ in range(after):
        assert child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    if after > 40:
        assert len(list(out.iterdir())) == 40
        return
    assert not out.exists()
    write(out, pixels(), geometry())
    assert [p.name for p in tmp_path.iterdir()] == ["s"], "the next writer removes what the killed one left"


@given(
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
    spacing=st.tuples(st.floats(0.1, 10), st.floats(0.05, 3), st.floats(0.05, 3)),
    tilt=st.floats(-30, 30),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_lattice_survives_the_decimal_strings(
    tmp_path: Path, origin: tuple[float, ...], spacing: tuple[float, ...], tilt: float
) -> None:
    angle = np.radians(tilt)
    affine = np.eye(4)
    affine[:3, 0] = [0, 0, spacing[0]]
    affine[:3, 1] = spacing[1] * np.array([0, np.cos(angle), np.sin(angle)])
    affine[:3, 2] = [spacing[2], 0, 0]
    affine[:3, 3] = origin
    dz = spacing[0] * np.cos(angle)
    at = Geometry((3, 2, 2), tuple(tuple(map(float, r)) for r in affine), tuple(dz * np.arange(3)), 5.0)
    out = tmp_path / f"s{time.time_ns()}"
    written = write(out, np.zeros((3, 2, 2), np.int16), at)
    for i, path in enumerate(written.paths):
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        np.testing.assert_allclose(ds.ImagePositionPatient, at.slice_position(i), atol=1e-4)
    shutil.rmtree(out)


@pytest.mark.parametrize(
    ("kind", "source", "expected"),
    [
        ("generated", {}, ("00", None, None)),
        ("decoded", {}, ("01", 16, "CTPIPE_VAE")),
        (
            "generated",
            {"LossyImageCompressionRatio": 8.0, "LossyImageCompressionMethod": "ISO_10918_1"},
            ("01", 8, "ISO_10918_1"),
        ),
        (
            "decoded",
            {"LossyImageCompressionRatio": 8.0, "LossyImageCompressionMethod": "ISO_10918_1"},
            ("01", [8, 16], ["ISO_10918_1", "CTPIPE_VAE"]),
        ),
    ],
)
def test_a_round_trip_through_the_autoencoder_is_lossy_and_lossy_it_stays(
    tmp_path: Path, kind: str, source: dict[str, Any], expected: tuple[object, ...]
) -> None:
    from pipeline.writing import write_enhanced_ct

    lossy = {"LossyImageCompression": "01" if source else "00"}
    full = {"ManufacturerModelName": "Model", "BodyPartExamined": "CHEST"}
    header = replace(HEADER, public={**HEADER.public, **full, **lossy, **source})
    provenance = replace(PROVENANCE, kind=kind)  # type: ignore[arg-type]
    slices = write_ct_series(pixels(), geometry(), header, tmp_path / "s", uids=IDENTITY, provenance=provenance)
    enhanced = write_enhanced_ct(pixels(), geometry(), header, tmp_path / "e", uids=IDENTITY, provenance=provenance)
    for path in (slices.paths[0], enhanced.paths[0]):
        assert validator_errors(path) == []
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        keywords = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
        assert tuple(ds.get(keyword) for keyword in keywords) == expected


def test_deidentification_is_said_in_codes_and_only_where_it_was_done(tmp_path: Path) -> None:
    """PS3.15 Annex E; CID 7050 as pydicom's dictionary of PS3.16 has it."""
    from pydicom.sr.codedict import codes

    ds = pydicom.dcmread(write(tmp_path / "s", pixels(), geometry()).paths[0])
    (item,) = ds.DeidentificationMethodCodeSequence
    basic = codes.cid7050.BasicApplicationConfidentialityProfile
    assert (item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning) == (basic.value, "DCM", basic.meaning)
    assert (ds.PatientIdentityRemoved, ds.LongitudinalTemporalInformationModified) == ("YES", "REMOVED")
    original = SeriesIdentity.original(HEADER)
    restored = pydicom.dcmread(write(tmp_path / "r", pixels(), geometry(), uids=original).paths[0])
    for keyword in (
        "PatientIdentityRemoved",
        "DeidentificationMethodCodeSequence",
        "LongitudinalTemporalInformationModified",
    ):
        assert keyword not in restored
    assert restored.StudyDate == "20200102"


def test_the_basic_profile_holds_for_what_is_written(tmp_path: Path) -> None:
    """No attribute that the Basic Profile removes (X) or empties (Z) may hold a value of the source."""
    ds = pydicom.dcmread(write(tmp_path / "s", pixels(), geometry()).paths[0])
    removed = (
        "PatientBirthDate PatientSex PatientAge PatientSize PatientWeight StudyDate StudyTime SeriesDate SeriesTime "
        "AcquisitionDate AcquisitionTime ContentDate ContentTime AccessionNumber ReferringPhysicianName StudyID "
        "StudyDescription InstitutionName StationName DeviceSerialNumber OperatorsName ProtocolName "
        "PerformingPhysicianName RequestAttributesSequence IssuerOfPatientID OtherPatientIDs"
    )
    assert {keyword: ds.get(keyword) for keyword in removed.split() if ds.get(keyword)} == {}
    assert ds.StudyInstanceUID != HEADER.identity["StudyInstanceUID"]
    assert ds.FrameOfReferenceUID != HEADER.identity["FrameOfReferenceUID"]


def test_text_in_the_pixels_of_the_source_is_not_denied(tmp_path: Path) -> None:
    burned = replace(HEADER, public={**HEADER.public, "BurnedInAnnotation": "YES"})
    out = tmp_path / "s"
    written = write_ct_series(pixels(), geometry(), burned, out, uids=IDENTITY, provenance=PROVENANCE)
    assert pydicom.dcmread(written.paths[0]).BurnedInAnnotation == "YES"
    assert validator_errors(written.paths[0]) == []
