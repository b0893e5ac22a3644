"""The rows of gpu.py that measure time, arithmetic and memory: VAE, U-Net, an epoch, a profile, the peers."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from gpu import DATA_SHEET_TFLOPS
from npy_latents import Latents, Pair, Shape
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion.config import OptimiserConfig
from diffusion.networks import UNet, UNetConfig, build_unet, model_preset
from diffusion.objectives import build_objective
from diffusion.training import build_adamw, compile_blocks, count_forward, measured_matmul_rate
from pipeline.vae import KlAutoencoder, Vae, VaeArchitecture, VaeWeights
from pipeline.vae.streaming import SlabExecutor

Say = Callable[..., None]
PATIENTS_AN_EPOCH = 267
THICK_SHARE = 60 / 300
"""Slices of a thick series over those of its thin one."""


# Measuring ------------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: torch.device, repeats: int = 2) -> tuple[float, float]:
    """Best seconds after a warm-up (none on a CPU), and the peak GiB allocated on a GPU (0 on a CPU)."""
    if device.type == "cuda":
        run()
    else:
        repeats = 1
    best, peak = float("inf"), 0.0
    for _ in range(repeats):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            peak = max(peak, torch.cuda.max_memory_allocated(device) / 2**30)
        best = min(best, time.perf_counter() - begin)
    return best, peak


def matmul_rate(device: torch.device) -> float:
    return measured_matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


# The VAE --------------------------------------------------------------------------------------------------------------


def random_vae(device: torch.device) -> Vae:
    """The published widths, random weights."""
    architecture = VaeArchitecture()
    torch.manual_seed(0)
    return Vae(VaeWeights(KlAutoencoder(architecture).state_dict(), architecture, ""), device)


def tflop_per_voxel(part: str) -> float:
    """Arithmetic of an unsplit pass, counted on shapes alone."""
    with torch.device("meta"):
        network: nn.Module = KlAutoencoder(VaeArchitecture())
        image, z = torch.empty(1, 1, 32, 64, 64), torch.empty(1, 4, 8, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.encode(image) if part == "encode" else network.decode(z)
    return counter.get_total_flops() / image.numel() / 1e12


def vae(device: torch.device, small: bool, say: Say, suffix: str = "") -> None:
    """Encode and decode of 300x512x512 beside the plan's prediction, and with activations in host memory."""
    shape: Shape = (4, 32, 32) if small else (300, 512, 512)
    latent_zyx = (shape[0] // 4, shape[1] // 4, shape[2] // 4)
    model, rate = random_vae(device), matmul_rate(device)
    unit, latent = torch.rand(shape) * 2 - 1, torch.randn(4, *latent_zyx)
    for part in ("encode", "decode"):
        plan = model.plan_encode(shape) if part == "encode" else model.plan_decode(latent_zyx)
        run = (lambda: model.encode(unit)) if part == "encode" else (lambda: model.decode(latent, shape))
        seconds, peak = timed(run, device)
        tflops = tflop_per_voxel(part) * shape[0] * shape[1] * shape[2] / seconds
        say(**{
            f"{part}{suffix}_s": round(seconds, 4),
            f"{part}{suffix}_peak_gib": round(peak, 2),
            f"{part}{suffix}_tflops": round(tflops, 2),
            f"{part}{suffix}_fraction": round(tflops * 1e12 / rate, 4),
            f"{part}{suffix}_fraction_of_989": round(tflops / DATA_SHEET_TFLOPS, 4),
        })  # fmt: skip
        if peak:
            say(**{f"predicted_over_peak_{part}": round(plan.device_bytes / 2**30 / peak, 2)})
        with offloaded(model):
            slow, peak = timed(run, device, repeats=1)
        say(**{f"{part}{suffix}_offload_s": round(slow, 4), f"{part}{suffix}_offload_peak_gib": round(peak, 2)})


@contextlib.contextmanager
def offloaded(model: Vae) -> Iterator[None]:
    model._executor = lambda plan: SlabExecutor(plan.slab_bytes, offload=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model._executor


def vae_before(device: torch.device, small: bool, say: Say) -> None:
    """The same without the kernels."""
    vae(device, small, say, "_before")


# The U-Net ------------------------------------------------------------------------------------------------------------


def new_model(config: UNetConfig, device: torch.device) -> UNet:
    torch.manual_seed(0)
    model = build_unet(config).to(device).train()
    return model.to(memory_format=torch.channels_last_3d) if device.type == "cuda" else model  # type: ignore[call-overload, no-any-return]


def steps_of(model: UNet, pairs: Iterator[Pair], device: torch.device) -> Generator[tuple[float, float], None, None]:
    """Training steps without end: objective, backward pass, clipping, update. Yields (seconds, of these waiting)."""
    on_gpu = device.type == "cuda"
    optimiser = build_adamw(model, OptimiserConfig(), device)
    objective = build_objective("bridge", residual_std=0.5)
    for number in count():
        begin = time.perf_counter()
        read = next(pairs)
        waited = time.perf_counter() - begin
        thin, condition = (x.to(device, non_blocking=True) for x in read)
        random = [torch.Generator(device).manual_seed(number * len(thin) + b) for b in range(len(thin))]
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = objective.loss(model, thin, condition, torch.ones_like(thin[:, :1]), random).per_sample.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        assert torch.isfinite(loss), "the loss is not finite"  # waits for the device
        yield time.perf_counter() - begin, waited


def measure(
    config: UNetConfig, shape: Shape, batch: int, device: torch.device, prepare: Callable[[UNet], object] = id
) -> dict[str, float]:
    """Seconds, arithmetic and memory of a step on made-up latents, after two that warm up (one on a CPU)."""
    steps, warm_up = (1, 1) if device.type == "cpu" else (5, 2)
    flops = count_forward(config, 1, shape, device.type == "cuda")[1]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        latents = Latents.make_up(Path(folder), shape)
        model = new_model(config, device)
        prepare(model)
        running = steps_of(model, latents.batches(batch, device, shape[0]), device)
        first = [next(running)[0] for _ in range(warm_up)]
        seconds, waited = (sum(x) / steps for x in zip(*(next(running) for _ in range(steps)), strict=True))
        running.close()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    tflops = 3 * flops * batch / seconds / 1e12
    return {
        "s": round(seconds, 4),
        "first_two_s": round(sum(first), 2),
        "tflops": round(tflops, 6),
        "peak_gib": round(peak / 2**30, 2),
        "data_wait": round(waited / seconds, 5),
        "epoch_s": round(PATIENTS_AN_EPOCH / batch * seconds, 1),
    }


def grid(
    name: str, shape: Shape, config: UNetConfig, device: torch.device, say: Say, batches: tuple[int, ...] = (1, 2)
) -> None:
    """The step at one grid, by batch; what does not fit is said."""
    rate = matmul_rate(device)
    for batch in batches:
        label = f"step_{name}" if batch == 1 else f"step_{name}_batch{batch}"
        try:
            found = measure(config, shape, batch, device)
        except torch.OutOfMemoryError:
            say(**{f"{label}_s": None, f"{label}_why": "out of memory"})
            continue
        say(**{f"{label}_{key}": value for key, value in found.items()})
        label = name if batch == 1 else f"{name}_batch{batch}"
        say(**{f"mfu_{label}": round(found["tflops"] * 1e12 / rate, 7)})
        say(**{f"mfu_{label}_of_989": round(found["tflops"] / DATA_SHEET_TFLOPS, 9)})


def unet_64(device: torch.device, small: bool, say: Say, suffix: str = "") -> None:
    """`medium` on 75x64x64, as it runs without compilation."""
    if small:
        grid(f"64{suffix}", (4, 8, 8), model_preset("tiny"), device, say, (1,))
    else:
        grid(f"64{suffix}", (75, 64, 64), model_preset("medium"), device, say)


def unet_64_before(device: torch.device, small: bool, say: Say) -> None:
    """The same without the kernels."""
    unet_64(device, small, say, "_before")


def unet_128(device: torch.device, small: bool, say: Say) -> None:
    """`medium` on 75x128x128, every block recomputed; and batch 1 with none."""
    if small:
        grid("128", (4, 16, 16), replace(model_preset("tiny"), activation_checkpointing=True), device, say, (1,))
        return
    shape, config = (75, 128, 128), model_preset("medium")
    grid("128", shape, replace(config, activation_checkpointing=True), device, say)
    grid("128_kept", shape, config, device, say, (1,))


def compiled(device: torch.device, small: bool, say: Say) -> None:
    """Blocks compiled one kind at a time: how long until the second step has ended, and what a step then takes."""
    config, shape = (
        (UNetConfig(16, (1, 2), 1, (1,), 2, 32, 4), (4, 8, 8)) if small else (model_preset("medium"), (75, 64, 64))
    )
    backend = "eager" if small else "inductor"  # a CPU machine need not have a compiler
    found = measure(config, shape, 1, device, partial(compile_blocks, backend=backend))
    rate = matmul_rate(device)
    say(
        compile_s=found["first_two_s"],
        step_64_compiled_s=found["s"],
        mfu_64_compiled=round(found["tflops"] * 1e12 / rate, 7),
        step_64_compiled_peak_gib=found["peak_gib"],
    )


def epoch(device: torch.device, small: bool, say: Say) -> None:
    """An epoch from cached latents, and one whose step encodes the thin series and the thick one itself."""
    config, shape = (model_preset("tiny"), (1, 8, 8)) if small else (model_preset("medium"), (75, 64, 64))
    cached = measure(config, shape, 1, device)
    say(epoch_s=cached["epoch_s"], data_wait=cached["data_wait"])
    model = random_vae(device)
    thin = torch.rand(4 * shape[0], 4 * shape[1], 4 * shape[2]) * 2 - 1
    thick = thin[: max(4, round(len(thin) * THICK_SHARE))]
    encode = timed(lambda: (model.encode(thin), model.encode(thick)), device, repeats=1)[0]
    in_loop = (cached["s"] + encode) * PATIENTS_AN_EPOCH
    say(in_loop_epoch_s=round(in_loop, 1), cached_vs_inloop=round(in_loop / cached["epoch_s"], 2))


# Where the time goes, and the peers -----------------------------------------------------------------------------------


def profile(device: torch.device, small: bool, say: Say) -> None:
    """The ten kernels that take most of an encode, and of a training step: names and milliseconds."""
    model = random_vae(device)
    unit = torch.rand((4, 32, 32) if small else (64, 512, 512)) * 2 - 1
    say(profile_encode=top_kernels(lambda: model.encode(unit), device))
    config, shape = (model_preset("tiny"), (4, 8, 8)) if small else (model_preset("medium"), (75, 64, 64))
    with tempfile.TemporaryDirectory() as folder:
        pairs = Latents.make_up(Path(folder), shape).batches(1, device, shape[0])
        running = steps_of(new_model(config, device), pairs, device)
        say(profile_step=top_kernels(lambda: next(running), device))
        running.close()


def top_kernels(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """The first ten by time, in ms."""
    run()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as seen:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def cost(event: Any) -> float:
        return float(event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1000

    events = sorted(seen.key_averages(), key=cost, reverse=True)
    return {event.key[:60]: round(cost(event), 2) for event in events[:10]}


def peers(device: torch.device, small: bool, say: Say) -> None:
    """MONAI's class as its weights' publisher configures it, 32x512x512, beside ours."""
    if importlib.util.find_spec("monai") is None:
        say(monai="not installed")
        return
    from vae import monai_maisi

    shape: Shape = (8, 32, 32) if small else (32, 512, 512)
    model = random_vae(device)
    unit = torch.rand(shape) * 2 - 1
    ours, _ = timed(lambda: model.encode(unit), device, repeats=1)
    say(ours_32_encode_s=round(ours, 3))
    theirs = monai_maisi(model.network.state_dict(), num_splits=2 if small else 16, norm_float16=device.type == "cuda")
    theirs = theirs.to(device)
    image: Tensor = (unit[None, None].to(device) + 1) / 2
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        begin = time.perf_counter()
        theirs.encode(image)
        if device.type == "cuda":
            torch.cuda.synchronize()
        monai = time.perf_counter() - begin
    say(monai_32_encode_s=round(monai, 3), encode_vs_monai=round(monai / ours, 2))
