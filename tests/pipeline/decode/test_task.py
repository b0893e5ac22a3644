"""From an archive through a store to DICOM, with a codec that is a plain average, so that every number is known."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from latentcache import InputError, LatentMeta, LatentStore
from pipeline.decode import (
    ComposeSettings,
    DecodeSelection,
    DecodeSettings,
    WriteSettings,
    parse_answer,
    task as decode,
)
from pipeline.decode.task import DecodeTask
from pipeline.encode import task as encode
from pipeline.encode.plan import EncodePlan
from pipeline.forward_model import Protocols, fit_pair
from pipeline.identity import PrivateStore
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.phantom import write_dataset
from pipeline.reading import read_series
from pipeline.volume import Geometry, Volume, Window, geometry_of
from pipeline.writing import read_provenance
from tests.support.average_codec import AverageCodec

WINDOW = Window(40, 400)


class World:
    def __init__(self, root: Path) -> None:
        write_dataset(root / "data", patients=4, size=32, n_thin=46, seed=3)
        self.url = str(root / "store")
        store, private = open_stores(self.url)
        ingest(str(root / "data"), store, private, IngestOptions())
        self.codec = AverageCodec()
        self.store = LatentStore.open(self.url)
        self.private = PrivateStore.open(self.url)
        encoding = encode.make_encoding(self.codec, WINDOW)
        self.encode_key = self.store.register_encoding(encoding)
        tasks = EncodePlan(self.store, self.encode_key, self.private.pointer)
        with self.store.writer() as writer:
            for task in list(tasks):
                done = encode.encode_one(self.codec, WINDOW, self.store.stage, encode.prepare(task, threads=1))
                if done.pair is not None:
                    writer.append_catalog([], [done.pair])
                writer.commit(done.records)

    def plan(self, with_identity: bool = False, **wanted: Any) -> list[DecodeTask]:
        series = {s.series_key: s for s in self.store.series()}
        read = functools.partial(read_series, threads=1)
        protocols = Protocols(self.store.pairs(), series, self.private.pointer, read)
        found: Iterator[DecodeTask] = decode.plan(
            self.store,
            self.private.pointer,
            self.private.identity,
            self.encode_key,
            DecodeSelection(**wanted),
            with_identity=with_identity,
            protocols=protocols,
        )
        return list(found)

    def generated(self, name: str, bias: float) -> LatentStore:
        """A generated store: the stored thin latents with a bias, as a model that has learnt everything but that."""
        out = self.store.generated(hashlib.sha256(name.encode()).hexdigest()[:16], create=True)
        out.register_encoding(self.store.encoding(self.encode_key))
        with out.writer() as writer:
            for pair in self.store.pairs():
                row = self.store.find(pair.thin_key, "thin", self.encode_key)
                assert row is not None
                staged = out.stage(
                    (self.store.read(row) + np.float16(bias)).astype(np.float16),
                    LatentMeta(
                        encode_key=self.encode_key,
                        key=pair.pair_key,
                        role="thin",
                        z0_mm=row.z0_mm,
                        dz_mm=row.dz_mm,
                        valid_zyx=row.valid_zyx,
                        source_digest="0" * 16,
                    ),
                )
                writer.commit([staged])
        return out


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def run(world: World, task: DecodeTask, out: Path, **options: Any) -> Any:
    restore = options.pop("restore_identity", False)
    compose = options.pop("compose", ComposeSettings())
    settings = DecodeSettings(WriteSettings(out, WINDOW, **options), compose, restore_identity=restore)
    return decode.decode_one(world.codec, decode.prepare(task, threads=1), settings=settings)


def test_a_stored_series_comes_back_on_its_own_lattice(world: World, tmp_path: Path) -> None:
    for task in world.plan():
        done = run(world, task, tmp_path)
        thin = next(s for s in world.store.series() if s.series_key == task.key)
        files = sorted((tmp_path / task.key).iterdir())
        assert len(files) == thin.n_slices == done.n_slices == 46
        at = geometry_of(thin)
        for i, path in enumerate(files):
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            np.testing.assert_allclose(ds.ImagePositionPatient, at.slice_position(i), atol=1e-4)
            np.testing.assert_allclose(ds.PixelSpacing, at.spacing_mm_zyx[1:], atol=1e-4)
        assert (ds.Rows, ds.Columns) == thin.shape_zyx[1:]
        assert read_provenance(ds)["kind"] == "decoded"


def test_a_stored_latent_is_written_as_the_plain_round_trip(world: World, tmp_path: Path) -> None:
    task = world.plan(split="test")[0]
    done = run(world, task, tmp_path)
    assert "rms_after_hu" not in done.figures
    at = decode.decoded_hu(world.codec, WINDOW, *task.latents[0])
    written = np.stack([pydicom.dcmread(p).pixel_array for p in sorted((tmp_path / task.key).iterdir())])
    seen = np.clip(written, WINDOW.lower, WINDOW.upper)
    # Inside the window nothing but the rounding of stored values.
    assert np.abs(seen - np.clip(at, WINDOW.lower, WINDOW.upper)).max() <= 0.5
    assert written.min() < WINDOW.lower - 400, "lung restored from the thick slices"
    thick_at = geometry_of(task.thick) if task.thick else None
    assert thick_at is not None
    low, high = thick_at.extent_mm
    z = np.asarray(task.target.z_mm)
    beyond = (z < low - 1e-6) | (z > high + 1e-6)
    assert written[beyond].min(initial=0) >= WINDOW.lower, "nothing was measured there"
    composed = DecodeSettings(WriteSettings(tmp_path / "composed", WINDOW), compose_stored=True)
    assert "rms_after_hu" in decode.decode_one(world.codec, decode.prepare(task), settings=composed).figures


def test_generated_slices_stay_within_what_was_measured(world: World, tmp_path: Path) -> None:
    (task,) = world.plan(generated=[world.generated("one", 0.0)], split="test")
    run(world, task, tmp_path)
    assert task.thick is not None
    low, high = geometry_of(task.thick).extent_mm
    z = [float(pydicom.dcmread(p).SliceLocation) for p in sorted((tmp_path / task.key).iterdir())]
    assert low - 1e-6 <= z[0]
    assert z[-1] <= high + 1e-6
    assert len(z) >= (high - low) / 1.0 - 1, "nothing measured is left out"
    ds = pydicom.dcmread(tmp_path / task.key / "00001.dcm")
    assert float(ds.SliceThickness) == task.thick.thickness_mm
    assert float(ds.SpacingBetweenSlices) == 1.0
    assert len(ds.SourceImageSequence) == task.thick.n_slices


def test_consistency_is_reported_and_a_bias_is_taken_back(world: World, tmp_path: Path) -> None:
    (task,) = world.plan(generated=[world.generated("biased", 0.2)], split="test")
    with_it = run(world, task, tmp_path / "with").figures
    without = run(world, task, tmp_path / "without", compose=ComposeSettings(consistency=False)).figures
    assert with_it["rms_after_hu"] < 0.5 * with_it["rms_before_hu"]
    assert "rms_after_hu" not in without
    assert task.fit is not None
    assert with_it["profile"] == str(task.fit.profile)
    assert with_it["rms_after_hu"] == pytest.approx(task.fit.noise_hu, rel=0.1)


def test_a_stated_thickness_that_is_not_the_profile_is_said(world: World, tmp_path: Path) -> None:
    (task,) = world.plan(generated=[world.generated("stated", 0.0)], split="test")
    assert task.fit is not None
    assert "stated_profile" not in run(world, task, tmp_path / "right").figures
    wrong = replace(task, fit=replace(task.fit, stated_rms_hu=4 * task.fit.noise_hu))
    said = run(world, wrong, tmp_path / "wrong").figures["stated_profile"]
    assert f"box {task.fit.thickness_mm:g} mm is not this protocol's slice profile" in said


def test_the_profile_is_fitted_on_other_patients_only(world: World) -> None:
    series = {s.series_key: s for s in world.store.series()}
    read = functools.partial(read_series, threads=1)
    pairs = world.store.pairs()
    mine = next(p for p in pairs if p.split == "test")
    protocols = Protocols(pairs, series, world.private.pointer, read)
    peers = protocols.peers(mine)
    assert peers
    assert {p.split for p in peers} == {"train"}
    assert mine.patient_key not in {p.patient_key for p in peers}
    fit = protocols.fit(mine)
    assert fit is not None
    assert fit.profile.fwhm_mm == pytest.approx(5.0, abs=0.6)
    assert abs(fit.profile.shift_mm) < 0.3
    own = fit_pair(read(world.private.pointer(mine.thin_key)), read(world.private.pointer(mine.thick_key)))
    assert fit.noise_hu == pytest.approx(own.noise_hu, rel=0.25)
    assert Protocols([mine], series, world.private.pointer, read).fit(mine) is None
    other_kernel = {**series, mine.thick_key: replace(series[mine.thick_key], kernel="other")}
    assert Protocols(pairs, other_kernel, world.private.pointer, read).fit(mine) is None


def test_a_peer_whose_archive_is_gone_does_not_count(world: World) -> None:
    series = {s.series_key: s for s in world.store.series()}

    def gone(_: object) -> Volume:
        raise InputError("no archive", expected="one", remedy="Bring it back.")

    protocols = Protocols(world.store.pairs(), series, world.private.pointer, gone)
    assert protocols.fit(world.store.pairs()[0]) is None


def test_samples_give_a_mean_and_an_uncertainty_series(world: World, tmp_path: Path) -> None:
    stores = [world.generated(name, bias) for name, bias in (("a", -0.02), ("b", 0.02))]
    (task,) = world.plan(generated=stores, split="test")
    off = ComposeSettings(consistency=False)
    done = run(world, task, tmp_path, uncertainty=True, compose=off)
    assert done.folders == (task.key, f"{task.key}-uncertainty")
    first = pydicom.dcmread(tmp_path / f"{task.key}-uncertainty" / "00010.dcm")
    spread = first.pixel_array * float(first.RescaleSlope)
    # Two samples 0.04 units apart: 8 HU, a standard deviation of 8 / sqrt(2).
    inside = pydicom.dcmread(tmp_path / task.key / "00010.dcm")
    hu = inside.pixel_array * float(inside.RescaleSlope) + float(inside.RescaleIntercept)
    soft = np.abs(hu - 40) < 60
    assert soft.sum() > 20
    assert np.median(spread[soft]) == pytest.approx(8 / np.sqrt(2), abs=0.8)
    assert "UNCERTAINTY" in list(first.ImageType)
    assert first.SeriesInstanceUID != inside.SeriesInstanceUID
    assert first.StudyInstanceUID == inside.StudyInstanceUID
    assert read_provenance(inside)["sampling"]["samples"] == 2


def test_identity_stays_out_unless_it_is_asked_for(world: World, tmp_path: Path) -> None:
    (task,) = world.plan(split="test", with_identity=True)
    (plain,) = world.plan(split="test")
    run(world, plain, tmp_path / "plain")
    run(world, task, tmp_path / "named", restore_identity=True)
    original = world.private.identity(task.source.series_key)
    raw = (tmp_path / "plain" / task.key / "00001.dcm").read_bytes()
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert str(original[keyword]).encode() not in raw, keyword
    named = pydicom.dcmread(tmp_path / "named" / task.key / "00001.dcm")
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert str(named[keyword].value) == original[keyword]
    assert named.SeriesInstanceUID != original["SeriesInstanceUID"]


def test_keys_and_splits_choose(world: World) -> None:
    everything = world.plan()
    assert len(everything) == 4
    assert [t.key for t in world.plan(keys=[everything[2].key])] == [everything[2].key]
    assert world.plan(keys=["0" * 16]) == []
    by_split = [t.key for split in ("train", "val", "test") for t in world.plan(split=split)]
    assert sorted(by_split) == sorted(t.key for t in everything)


def test_a_taken_folder_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    task = world.plan()[0]
    (tmp_path / task.key).mkdir()

    class Untouchable(AverageCodec):
        def decode(self, latent: Any, valid_zyx: Any) -> Any:
            raise AssertionError("decoded although the folder is taken")

    settings = DecodeSettings(WriteSettings(tmp_path, WINDOW))
    with pytest.raises(InputError, match="exists"):
        decode.decode_one(Untouchable(), decode.prepare(task, threads=1), settings=settings)


def test_an_extent_with_nothing_measured_is_refused(world: World) -> None:
    (task,) = world.plan(generated=[world.generated("far", 0.0)], split="test")
    prepared = decode.prepare(task, threads=1)
    away: Geometry = task.target.with_z(np.asarray(task.target.z_mm) + 5000)
    moved = replace(prepared, task=replace(task, target=away))
    settings = DecodeSettings(WriteSettings(Path("nowhere"), WINDOW))
    with pytest.raises(InputError, match="overlapping extents"):
        decode.decode_one(world.codec, moved, settings=settings)


def test_two_answers_from_one_run_each_said_in_dicom(world: World, tmp_path: Path) -> None:
    stores = [world.generated(name, bias) for name, bias in (("c", -0.02), ("d", 0.02))]
    (task,) = world.plan(generated=stores, split="test")
    off = ComposeSettings(consistency=False)
    both = run(world, task, tmp_path / "both", answer="both", compose=off)
    assert both.folders == (task.key, f"{task.key}-sample")
    mean, sample = (pydicom.dcmread(tmp_path / "both" / name / "00010.dcm") for name in both.folders)
    assert read_provenance(mean)["answer"] == "mean"
    assert read_provenance(sample)["answer"] == "sample"
    assert "(mean)" in mean.SeriesDescription
    assert "(sample)" in sample.SeriesDescription
    assert "mean over samples: for viewing" in mean.DerivationDescription
    assert "ONE sample of several: for measuring" in sample.DerivationDescription
    assert mean.SeriesInstanceUID != sample.SeriesInstanceUID
    soft = np.abs(mean.pixel_array * float(mean.RescaleSlope) + float(mean.RescaleIntercept) - 40) < 60
    # The first of two samples 0.04 units apart lies 4 HU below their mean.
    apart = (mean.pixel_array.astype(int) - sample.pixel_array) * float(mean.RescaleSlope)
    assert np.median(apart[soft]) == pytest.approx(4, abs=1)
    alone = run(world, task, tmp_path / "sample", answer="sample", compose=off)
    assert alone.folders == (task.key,)
    only = pydicom.dcmread(tmp_path / "sample" / task.key / "00010.dcm")
    np.testing.assert_array_equal(only.pixel_array, sample.pixel_array)
    assert read_provenance(only)["answer"] == "sample"


def test_an_answer_of_several_needs_several() -> None:
    assert parse_answer("mean", 1) == "mean"
    assert parse_answer("both", 2) == "both"
    with pytest.raises(InputError, match="sample of one sample"):
        parse_answer("sample", 1)
    with pytest.raises(InputError, match="mean, sample or both"):
        parse_answer("median", 8)


def test_every_generated_series_carries_a_certificate(world: World, tmp_path: Path) -> None:
    """In its figures, its provenance and its DerivationDescription; a tissue that is too small to be judged is said."""
    (task,) = world.plan(generated=[world.generated("certified", 0.0)], split="test")
    done = run(world, task, tmp_path)
    judged = done.figures["certificate"]
    assert set(judged["shift_hu"]) | set(judged["missing"]) == {"lung", "fat", "soft_tissue"}
    ds = pydicom.dcmread(tmp_path / task.key / "00005.dcm")
    assert read_provenance(ds)["consistency"]["certificate"] == judged
    assert judged["said"] in ds.DerivationDescription
    if judged["missing"]:
        assert "certificate not computed: too little" in ds.DerivationDescription


def test_an_alarm_map_lies_beside_the_sample_that_it_judges(world: World, tmp_path: Path) -> None:
    """The first of four samples is 16 HU off where the others differ by 4: a map in their spread, said in DICOM."""
    stores = [world.generated(f"alarm{k}", bias) for k, bias in enumerate((0.08, -0.02, 0.0, 0.02))]
    (task,) = world.plan(generated=stores, split="test")
    off = ComposeSettings(consistency=False)
    done = run(world, task, tmp_path, answer="sample", alarm_map=True, compose=off)
    assert done.folders == (task.key, f"{task.key}-alarm")
    (path,) = (tmp_path / f"{task.key}-alarm").iterdir()
    ds = pydicom.dcmread(path)
    assert read_provenance(ds)["kind"] == "alarm"
    derived = ds.SharedFunctionalGroupsSequence[0].DerivationImageSequence[0]
    assert "Fabrication alarm" in derived.DerivationDescription
    assert "fabrication alarm" in ds.SeriesDescription
    files = [pydicom.dcmread(f) for f in sorted((tmp_path / task.key).glob("*.dcm"))]
    hu = np.stack([f.pixel_array * float(f.RescaleSlope) + float(f.RescaleIntercept) for f in files])
    assert ds.pixel_array.shape == hu.shape
    # 16 HU over the hypot of a spread of 4 HU from three samples and the 2 HU of rounding is 3.2, and without
    # consistency the thick slices contradict it too.
    tissue = np.abs(hu - 56) < 40
    assert np.median(ds.pixel_array[tissue]) > 3
    (like,) = world.plan(generated=[stores[2], stores[1], stores[3]], split="test")
    run(world, like, tmp_path / "like", answer="sample", alarm_map=True, compose=off)
    (quiet,) = (tmp_path / "like" / f"{like.key}-alarm").iterdir()
    assert np.median(pydicom.dcmread(quiet).pixel_array[tissue]) < 1
    with pytest.raises(InputError, match="alarm map beside a mean"):
        run(world, task, tmp_path / "mean", answer="mean", alarm_map=True, compose=off)
    (few,) = world.plan(generated=stores[:2], split="test")
    with pytest.raises(InputError, match="alarm map of 2 samples"):
        run(world, few, tmp_path / "few", answer="sample", alarm_map=True, compose=off)
