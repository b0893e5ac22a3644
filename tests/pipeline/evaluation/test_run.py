"""Evaluating a store: resumed case by case, broken cases said, commands and both reports on the result."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentcache import Encoding, InputError, LatentMeta, LatentStore, PairRecord
from pipeline.decode import ComposeSettings
from pipeline.engines.workers import pin
from pipeline.evaluation import CaseWork, EvaluationSettings, evaluate_pairs, finish, load_views, run as evaluate_store
from pipeline.identity import PrivateStore
from pipeline.ingest import ingest
from pipeline.phantom import write_dataset
from pipeline.reading import read_series
from pipeline.refiner import Refiner, RefinerCard, RefinerConfig, save_refiner
from pipeline.volume import Window, resample_z
from pipeline.workflows import compare_runs, write_dataset_report, write_run_report
from tests.support.prepared import Script

WINDOW = Window()
SETTINGS = EvaluationSettings(WINDOW, "", ComposeSettings(), views=1, identity="one")


def latents_of(store: LatentStore, encode_key: str) -> Callable[[PairRecord], np.ndarray]:
    """The true latents in place of generated ones."""

    def latent(pair: PairRecord) -> np.ndarray:
        record = store.find(pair.thin_key, "thin", encode_key)
        assert record is not None
        return store.read(record)

    return latent


class BlockVae:
    """A codec whose latents are 4x4x4 means repeated over the channels: linear, exact enough to be scored."""

    sha256 = "00" * 32
    architecture: dict[str, Any] = {}  # noqa: RUF012

    def encode(self, unit: np.ndarray, pad_multiple_zyx: tuple[int, int, int] = (4, 4, 4)) -> torch.Tensor:
        pad = [(0, -n % 4) for n in unit.shape]
        full = np.pad(np.asarray(unit), pad, mode="edge")
        d, h, w = (n // 4 for n in full.shape)
        means = full.reshape(d, 4, h, 4, w, 4).mean(axis=(1, 3, 5))
        return torch.from_numpy(np.repeat(means[None], 4, axis=0).astype(np.float32))

    def decode(self, latent: np.ndarray, valid_zyx: tuple[int, int, int]) -> torch.Tensor:
        full = np.asarray(latent)[0].repeat(4, 0).repeat(4, 1).repeat(4, 2)
        d, h, w = valid_zyx
        return torch.from_numpy(np.ascontiguousarray(full[:d, :h, :w]))


class World:
    """A store of three phantom patients with latents of ``BlockVae``."""

    def __init__(self, folder: Path) -> None:
        write_dataset(folder / "archive", patients=3, size=64, n_thin=44, seed=1)
        self.url = str(folder / "store")
        self.private = PrivateStore.open(self.url, create=True)
        self.vae = BlockVae()
        store = LatentStore.create(self.url, secret_fingerprint=self.private.fingerprint)
        ingest(str(folder / "archive"), store, self.private)
        self.encoding = Encoding(vae_sha256=self.vae.sha256, vae_architecture={}, window_center=40, window_width=400)
        self.encode_key = store.register_encoding(self.encoding)
        self.pairs = sorted(store.pairs(), key=lambda p: p.pair_key)
        with store.writer() as writer:
            writer.commit([record for pair in self.pairs for record in self._latents(store, pair)])
        self.store = LatentStore.open(self.url)

    def _latents(self, store: LatentStore, pair: PairRecord) -> list[Any]:
        thick, thin = (read_series(self.private.pointer(k)) for k in (pair.thick_key, pair.thin_key))
        on_thin = resample_z(thick.hu, np.array(thick.geometry.z_mm), np.array(thin.geometry.z_mm))
        out = []
        for role, key, hu in (("thin", pair.thin_key, thin.hu), ("thick_on_thin", pair.pair_key, on_thin)):
            latent = self.vae.encode(WINDOW.to_unit(hu)).numpy().astype(np.float16)
            out.append(
                store.stage(
                    latent,
                    LatentMeta(
                        self.encode_key, key, role, thin.geometry.z_mm[0] + 1.5, 4.0, thin.hu.shape,  # type: ignore[arg-type]
                        source_digest="x", round_trip_psnr=30.0,
                    ),
                )
            )  # fmt: skip
        return out

    def truth_latent(self, pair: PairRecord) -> np.ndarray:
        return latents_of(self.store, self.encode_key)(pair)

    def run(self, folder: Path, latent: Any = None, first: int | None = None, **changes: Any) -> list[Any]:
        pin(1)  # as a stage does: sums are equal to the last bit for equal thread counts alone
        settings = replace(SETTINGS, encode_key=self.encode_key, **changes)
        generated = latent or self.truth_latent
        work = CaseWork(self.store, self.private, self.vae, generated, settings)  # type: ignore[arg-type]
        return list(evaluate_pairs(work, self.pairs[:first], folder))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run's folder with an evaluation of its test split."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "evaluation" / "test"
    cases = world.run(folder)
    facts = {"split": "test", "window_hu": [-160.0, 240.0], "encode_key": world.encode_key, "checkpoint_sha256": "ab",
             "generation_key": "cd", "snapshot": 1, "settings": {"sampling": {"seed": 0}}}  # fmt: skip
    (run / "run.json").write_text("{}", encoding="utf-8")
    return run, finish(folder, cases, facts)


def test_every_method_is_scored_on_every_pair(done: tuple[Path, dict[str, Any]]) -> None:
    _, document = done
    assert document["cases"] == document["patients"] == 3
    assert set(document["methods"]) == {
        "nearest", "linear", "cubic", "lanczos", "cubic_back_projection", "cubic_consistent", "condition_round_trip",
        "model", "vae_ceiling",
    }  # fmt: skip
    assert document["failures"] == {}
    assert document["methods"]["model"]["psnr_db"] > document["methods"]["nearest"]["psnr_db"]
    assert document["methods"]["vae_ceiling"].get("psnr_3072_db") is None, "outside its window a latent means nothing"
    assert document["against_cubic"]["model"]["patients"] == 3
    assert {"APE", "non-APE"} >= set(document["by_category"])
    said = [case["consistency"] for case in document["by_case"]]
    assert all("certificate" in one and isinstance(one["scanner"], str) for one in said), "judged by scanner"


def test_a_case_that_is_done_is_not_done_again(
    world: World, done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("evaluated again")

    folder = done[0] / "evaluation" / "test"
    before = world.run(folder)
    monkeypatch.setattr(evaluate_store, "_evaluate", refuse)
    assert world.run(folder) == before
    first = folder / "cases" / f"{world.pairs[0].pair_key}.json"
    kept = first.read_text(encoding="utf-8")
    first.write_text("{", encoding="utf-8")
    again = world.run(folder)
    assert ["AssertionError" in str(case.failures) for case in again] == [True, False, False], "only the torn one"
    assert first.read_text(encoding="utf-8") == "{", "a bug's failure is not kept: the next run tries it again"
    first.write_text(kept, encoding="utf-8")
    other = world.run(folder, identity="another checkpoint")
    assert all("AssertionError" in str(case.failures) for case in other)


_KILLED = """
import os, signal
from pathlib import Path
from tests.pipeline.evaluation.test_run import BlockVae, SETTINGS, latents_of
from latentcache.store import LatentStore
from pipeline.evaluation import CaseWork, evaluate_pairs
from pipeline.engines.workers import pin
from pipeline.identity.private_store import PrivateStore
from dataclasses import replace

pin(1)
store, private = LatentStore.open({url!r}), PrivateStore.open({url!r})
pairs = sorted(store.pairs(), key=lambda p: p.pair_key)
(encode_key,) = store.encode_keys()

def latent(pair):
    if pair.pair_key == pairs[1].pair_key:
        os.kill(os.getpid(), signal.SIGKILL)
    return latents_of(store, encode_key)(pair)

settings = replace(SETTINGS, encode_key=encode_key)
list(evaluate_pairs(CaseWork(store, private, BlockVae(), latent, settings), pairs, Path({out!r})))
"""


def test_a_killed_evaluation_goes_on_where_it_was(
    world: World, done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "e"
    script = _KILLED.format(url=world.url, out=str(out))
    assert Script(script).wait() == -signal.SIGKILL
    first = world.pairs[0].pair_key
    (kept,) = (out / "cases").iterdir()
    assert kept.name == f"{first}.json", "one case was done, and the one in work left nothing"
    asked = []

    def latent(pair: PairRecord) -> np.ndarray:
        asked.append(pair.pair_key)
        return world.truth_latent(pair)

    cases = world.run(out, latent)
    assert asked == [pair.pair_key for pair in world.pairs[1:]]
    assert finish(out, cases, {})["methods"] == done[1]["methods"]


def test_nan_and_missing_latents_are_said_by_case(world: World, tmp_path: Path) -> None:
    bad, missing, fine = (p.pair_key for p in world.pairs)

    def latent(pair: PairRecord) -> np.ndarray:
        if pair.pair_key == missing:
            raise InputError("no latent", expected="one", remedy="Sample it.")
        z = world.truth_latent(pair).copy()
        if pair.pair_key == bad:
            z[0, z.shape[1] // 2, 1, 1] = np.nan  # the ends may lie outside what the thick series covers
        return z

    cases = {case.key: case for case in world.run(tmp_path / "e", latent)}
    assert "no latent" in cases[missing].failures["model"]
    assert "non-finite voxels in the decoded model output" in cases[bad].failures["model"]
    assert "cubic" in cases[bad].scores, "what can be scored is"
    document = finish(tmp_path / "e", list(cases.values()), {})
    assert document["methods"]["model"]["cases"] == 1
    assert document["methods"]["model"]["psnr_db"] == pytest.approx(cases[fine].scores["model"]["psnr_db"])
    assert set(document["failures"]) == {bad, missing}


def test_latents_of_other_slices_or_spacing_are_said_by_case(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = world.run(tmp_path / "a", lambda pair: world.truth_latent(pair)[:, 1:], first=1)
    assert "a generated latent of shape (4, 10, 16, 16)" in first.failures["model"]
    assert "vae_ceiling" in first.scores
    find = world.store.find

    def stretched(key: str, role: Any, encode_key: str | None = None) -> Any:
        record = find(key, role, encode_key)
        return replace(record, dz_mm=2 * record.dz_mm) if record is not None and role == "thin" else record

    monkeypatch.setattr(world.store, "find", stretched)
    monkeypatch.setattr(world, "truth_latent", lambda pair: world.store.read(find(pair.thin_key, "thin")))
    (wide,) = world.run(tmp_path / "b", first=1)
    assert "2.000 mm apart" in wide.failures["vae_ceiling"]
    assert "model" in wide.scores


def test_a_thick_series_of_another_pixel_spacing_is_resampled_and_said(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = world.pairs[0]
    thick_pointer = world.private.pointer(pair.thick_key)

    def wider(pointer: Any) -> Any:
        volume = read_series(pointer)
        if pointer != thick_pointer:
            return volume
        affine = volume.geometry.affine.copy()
        affine[:3, 1:3] *= 1.25
        affine[:2, 3] *= 1.25  # centred on the origin, as the phantom is
        lattice = replace(volume.geometry, affine_lps=tuple(tuple(row) for row in affine.tolist()))
        return replace(volume, geometry=lattice)

    monkeypatch.setattr(evaluate_store, "read_series", wider)
    (case,) = world.run(tmp_path / "e", first=1)
    assert "resampled in-plane" in case.notes[0]
    assert "another pixel spacing" in case.notes[0]


def test_a_regression_network_stands_in_the_same_table(world: World, tmp_path: Path) -> None:
    """Untrained it back-projects cubic interpolation, and the consistency step then finds little to do."""
    card = RefinerCard(RefinerConfig(2, 1), (40.0, 400.0), (1.0, 1.0), "none", {})
    file = save_refiner(Refiner(card.config), card, tmp_path / "refiner.safetensors")
    (case,) = world.run(tmp_path / "e", first=1, regression=file)
    psnr = {name: score["psnr_db"] for name, score in case.scores.items()}
    near = sorted((psnr["cubic_back_projection"], psnr["cubic_consistent"]))
    assert near[0] - 0.2 < psnr["regression"] < near[1] + 0.2
    ratios = {name: case.scores[name]["consistency"]["ratio"] for name in ("cubic", "cubic_consistent", "regression")}
    assert ratios["cubic_consistent"] < ratios["cubic"]
    assert ratios["regression"] < ratios["cubic"]


def test_known_structures_of_phantoms_are_measured(done: tuple[Path, dict[str, Any]]) -> None:
    methods = done[1]["methods"]
    assert methods["nearest"]["vessel_count"] >= 1
    assert methods["nearest"]["vessel_missed"] <= methods["nearest"]["vessel_count"]
    assert abs(methods["nearest"]["vessel_truth_total_error"]) < 0.25
    assert methods["vae_ceiling"].get("vessel_count") is None, "beyond its window a latent means nothing"


def test_no_pair_is_an_error(world: World, tmp_path: Path) -> None:
    settings = EvaluationSettings(WINDOW, world.encode_key)
    with pytest.raises(InputError, match="no pair"):
        list(
            evaluate_pairs(CaseWork(world.store, world.private, world.vae, world.truth_latent, settings), [], tmp_path)
        )  # type: ignore[arg-type]


def test_the_viewers_volumes_are_kept(done: tuple[Path, dict[str, Any]]) -> None:
    views = load_views(done[0] / "evaluation" / "test")
    assert len(views) == 1
    assert {"truth", "linear", "model"} <= set(views[0].volumes)
    assert views[0].towards == "HPL", "the phantom lies on its back, head first"
    assert load_views(done[0] / "evaluation" / "test", keys=[]) == []


def test_the_run_report_has_what_was_measured(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    page = write_run_report(done[0], "test", tmp_path / "r.html").read_text(encoding="utf-8")
    assert "On 3 pairs of 3 patients of the test split, which no choice during training saw" in page
    assert "Cubic with back-projection" in page
    with pytest.raises(InputError, match="no evaluation"):
        write_run_report(done[0], "val", tmp_path / "r.html")


def test_two_runs_are_compared_within_patients(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, document = done
    other = tmp_path / "other"
    changed = json.loads(json.dumps(document))
    for case in changed["by_case"]:
        case["scores"]["model"]["psnr_db"] += 0.5
    changed["settings"] = {"sampling": {"seed": 1}}
    target = other / "evaluation" / "test"
    target.mkdir(parents=True)
    (target / "metrics.json").write_text(json.dumps(changed), encoding="utf-8")
    found = compare_runs(run, other, "test")
    assert found["common_pairs"] == 3
    assert found["model"]["psnr_db"]["difference"]["mean"] == pytest.approx(0.5)
    assert found["model"]["psnr_db"]["difference"]["low"] == pytest.approx(0.5)
    assert found["settings_differ"] == {"sampling.seed": [0, 1]}
    changed["window_hu"] = [-1000.0, 1000.0]
    (target / "metrics.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(InputError, match="windows"):
        compare_runs(run, other, "test")


def test_the_stores_report_shows_data_and_no_patient(world: World, tmp_path: Path) -> None:
    page = write_dataset_report(world.url, None, tmp_path / "s.html", 2).read_text(encoding="utf-8")
    assert "3 patients, 6 series, 3 usable thick/thin pairs" in page
    assert page.count("data:image/jpeg") == 4
    assert "30" in page
    assert "archive" not in page
    assert ".zip" not in page
    bare = write_dataset_report(world.url, str(tmp_path / "nowhere"), tmp_path / "b.html", 2)
    assert "out of reach" in bare.read_text(encoding="utf-8")
