"""`encode --augment`: mirrored training pairs, cached under keys of their own and drawn from by the trainer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import app
from diffusion.config import DataConfig
from diffusion.data import Batch, PairStream, ProcessShare
from latentcache import InputError, LatentStore
from latentcache.maintenance import status
from pipeline.identity import PrivateStore
from pipeline.reading import read_series
from pipeline.vae import load_vae
from pipeline.volume import Window
from tests.support.small_site import SMALL, Site

INLINE = ("--engine", "inline", "--threads", 1)


def ctpipe(*words: Any) -> int:
    return int(app([str(word) for word in words], standalone_mode=False) or 0)


@pytest.fixture(scope="module")
def site(trained_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """The trained site, whose first run stays, and mirrored pairs."""
    copied = trained_site.copy(tmp_path_factory.mktemp("site"))
    assert ctpipe("encode", copied.store, "--augment", "flip-x,flip-y", *INLINE) == 0
    return copied


@pytest.fixture(scope="module")
def keys(site: Site) -> dict[str, str]:
    store = LatentStore.open(site.store)
    return {store.encoding(key).mirrored: key for key in store.encode_keys()}


def test_what_is_cached_is_the_latent_of_the_mirrored_volume(site: Site, keys: dict[str, str]) -> None:
    assert set(keys) == {"", "x", "y"}
    store, vae = LatentStore.open(site.store), load_vae("tiny", "cpu")
    train = {pair.thin_key for pair in store.pairs() if pair.split == "train"}
    assert (
        {r.key for r in store.records(keys["x"], "thin")} == train != {r.key for r in store.records(keys[""], "thin")}
    )
    key = min(train)
    unit = Window().to_unit(read_series(PrivateStore.open(str(site.store)).pointer(key)).hu)
    plain = store.find(key, "thin", keys[""])
    assert plain is not None
    for axis, number in (("x", 3), ("y", 2)):
        record = store.find(key, "thin", keys[axis])
        assert record is not None
        latent = np.asarray(store.read(record), np.float32)
        flipped = np.ascontiguousarray(np.flip(unit, number - 1))
        expected = np.asarray(vae.encode(flipped, pad_multiple_zyx=store.encoding(keys[axis]).pad_multiple_zyx))
        np.testing.assert_allclose(latent, expected, rtol=6e-4, atol=1e-3)  # float16
        # The encoder's strided convolutions do not commute with a mirror, which is why volumes are mirrored.
        assert np.abs(np.flip(np.asarray(store.read(plain), np.float32), number) - expected).max() > 0.05


def stream(site: Site, split: Any = "train", augment: str = "flip-x,flip-y", **more: Any) -> PairStream:
    data = DataConfig(window=4, windows_per_volume=40, batch_size=4, readers=0, augment=augment)
    return PairStream(LatentStore.open(site.store), data, split=split, samples_per_step=4, share=ProcessShare(), **more)


def drawn(one: PairStream, steps: int | None = None) -> list[Batch]:
    batches: list[Batch] = []
    for step in one:
        batches += list(step.batches)
        if step.index + 1 == (steps or step.steps_in_epoch):
            return batches
    return batches


def test_a_sample_is_one_of_those_cached_and_its_condition_mirrors_alike(site: Site, keys: dict[str, str]) -> None:
    one = stream(site)
    assert not [reason for reason in one.left_out if "flip" in reason]
    store = LatentStore.open(site.store)
    pairs = {pair.pair_key: pair for pair in store.pairs()}
    whole: dict[tuple[str, str, str], np.ndarray[Any, Any]] = {}
    for axis, encode_key in keys.items():
        for record in store.records(encode_key):
            whole[axis, record.role, record.key] = np.asarray(store.read(record), np.float32)
    seen: Counter[str] = Counter()
    mean, std = (values[:, None, None, None] for values in (one.mean, one.std))
    for batch in drawn(one):
        for n, pair_key in enumerate(batch["pair_key"]):
            pair = pairs[pair_key]
            record = store.find(pair.thin_key, "thin", keys[""])
            assert record is not None
            first = round((float(batch["z_mm"][n, 0]) - record.z0_mm) / record.dz_mm)
            thin, condition = (batch[name][n].numpy() * std + mean for name in ("thin", "condition"))

            def matches(
                axis: str, thin: Any = thin, condition: Any = condition, pair: Any = pair, k: int = first
            ) -> bool:
                at = slice(k, k + 4)
                return np.allclose(thin, whole[axis, "thin", pair.thin_key][:, at], atol=1e-2) and np.allclose(
                    condition, whole[axis, "thick_on_thin", pair.pair_key][:, at], atol=1e-2
                )

            (axis,) = [axis for axis in keys if matches(axis)]
            seen[axis] += 1
    total = sum(seen.values())
    assert total == one.samples_per_epoch
    for axis in keys:
        # 80 samples or more at a third each: outside 0.15 to 0.52 once in a thousand times, and the draw is seeded.
        assert 0.15 < seen[axis] / total < 0.52


def test_the_draw_is_seeded_and_validation_is_as_it_was(site: Site) -> None:
    first, second = (drawn(stream(site, seed=3), 6) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one["thin"].equal(other["thin"])
    plain, augmented = (list(stream(site, "val", augment).fixed_batches()) for augment in ("", "flip-x"))
    for one, other in zip(plain, augmented, strict=True):
        assert one["thin"].equal(other["thin"])


def test_a_run_trains_on_them_and_everything_else_goes_on_with_the_volumes_as_they_are(
    site: Site, keys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", site.store, tmp_path / "run", "--preset", "tiny", "--max-steps", 2, *SMALL]
    assert ctpipe(*words, "--set", "data.augment=flip-x") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["encode_key"] == keys[""]
    capsys.readouterr()
    assert ctpipe("decode", site.store, tmp_path / "out", *INLINE, "--json") == 0
    written = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["written"]
    assert len(written) == 4
    with pytest.raises(InputError, match="encodings"):
        ctpipe("decode", site.store, tmp_path / "mirrored", *INLINE, "--encode-key", keys["x"])
    # Made again from the archives they come out the same: nothing is taken for another series' latents.
    assert ctpipe("verify", site.store, "--sources") == 0


def test_mirrored_pairs_of_another_refiner_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    refiners = iter(["a" * 64, "b" * 64])
    monkeypatch.setattr("diffusion.data.stream.only_refiner", lambda pairs: next(refiners))
    with pytest.raises(
        InputError, match="flip-x latents of refiner aaaaaaaaaaaa beside latents of refiner bbbbbbbbbbbb"
    ):
        stream(site, augment="flip-x")


def test_status_counts_what_mirrored_encodings_lack_of_the_training_split(site: Site, keys: dict[str, str]) -> None:
    found = status(LatentStore.open(site.store))["encodings"]
    assert {key: (row["mirrored"], row["series_missing"]) for key, row in found.items()} == {
        key: (axis, 0) for axis, key in keys.items()
    }


def test_what_is_not_there_is_said(trained_site: Site, site: Site) -> None:
    with pytest.raises(InputError, match=r"without mirrored latents of .*Run `ctpipe encode STORE --augment flip-y`"):
        stream(trained_site, augment="flip-y")
    with pytest.raises(InputError, match="flip-z"):
        stream(site, augment="flip-z")
    with pytest.raises(InputError, match="augmentation flip-z"):
        ctpipe("encode", site.store, "--augment", "flip-z", *INLINE)
