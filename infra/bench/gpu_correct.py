"""The row `correctness` of gpu.py: what only a GPU can get wrong, each looked at by itself.

Every check says ``ok`` or what was wrong; one that fails does not keep the others from running.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.config import OptimiserConfig
from diffusion.networks import ThickSlices, UNet, build_unet, fused_norm, model_preset
from diffusion.objectives import build_objective
from diffusion.runs import PowerEma, checkpoint
from diffusion.sampling import Interpolator
from diffusion.training import World, build_adamw, measured_matmul_rate, reshard, shard
from pipeline.refiner import Refiner, RefinerConfig
from pipeline.vae import load_vae
from pipeline.vae.streaming import SlabExecutor, fused as vae_fused

Say = Callable[..., None]


def correctness(device: torch.device, small: bool, say: Say) -> None:
    """All checks; the process fails if one does."""
    rate = measured_matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    say(matmul_tflops=round(rate / 1e12, 2))
    checks = (resume, offload, precisions, convolutions, kernels, generation, refiner_step, one_rank_fsdp, recomputed)
    failed = []
    for check in checks:
        begin = time.perf_counter()
        try:
            figure = check(device, small)
            say(**{f"check_{check.__name__}": "ok", **figure})
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding, and the next check must run
            failed.append(check.__name__)
            lines = str(error).splitlines() or [""]
            say(**{f"check_{check.__name__}": f"{type(error).__name__}: {lines[0][:200]}"})
        say(**{f"check_{check.__name__}_s": round(time.perf_counter() - begin, 2)})
    if failed:
        raise SystemExit("failed: " + ", ".join(failed))


def network(device: torch.device) -> UNet:
    torch.manual_seed(0)
    net = build_unet(model_preset("tiny")).to(device)
    return net.to(memory_format=torch.channels_last_3d) if device.type == "cuda" else net  # type: ignore[call-overload, no-any-return]


def resume(device: torch.device, small: bool) -> dict[str, Any]:
    """The loss after a resumed checkpoint is that of the run that was not disturbed."""

    def parts() -> tuple[UNet, torch.optim.AdamW, PowerEma]:
        net = network(device)
        return net, build_adamw(net, OptimiserConfig(), device), PowerEma(net, 0.1)

    def step(net: UNet, optimiser: torch.optim.AdamW, ema: PowerEma, number: int) -> float:
        random = torch.Generator().manual_seed(3)
        x, c = torch.randn((2, 1, 4, 4, 16, 16), generator=random).to(device)
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            noise = [torch.Generator(device).manual_seed(number)]
            loss = build_objective("bridge").loss(net, x, c, torch.ones_like(x[:, :1]), noise).per_sample.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        ema.update(number + 1)
        return float(loss)

    first = parts()
    for number in range(3):
        step(*first, number)
    contents = checkpoint.gather(*first, {"step": 3})
    second = parts()
    checkpoint.restore(contents, *second)
    expected, found = ([step(*these, number) for number in (3, 4)] for these in (first, second))
    off = max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))
    assert off < 1e-3, f"losses {found} after resuming, {expected} without"
    return {"resume_off": off}


def offload(device: torch.device, small: bool) -> dict[str, Any]:
    """Activations in host memory: the same bytes, five times."""
    vae = load_vae("tiny", device)
    unit = torch.rand((8, 32, 32) if small else (48, 256, 256), generator=torch.Generator().manual_seed(0)) * 2 - 1

    def encode(offloaded: bool) -> Tensor:
        vae._executor = lambda plan: SlabExecutor(100_000 if small else 4 << 20, offload=offloaded)  # type: ignore[method-assign]
        return vae.encode(unit)

    expected = encode(False)
    assert all(torch.equal(encode(True), expected) for _ in range(2 if small else 5)), "latents differ"
    return {}


def precisions(device: torch.device, small: bool) -> dict[str, Any]:
    """bfloat16 and float32 on the device against float32 on the CPU."""
    unit = torch.rand((8, 32, 32) if small else (16, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    reference = load_vae("tiny").encode(unit)
    off = {}
    for dtype, allowed in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = load_vae("tiny", device, dtype=dtype).encode(unit)
        name = str(dtype).removeprefix("torch.")
        off[f"{name}_off"] = float((found - reference).norm() / reference.norm())
        assert off[f"{name}_off"] < allowed, f"{name} is off by {off[f'{name}_off']:.1e}"
    return off


def convolutions(device: torch.device, small: bool) -> dict[str, Any]:
    """One large slab in bfloat16 against float32: cuDNN 9.8 to 9.14 may be silently wrong there."""
    side, width = (16, 8) if small else (512, 64)
    torch.manual_seed(0)
    x = torch.randn((1, width, 10, side, side), device=device).to(memory_format=torch.channels_last_3d)
    weight = torch.randn((width, width, 3, 3, 3), device=device) / (27 * width) ** 0.5
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = torch.nn.functional.conv3d(x, weight, padding=(0, 1, 1))
    half = weight.to(torch.bfloat16, memory_format=torch.channels_last_3d)
    found = torch.nn.functional.conv3d(x.bfloat16(), half, padding=(0, 1, 1)).float()
    off = float((found - exact).norm() / exact.norm())
    assert off < 1e-2, f"off by {off:.1e}"
    return {"convolution_off": off}


def kernels(device: torch.device, small: bool) -> dict[str, Any]:
    """The Triton kernels against PyTorch, and that they are what runs."""
    if device.type != "cuda":
        return {"kernels": "not on a CPU"}
    off = {
        "unet_kernels_off": fused_norm.largest_difference(device),
        "vae_kernels_off": vae_fused.largest_difference(device),
    }
    assert fused_norm.usable(0), "the U-Net's kernels are not used"
    assert vae_fused.usable(0), "the VAE's kernels are not used"
    return off


def generation(device: torch.device, small: bool) -> dict[str, Any]:
    """A few sampler steps in depth windows."""
    interpolator = Interpolator.from_parts(network(device).eval(), build_objective("epsilon"), [0.0] * 4, [1.0] * 4)
    condition = torch.randn(4, 10 if small else 20, 16, 24)
    depth = condition.shape[1]
    found = interpolator.generate_latent(
        condition,
        num_inference_steps=2 if small else 4,
        depth_window=8,
        thick=ThickSlices(0.0, 5.0, depth, 5.0),
        z_mm=4.0 * np.arange(depth),
    )
    assert torch.as_tensor(found).isfinite().all()
    return {}


def refiner_step(device: torch.device, small: bool) -> dict[str, Any]:
    """Forward and backward pass of the refiner under autocast."""
    net = Refiner(RefinerConfig(width=8, blocks=1) if small else RefinerConfig()).to(device)
    side = 16 if small else 64
    fine, thick = torch.randn(2, 3, 20, side, side, device=device), torch.randn(2, 2, 6, side, side, device=device)
    below = torch.arange(20, device=device).div(5, rounding_mode="floor").clamp(max=4)[None].expand(2, -1).contiguous()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss = net(fine, thick, below, torch.rand(2, 20, device=device)).square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    return {}


def one_rank_fsdp(device: torch.device, small: bool) -> dict[str, Any]:
    """A step of the network as the trainer shards it: bf16 gathers, activations channels last."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net = network(device)
                model = shard(net, World(device=device), bf16=device.type == "cuda")
                optimiser = build_adamw(net, OptimiserConfig(), device)
                x = torch.randn(1, 8, 4, 16, 16, device=device)
                x = x.to(memory_format=torch.channels_last_3d)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    model(x, torch.ones(1, device=device)).float().square().sum().backward()
                optimiser.step()
                reshard(net)
        finally:
            torch.distributed.destroy_process_group()
    return {}


def recomputed(device: torch.device, small: bool) -> dict[str, Any]:
    """Recomputing blocks gives the gradients of keeping them, at several depths."""
    for depth in (4,) if small else (8, 16, 24):
        found = []
        for again in (False, True):
            torch.manual_seed(0)
            net = build_unet(replace(model_preset("tiny"), activation_checkpointing=again)).to(device).train()
            if device.type == "cuda":
                net = net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
            torch.nn.init.normal_(net.conv_out.weight, 0, 0.1)
            x = torch.randn((1, 8, depth, 16, 16), generator=torch.Generator().manual_seed(1)).to(device)
            net(x, torch.ones(1, device=device)).square().sum().backward()
            found.append(net.conv_in.weight.grad)
        kept, repeated = found
        assert kept is not None
        assert repeated is not None
        off = float((kept - repeated).norm() / kept.norm())
        assert off < 1e-2, f"gradients are off by {off:.1e} at depth {depth}"
    return {}
