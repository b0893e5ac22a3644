"""Refine, then diffuse: encode, train, decode, interpolate and evaluate from a refiner's slices, by command."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.main import app
from cli.output import Exit
from diffusion.runs import RunCard
from latentcache import InputError, LatentStore
from latentcache.maintenance import refiner_of_digest
from pipeline.decode import ComposeSettings, compose
from pipeline.identity import PrivateStore
from pipeline.reading import read_series
from pipeline.refiner import (
    START_NAME,
    Refiner,
    RefinerCard,
    RefinerConfig,
    RefinerFile,
    load_pretrained,
    refined_volume,
    save_refiner,
)
from pipeline.volume import Window, geometry_of
from pipeline.volume.window import BLEND_FRACTION
from pipeline.workflows import start_of
from tests.support.small_site import BRIEF, MODEL, Site as SmallSite

WINDOW = Window()
INLINE = ("--engine", "inline", "--threads", 1)
# A rate of nothing: the model gives its condition back, so that what is written is known.
SETS = (*(f"model.{one}" for one in MODEL), *BRIEF, "images_every=0", "optimiser.learning_rate=1e-12")
SMALL = tuple(word for key in SETS for word in ("--set", key))


@dataclass
class Site:
    archive: Path
    store: Path
    run: Path
    refiner: Path
    other: Path


def ctpipe(*words: Any) -> int:
    return int(app([str(word) for word in words], standalone_mode=False) or 0)


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return loaded


def made(folder: Path, seed: int, window: tuple[float, float] = (40.0, 400.0), detail: str = "none") -> Path:
    """A refiner that changes slices by some HU at random."""
    torch.manual_seed(seed)
    network = Refiner(RefinerConfig(width=4, blocks=1))
    torch.nn.init.normal_(network.leave.weight, std=0.02)
    save_refiner(network, RefinerCard(network.config, window, (0.5, 2.0), detail), folder / "refiner.safetensors")
    return folder


@pytest.fixture(scope="module")
def site(ingested_site: SmallSite, tmp_path_factory: pytest.TempPathFactory) -> Site:
    root = tmp_path_factory.mktemp("site")
    ingested = ingested_site.copy(root)
    here = Site(ingested.archive, ingested.store, root / "run", made(root / "one", 0), made(root / "other", 1))
    assert ctpipe("encode", here.store, "--vae", "tiny", "--refiner", here.refiner, *INLINE) == Exit.OK
    ctpipe("train", here.store, here.run, "--preset", "tiny", "--refiner", here.refiner, "--max-steps", 1, *SMALL)
    return here


def rows(store: Path) -> list[Any]:
    return LatentStore.open(str(store)).records(role="refined_on_thin")


def test_refined_slices_are_encoded_once_a_pair_and_name_their_refiner(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sha256, other = (RefinerFile.of(folder).sha256 for folder in (site.refiner, site.other))
    store = tmp_path / "store"
    shutil.copytree(site.store, store)
    first = rows(store)
    assert {row.key for row in first} == {pair.pair_key for pair in LatentStore.open(str(store)).pairs()}
    assert {refiner_of_digest(row.source_digest) for row in first} == {sha256}
    capsys.readouterr()
    assert ctpipe("encode", store, "--refiner", site.refiner, "--json", *INLINE) == Exit.OK
    assert result(capsys)["planned"] == 0
    assert ctpipe("encode", store, "--refiner", site.other, "--json", *INLINE) == Exit.QUARANTINED
    assert (result(capsys)["stale"], {row.sha256 for row in rows(store)}) == (4, {row.sha256 for row in first})
    assert ctpipe("encode", store, "--refiner", site.other, "--refresh", "--json", *INLINE) == Exit.OK
    assert result(capsys)["retired"] == 4
    assert {refiner_of_digest(row.source_digest) for row in rows(store)} == {other}
    words = ("--checkpoint", site.run, "--vae", "tiny", "--json", *INLINE)
    assert ctpipe("decode", store, tmp_path / "out", *words) == Exit.QUARANTINED
    failed = result(capsys)["failed"]
    assert len(failed) == 4
    assert all("by the refiner that the model was trained with" in reason for reason in failed.values())


def test_what_is_written_is_the_refined_volume_and_the_models_change(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert ctpipe("evaluate", site.store, site.run, "--split", "test", "--json") == Exit.OK
    methods = result(capsys)["methods"]
    assert methods["model"]["psnr_db"] == pytest.approx(methods["refined"]["psnr_db"], abs=1e-3)
    assert methods["refined"]["psnr_db"] != pytest.approx(methods["cubic_consistent"]["psnr_db"], abs=1e-3)
    words = ("--checkpoint", site.run, "--split", "test", "--to-dicom", "--json")
    assert ctpipe("decode", site.store, tmp_path / "out", *words, *INLINE) == Exit.OK
    ((key, figures),) = result(capsys)["written"].items()
    file = RefinerFile.of(site.run / START_NAME)
    assert figures["start_refiner_sha256"] == file.sha256 == RefinerFile.of(site.refiner).sha256
    latents = LatentStore.open(str(site.store))
    (pair,) = (p for p in latents.pairs() if p.pair_key == key)
    series = {s.series_key: s for s in latents.series()}
    thick = read_series(PrivateStore.open(str(site.store)).pointer(pair.thick_key))
    target = geometry_of(series[pair.thin_key])
    refined = refined_volume(file, thick, np.asarray(target.z_mm), WINDOW)
    plain = ComposeSettings(consistency=False)
    alone, _ = compose(refined, WINDOW, plain.measured(thick, target), plain, condition_hu=refined, base_hu=refined)
    margin = BLEND_FRACTION * WINDOW.width
    apart = np.minimum(np.abs(refined - WINDOW.lower), np.abs(refined - WINDOW.upper)) > margin
    assert np.abs(alone - refined)[apart].max() <= 1, "no change is no change, beyond the window too"
    assert np.abs(alone - refined).max() < margin


def test_interpolate_refines_the_study_first(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (zipped, *_) = sorted(site.archive.rglob("*.zip"))
    capsys.readouterr()
    for spacing in (1.0, 2.5):
        words = ("--checkpoint", site.run, "--spacing-mm", spacing, "--json")
        assert ctpipe("interpolate", zipped, tmp_path / str(spacing), *words) == Exit.OK
        assert result(capsys)["start_refiner_sha256"] == RefinerFile.of(site.refiner).sha256


def test_a_run_keeps_its_refiner_and_takes_no_other(site: Site, tmp_path: Path) -> None:
    card = RunCard.read(site.run)
    assert card.refiner_sha256 == RefinerFile.of(site.refiner).sha256
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(site.run / "run.json", run)
    with pytest.raises(InputError, match="is not there"):
        start_of(run, "cpu")
    shutil.copy(site.other / "refiner.safetensors", run / START_NAME)
    with pytest.raises(InputError, match="is another refiner"):
        start_of(run, "cpu")
    new, few = tmp_path / "new", ("--preset", "tiny", "--max-steps", 1, "--set", "validation.every_epochs=0", *SMALL)
    with pytest.raises(InputError, match="where the run's latents are"):
        ctpipe("train", site.store, new, "--refiner", site.other, *few)
    assert ctpipe("train", site.store, new, "--refiner", site.refiner, *few) == Exit.OK
    assert start_of(new, "cpu") is not None, "the refiner of the attempt that was refused is not kept"


def test_what_cannot_be_refined_is_refused_before_work(site: Site, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without a refiner"):
        ctpipe("encode", site.store, "--roles", "thin,refined_on_thin", *INLINE)
    with pytest.raises(InputError, match="a refiner for the window 0:2000"):
        ctpipe("encode", site.store, "--refiner", made(tmp_path / "wide", 0, (0.0, 2000.0)), *INLINE)
    with pytest.raises(InputError, match=r"a refiner of a model's output"):
        ctpipe("encode", site.store, "--refiner", made(tmp_path / "late", 0, detail="residual"), *INLINE)


def test_a_store_without_refined_latents_is_no_store_for_such_a_run(site: Site, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ctpipe("ingest", site.archive, store)
    ctpipe("encode", store, "--vae", "tiny", "--roles", "thin,thick_on_thin", *INLINE)
    with pytest.raises(InputError, match="no refined_on_thin latent yet"):
        ctpipe("train", store, tmp_path / "run", "--refiner", site.refiner, "--set", "validation.every_epochs=0")
    with pytest.raises(InputError, match="without a refined latent"):
        ctpipe("train", store, tmp_path / "run", "--preset", "tiny", "--refiner", site.refiner)
    with pytest.raises(InputError, match="without the refiner"):
        ctpipe("train", store, tmp_path / "run2", "--preset", "tiny", "--set", "data.start=refined")


def test_a_model_that_ships_serves_as_the_refiner_and_its_card_goes_along(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing but the diffusion model is trained; the run then needs the package no more."""
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(site.store, store)
    shipped = load_pretrained("fast")
    assert ctpipe("encode", store, "--refiner", "fast", "--refresh", *INLINE) == Exit.OK
    assert {refiner_of_digest(row.source_digest) for row in rows(store)} == {shipped.sha256}
    ctpipe("train", store, run, "--preset", "tiny", "--refiner", "fast", "--max-steps", 1, *SMALL)
    assert RunCard.read(run).refiner_sha256 == shipped.sha256
    start = start_of(run, "cpu")
    assert start.path == str(run / START_NAME)
    assert start.pretrained.card == replace(shipped.card, raw=start.pretrained.card.raw)
    capsys.readouterr()
    words = ("--checkpoint", run, "--split", "test", "--to-dicom", "--json")
    assert ctpipe("decode", store, tmp_path / "out", *words, *INLINE) == Exit.OK
    ((_, figures),) = result(capsys)["written"].items()
    assert figures["start_refiner_sha256"] == shipped.sha256
    (run / START_NAME).with_suffix(".json").write_text("{}")
    with pytest.raises(InputError, match="without a card"):
        assert start_of(run, "cpu").pretrained


def test_another_refiner_begun_in_the_same_folder_leaves_no_card_of_a_shipped_one(site: Site, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / START_NAME).with_suffix(".json").write_text("{}")  # of an attempt that never began
    ctpipe("train", site.store, run, "--preset", "tiny", "--refiner", site.refiner, "--max-steps", 1, *SMALL)
    assert start_of(run, "cpu").pretrained is None
