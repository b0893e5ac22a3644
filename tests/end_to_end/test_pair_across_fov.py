"""Pairs across fields of view, archive to DICOM: on request alone, proved by pixels, no use to latent alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from diffusion.config import DataConfig
from diffusion.data.pairs import plan_pairs
from diffusion.sampling import Interpolator
from diffusion.sampling.stage import condition_of
from latentcache import InputError, LatentMeta, LatentStore, PairRecord
from pipeline.decode import DecodeSelection, DecodeSettings, WriteSettings, task as decode
from pipeline.encode import task as encode
from pipeline.encode.plan import EncodePlan
from pipeline.identity import PrivateStore
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.ingest.summary import IngestSummary
from pipeline.pairing import ON_REQUEST
from pipeline.phantom import PhantomPatient, PhantomSettings, make_patient
from pipeline.reading import read_series
from pipeline.volume import Window, resample_z
from tests.support.average_codec import AverageCodec
from tests.support.hospital import Scan, thick, thin, write_zip

WINDOW = Window(40, 400)
SIZE, WIDE_MM, SMALL_MM = 64, 2.5, 1.5
SMALL_CORNER = (-42.5, -55.0)
"""First pixel of the small field, x and y: off the middle, and off the wide field's raster."""


def at_pixels(image: NDArray[Any], pixel_mm: float, corner: Sequence[float]) -> NDArray[np.float32]:
    """Slices of the wide field at other pixel centres, by cubic splines: not by what is tested."""
    wide = -(SIZE - 1) / 2 * WIDE_MM
    x, y = ((c - wide + pixel_mm * np.arange(SIZE)) / WIDE_MM for c in corner)
    rows, columns = np.meshgrid(y, x, indexing="ij")
    return np.stack([map_coordinates(one.astype(np.float32), [rows, columns], order=3) for one in image])


def scans(number: int, patient: PhantomPatient, *, claimed_mm: float = SMALL_MM, corner_mm: float = 0.0) -> list[Scan]:
    """A wide thick series and a small thin one; what the thin header claims may be wrong."""
    ids: dict[str, Any] = {"study": f"1.2.{number}", "patient": f"PAT{number}", "frame": f"1.9.{number}"}
    wide = patient.thick.hu
    small = np.rint(at_pixels(patient.thin.hu, SMALL_MM, SMALL_CORNER)).clip(-1024, 3071).astype(np.int16)
    first = -(SIZE - 1) / 2 * WIDE_MM
    z_thick, z_thin = patient.thick.geometry.z_mm, patient.thin.geometry.z_mm
    corner = (SMALL_CORNER[0] + corner_mm, SMALL_CORNER[1])
    return [
        thick(f"1.2.{number}.5", n=len(wide), z0=z_thick[0], image=wide, pixel=WIDE_MM, origin=(first, first), **ids),
        thin(f"1.2.{number}.1", n=len(small), z0=z_thin[0], image=small, pixel=claimed_mm, origin=corner, **ids),
    ]


class World:
    """One anatomy three times: fields as they say; a wrong pixel spacing; a thin field that reaches beyond."""

    encode_key: str

    def __init__(self, root: Path) -> None:
        self.root = root
        patient = make_patient(1, size=SIZE, n_thin=45, settings=PhantomSettings(field_of_view_mm=SIZE * WIDE_MM))
        made = [scans(1, patient), scans(2, patient, claimed_mm=1.7), scans(3, patient, corner_mm=60.0)]
        for number, series in enumerate(made, start=1):
            write_zip(root / "data" / "APE" / f"{number}.zip", series)
        self.url = str(root / "store")
        self.codec = AverageCodec()

    def ingest(self, **options: Any) -> IngestSummary:
        store, private = open_stores(self.url)
        return ingest(str(self.root / "data"), store, private, IngestOptions(**options))

    @property
    def store(self) -> LatentStore:
        return LatentStore.open(self.url)

    @property
    def private(self) -> PrivateStore:
        return PrivateStore.open(self.url)

    def pair_of(self, number: int) -> PairRecord:
        key = self.private.keys.series(f"1.2.{number}.5")
        return next(pair for pair in self.store.pairs() if pair.thick_key == key)

    def encode(self) -> str:
        store = self.store
        key = store.register_encoding(encode.make_encoding(self.codec, WINDOW))
        tasks = list(EncodePlan(store, key, self.private.pointer))
        with store.writer() as writer:
            for task in tasks:
                done = encode.encode_one(self.codec, WINDOW, store.stage, encode.prepare(task, threads=1))
                if done.pair is not None:
                    writer.append_catalog([], [done.pair])
                writer.commit(done.records)
        return key


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CTPIPE_SECRET", raising=False)
        made = World(tmp_path_factory.mktemp("fields"))
        unasked = made.ingest()
        assert unasked.pairs == 0
        reasons = sorted(item.reason for item in unasked.set_aside)
        assert [ON_REQUEST in reason for reason in reasons] == [False, True, True]
        asked = made.ingest(pair_across_fov=True)
        assert (asked.archives, asked.pairs) == ({"unchanged": 3}, 2)
        assert [("beyond the thick one" in item.reason, item.kind) for item in asked.set_aside] == [(True, "patient")]
        assert made.ingest(rescan=True).pairs == 2, "what was asked for once stays"
        made.encode_key = made.encode()
        return made


def test_the_pixels_prove_the_true_field_and_refuse_the_wrong_one(world: World) -> None:
    true, wrong = world.pair_of(1), world.pair_of(2)
    assert true.across_fields
    assert (true.status, true.reason) == ("ok", "")
    assert wrong.status == "quarantined"
    assert "does not average to the thick one" in wrong.reason


def test_the_condition_is_the_thick_series_at_the_thin_ones_voxels(world: World) -> None:
    pair = world.pair_of(1)
    store, private = world.store, world.private
    records = [store.find(pair.pair_key, "thick_on_thin", world.encode_key), store.find(pair.thin_key, "thin")]
    condition, own = (record for record in records if record is not None)
    assert condition.shape == own.shape
    assert (condition.z0_mm, condition.dz_mm, condition.valid_zyx) == (own.z0_mm, own.dz_mm, own.valid_zyx)
    wide = read_series(private.pointer(pair.thick_key))
    sampled = at_pixels(wide.hu, SMALL_MM, SMALL_CORNER)
    z_thick, z_thin = wide.geometry.z_mm, read_series(private.pointer(pair.thin_key)).geometry.z_mm
    expected = WINDOW.to_unit(resample_z(sampled, np.array(z_thick), np.array(z_thin)))
    seen = world.codec.decode(np.asarray(store.read(condition), np.float32), condition.valid_zyx)
    blurred = world.codec.decode(world.codec.encode(expected, pad_multiple_zyx=(4, 32, 32)), condition.valid_zyx)
    assert np.corrcoef(np.ravel(seen), np.ravel(blurred))[0, 1] > 0.995
    assert store.find(world.pair_of(2).pair_key, "thick_on_thin") is None


def test_latent_alignment_leaves_such_pairs_out_and_says_how_many(world: World) -> None:
    store = world.store
    pixel, _ = plan_pairs(store, world.encode_key, DataConfig(alignment="pixel"), "all")
    assert [one.pair_key for one in pixel] == [world.pair_of(1).pair_key]
    latent, left_out = plan_pairs(store, world.encode_key, DataConfig(alignment="latent"), "all")
    assert len(latent) == 0
    assert [count for reason, count in left_out.items() if "field of view" in reason] == [1]
    model = cast(Interpolator, SimpleNamespace(alignment="latent", encode_key=world.encode_key, condition_role="thick"))
    with pytest.raises(InputError, match="differ in their fields of view"):
        condition_of(store, model, world.pair_of(1))


def test_a_generated_series_lies_on_the_thin_field(world: World, tmp_path: Path) -> None:
    store, pair = world.store, world.pair_of(1)
    row = store.find(pair.thin_key, "thin", world.encode_key)
    assert row is not None
    generated = store.generated("0" * 16, create=True)
    generated.register_encoding(store.encoding(world.encode_key))
    facts = {"z0_mm": row.z0_mm, "dz_mm": row.dz_mm, "valid_zyx": row.valid_zyx, "source_digest": "0" * 16}
    with generated.writer() as writer:
        staged = generated.stage(
            store.read(row), LatentMeta(encode_key=world.encode_key, key=pair.pair_key, role="thin", **cast(Any, facts))
        )
        writer.commit([staged])
    private = world.private
    tasks = decode.plan(
        store, private.pointer, private.identity, world.encode_key, DecodeSelection(generated=[generated])
    )
    (task,) = [replace(task, fit=None) for task in tasks]
    settings = DecodeSettings(WriteSettings(tmp_path, WINDOW))
    done = decode.decode_one(world.codec, decode.prepare(task, threads=1), settings=settings)
    assert done.figures["covered_slices"] >= 3
    assert done.figures["rms_after_hu"] < 2 * done.figures["noise_hu"] + 5
    first = pydicom.dcmread(sorted((tmp_path / task.key).iterdir())[0])
    assert list(first.PixelSpacing) == [SMALL_MM, SMALL_MM]
    assert [float(v) for v in first.ImagePositionPatient[:2]] == list(SMALL_CORNER)
