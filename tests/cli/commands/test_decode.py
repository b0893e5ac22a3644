"""decode, interpolate and send as a user types them, on a made archive, with the tiny VAE and an untrained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pydicom
import pytest

from cli.main import app
from cli.output import Exit
from latentcache import InputError, LatentStore
from pipeline.writing import read_provenance
from tests.support.small_site import Site

INLINE = ("--engine", "inline", "--threads", 1)


def ctpipe(*words: Any) -> int:
    code = app([str(word) for word in words], standalone_mode=False)
    return int(code or 0)


@pytest.fixture(scope="module")
def site(trained_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return trained_site.copy(tmp_path_factory.mktemp("site"))


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return loaded


def test_stored_latents_to_dicom_and_again(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert ctpipe("decode", site.store, tmp_path / "out", "--to-dicom", *INLINE, "--json") == Exit.OK
    first = result(capsys)
    assert len(first["written"]) == 4
    assert {len(list(folder.iterdir())) for folder in (tmp_path / "out").iterdir()} == {36}
    assert ctpipe("decode", site.store, tmp_path / "out", "--to-dicom", *INLINE, "--json") == Exit.OK
    again = result(capsys)
    assert (again["already"], again["written"]) == (4, {})


def test_a_series_that_fails_is_recorded_and_the_rest_goes_on(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    shutil.copytree(site.store, store)
    opened = LatentStore.open(str(store))
    broken = opened.records(role="thin")[0]
    shutil.rmtree(store / broken.path)
    capsys.readouterr()
    code = ctpipe("decode", store, tmp_path / "out", "--to-dicom", *INLINE, "--json")
    assert code == Exit.QUARANTINED
    done = result(capsys)
    assert list(done["failed"]) == [broken.key]
    assert len(done["written"]) == 3
    assert not (tmp_path / "out" / broken.key).exists()


def test_sampling_then_decoding_a_split(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    words = ["--checkpoint", site.run, "--split", "test", "--steps", 2, "--samples", 2, "--uncertainty"]
    code = ctpipe("decode", site.store, tmp_path, "--to-dicom", *words, *INLINE, "--json")
    assert code == Exit.OK
    ((key, figures),) = result(capsys)["written"].items()
    assert figures["folders"] == [key, f"{key}-uncertainty"]
    assert figures["detail"] == "residual"
    assert figures["rms_after_hu"] <= figures["rms_before_hu"]
    said = read_provenance(pydicom.dcmread(tmp_path / key / "00001.dcm"))
    assert said["kind"] == "generated"
    assert (said["sampling"]["samples"], said["sampling"]["steps"]) == (2, 2)
    assert len(said["checkpoint_sha256"]) == 64


def test_interpolate_needs_no_store(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    (zipped, *_) = sorted(site.archive.rglob("*.zip"))
    capsys.readouterr()
    words = ["interpolate", zipped, tmp_path / "out", "--checkpoint", site.run, "--steps", 2]
    assert ctpipe(*words, "--json", "--transfer-syntax", "jpegls") == Exit.OK
    done = result(capsys)
    assert done["slices"] == 5 * done["source_slices"]
    assert done["estimated_seconds"] > 0
    assert json.loads((site.run / "run.json").read_text())["extra"]["thin_spacing_mm"] == 1.0
    assert len(list((tmp_path / "out" / done["key"]).iterdir())) == done["slices"]
    assert (tmp_path / "out" / "private").stat().st_mode & 0o077 == 0
    with pytest.raises(InputError, match="exists"):
        ctpipe(*words)
    words[2] = tmp_path / "one-file"
    assert ctpipe(*words, "--enhanced", "--json") == Exit.OK
    (frames,) = (tmp_path / "one-file" / result(capsys)["key"]).iterdir()
    assert pydicom.dcmread(frames).NumberOfFrames == done["slices"]
    with pytest.raises(InputError, match="--enhanced for stored latents"):
        ctpipe("decode", site.store, tmp_path / "none", "--enhanced")


@pytest.mark.parametrize(("seconds", "said"), [(0.2, "1 s"), (40, "40 s"), (720, "12 min"), (9000, "2.5 h")])
def test_times_are_spelled_for_people(seconds: float, said: str) -> None:
    from cli.summaries import spell_seconds

    assert spell_seconds(seconds) == said


def test_a_refiner_is_trained_resumed_and_used(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.workflows.training.refiner.WIN_DB", 1000.0)  # other tests share the checkpoint
    small = ["--patch", "8,16,16", "--batch", 2, "--width", 4, "--blocks", 1, "--json"]
    words = ["train-refiner", site.store, tmp_path / "run", "--checkpoint", site.run, "--sampling-steps", 1, *small]
    capsys.readouterr()
    assert ctpipe(*words, "--steps", 3) == Exit.OK
    trained = result(capsys)
    assert trained["steps"] == 3
    assert trained["validation"]["composed_psnr_db"] > 5
    with pytest.raises(InputError, match="a run in this folder already"):
        ctpipe(*words, "--steps", 3)
    assert ctpipe(*words, "--steps", 3, "--resume") == Exit.OK
    assert result(capsys)["sha256"] == trained["sha256"]
    series = ["--checkpoint", site.run, "--split", "test", "--steps", 1, *INLINE]
    assert ctpipe("decode", site.store, tmp_path / "out", *series, "--refiner", tmp_path / "run", "--json") == Exit.OK
    ((key, figures),) = result(capsys)["written"].items()
    assert figures["refiner_sha256"] == trained["sha256"]
    written = pydicom.dcmread(tmp_path / "out" / key / "00001.dcm")
    assert read_provenance(written)["refiner_sha256"] == trained["sha256"]
    assert f"refiner {trained['sha256'][:16]}" in written.DerivationDescription
    with pytest.raises(InputError, match=r"no refiner\.safetensors"):
        ctpipe("decode", site.store, tmp_path / "none", *series, "--refiner", tmp_path)


def test_every_way_out_takes_as_much_of_a_mean_as_validation_found_it_worth(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(site.run, run)
    state = run / "checkpoints" / "best" / "state.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps({**known, "validation": {"val_change_gain": 0.25}}))
    words = ["decode", site.store, tmp_path / "out", "--checkpoint", run, "--split", "test", *INLINE, "--json"]
    capsys.readouterr()
    assert ctpipe(*words) == Exit.OK
    ((key, figures),) = result(capsys)["written"].items()
    assert figures["change_gain"] == 0.25
    written = pydicom.dcmread(tmp_path / "out" / key / "00001.dcm")
    assert read_provenance(written)["consistency"]["change_gain"] == 0.25
    assert "0.25 of the model's change" in written.DerivationDescription
    study = sorted(site.archive.rglob("*.zip"))[0]
    taken = {}
    for steps in (1, 2):
        words = ["interpolate", study, tmp_path / f"thin{steps}", "--checkpoint", run, "--steps", steps, "--json"]
        assert ctpipe(*words) == Exit.OK
        taken[steps] = result(capsys).get("change_gain", 1.0)
    assert taken == {1: 0.25, 2: 1.0}
    assert ctpipe("evaluate", site.store, run, "--split", "test", "--threads", 1, "--json") == Exit.OK
    document = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    assert document["settings"]["change_gain"] == 0.25


def test_a_draw_for_measuring_gets_the_texture_of_true_thin_slices(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.metrics.texture.LEAST_VOXELS", 20)  # planes of 32 x 32 have few even places
    run = tmp_path / "run"
    shutil.copytree(site.run, run)
    kept = json.loads((run / "texture.json").read_text())
    assert sum(kept["voxels"]) > 0, "measured when the run began"
    # More noise than an untrained model draws.
    many = {**kept, "power": [[900.0, 900.0]] * len(kept["power"]), "voxels": [10**6] * len(kept["voxels"])}
    (run / "texture.json").write_text(json.dumps(many))
    shutil.rmtree(run / "evaluation", ignore_errors=True)
    words = ["decode", site.store, "--checkpoint", run, "--split", "test", *INLINE, "--json"]
    both = [*words, "--steps", 2, "--samples", 2, "--answer", "both"]
    capsys.readouterr()
    written = {}
    for name, more in (("with", []), ("without", ["--no-texture"])):
        assert ctpipe(*both[:2], tmp_path / name, *both[2:], *more) == Exit.OK
        ((key, figures),) = result(capsys)["written"].items()
        assert figures["folders"] == [key, f"{key}-sample"]
        for folder in (key, f"{key}-sample"):
            written[name, folder[len(key) :]] = pydicom.dcmread(tmp_path / name / folder / "00020.dcm")
    added = read_provenance(written["with", "-sample"])["consistency"]["texture_added_hu"]
    assert added > 0
    assert f"{added:g} HU RMS of enlarged detail and drawn noise" in written["with", "-sample"].DerivationDescription
    assert written["with", "-sample"].PixelData != written["without", "-sample"].PixelData
    assert "texture_added_hu" not in read_provenance(written["without", "-sample"])["consistency"]
    assert written["with", ""].PixelData == written["without", ""].PixelData, "the mean is as it was"
    for more, wrong in (
        (["--steps", 1], "a single step, which gives a mean"),
        (["--steps", 2, "--samples", 2], "the mean of several samples"),
    ):
        with pytest.raises(InputError, match=wrong):
            ctpipe(*words[:2], tmp_path / "none", *words[2:], *more, "--texture")
    study = sorted(site.archive.rglob("*.zip"))[0]
    thin = ["interpolate", study, tmp_path / "thin", "--checkpoint", run, "--steps", 2, "--texture", "--json"]
    assert ctpipe(*thin) == Exit.OK
    assert result(capsys)["texture_added_hu"] > 0
    scored = ["evaluate", site.store, run, "--split", "test", "--steps", 2, "--texture", "--threads", 1, "--json"]
    assert ctpipe(*scored) == Exit.OK
    document = json.loads((run / "evaluation" / "test" / "metrics.json").read_text())
    assert document["settings"]["texture"] is True
    (run / "texture.json").unlink()
    with pytest.raises(InputError, match=r"--texture of a run without texture\.json"):
        ctpipe(*thin[:2], tmp_path / "again", *thin[3:])


def test_a_refiner_that_wins_is_its_checkpoints_default(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.workflows.training import refiner as refiner_training

    run = tmp_path / "model"
    shutil.copytree(site.run, run)
    small = ["--patch", "8,16,16", "--batch", 2, "--width", 4, "--blocks", 1, "--steps", 1, "--json"]
    words = ["train-refiner", site.store, tmp_path / "lost", "--checkpoint", run, "--sampling-steps", 1, *small]
    monkeypatch.setattr(refiner_training, "WIN_DB", 1000.0)
    capsys.readouterr()
    assert ctpipe(*words) == Exit.OK
    assert result(capsys)["default_of_checkpoint"] is False
    assert not (run / "refiner.safetensors").exists()
    monkeypatch.setattr(refiner_training, "WIN_DB", -1000.0)
    words[2] = tmp_path / "won"
    assert ctpipe(*words) == Exit.OK
    won = result(capsys)
    assert won["default_of_checkpoint"] is True
    decode = [
        "decode",
        site.store,
        "--checkpoint",
        run,
        "--split",
        "test",
        "--steps",
        1,
        *INLINE,
        "--json",
    ]
    assert ctpipe(*decode[:2], tmp_path / "with", *decode[2:]) == Exit.OK
    ((_, figures),) = result(capsys)["written"].items()
    assert figures["refiner_sha256"] == won["sha256"]
    assert ctpipe(*decode[:2], tmp_path / "without", *decode[2:], "--refiner", "none") == Exit.OK
    ((_, figures),) = result(capsys)["written"].items()
    assert "refiner_sha256" not in figures
    assert ctpipe(*decode[:2], tmp_path / "other", *decode[2:], "--detail", "absolute") == Exit.OK
    ((_, figures),) = result(capsys)["written"].items()
    assert "detail absolute" in figures["refiner_left_out"], "nobody asked for it, so nobody is refused"


def test_a_vae_that_did_not_encode_the_store_is_refused(site: Site, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    from pipeline.vae.weights import TINY

    other = tmp_path / "other.safetensors"
    tensors = load_file(TINY)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    from safetensors import safe_open

    with safe_open(TINY, "np") as file:
        save_file(tensors, other, metadata=file.metadata())
    with pytest.raises(InputError, match="the one that encoded these latents"):
        ctpipe("decode", site.store, tmp_path / "out", "--to-dicom", "--vae", other, *INLINE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--transfer-syntax", "jpeg"], "explicit, jpegls, htj2k"),
        (["--detail", "lots"], "absolute or residual"),
        (["--series", "0" * 16], "no stored latent that matches"),
        (["--encode-key", "0" * 16], "one encoding, or its key"),
    ],
)
def test_wrong_options_say_what_is_right(site: Site, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ctpipe("decode", site.store, tmp_path / "out", "--to-dicom", *INLINE, *words)
    assert not (tmp_path / "out").exists()


def test_send_reports_what_is_left(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series = LatentStore.open(str(site.store)).records(role="thin")[0].key
    words = ["decode", site.store, tmp_path, "--to-dicom", "--series", series, *INLINE]
    assert ctpipe(*words) == Exit.OK
    capsys.readouterr()
    code = ctpipe("send", tmp_path / series, "--stow", "http://127.0.0.1:9/x", "--attempts", 1, "--json")
    assert code == Exit.FAILED
    assert len(result(capsys)[series]["left"]) == 36
    assert (tmp_path / f"{series}.unsent.json").exists()
