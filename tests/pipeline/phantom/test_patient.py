"""The synthetic chest: what it shows, where its slices lie, and that its zips are real CT."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import assume, given, settings, strategies as st
from typer.testing import CliRunner

from latentcache import InputError
from pipeline.phantom import PhantomPatient, PhantomSettings, make_patient, patient_zip, write_dataset
from pipeline.phantom.dicom import phantom_uid
from pipeline.phantom.patient import slice_profile
from pipeline.phantom.rasterise import Canvas, Ellipsoid, Grid, Material, Texture, Tube, slice_noise
from pipeline.phantom.trees import Growth, grow
from pipeline.volume import Volume, Window, resample_z

SMALL = {"size": 48, "n_thin": 40}


@pytest.fixture(scope="module")
def patient() -> PhantomPatient:
    return make_patient(5, 96, 60, "APE")


def _grid(pixel: float = 1.0, half: float = 15.0, dz: float = 0.5) -> Grid:
    axis = np.arange(-half, half + pixel / 2, pixel, dtype=np.float32)
    return Grid(axis, axis, np.arange(-half, half + dz / 2, dz, dtype=np.float32))


def _empty(grid: Grid) -> Canvas:
    shape = (len(grid.z), len(grid.y), len(grid.x))
    zero = np.zeros(shape, np.float32)
    return Canvas(grid, np.zeros(shape, np.float32), zero, zero)


def _sum(canvas: Canvas) -> float:
    return float(canvas.hu.sum()) * canvas.grid.pixel**2 * canvas.grid.dz


@given(radius=st.floats(2.0, 9.0), pixel=st.floats(0.6, 2.5), offset=st.floats(-0.5, 0.5))
@settings(max_examples=25, deadline=None)
def test_a_sphere_keeps_its_volume_at_any_pixel_size(radius: float, pixel: float, offset: float) -> None:
    assume(radius >= 1.5 * pixel)  # below, where the raster falls decides as much as the edge
    canvas = _empty(_grid(pixel))
    Ellipsoid((offset, -offset, offset), (radius, radius, radius), Material(1.0)).paint(canvas)
    # An edge blurred by sigma turns r^3 into r^3 + 3 r sigma^2; the painter's has a sigma of about a quarter pixel.
    allowed = max(0.08, 3.5 * (0.25 * pixel / radius) ** 2)
    assert _sum(canvas) == pytest.approx(4 / 3 * np.pi * radius**3, rel=allowed)


@pytest.mark.parametrize("end", [(10.0, 0.0, 0.0), (0.0, 0.0, 10.0), (7.0, 0.0, 7.0)])
@pytest.mark.parametrize("radius", [0.5, 1.0, 4.0])
def test_a_vessel_keeps_its_amount_of_contrast_even_below_a_pixel(
    end: tuple[float, float, float], radius: float
) -> None:
    length = 2 * float(np.linalg.norm(end))
    expected = np.pi * radius**2 * length + 4 / 3 * np.pi * radius**3
    found = []
    for shift in (0.0, 0.5, 1.0, 1.5):  # where the vessel lies between the pixels
        canvas = _empty(_grid(pixel=2.0, half=20.0))
        start, stop = (-end[0] + shift, shift, -end[2]), (end[0] + shift, shift, end[2])
        Tube(start, stop, radius, radius, Material(1.0)).paint(canvas)
        found.append(_sum(canvas))
    assert np.mean(found) == pytest.approx(expected, rel=0.2)


def test_textures_have_unit_variance_and_fit_across_blocks() -> None:
    rng = np.random.default_rng(0)
    texture = Texture.random(rng, (-60.0, -60.0, 0.0), (60.0, 60.0, 60.0), 4.0)
    axis = np.arange(-60, 60, 1.5, dtype=np.float32)
    z = np.arange(0, 60, 1.0, dtype=np.float32)
    whole = texture.sample(Grid(axis, axis, z))
    assert whole.std() == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(texture.sample(Grid(axis, axis, z[20:35])), whole[20:35], atol=1e-4)


def test_trees_follow_murrays_law_and_stay_inside() -> None:
    growth = Growth("artery", min_radius=0.5, max_segments=200)
    tree = grow(
        np.random.default_rng(1), (0, 0, 0), (1, 0, 0), 4.0, lambda x, y, z: x * x + y * y + z * z < 80**2, growth
    )
    assert len(tree) > 50
    assert all(np.linalg.norm(s.end) < 80 for s in tree)
    assert min(s.start_diameter_mm for s in tree) >= 1.0
    by_start: dict[tuple[float, float, float], list[float]] = {}
    for s in tree:
        by_start.setdefault(s.start, []).append(s.start_diameter_mm)
    complete = [(s, by_start[s.end]) for s in tree if len(by_start.get(s.end, [])) == 2]
    assert complete
    for parent, children in complete:
        assert sum(d**3 for d in children) == pytest.approx(parent.end_diameter_mm**3, rel=1e-6)


def test_noise_has_the_asked_sigma_is_white_in_z_and_has_a_kernel_spectrum() -> None:
    noise = slice_noise(np.random.default_rng(3), 24, 128, 0.7, 9.0, 0.3)
    assert noise.std() == pytest.approx(9.0, rel=0.03)
    between = np.mean(noise[1:] * noise[:-1]) / noise.var()
    assert abs(between) < 0.02
    power = np.abs(np.fft.fft2(noise)).mean(0) ** 2
    f = np.hypot(np.fft.fftfreq(128, 0.7)[:, None], np.fft.fftfreq(128, 0.7)[None])
    band = [power[(f >= lo) & (f < lo + 0.06)].mean() for lo in (0.0, 0.24, 0.64)]
    assert band[1] > 3 * band[0]
    assert band[1] > 3 * band[2]


@pytest.mark.parametrize(("fwhm", "spacing"), [(5.0, 5.0), (6.2, 5.0), (1.1, 1.0)])
def test_the_slice_profile_has_its_width(fwhm: float, spacing: float) -> None:
    z = np.linspace(-10, 10, 20001)
    h = slice_profile(z, fwhm, spacing)
    above = z[h >= h.max() / 2]
    assert above[-1] - above[0] == pytest.approx(fwhm, abs=0.1)


def test_the_two_series_share_a_plane_but_not_a_raster(patient: PhantomPatient) -> None:
    thin, thick = patient.thin.geometry, patient.thick.geometry
    assert thin.spacing_mm_zyx == pytest.approx((1.0, 320 / 96, 320 / 96))
    assert thick.spacing_mm_zyx == pytest.approx((5.0, 320 / 96, 320 / 96))
    low, high = thick.extent_mm
    assert thin.extent_mm[0] + 2.5 < low < high < thin.extent_mm[1] - 2.5
    assert patient.thin.hu.dtype == np.int16
    assert patient.thin.hu.min() >= -1024
    assert patient.thin.hu.max() <= 3071
    offsets = {round((make_patient(s, 16, 40).thick.geometry.z_mm[0] * 10) % 10) for s in range(5)}
    assert len(offsets) > 2


def test_thick_slices_are_the_thin_anatomy_under_the_profile(patient: PhantomPatient) -> None:
    thin_z, thick_z = np.asarray(patient.thin.geometry.z_mm), np.asarray(patient.thick.geometry.z_mm)
    weights = slice_profile(thin_z[None] - thick_z[:, None], 5.0, 5.0)
    averaged = np.tensordot(weights / weights.sum(1, keepdims=True), patient.thin_truth, axes=(1, 0))
    error = np.sqrt(np.mean((averaged - patient.thick_truth) ** 2))
    shifted = np.sqrt(np.mean((averaged[1:] - patient.thick_truth[:-1]) ** 2))
    assert error < 12
    assert shifted > 5 * error


def test_noise_is_on_top_of_the_truth(patient: PhantomPatient) -> None:
    middle = np.s_[:, 32:64, 32:64]
    for series, truth, sigma in ((patient.thin, patient.thin_truth, 9.0), (patient.thick, patient.thick_truth, 4.5)):
        inside = np.abs(truth[middle]) < 1000
        assert (series.hu[middle] - truth[middle])[inside].std() == pytest.approx(1.1 * sigma, rel=0.1)


def test_the_chest_has_the_hu_of_a_chest(patient: PhantomPatient) -> None:
    hu = patient.thin_truth
    assert np.mean((hu > -950) & (hu < -750)) > 0.12  # lung
    assert np.mean((hu > 20) & (hu < 130)) > 0.05  # muscle, heart, liver
    assert np.mean((hu > -130) & (hu < -60)) > 0.03  # fat
    assert np.mean(hu > 350) > 0.005  # bone
    assert hu[:, 0, 0].max() < -990  # air outside


def test_known_vessels_and_nodules_are_where_they_are_said_to_be() -> None:
    quiet = PhantomSettings(thin_sigma_hu=0.0, thick_sigma_hu=0.0)
    patient = make_patient(8, 160, 60, "non-APE", quiet)
    assert not patient.clots
    diameters = [s.start_diameter_mm for s in patient.vessels if s.kind == "artery"]
    assert min(diameters) < 1.5
    assert max(diameters) > 8
    lattice = np.linalg.inv(patient.thin.geometry.affine)
    hits, seen = 0, 0
    for s in patient.vessels:
        if s.kind != "artery" or s.end_diameter_mm < 3 or s.generation == 0:
            continue
        z, y, x, _ = np.rint(lattice @ np.append((np.asarray(s.start) + s.end) / 2, 1)).astype(int)
        if 0 <= z < 60:
            seen += 1
            hits += int(patient.thin_truth[z, y, x] > -500)  # lung is below -750
    assert seen > 5
    assert hits > 0.85 * seen
    for nodule in patient.nodules:
        assert nodule.volume_mm3 == pytest.approx(4 / 3 * np.pi * np.prod(nodule.radii))


def test_clots_lower_the_contrast_of_the_arteries_that_hold_them() -> None:
    quiet = PhantomSettings(thin_sigma_hu=0.0, thick_sigma_hu=0.0)
    patient = make_patient(8, 160, 60, "APE", quiet)
    assert patient.clots
    lattice = np.linalg.inv(patient.thin.geometry.affine)
    large = max(patient.clots, key=lambda c: c.diameter_mm)
    assert large.diameter_mm < large.vessel_diameter_mm
    z, y, x, _ = np.rint(lattice @ np.append((np.asarray(large.start) + large.end) / 2, 1)).astype(int)
    assert patient.thin_truth[z, y, x] < 180


def test_a_seed_is_a_patient(patient: PhantomPatient) -> None:
    again = make_patient(5, 96, 60, "APE")
    other = make_patient(6, 96, 60, "APE")
    np.testing.assert_array_equal(patient.thin.hu, again.thin.hu)
    np.testing.assert_array_equal(patient.thick.hu, again.thick.hu)
    assert np.mean(np.abs(patient.thin.hu.astype(float) - other.thin.hu)) > 20


def test_interpolation_leaves_something_to_win(patient: PhantomPatient) -> None:
    window = Window()
    thin_z, thick_z = np.asarray(patient.thin.geometry.z_mm), np.asarray(patient.thick.geometry.z_mm)
    inside = (thin_z > thick_z[0]) & (thin_z < thick_z[-1])
    truth = window.to_unit(patient.thin.hu[inside])
    cubic = window.to_unit(resample_z(patient.thick.hu, thick_z, thin_z[inside], "cubic"))
    clean = window.to_unit(patient.thin_truth[inside])

    def psnr(a: np.ndarray) -> float:
        return float(-10 * np.log10(np.mean((a - truth) ** 2) / 4))

    assert psnr(cubic) < psnr(clean) - 6


@given(n_thin=st.integers(10, 60), seed=st.integers(0, 10_000))
@settings(max_examples=6, deadline=None)
def test_any_depth_gives_a_thick_series_inside_the_thin_one(n_thin: int, seed: int) -> None:
    patient = make_patient(seed, 16, n_thin, "APE")
    thin, thick = patient.thin.geometry, patient.thick.geometry
    assert thin.shape_zyx[0] == n_thin
    assert thick.shape_zyx[0] >= 2
    assert thin.extent_mm[0] - 0.06 <= thick.extent_mm[0]
    assert thick.extent_mm[1] <= thin.extent_mm[1] + 0.06


@pytest.mark.parametrize("wrong", [{"size": 8}, {"n_thin": 5}, {"category": "other"}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, int | str]) -> None:
    with pytest.raises(InputError):
        make_patient(1, **{**SMALL, **wrong})  # type: ignore[arg-type]


def test_the_zip_is_ct_that_reads_back_to_the_volume(tmp_path: Path) -> None:
    patient = make_patient(3, 32, 30, "APE")
    path = tmp_path / "p.zip"
    path.write_bytes(patient_zip(patient.thick, patient.thin, "S0_APE_001", "made"))
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == b"made"
        assert all(i.compress_type == zipfile.ZIP_DEFLATED for i in archive.infolist())
        for folder, series in (("1/", patient.thick), ("2/", patient.thin)):
            names = [n for n in archive.namelist() if n.startswith(folder)]
            read = [pydicom.dcmread(io.BytesIO(archive.read(n))) for n in names]
            _assert_same(read, series)
            for name in (names[0], names[-1]):
                (tmp_path / "one.dcm").write_bytes(archive.read(name))
                result = subprocess.run(
                    [Path(sys.executable).parent / "dciodvfy", tmp_path / "one.dcm"],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert "Error" not in result.stdout + result.stderr
                assert "CTImage" in result.stdout + result.stderr


def _assert_same(read: list[pydicom.Dataset], series: Volume) -> None:
    assert len({d.SeriesInstanceUID for d in read}) == 1
    assert len({d.SOPInstanceUID for d in read}) == len(read)
    assert [d.InstanceNumber for d in read] == list(range(1, len(read) + 1))
    read = sorted(read, key=lambda d: float(d.ImagePositionPatient[2]))
    assert [d.InstanceNumber for d in read] == list(range(len(read), 0, -1))
    hu = np.stack([d.pixel_array.astype(int) * int(d.RescaleSlope) + int(d.RescaleIntercept) for d in read])
    np.testing.assert_array_equal(hu, series.hu)
    for i, d in enumerate(read):
        np.testing.assert_allclose(
            [float(v) for v in d.ImagePositionPatient], series.geometry.slice_position(i), atol=1e-5
        )
        assert d.PatientName.family_name == "PHANTOM"
    dz, dy, dx = series.geometry.spacing_mm_zyx
    assert float(read[0].SliceThickness) == pytest.approx(dz)
    assert [float(v) for v in read[0].PixelSpacing] == pytest.approx([dy, dx])


def test_uids_are_of_the_uuid_root_and_follow_the_label() -> None:
    uid = phantom_uid("a", 1)
    assert uid.is_valid
    assert uid.startswith("2.25.")
    assert uid == phantom_uid("a", 1) != phantom_uid("a", 2)


def test_a_dataset_is_made_once_and_never_over_other_files(tmp_path: Path) -> None:
    paths = write_dataset(tmp_path, patients=3, size=16, n_thin=20, seed=4)
    assert [str(p.relative_to(tmp_path)) for p in paths] == [
        "APE/patient_001.zip",
        "non-APE/patient_002.zip",
        "APE/patient_003.zip",
    ]
    before = [p.stat().st_mtime_ns for p in paths]
    paths[1].unlink()
    write_dataset(tmp_path, patients=3, size=16, n_thin=20, seed=4)
    assert [paths[i].stat().st_mtime_ns for i in (0, 2)] == [before[0], before[2]]
    with zipfile.ZipFile(paths[1]) as archive:
        recipe = json.loads(archive.comment)["ctpipe-phantom"]
    again = make_patient(recipe["seed"], recipe["size"], recipe["n_thin"], recipe["category"])
    assert paths[1].read_bytes().startswith(b"PK")
    assert again.category == "non-APE"
    with pytest.raises(InputError):
        write_dataset(tmp_path, patients=1, size=16, n_thin=21, seed=4)
    paths[0].write_bytes(b"a user's own file")
    with pytest.raises(InputError):
        write_dataset(tmp_path, patients=1, size=16, n_thin=20, seed=4)
    assert paths[0].read_bytes() == b"a user's own file"


def test_the_same_settings_give_the_same_bytes(tmp_path: Path) -> None:
    one = write_dataset(tmp_path / "a", patients=1, size=16, n_thin=20, seed=1)
    two = write_dataset(tmp_path / "b", patients=1, size=16, n_thin=20, seed=1)
    assert one[0].read_bytes() == two[0].read_bytes()


def test_the_command_writes_the_archives_layout(tmp_path: Path) -> None:
    import typer

    from cli.commands.phantom import register

    app = typer.Typer()
    register(app)
    out = tmp_path / "data"
    args = [str(out), "--patients", "2", "--size", "16", "--thin-slices", "20", "--json"]
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["written"] == 2
    assert sorted(p.name for p in out.glob("*/*.zip")) == ["patient_001.zip", "patient_002.zip"]
    dry = CliRunner().invoke(app, [str(tmp_path / "none"), "--dry-run", "--json"])
    assert dry.exit_code == 0
    assert not (tmp_path / "none").exists()
