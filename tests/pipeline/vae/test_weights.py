"""Checkpoint files: what loads, what is refused, and with which words."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from latentcache import InputError
from pipeline.vae import VaeArchitecture
from pipeline.vae.weights import TINY, canonical_name, load_weights
from tests.support import vae_oracle as oracle


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return dict(oracle.monai_maisi(**oracle.FULL).state_dict())


@pytest.mark.parametrize("wrapper", [None, "unet_state_dict", "state_dict"])
def test_maisi_checkpoints_load_whole(
    state: dict[str, torch.Tensor], tmp_path: Path, wrapper: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "autoencoder.pt"
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 273}, path)
    with caplog.at_level(logging.INFO, logger="ctpipe.vae"):
        weights = load_weights(path)
    assert "130/130 tensors loaded" in caplog.text
    assert weights.architecture == VaeArchitecture()
    assert len(weights.sha256) == 64


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.blocks.3.conv.conv.conv.weight", "encoder.blocks.3.weight"),
        ("encoder.blocks.1.conv1.conv.conv.bias", "encoder.blocks.1.conv1.bias"),
        ("decoder.blocks.3.postconv.conv.weight", "decoder.blocks.3.weight"),
        ("module.quant_conv_mu.conv.weight", "quant_conv_mu.weight"),
        ("encoder.blocks.4.nin_shortcut.conv.conv.weight", "encoder.blocks.4.nin_shortcut.weight"),
    ],
)
def test_names(theirs: str, ours: str) -> None:
    assert canonical_name(theirs) == ours
    assert canonical_name(ours) == ours


def refused(state: object, path: Path, words: str) -> None:
    torch.save(state, path)
    with pytest.raises(InputError, match=words):
        load_weights(path)


def test_wrong_checkpoints_are_refused_by_name(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "autoencoder.pt"
    first = "encoder.blocks.0.conv.conv.weight"
    refused({k: v for k, v in state.items() if k != first}, path, r"129/130 .*1 missing: encoder\.blocks\.0\.weight")
    refused({**state, "extra.weight": torch.zeros(1)}, path, r"130/130 .*1 extra: extra\.weight")
    refused({**state, first: torch.zeros(32, 1, 3, 3, 3)}, path, r"of another shape: encoder\.blocks\.0\.weight \(32")
    refused({**state, first: state[first] * torch.nan}, path, r"NaN or infinity in encoder\.blocks\.0\.weight")
    refused({**state, "module." + first: state[first]}, path, "two tensors that both mean")
    refused([1, 2, 3], path, "no state dict")
    refused({"weights": "none"}, path, "no state dict")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    junk = tmp_path / "autoencoder.pt"
    junk.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_weights(junk)
    torch.save(Path("code"), junk)  # a pickle that wants a class: never run
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_weights(junk)
    broken = tmp_path / "autoencoder.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(InputError, match="not safetensors"):
        load_weights(broken)
    with pytest.raises(InputError, match="no VAE checkpoint"):
        load_weights(tmp_path / "absent.pt")


def test_architecture_is_read_from_metadata(tmp_path: Path) -> None:
    model = oracle.monai_kl(**oracle.NARROW)
    path = oracle.save(
        model, tmp_path / "kl.safetensors", {"class": "monai.networks.nets.AutoencoderKL", **oracle.NARROW}
    )
    architecture = load_weights(path).architecture
    assert architecture.channels == (8, 16, 32)
    assert architecture.upsampling == "nearest"
    assert VaeArchitecture.from_dict(architecture.to_dict()) == architecture
    save_file(model.state_dict(), path)
    with pytest.raises(InputError, match="of another shape"):
        load_weights(path)


@pytest.mark.parametrize(
    "raw",
    [
        {"attention_levels": [False, False, True]},
        {"use_convtranspose": True},
        {"channels": [8, 12], "norm_num_groups": 8},
        {"upsampling": "cubic"},
        {"num_res_blocks": [2]},
        {"depth": 3},
    ],
)
def test_other_networks_are_refused(raw: dict[str, object]) -> None:
    with pytest.raises(InputError):
        VaeArchitecture.from_dict(raw)


def test_the_tiny_vae_ships(tmp_path: Path) -> None:
    assert TINY.stat().st_size < 5_000_000
    weights = load_weights(TINY)
    assert len(weights.state) == 130
    assert weights.architecture.compression == 4
