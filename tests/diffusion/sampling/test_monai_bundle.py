"""A bundle is valid by MONAI's schema, and what MONAI's own runner makes of it equals the interpolator."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.sampling import BundleFacts, Interpolator, export_bundle
from latentcache import InputError
from tests.diffusion.sampling.test_interpolator import ENCODING, latents, make_run, network

SCHEMA = Path(__file__).parents[2] / "golden" / "monai_meta_schema_20240725.json"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    make_run(tmp_path / "run", network())
    export_bundle(tmp_path / "run", tmp_path / "bundle", facts=BundleFacts(authors="A. Author", version="1.2.0"))
    return tmp_path / "bundle"


def test_metadata_is_valid_by_monais_schema(bundle: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    found = json.loads((bundle / "configs" / "metadata.json").read_text())
    jsonschema.validate(found, json.loads(SCHEMA.read_text()))
    assert found["schema"].endswith("meta_schema_20240725.json")
    assert (found["version"], found["authors"], found["encode_key"]) == ("1.2.0", "A. Author", ENCODING.encode_key)
    data = found["network_data_format"]
    assert (data["inputs"]["image"]["num_channels"], data["outputs"]["pred"]["num_channels"]) == (8, 4)
    assert data["inputs"]["image"]["spatial_shape"] == ["*", "2*n", "2*n"]
    del found["task"]
    with pytest.raises(jsonschema.ValidationError, match="task"):
        jsonschema.validate(found, json.loads(SCHEMA.read_text()))


def test_monais_config_parser_builds_and_runs_it(bundle: Path, tmp_path: Path) -> None:
    parser_of = pytest.importorskip("monai.bundle").ConfigParser
    np.save(tmp_path / "condition.npy", latents())
    parser = parser_of()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    parser["bundle_root"] = str(bundle)
    parser["condition_file"] = str(tmp_path / "condition.npy")
    parser["output_file"] = str(tmp_path / "thin.npy")
    parser["num_inference_steps"] = 3
    parser["seed"] = 5
    parser.parse()
    parser.get_parsed_content("run")
    wanted = Interpolator.load(tmp_path / "run").generate_latent(latents(), num_inference_steps=3, seed=5)
    np.testing.assert_array_equal(np.load(tmp_path / "thin.npy"), wanted)


@pytest.mark.slow
def test_monais_command_runs_it_in_a_process_of_its_own(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("fire")
    np.save(bundle / "condition.npy", latents())
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    path = os.pathsep.join([str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([*command, "--num_inference_steps", "2"], cwd=bundle, env=environment, check=True)
    wanted = Interpolator.load(tmp_path / "run").generate_latent(latents(), num_inference_steps=2)
    np.testing.assert_array_equal(np.load(bundle / "thin.npy"), wanted)


def test_weights_are_a_plain_state_dict_and_nothing_of_the_store_leaves(bundle: Path) -> None:
    weights = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in network().state_dict().items()}
    texts = [p.read_text() for p in bundle.rglob("*") if p.suffix in (".json", ".md")]
    assert len(texts) == 3
    assert not any("f" * 16 in text for text in texts)  # the store's fingerprint


def test_errors_leave_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="exists"):
        export_bundle(tmp_path / "run", bundle)
    with pytest.raises(InputError, match=r"run\.json"):
        export_bundle(tmp_path, tmp_path / "other")
    monkeypatch.setitem(sys.modules, "monai.bundle", None)
    with pytest.raises(InputError, match=r"ctpipe\[monai\]"):
        export_bundle(tmp_path / "run", tmp_path / "other")
    assert not (tmp_path / "other").exists()
