"""Look for what would make a job fail: machine, device, disk, weights, store, memory and time."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion.config import TrainConfig
    from latentcache import LatentStore


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``level`` is ok, note or problem."""

    name: str
    level: str
    detail: str


def machine() -> tuple[str, str]:
    import psutil
    import torch

    gib = psutil.virtual_memory().total / 2**30
    return "ok", f"{os.cpu_count()} cores, {gib:.0f} GiB, python {platform.python_version()}, torch {torch.__version__}"


def device() -> tuple[str, str]:
    """Each GPU and what a large matrix product reaches on it."""
    import torch

    from diffusion.training import measured_matmul_rate

    if not torch.cuda.is_available():
        rate = measured_matmul_rate(torch.device("cpu"), torch.float32)
        return "note", f"no CUDA device: training and encoding run on the CPU ({rate / 1e9:.0f} GFLOP/s measured)"
    rows = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        rate = measured_matmul_rate(torch.device("cuda", index), torch.bfloat16)
        name = torch.cuda.get_device_name(index)
        rows.append(f"{name} {free / 2**30:.0f}/{total / 2**30:.0f} GiB free, {rate / 1e12:.0f} TFLOP/s in bf16")
    return "ok", "; ".join(rows)


def disk() -> tuple[str, str]:
    free = shutil.disk_usage(os.curdir).free / 2**30
    return ("ok" if free > 30 else "note"), f"{free:.0f} GiB free here; a `medium` run keeps up to 3 x 9 GiB"


def vae_weights(spec: str) -> tuple[str, str]:
    from pipeline.vae import load_vae

    vae = load_vae(spec)
    count = sum(p.numel() for p in vae.network.parameters())
    return "ok", f"{spec if spec == 'tiny' else 'loaded'}: {count:,} parameters, SHA-256 begins {vae.sha256[:12]}"


def store_health(opened: list[LatentStore], latents: LatentStore) -> tuple[str, str]:
    """Counts, and pairs that cannot be trained on yet. A deep check is ``ctpipe verify``."""
    opened.append(latents)
    pairs = latents.pairs()
    splits = {name: sum(p.split == name for p in pairs) for name in ("train", "val", "test")}
    rows = latents.manifest_table(["role"]).num_rows
    bad = sum(p.status != "ok" for p in pairs)
    text = f"snapshot {latents.snapshot}: {len(pairs)} pairs {splits}, {rows} latents, {bad} pairs quarantined"
    if not splits["val"]:
        return "problem", text + "; the val split is empty: assign patients with `ctpipe ingest --splits CSV`"
    return ("ok" if rows else "problem"), text + ("" if rows else "; run `ctpipe encode`")


def sample_shape(config: TrainConfig, latents: list[LatentStore]) -> tuple[tuple[int, int, int], int | None]:
    """The largest sample of the store and its samples an epoch; without a store 300 slices of 512 x 512."""
    from diffusion.data import PairStream

    if latents:
        stream = PairStream(latents[0], config.data, in_plane_multiple=config.model.in_plane_multiple)
        if stream.pairs:
            return stream.shapes[0], stream.samples_per_epoch
    side = config.data.crop or 128
    return (config.data.window or 75, side, side), None


def memory(config: TrainConfig, latents: list[LatentStore]) -> tuple[str, str]:
    from diffusion.training import World, default_device, estimate_step, memory_present, remedies

    world = World(device=default_device())
    shape, _ = sample_shape(config, latents)
    need = estimate_step(config, shape, world)
    present = memory_present(world.device)
    text = (
        f"{config.preset}: {need.parameters / 1e6:.0f}M parameters, batch {config.data.batch_size} of {shape} needs "
        f"{need.peak_bytes / 2**30:.1f} GiB, {present / 2**30:.1f} GiB free on {world.device.type}"
    )
    if need.peak_bytes <= present:
        return "ok", text
    return "problem", text + ": " + "; ".join(remedies(config))


def epoch_time(config: TrainConfig, latents: list[LatentStore]) -> tuple[str, str]:
    """From the model's arithmetic and the measured matrix product, at 40% of it (20% on a CPU)."""
    import torch

    from diffusion.training import World, default_device, estimate_step, measured_matmul_rate

    world = World(device=default_device())
    shape, samples = sample_shape(config, latents)
    flops: Any = estimate_step(config, shape, world).forward_flops_per_sample
    passes = 4 if config.model.activation_checkpointing else 3
    on_gpu = world.device.type == "cuda"
    rate = measured_matmul_rate(world.device, torch.bfloat16 if on_gpu else torch.float32) * (0.4 if on_gpu else 0.2)
    seconds = passes * flops * (samples or 250) / rate
    whose = f"{samples} samples of this store" if samples else "250 volumes"
    length = f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
    return "ok", f"about {length} for {whose}, {flops / 1e12:.2f} TFLOP forward each"
