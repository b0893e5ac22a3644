"""A run as a MONAI Bundle: the network, its weights, what they are, and an inference that MONAI runs.

    OUT/configs/metadata.json     what the bundle is, by MONAI's schema
    OUT/configs/inference.json    network, objective, whitening and sampling; run by `python -m monai.bundle run`
    OUT/models/model.pt           the averaged weights, a plain state dict
    OUT/docs/README.md            what goes in and what comes out

MONAI Bundle Specification: https://docs.monai.io/en/stable/mb_specification.html. The configuration names functions
of ctpipe, which must be installed where the bundle runs. The VAE is not in it: its weights have a licence of their own,
and the encode key says which it was.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion.runs import RunCard
from diffusion.sampling.interpolator import Interpolator
from latentcache import missing_extra
from latentcache.storage import atomic_folder, sync_file, sync_folder

SCHEMA = "https://project-monai.github.io/schema/meta_schema_20240725.json"


@dataclass(frozen=True)
class BundleFacts:
    """Statement of a bundle's origin: who answers for the weights, and the bundle's own version."""

    authors: str = "not stated"
    copyright: str = "not stated"
    version: str = "0.1.0"


def export_bundle(
    run_dir: Path, out: Path, *, which: Literal["best", "last"] = "best", facts: BundleFacts | None = None
) -> int:
    """Write a run's weights and configuration as a MONAI Bundle, whole or not at all; returns the parameters.

    Raises:
        InputError: No run or checkpoint there, ``out`` exists, or MONAI is not installed.
    """
    monai_version = _monai_version()
    card = RunCard.read(run_dir)
    interpolator = Interpolator.load(run_dir, which=which)
    weights = {name: tensor.contiguous().clone() for name, tensor in interpolator.model.state_dict().items()}
    documents = {
        "configs/metadata.json": _json(_metadata(card, interpolator, facts or BundleFacts(), monai_version)),
        "configs/inference.json": _json(_inference(card)),
        "docs/README.md": _readme(card, interpolator),
    }
    with atomic_folder(out) as folder:
        for name in ("configs", "models", "docs"):
            (folder / name).mkdir()
        for name, text in documents.items():
            (folder / name).write_text(text, encoding="utf-8")
        torch.save(weights, folder / "models" / "model.pt")
        for path in sorted(folder.rglob("*"), reverse=True):
            (sync_folder if path.is_dir() else sync_file)(path)
    return sum(tensor.numel() for tensor in weights.values())


def _monai_version() -> str:
    try:
        import monai.bundle  # noqa: F401

        return metadata.version("monai")
    except ModuleNotFoundError as error:
        raise missing_extra("monai", "monai", "MONAI Bundles") from error


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2) + "\n"


def _inference(card: RunCard) -> dict[str, Any]:
    """Configuration in MONAI's language: ``_target_`` is called, ``@`` refers, ``$`` is evaluated."""
    return {
        "imports": ["$import numpy", "$import torch"],
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "weights_file": "$@bundle_root + '/models/model.pt'",
        "condition_file": "condition.npy",
        "output_file": "thin.npy",
        "sampler": None,
        "num_inference_steps": None,
        "seed": 0,
        "samples": 1,
        "network_def": {
            "_target_": "diffusion.networks.build_unet",
            "config": {"_target_": "diffusion.networks.UNetConfig", **card.unet_config.to_dict()},
        },
        "weights": "$torch.load(@weights_file, map_location='cpu', weights_only=True)",
        # load_state_dict refuses what does not fit and returns a report, which is always true.
        "network": "$@network_def.load_state_dict(@weights) and @network_def.eval().requires_grad_(False).to(@device)",
        "objective": {
            "_target_": "diffusion.objectives.build_objective",
            "name": card.objective["name"],
            **card.objective.get("settings", {}),
        },
        "interpolator": {
            "_target_": "diffusion.sampling.Interpolator.from_parts",
            "model": "@network",
            "objective": "@objective",
            "mean": card.whitening["mean"],
            "std": card.whitening["std"],
            "encode_key": card.encode_key,
            "alignment": card.alignment,
            "depth_window": card.depth_window,
        },
        "thin": "$@interpolator.generate_latent(numpy.load(@condition_file), sampler=@sampler, "
        "num_inference_steps=@num_inference_steps, seed=@seed, samples=@samples)",
        "run": ["$numpy.save(@output_file, @thin)"],
    }


def _metadata(card: RunCard, interpolator: Interpolator, facts: BundleFacts, monai_version: str) -> dict[str, Any]:
    config = card.unet_config
    multiple = f"{config.in_plane_multiple}*n"

    def latents(channels: int, meaning: str) -> dict[str, Any]:
        return {
            "type": "image",
            "format": "latent",
            "num_channels": channels,
            "spatial_shape": ["*", multiple, multiple],
            "dtype": "float32",
            "value_range": [],
            "is_patch_data": card.depth_window is not None,
            "channel_def": {str(n): f"{meaning} {n}" for n in range(channels)},
        }

    noisy, condition = config.latent_channels, config.condition_channels
    return {
        "schema": SCHEMA,
        "version": facts.version,
        "changelog": {facts.version: "exported by ctpipe"},
        "monai_version": monai_version,
        "pytorch_version": str(torch.__version__).split("+")[0],
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": {"ctpipe": metadata.version("ctpipe")},
        "task": "Thin-slice CT from thick-slice CT, in the latent space of a frozen VAE",
        "description": f"A latent diffusion model ({card.preset}, objective {card.objective['name']}) that predicts "
        "the latents of a thin series from those of the thick one",
        "authors": facts.authors,
        "copyright": facts.copyright,
        "data_type": "latents",
        "intended_use": "Research. Not a medical device; no diagnosis may rest on it alone.",
        "checkpoint_sha256": interpolator.checkpoint_sha256,
        "encode_key": card.encode_key,
        "encoding": json.loads(card.encoding),
        "network_data_format": {
            "inputs": {
                "image": latents(noisy + condition, "noisy thin latent, then condition: channel"),
                "timesteps": "time of the objective, one number for each volume of the batch",
            },
            "outputs": {"pred": latents(noisy, "prediction of the objective: channel")},
        },
    }


def _readme(card: RunCard, interpolator: Interpolator) -> str:
    encoding = card.build_encoding()
    return f"""# Thin slices from thick slices, in latents

A U-Net of `ctpipe` and its sampler. Install what runs it: `pip install 'ctpipe[monai]'`.

    python -m monai.bundle run --config_file configs/inference.json --bundle_root . \\
        --condition_file condition.npy --output_file thin.npy

- In: `condition.npy`, raw latents (4, depth, height, width) of the thick series on the thin grid (alignment
  `{card.alignment}`), encode key `{card.encode_key}`: window {encoding.window_center:g}/{encoding.window_width:g},
  VAE with SHA-256 `{encoding.vae_sha256}`. `LatentStore.read` and `LatentStore.zarr_array` give such latents.
- Out: `thin.npy`, raw latents of the thin series, for the decoder of the same VAE.
- Whitening, padding and windows along depth are inside. Options: `sampler`, `num_inference_steps`, `seed`, `samples`.
- Weights: `models/model.pt`, a state dict; of the checkpoint with SHA-256 `{interpolator.checkpoint_sha256}`.

Latents decode to images of patients: treat them as such.
"""
