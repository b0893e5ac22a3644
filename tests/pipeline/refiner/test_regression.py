"""The regression baseline: trained on the training split for a model's time, refused where it has seen too much."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data import make_store
from latentcache import InputError, LatentStore
from pipeline.decode import ComposeSettings, compose
from pipeline.phantom import make_patient
from pipeline.refiner import (
    Refiner,
    RefinerCard,
    RefinerCase,
    RefinerConfig,
    RefinerFile,
    check_same_split,
    regression_facts,
    save_refiner,
    training_pairs,
    training_recipe,
)
from pipeline.volume import Geometry, Volume, Window, interpolated
from pipeline.workflows import RefinerSource, RegressionJob
from pipeline.workflows.training import regression as command


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return make_store(tmp_path / "s", splits=("train", "train", "test"), depths=(8,), side=16)


def written(folder: Path, recipe: dict[str, Any], detail: str = "none") -> RefinerFile:
    card = RefinerCard(RefinerConfig(2, 1), (40.0, 400.0), (1.0, 1.0), detail, recipe)
    return save_refiner(Refiner(card.config), card, folder / "refiner.safetensors")


def test_facts_say_what_it_saw(store: LatentStore, tmp_path: Path) -> None:
    keys = training_pairs(store.pairs())
    assert len(keys) == 2
    facts = regression_facts(written(tmp_path, training_recipe(store, keys, 12.34, 56, 7)))
    assert facts["seconds"] == 12.3
    assert facts["pairs"] == 2
    assert facts["parameters"] == sum(p.numel() for p in Refiner(RefinerConfig(2, 1)).parameters())


def test_a_refiner_of_a_models_output_is_no_baseline(store: LatentStore, tmp_path: Path) -> None:
    recipe = training_recipe(store, [], 1, 1, 0)
    for file in (written(tmp_path / "a", recipe, "residual"), written(tmp_path / "b", {"steps": 3})):
        with pytest.raises(InputError, match="no regression baseline"):
            regression_facts(file)


def test_a_network_that_saw_what_it_is_judged_on_is_refused(store: LatentStore, tmp_path: Path) -> None:
    pairs = store.pairs()
    test = [p for p in pairs if p.split == "test"]
    good = written(tmp_path / "a", training_recipe(store, training_pairs(pairs), 1, 1, 0))
    check_same_split(good, store, test)
    everything = written(tmp_path / "b", training_recipe(store, [p.pair_key for p in pairs], 1, 1, 0))
    with pytest.raises(InputError, match="other pairs than the training split"):
        check_same_split(everything, store, test)
    moved = replace(next(p for p in pairs if p.split == "train"), split="test")
    with pytest.raises(InputError, match="1 of the patients' pairs"):
        check_same_split(good, store, [moved])
    elsewhere = {**training_recipe(store, ["x"], 1, 1, 0), "store_fingerprint": "another"}
    check_same_split(written(tmp_path / "c", elsewhere), store, test)


def test_a_runs_time_is_that_of_its_steps(tmp_path: Path) -> None:
    rows = [
        {"kind": "train", "step": 10, "step_s": 0.5},
        {"kind": "validation", "step": 10, "val_loss": 1.0},
        {"kind": "train", "step": 30, "step_s": 0.25},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    assert command.seconds_of(tmp_path) == pytest.approx(10)
    with pytest.raises(InputError, match="without a logged"):
        command.seconds_of(tmp_path / "none")


def test_a_short_training_already_beats_interpolation(
    store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixty steps on a phantom: the written network lowers the error of the interpolation that it is given."""
    patient = make_patient(3, 48, 60)
    z = np.array(patient.thin.geometry.z_mm)
    low, high = patient.thick.geometry.extent_mm
    kept = slice(int(np.argmax(z >= low)), int(np.argmax(z > high)) or len(z))
    lattice: Geometry = patient.thin.geometry.with_z(z[kept])
    case = RefinerCase("s", Volume(patient.thin.hu[kept], lattice), patient.thick)
    monkeypatch.setattr(RefinerSource, "case", lambda self, key: case)
    monkeypatch.setattr("pipeline.identity.private_store.PrivateStore.open", lambda *_: None)
    (tmp_path / "run").mkdir()
    job = RegressionJob(
        str(store.url), tmp_path / "run", steps=60, width=8, blocks=1, patch=(8, 32, 32), learning_rate=3e-3
    )
    said = command.train_regression(job)
    assert said["pairs"] == 2
    assert said["steps"] == 60
    base = interpolated(case.thick, lattice, "cubic")
    how = ComposeSettings("absolute", False, refiner=RefinerFile.of(tmp_path / "run"))
    better, _ = compose(base, Window(), how.measured(case.thick, lattice), how)

    def mse(volume: np.ndarray) -> float:
        return float(np.mean((np.clip(volume, -160, 240) - np.clip(case.thin.hu, -160, 240)) ** 2))

    assert mse(better) < 0.97 * mse(base)
