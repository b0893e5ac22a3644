"""``--tiling sliding``: a key of its own, the same windows back, and exact stores untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from latentcache import InputError, LatentStore
from pipeline.encode import EncodeSettings
from pipeline.encode.store import load_encoder
from pipeline.identity import PrivateStore
from pipeline.reading import read_series
from pipeline.vae import SlidingVae, Tiling, as_encoded, load_decoder, load_vae, parse_tiling
from pipeline.vae.sliding_window import tiling_of

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def ctpipe(*words: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, words), "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    assert (done.return_value or 0) == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A store that holds one pair under both tilings: its path, the exact key and the sliding one."""
    root = tmp_path_factory.mktemp("tiling")
    store = root / "store"
    ctpipe("phantom", root / "data", "--patients", "1", "--size", "64", "--thin-slices", "68")
    ctpipe("ingest", root / "data", store)
    words = ("encode", store, "--engine", "inline", "--threads", "1", "--roles", "thin,thick", "--round-trip", "1")
    exact, slid = ctpipe(*words), ctpipe(*words, "--tiling", "sliding")
    assert exact["committed"] == slid["committed"] == 2
    return store, exact["encode_key"], slid["encode_key"]


def test_sliding_latents_have_a_key_of_their_own(encoded: tuple[Path, str, str]) -> None:
    path, exact, slid = encoded
    store = LatentStore.open(path)
    assert store.encoding(exact).extra == {}
    assert store.encoding(slid).extra == {"tiling": {"kind": "sliding", "window_zyx": [64, 64, 64], "overlap": 0.4}}
    found = ctpipe("diff", path, exact, slid)
    assert list(found["settings"]) == ["extra.tiling"]
    assert (found["common"], len(found["compared"]), found["incomparable"]) == (2, 2, [])
    assert all(1e-4 < one["relative"] < 0.5 for one in found["compared"])
    # Nothing was encoded over: a further run under either key finds all there.
    for tiling in ("exact", "sliding"):
        again = ctpipe("encode", path, "--engine", "inline", "--roles", "thin,thick", "--tiling", tiling)
        assert (again["planned"], again["already"]) == (0, 2)


def test_the_round_trip_is_that_of_the_windows(encoded: tuple[Path, str, str]) -> None:
    path, _, slid = encoded
    store = LatentStore.open(path)
    (record,) = store.records(slid, "thin")
    settings = EncodeSettings()
    unit = settings.window.to_unit(read_series(PrivateStore.open(str(path)).pointer(record.key)).hu)
    vae = load_vae("tiny")
    # 68 slices: two windows along depth, one in plane.
    latent = vae.encode_sliding(unit)
    held = store.read(record).astype(np.float32)
    assert np.abs(latent.numpy() - held).max() < 2e-3 * np.abs(held).max()
    decoded = vae.decode_sliding(torch.from_numpy(held), record.valid_zyx).numpy()
    psnr = 10 * np.log10(4 / np.mean((decoded - unit) ** 2))
    assert record.round_trip_psnr == pytest.approx(psnr, abs=0.01)


def test_what_was_encoded_in_windows_is_decoded_in_them(encoded: tuple[Path, str, str], tmp_path: Path) -> None:
    path, exact, slid = encoded
    store = LatentStore.open(path)
    encodings = [store.encoding(key) for key in (exact, slid)]
    plain, windowed = (load_decoder("cpu", spec="tiny", encoding=e) for e in encodings)
    assert not isinstance(plain, SlidingVae)
    assert isinstance(windowed, SlidingVae)
    latent = torch.randn(4, 20, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(windowed.decode(latent, (77, 32, 31)), windowed.vae.decode_sliding(latent, (77, 32, 31)))
    assert not torch.allclose(windowed.decode(latent, (77, 32, 31)), plain.decode(latent, (77, 32, 31)), atol=1e-4)
    done = ctpipe("decode", path, tmp_path / "out", "--to-dicom", "--encode-key", slid)
    assert len(done["written"]) == 1
    assert done["failed"] == {}


def test_settings_carry_the_windows_to_the_worker() -> None:
    settings = EncodeSettings(tiling=Tiling((32, 64, 64), 0.25))
    vae: Any = load_encoder("cpu", settings)
    assert vae.tiling == tiling_of(settings.extra) == Tiling((32, 64, 64), 0.25)
    assert as_encoded(vae.vae, {}) is vae.vae


def test_unknown_tilings_are_refused() -> None:
    assert parse_tiling("exact") is None
    with pytest.raises(InputError, match="exact or sliding"):
        parse_tiling("patches")
    with pytest.raises(InputError, match="newer ctpipe"):
        tiling_of({"tiling": {"kind": "spiral"}})
