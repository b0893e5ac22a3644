"""A run measures the noise of its true thin slices when it begins, and the detail of its draws when it has trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import app
from diffusion.config import load_config
from latentcache import LatentStore
from pipeline.metrics import DetailPower, Texture
from pipeline.metrics.texture import BANDS, KINDS
from pipeline.workflows.training.texture import measure_draws, measure_noise
from tests.support.small_site import SMALL, Site


def settings_of(site: Site, run: Path) -> dict[str, Any]:
    return {"store": str(site.store), "run": str(run), "private": None, "vae": None}


@pytest.fixture(scope="module")
def site(trained_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return trained_site.copy(tmp_path_factory.mktemp("site"))


def test_a_run_has_measured_both(site: Site, tmp_path: Path) -> None:
    assert set(json.loads((site.run / "texture.json").read_text())) == {"power", "voxels", "detail_gain"}
    config, _ = load_config("tiny", None, [])
    latents = LatentStore.open(site.store)
    measure_noise(settings_of(site, tmp_path / "new"), config, latents)
    own = Texture.from_json((tmp_path / "new" / "texture.json").read_text())
    kept = Texture.from_json((site.run / "texture.json").read_text())
    np.testing.assert_array_equal(own.noise.power, kept.noise.power)
    assert (own.gain == 1).all()
    (tmp_path / "new" / "texture.json").write_text(kept.to_json())
    measure_noise(settings_of(site, tmp_path / "new"), config, latents)
    assert (tmp_path / "new" / "texture.json").read_text() == kept.to_json(), "a resumed run keeps what it has"


def test_the_gain_is_that_of_draws_on_held_out_pairs(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(site.run, run)
    voxels = np.full(KINDS, 10**6)
    seen = []

    def found(latents: Any, private: Any, vae: Any, key: str, draw: Any, start: Any, count: int) -> Any:
        pair = next(pair for pair in latents.pairs() if pair.split == "val")
        seen.append(draw(pair))
        return DetailPower(np.full((KINDS, BANDS), 1.44), voxels), DetailPower(np.ones((KINDS, BANDS)), voxels)

    monkeypatch.setattr("pipeline.evaluation.detail_of_draws", found)
    before = Texture.from_json((run / "texture.json").read_text())
    measure_draws(settings_of(site, run), load_config("tiny", None, [])[0], LatentStore.open(site.store), "cpu")
    after = Texture.from_json((run / "texture.json").read_text())
    np.testing.assert_array_equal(after.noise.power, before.noise.power)
    np.testing.assert_allclose(after.gain, np.where(np.arange(KINDS)[:, None] == 0, 1, 1.2) * np.ones((1, BANDS)))
    assert np.ndim(seen[0]) == 4


def test_without_archives_a_run_trains_and_says_so(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(site.store, store)
    shutil.rmtree(store / "private")
    words = ["train", store, tmp_path / "run", "--preset", "tiny", "--max-steps", 1, *SMALL]
    assert (app([str(word) for word in words], standalone_mode=False) or 0) == 0
    assert not (tmp_path / "run" / "texture.json").exists()
    assert "texture of thin slices" in capsys.readouterr().err
