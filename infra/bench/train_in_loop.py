"""What a VAE inside the training loop costs beside the U-Net's step: measured at the real widths, and counted.

Used by train.py. A loop that encodes needs the thin series and the thick one in every step, the thick one either as
scanned or resampled onto the thin slices. Everything here is proportional to the number of slices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion.networks import build_unet, model_preset
from diffusion.training import count_forward
from pipeline.vae import KlAutoencoder, Vae, VaeArchitecture, VaeWeights

THICK_SHARE = 60 / 300
"""Slices of a thick series over those of its thin one."""


def full_width(device: torch.device) -> dict[str, Any]:
    """Seconds of `medium`'s step and of encoding, real widths, 16 slices of 512x512; ratios for the whole volume."""
    volume = torch.rand(16, 512, 512) * 2 - 1
    per_slab = {"patch2": seconds_of_a_step("classic", (4, 128, 128), device)}
    # A quarter of the plane, four times: the step is proportional to it, and the whole takes more memory than is here.
    per_slab["patch1"] = 4 * seconds_of_a_step("medium", (4, 64, 64), device)
    torch.manual_seed(0)
    architecture = VaeArchitecture()
    state = KlAutoencoder(architecture).state_dict()
    ours = Vae(VaeWeights(state, architecture, ""), device)
    monai = published_monai(state).to(device)
    encode = {"ours": seconds(lambda: ours.encode(volume))}
    with torch.inference_mode():
        encode["monai"] = seconds(lambda: monai.encode(((volume + 1) / 2)[None, None].to(device)))
    result: dict[str, Any] = {f"width_encode_s_{name}": round(value, 2) for name, value in encode.items()}
    result["width_threads"] = torch.get_num_threads()
    for grid, step in per_slab.items():
        result[f"width_step_s_{grid}"] = round(step, 2)
        for name, value in encode.items():
            result[f"width_cached_vs_inloop_{grid}_{name}"] = in_loop_ratios(step, value)
    result["cached_vs_inloop"] = result["width_cached_vs_inloop_patch2_monai"]["thick_as_scanned"]
    return result


def seconds_of_a_step(preset: str, shape_dhw: tuple[int, int, int], device: torch.device) -> float:
    """Forward and backward pass of one sample in float32, after a small one that loads the library's code."""
    torch.manual_seed(0)
    net = build_unet(replace(model_preset(preset), activation_checkpointing=False)).to(device).train()

    def step(depth: int, height: int, width: int) -> None:
        net.zero_grad(set_to_none=True)
        x, t = torch.randn(1, 8, depth, height, width, device=device), torch.rand(1, device=device)
        net(x, t).square().mean().backward()

    step(1, 16, 16)
    return seconds(lambda: step(*shape_dhw))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_loop_ratios(step: float, encode: float) -> dict[str, float]:
    """Cost of a step that encodes thin and thick over one that does not, by what is encoded as the thick series."""
    thick = {"thick_resampled_to_thin": 1.0, "thick_as_scanned": THICK_SHARE}
    return {name: round((step + (1 + share) * encode) / step, 2) for name, share in thick.items()}


def published_monai(state: dict[str, Any]) -> Any:
    """MONAI's class as its weights' publisher configures it; its half-precision norms do not run in float32."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    model = AutoencoderKlMaisi(
        spatial_dims=3, in_channels=1, out_channels=1, latent_channels=4, num_channels=(64, 128, 256),
        num_res_blocks=(2, 2, 2), norm_num_groups=32, norm_eps=1e-6, attention_levels=(False, False, False),
        use_convtranspose=False, num_splits=16, dim_split=1, save_mem=True,
    ).eval()  # fmt: skip
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model


def full_size_by_counting() -> dict[str, Any]:
    """Operations of MAISI's VAE on 512x512x300 beside those of a training step of `medium` (three forward passes).

    Besides encoding in one piece: sliding windows, which compute their overlaps again, with MONAI's default overlap and
    with the one that the weights' publisher uses; and image losses on the whole decoded volume every tenth step
    (forward for prediction and target, backward through the prediction), where ours decodes a slab.
    """
    encode, decode = (vae_tflop(part) for part in ("encode", "decode"))
    windows = {"one_piece": 1.0, "windows_96_overlap_25": window_factor(96, 0.25),
               "windows_80_overlap_40": window_factor(80, 0.4)}  # fmt: skip
    result: dict[str, Any] = {
        "count_encode_tflop": round(encode, 1),
        "count_decode_tflop": round(decode, 1),
        "count_window_factors": {name: round(factor, 2) for name, factor in windows.items()},
    }
    for name, preset in (("patch2", "classic"), ("patch1", "medium")):
        step = 3 * count_forward(model_preset(preset), 1, (75, 128, 128), bf16=True)[1] / 1e12
        result[f"count_step_tflop_{name}"] = round(step, 1)
        ratios = {way: in_loop_ratios(step, encode * factor) for way, factor in windows.items()}
        whole = (step + 2 * encode + 4 * decode / 10) / step
        ratios["one_piece_and_whole_volume_image_losses"] = {"thick_resampled_to_thin": round(whole, 2)}
        result[f"count_cached_vs_inloop_{name}"] = ratios
    return result


def vae_tflop(part: str) -> float:
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae = KlAutoencoder(VaeArchitecture())
        if part == "encode":
            vae.encode(torch.zeros(1, 1, 300, 512, 512))
        else:
            vae.decode(torch.zeros(1, 4, 75, 128, 128))
    return counter.get_total_flops() / 1e12


def window_factor(side: int, overlap: float) -> float:
    """Voxels computed by sliding windows over those of the volume, 300x512x512."""
    stride = int(side * (1 - overlap))
    counts = [math.ceil((n - side) / stride) + 1 for n in (300, 512, 512)]
    return math.prod(counts) * side**3 / (300 * 512 * 512)
