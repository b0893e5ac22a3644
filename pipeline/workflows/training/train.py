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
    from pipeline.workflows.training.texture import measure_draws, measure_noise

    if settings["gpus"] == 0:
        import os

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_gpus(settings["gpus"] or 0)
    config = configuration(settings, on_note)
    world = join()
    starts_from = own_start(settings, config, first=world.rank == 0)
    latents = LatentStore.open(settings["store"])
    first = world.rank == 0
    decoder, validate = image_side(settings, config, latents, str(world.device), first=first, on_note=on_note)
    if first:
        measure_noise(settings, config, latents, on_note)
    try:
        summary = train_model(
            latents,
            settings["run"],
            config,
            decoder=decoder,
            validate=validate,
            refiner_sha256=starts_from,
            resume=settings["resume"],
            on_progress=on_progress,
        )
    finally:
        leave()
    if first and validate is not None:  # the other processes need not wait for it
        measure_draws(settings, config, latents, str(world.device), on_note)
    return {**asdict(summary), "run": settings["run"], "rank": world.rank}


def configuration(settings: dict[str, Any], on_note: Callable[[str], None] | None = None) -> TrainConfig:
    """The run's configuration: on resume the run's own, with this call's overrides on top; else preset and file."""
    import json

    from diffusion.config import from_dict, load_config

    kept = Path(settings["run"]) / "config.json"
    if settings["resume"] and kept.exists() and settings["preset"] is None and settings["config"] is None:
        base = from_dict(json.loads(kept.read_text(encoding="utf-8")))
        config, notes = load_config(base.preset, None, settings["overrides"], base=base)
    else:
        config, notes = load_config(settings["preset"], settings["config"], settings["overrides"])
    for note in notes:
        if on_note is not None:
            on_note(note)
    return config


def image_side(
    settings: dict[str, Any],
    config: TrainConfig,
    latents: LatentStore,
    device: str,
    *,
    first: bool,
    on_note: Callable[[str], None] | None = None,
) -> tuple[Callable[[Any], Any] | None, Callable[[Interpolator, int], dict[str, float]] | None]:
    """Return what needs the VAE: its decoder, for the losses, and validation that samples and decodes held-out pairs.

    Both are None where the VAE is not at hand and nothing demands it.
    """
    from diffusion.data import choose_encode_key
    from diffusion.training import OF_LATENTS
    from latentcache import InputError
    from pipeline.vae import check_same_vae, load_vae

    losses, looks = config.losses, config.validation
    on_images = losses.ms_ssim_weight > 0 or losses.perceptual_weight > 0 or losses.image_l2_weight > 0
    on_pairs = looks.every_epochs > 0 and (looks.images_every > 0 or looks.metric not in ("auto", *OF_LATENTS))
    demanded = on_images or losses.measure == "image" or on_pairs
    welcome = losses.measure == "auto" or (looks.every_epochs > 0 and looks.metric == "auto")
    if not demanded and not welcome:
        return None, None
    encode_key = choose_encode_key(latents, config.data.encode_key)
    encoding = latents.encoding(encode_key)
    tiny = load_vae("tiny", device)
    if settings["vae"] is None and tiny.sha256 != encoding.vae_sha256:
        if not demanded:
            return None, None
        raise InputError(
            "no VAE for the image losses and the image validation",
            expected=f"the one that encoded this store's latents (SHA-256 begins {encoding.vae_sha256[:12]})",
            remedy="Name it with --vae PATH; or train without: --set losses.ms_ssim_weight=0 "
            "--set losses.perceptual_weight=0 --set losses.measure=latent --set validation.images_every=0.",
        )
    model = tiny if settings["vae"] in (None, "tiny") else load_vae(settings["vae"], device)
    check_same_vae(model, encoding)
    decoder = model.decode_slab if on_images or losses.measure != "latent" else None
    if not on_pairs and not (looks.every_epochs > 0 and looks.metric == "auto"):
        return decoder, None
    return decoder, held_out_pairs(
        settings, config, latents, model, encode_key, demanded=on_pairs, first=first, on_note=on_note
    )


def own_start(settings: dict[str, Any], config: TrainConfig, *, first: bool) -> str | None:
    """SHA-256 of the refiner whose slices the run starts from, copied into its folder; None where it has none.

    Raises:
        InputError: The run starts from refined slices, and neither --refiner nor its folder has the refiner.
    """
    from diffusion.runs import RUN_CARD
    from latentcache import InputError
    from pipeline.refiner import START_NAME, RefinerFile

    if config.data.start != "refined":
        return None
    kept, begun = Path(settings["run"]) / START_NAME, (Path(settings["run"]) / RUN_CARD).is_file()
    if settings["refiner"] is None and not kept.is_file():
        raise InputError(
            "data.start = refined without the refiner",
            expected="the refiner's run, whose file this run keeps",
            remedy="Name the one that `ctpipe encode STORE --refiner` was given: --refiner RUN.",
        )
    file = RefinerFile.of(settings["refiner"] or kept)
    if first and not (begun and kept.is_file()) and Path(file.path) != kept:
        # What an attempt left that never began is replaced; a run that has begun keeps its own.
        file.copy_to(kept)
    return file.sha256


def held_out_pairs(
    settings: dict[str, Any],
    config: TrainConfig,
    latents: LatentStore,
    vae: Any,
    encode_key: str,
    *,
    demanded: bool,
    first: bool,
    on_note: Callable[[str], None] | None = None,
) -> Callable[[Interpolator, int], dict[str, float]] | None:
    """Validation on sampled held-out pairs; None where the archives are not at hand and it is not demanded.

    Every rank gets a function, so that all agree on what is looked at; the first one alone is called.
    """
    from latentcache import CtpipeError
    from pipeline.evaluation import HeldOutImages
    from pipeline.identity import PrivateStore
    from pipeline.refiner import START_NAME, RefinerFile

    start = Path(settings["run"]) / START_NAME if config.data.start == "refined" else None
    try:
        private = PrivateStore.open(settings["store"], settings["private"])
    except CtpipeError as error:
        if demanded:
            raise
        if on_note is not None:
            on_note(f"held-out pairs are not decoded during training: {error}")
        return None
    if not first:
        return lambda interpolator, step: {}
    held_out = HeldOutImages(
        latents,
        private,
        vae,
        encode_key,
        count=config.validation.pairs,
        start=None if start is None else RefinerFile.of(start),
    )

    def validate(interpolator: Interpolator, step: int) -> dict[str, float]:
        from diffusion.sampling import generate_for

        steps = config.validation.sampling_steps
        return held_out.figures(
            lambda pair: generate_for(
                latents, interpolator, pair, sampler=config.validation.sampler, num_inference_steps=steps
            ),
            means=interpolator.objective.steps(steps) == 1,
        )

    return validate


def describe(settings: dict[str, Any], on_note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Return what a run would be and need, without training it."""
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
