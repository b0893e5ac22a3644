"""Train a diffusion model on a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusion.config import TrainConfig
    from diffusion.sampling import Interpolator
    from diffusion.training import Progress
    from latentcache import LatentStore


def run_training(
    settings: dict[str, Any],
    on_progress: Callable[[Progress], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train in this process, which may be one of several. Picklable, so that Ray can send it."""
    from diffusion.training import check_gpus, join, leave, train as train_model
    from latentcache import LatentStore

    if settings["gpus"] == 0:
        import os

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_gpus(settings["gpus"] or 0)
    config = configuration(settings, on_note)
    world = join()
    latents = LatentStore.open(settings["store"])
    decoder, validate = image_side(settings, config, latents, str(world.device), first=world.rank == 0)
    try:
        summary = train_model(
            latents,
            settings["run"],
            config,
            decoder=decoder,
            validate=validate,
            resume=settings["resume"],
            on_progress=on_progress,
        )
    finally:
        leave()
    return {**asdict(summary), "run": settings["run"], "rank": world.rank}


def configuration(settings: dict[str, Any], on_note: Callable[[str], None] | None = None) -> TrainConfig:
    """The run's configuration: on resume the run's own, with this call's overrides on top; else preset and file."""
    import json

    from diffusion.config import from_dict, load_config

    kept = Path(settings["run"]) / "config.json"
    if settings["resume"] and kept.exists() and settings["preset"] is None and settings["config"] is None:
        base = from_dict(json.loads(kept.read_text()))
        config, notes = load_config(base.preset, None, settings["overrides"], base=base)
    else:
        config, notes = load_config(settings["preset"], settings["config"], settings["overrides"])
    for note in notes:
        if on_note is not None:
            on_note(note)
    return config


def image_side(
    settings: dict[str, Any], config: TrainConfig, latents: LatentStore, device: str, *, first: bool
) -> tuple[Callable[[Any], Any] | None, Callable[[Interpolator, int], dict[str, float]] | None]:
    """What needs the VAE: the image losses' decoder, and validation that samples and decodes held-out pairs."""
    losses = config.losses.ms_ssim_weight > 0 or config.losses.perceptual_weight > 0
    looks = config.validation.every_epochs > 0 and (
        config.validation.images_every > 0 or config.validation.metric != "val_loss"
    )
    if not losses and not (looks and first):
        return None, None
    from diffusion.data import choose_encode_key
    from latentcache import InputError
    from pipeline.evaluation import HeldOutImages, check_same_vae
    from pipeline.identity import PrivateStore
    from pipeline.vae import load_vae

    encode_key = choose_encode_key(latents, config.data.encode_key)
    tiny = load_vae("tiny", device)
    wanted = latents.encoding(encode_key).vae_sha256
    if settings["vae"] is None and tiny.sha256 != wanted:
        raise InputError(
            "no VAE for the image losses and the image validation",
            expected=f"the one that encoded this store's latents (SHA-256 begins {wanted[:12]})",
            remedy="Name it with --vae PATH; or train without: --set losses.ms_ssim_weight=0 "
            "--set losses.perceptual_weight=0 --set validation.images_every=0.",
        )
    model = tiny if settings["vae"] in (None, "tiny") else load_vae(settings["vae"], device)
    check_same_vae(model, wanted)
    decoder = model.decode_slab if losses else None
    if not looks or not first:
        return decoder, None
    held_out = HeldOutImages(
        latents,
        PrivateStore.open(settings["store"], settings["private"]),
        model,
        encode_key,
        count=config.validation.pairs,
    )

    def validate(interpolator: Interpolator, step: int) -> dict[str, float]:
        from diffusion.sampling import condition_of

        return held_out.figures(
            lambda pair: interpolator.generate_latent(
                condition_of(latents, interpolator, pair)[0],
                sampler=config.validation.sampler,
                num_inference_steps=config.validation.sampling_steps,
            )
        )

    return decoder, validate


def describe(settings: dict[str, Any], on_note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """What a run would be and need, without training it."""
    from diffusion.training import World, default_device, estimate_step, memory_present, open_streams
    from latentcache import LatentStore

    config = configuration(settings, on_note)
    latents = LatentStore.open(settings["store"])
    workers = max(1, settings["gpus"] or 1)
    world = World(0, workers, default_device())
    stream, held_out = open_streams(latents, config, world)
    decoder, _ = image_side(settings, config, latents, str(world.device), first=False)
    need = estimate_step(config, stream.shapes[0], world, decoder)
    total = config.optimiser.steps or config.optimiser.epochs * len(stream)
    return {
        "preset": config.preset,
        "objective": config.objective.name,
        "training_pairs": len(stream.pairs),
        "validation_pairs": len(held_out.pairs) if held_out else 0,
        "left_out": stream.left_out,
        "largest_sample": list(stream.shapes[0]),
        "samples_per_epoch": stream.samples_per_epoch,
        "steps_per_epoch": len(stream),
        "steps": min(total, config.budget.max_steps or total),
        "parameters": need.parameters,
        "tflop_per_epoch": round(3 * need.forward_flops_per_sample * stream.samples_per_epoch / 1e12, 3),
        "memory_needed_gib": round(need.peak_bytes / 2**30, 2),
        "memory_present_gib": round(memory_present(world.device) / 2**30, 2),
        "checkpoint_gib": round(need.checkpoint_bytes / 2**30, 2),
        "device": world.device.type,
        "snapshot": latents.snapshot,
        "encode_key": stream.encode_key,
    }
