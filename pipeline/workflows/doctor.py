"""Look for what would make a job fail: machine, device, disk, weights, store, memory and time."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diffusion.config import TrainConfig
    from latentcache import LatentStore


REMEDIES = {
    "out of memory": "set data.batch_size lower, model.activation_checkpointing=true, data.window=32, --latent-patch 2 "
    "or, with several GPUs, parallel.strategy=fsdp; for the VAE, --memory-gib",
    "NaN or infinity": "the run stops and names step, study and tensor; run `ctpipe verify STORE`; if it is clean, "
    "lower optimiser.learning_rate or set optimiser.precision=fp32, and --resume",
    "checkpoint not 130/130": "the file is not a MAISI VAE's, or is cut: compare its size with the publisher's; the "
    "loader names the missing tensors",
    "unreadable archive": "it is quarantined with its reason, the others go on: repair or replace the zip, then run "
    "`ctpipe ingest` again",
    "disk full": "the checkpoint before is whole: free space and run the same command with --resume; `ctpipe gc STORE` "
    "removes what no snapshot names",
}
"""The README's troubleshooting table; error messages say the same."""


NOTED_EPOCH_S, HOPELESS_EPOCH_S = 6 * 3600.0, 48 * 3600.0


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``level`` is ok, note or problem."""

    name: str
    level: str
    detail: str


def examine(store: str | None, preset: str, overrides: Sequence[str], vae: str) -> list[Finding]:
    """Return what was found about this machine and, where a store is named, about a planned run on it.

    Args:
        overrides: ``KEY=VALUE`` as for ``ctpipe train --set``.
        vae: ``tiny`` or the path of MAISI weights.
    """
    from diffusion.config import load_config
    from latentcache import CtpipeError, LatentStore

    without_vgg = ["losses.perceptual_weight=0"] if preset == "classic" else []
    config, _ = load_config(preset, None, [*without_vgg, *overrides])
    findings: list[Finding] = []

    def look(name: str, found: Callable[[], tuple[str, str]]) -> None:
        try:
            findings.append(Finding(name, *found()))
        except CtpipeError as error:
            findings.append(Finding(name, "problem", str(error)))

    latents: list[LatentStore] = []
    look("machine", machine)
    look("device", device)
    look("compilation", compilation)
    look("disk", disk)
    look("VAE weights", lambda: vae_weights(vae))
    if store is not None:
        look("store", lambda: store_health(latents, LatentStore.open(store)))
    look("memory", lambda: memory(config, latents))
    look("epoch", lambda: epoch_time(config, latents))
    return findings


def machine() -> tuple[str, str]:
    """Return level and detail: processors, memory and GPUs of this machine."""
    import psutil
    import torch

    gib = psutil.virtual_memory().total / 2**30
    return "ok", f"{os.cpu_count()} cores, {gib:.0f} GiB, python {platform.python_version()}, torch {torch.__version__}"


def device() -> tuple[str, str]:
    """Each GPU and what a large matrix product reaches on it."""
    import torch

    from diffusion.training import measured_matmul_rate

    if not torch.cuda.is_available():
        if why := driver_without_gpu(torch.version.cuda):
            return "problem", why
        rate = measured_matmul_rate(torch.device("cpu"), torch.float32)
        return "note", f"no CUDA device: training and encoding run on the CPU ({rate / 1e9:.0f} GFLOP/s measured)"
    from latentcache import check_bf16_convolutions

    rows = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        rate = measured_matmul_rate(torch.device("cuda", index), torch.bfloat16)
        name = torch.cuda.get_device_name(index)
        check_bf16_convolutions(torch.device("cuda", index))
        rows.append(f"{name} {free / 2**30:.0f}/{total / 2**30:.0f} GiB free, {rate / 1e12:.0f} TFLOP/s in bf16")
    return "ok", "; ".join(rows)


NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def driver_without_gpu(cuda: str | None) -> str:
    """Why a machine that has an NVIDIA driver has no GPU for torch; empty where there is no driver.

    Args:
        cuda: The CUDA release that torch was built for; None: for none.
    """
    if not NVIDIA_DRIVER.exists():
        return ""
    first = NVIDIA_DRIVER.read_text(errors="replace").partition("\n")[0].strip()
    if cuda is None:
        return f"an NVIDIA driver is here ({first}), but this torch is built without CUDA: install the CUDA build"
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        reason = "it names no device: look at CUDA_VISIBLE_DEVICES, and at how the container is given its GPUs"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
    return f"an NVIDIA driver is here ({first}), but torch for CUDA {cuda} finds no GPU: {reason}"


def disk() -> tuple[str, str]:
    """Return level and detail: what is free on the disk of the working folder."""
    free = shutil.disk_usage(os.curdir).free / 2**30
    return ("ok" if free > 30 else "note"), f"{free:.0f} GiB free here; a `medium` run keeps up to 3 x 9 GiB"


def vae_weights(spec: str) -> tuple[str, str]:
    """Return level and detail: the weights of a VAE, loaded."""
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
    """Return level and detail: what a training step needs beside what the device has."""
    from diffusion.training import World, default_device, estimate_step, memory_present, remedies

    world = World(device=default_device())
    shape, _ = sample_shape(config, latents)
    need = estimate_step(config, shape, world, decoder_of(latents, config, world.device.type == "cuda"))
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
    level, judged = judge_epoch(seconds, config)
    return level, f"about {spelled(seconds)} for {whose}, {flops / 1e12:.2f} TFLOP forward each{judged}"


def judge_epoch(seconds: float, config: TrainConfig) -> tuple[str, str]:
    """Return whether a run of such epochs is practicable, and what to change where it is not.

    An epoch is a note from 6 hours on (100 of them are a month) and a problem from 2 days on.
    """
    if seconds < NOTED_EPOCH_S:
        return "ok", ""
    whole = f"{config.optimiser.epochs} epochs would take {spelled(seconds * config.optimiser.epochs)}"
    if config.optimiser.steps is not None or config.budget.max_seconds is not None:
        whole = "the run's limits end it within an epoch or few"
    remedy = "train on GPUs (`ctpipe train --gpus N`), or choose --preset tiny, data.window or a smaller model.width"
    return ("note" if seconds < HOPELESS_EPOCH_S else "problem"), f"; {whole}: {remedy}"


def spelled(seconds: float) -> str:
    """Minutes, hours, days or years, whichever a person would say."""
    for unit, length, until in (("min", 60.0, 7200.0), ("h", 3600.0, 2 * 86400.0), ("days", 86400.0, 2 * 31_557_600.0)):
        if seconds < until:
            return f"{seconds / length:.{1 if unit == 'min' else 0}f} {unit}"
    return f"{seconds / 31_557_600:.0f} years"


def decoder_of(latents: list[LatentStore], config: TrainConfig, bf16: bool) -> Callable[[Any], Any]:
    """The decoder that the image losses would run, on shapes alone: the store's, else MAISI's."""
    from diffusion.data import choose_encode_key
    from latentcache import InputError
    from pipeline.vae import decoder_on_shapes

    architecture = None
    if latents:
        try:
            found = choose_encode_key(latents[0], config.data.encode_key)
            architecture = latents[0].encoding(found).vae_architecture
            return decoder_on_shapes(architecture, bf16=bf16)
        except InputError:  # nothing encoded yet, or a made-up VAE: the published one is the larger need
            architecture = None
    return decoder_on_shapes(architecture, bf16=bf16)


def compilation() -> tuple[str, str]:
    """Whether Triton can compile here: for ``optimiser.compile`` and for the fused kernels."""
    from diffusion.training import what_compilation_lacks

    missing = what_compilation_lacks()
    if not missing:
        return "ok", "a C compiler and Python's headers are here: compiled models and fused kernels can run"
    return "note", f"no {' and no '.join(missing)}: leave optimiser.compile off; fused kernels fall back to PyTorch's"
