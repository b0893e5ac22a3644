"""What the guide prints works as printed: its YAML, its `generate`, and a tuned decoder on cached latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch

from cli.output import Exit
from ctpipe import Interpolator, load_vae
from diffusion.losses import VGG19Features
from diffusion.runs import LOG, read_log
from latentcache import LatentStore
from pipeline.writing import read_provenance
from tests.cli.commands.test_decode import (
    ctpipe,
    result,
    site,  # noqa: F401 - a fixture
)
from tests.diffusion.config.test_classic_yaml import GUIDE
from tests.pipeline.vae.test_finetune import tuned_from_tiny
from tests.support.small_site import BRIEF, Site

SMALL = ["model.width=8", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.groups=4", "model.heads=2",
         "model.time_embedding=16", "validation.images_every=0", "losses.every=1", *BRIEF]  # fmt: skip


def sets(*keys: str) -> list[str]:
    return [word for key in keys for word in ("--set", key)]


def test_the_guides_yaml_trains_on_an_ingested_and_encoded_archive(
    site: Site,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Both image losses run, on random VGG19 weights; only the network is made smaller than the guide's 599M."""
    config, vgg, run = tmp_path / "guide.yaml", tmp_path / "vgg19.pth", tmp_path / "run"
    config.write_text(GUIDE)
    torch.manual_seed(0)
    torch.save(VGG19Features().state_dict(), vgg)
    capsys.readouterr()
    small = sets(*SMALL, f"losses.vgg19_weights={vgg}")
    code = ctpipe("train", site.store, run, "--config", config, "--max-steps", 2, "--gpus", 0, *small, "--json")
    captured = capsys.readouterr()
    done = json.loads(captured.out.strip().splitlines()[-1])
    assert (code, done["steps"], done["stopped_by"]) == (Exit.OK, 2, "max-steps")
    assert np.isfinite(done["loss"])
    notes = " ".join(captured.err.split())
    assert "note: unet_model_channels became model.width = 192" in notes
    assert "run `ctpipe ingest /data/APE STORE`, then `ctpipe encode STORE --vae" in notes
    kept = json.loads((run / "config.json").read_text())
    assert (kept["preset"], kept["optimiser"]["samples_per_step"]) == ("classic", 16)
    assert (kept["losses"]["ms_ssim_weight"], kept["losses"]["perceptual_weight"]) == (0.1, 0.1)
    rows = [row for row in read_log(run / LOG) if row["kind"] == "train"]
    assert len(rows) == 2
    assert any(row["perceptual"] > 0 and row["ms_ssim"] > 0 for row in rows), "but where the noise left too little"


def test_generate_through_the_shipped_vae_gives_slices(site: Site) -> None:  # noqa: F811
    model = Interpolator.load(site.run, codec=load_vae("tiny"))
    thick = np.random.default_rng(0).uniform(-1, 1, (5, 32, 32)).astype(np.float32)
    thin = model.generate(thick, num_inference_steps=1, target_depth=30)
    assert (thin.shape, thin.dtype) == ((30, 32, 32), np.float32)
    assert float(np.abs(thin).max()) <= 1


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned_from_tiny(tmp_path_factory.mktemp("vae") / "tuned.safetensors")


def test_a_tuned_decoder_decodes_the_stores_latents(
    site: Site,  # noqa: F811
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Encoding with its file finds every latent there; decoding differs, and says in DICOM which decoder it was."""
    capsys.readouterr()
    before = LatentStore.open(str(site.store)).records()
    assert ctpipe("encode", site.store, "--vae", tuned, "--engine", "inline", "--threads", 1) == Exit.OK
    assert LatentStore.open(str(site.store)).records() == before, "the encode key names the encoder"
    series = next(r.key for r in before if r.role == "thin")
    written: dict[str, Any] = {}
    for name, spec in (("shipped", "tiny"), ("tuned", tuned)):
        capsys.readouterr()
        words = ["--to-dicom", "--engine", "inline", "--series", series, "--vae", spec, "--json"]
        assert ctpipe("decode", site.store, tmp_path / name, *words) == Exit.OK
        folder = tmp_path / name / series
        written[name] = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    shipped, other = written["shipped"][5], written["tuned"][5]
    decoder = load_vae(tuned).file_sha256
    assert "decoder_sha256" not in read_provenance(shipped)
    assert read_provenance(other)["decoder_sha256"] == decoder
    assert read_provenance(other)["vae_sha256"] == read_provenance(shipped)["vae_sha256"]
    assert f"decoder {decoder[:16]}" in other.DerivationDescription
    assert other.SeriesInstanceUID != shipped.SeriesInstanceUID
    assert not np.array_equal(other.pixel_array, shipped.pixel_array)


def test_a_tuned_decoder_evaluates_trains_and_interpolates(
    site: Site,  # noqa: F811
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    words = ["--split", "test", "--steps", 1, "--threads", 1, "--json"]
    assert ctpipe("evaluate", site.store, site.run, *words, "--vae", "tiny") == Exit.OK
    shipped = result(capsys)
    assert ctpipe("evaluate", site.store, site.run, *words, "--vae", tuned) == Exit.OK
    other = result(capsys)
    assert other != shipped, "scores of another decoder are not taken from those kept"
    with_losses = sets(*SMALL, "losses.ms_ssim_weight=0.1")
    options = ["--preset", "tiny", "--max-steps", 1, "--gpus", 0, "--vae", tuned]
    assert ctpipe("train", site.store, tmp_path / "run", *options, *with_losses) == Exit.OK
    archive = sorted(site.archive.rglob("*.zip"))[0]
    words = ["--checkpoint", site.run, "--vae", tuned, "--steps", 1, "--spacing-mm", 2.0]
    assert ctpipe("interpolate", archive, tmp_path / "thin", *words) == Exit.OK
    file = next((tmp_path / "thin").rglob("*.dcm"))
    assert read_provenance(pydicom.dcmread(file))["decoder_sha256"] == load_vae(tuned).file_sha256
