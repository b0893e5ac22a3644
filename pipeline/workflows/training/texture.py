"""Noise and detail that a run's samples lack of true thin slices: measured when it begins, and when it has trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusion.config import TrainConfig
    from latentcache import LatentStore

DRAW_STEPS = 10
"""Sampling steps of the draws that are measured, where the objective gives a mean by default."""


def measure_noise(
    settings: dict[str, Any], config: TrainConfig, latents: LatentStore, on_note: Callable[[str], None] | None = None
) -> None:
    """Measure the noise of training pairs' true thin slices; kept in the run's folder, once.

    Where the archives are not at hand, or cannot be read, the run does without, and says so.
    """
    from diffusion.data import choose_encode_key
    from latentcache import CtpipeError
    from latentcache.storage import write_text
    from pipeline.evaluation import texture_of_pairs
    from pipeline.identity import PrivateStore
    from pipeline.metrics import Texture
    from pipeline.workflows.sample import TEXTURE_NAME

    path = Path(settings["run"]) / TEXTURE_NAME
    if path.exists():
        return
    try:
        private = PrivateStore.open(settings["store"], settings["private"])
        noise, failed = texture_of_pairs(latents, private, choose_encode_key(latents, config.data.encode_key))
    except CtpipeError as error:
        noise, failed = None, {"all": str(error)}
    for pair, reason in failed.items():
        if on_note is not None:
            on_note(f"texture of thin slices, pair {pair}: {reason}")
    if noise is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, Texture.of_noise(noise).to_json() + "\n")


def measure_draws(
    settings: dict[str, Any],
    config: TrainConfig,
    latents: LatentStore,
    device: str,
    on_note: Callable[[str], None] | None = None,
) -> None:
    """Measure how much detail draws of the run's best weights lack on its held-out pairs; kept beside the noise.

    A run that looks at no held-out pair in HU has no gain; one that fails to says so, and keeps what it has.
    """
    from diffusion.sampling import Interpolator, generate_for
    from latentcache import CtpipeError
    from latentcache.storage import write_text
    from pipeline.evaluation import detail_of_draws
    from pipeline.identity import PrivateStore
    from pipeline.metrics import Texture
    from pipeline.vae import load_vae
    from pipeline.workflows.sample import TEXTURE_NAME, start_of

    run = Path(settings["run"])
    if not (run / TEXTURE_NAME).is_file() or config.validation.pairs == 0:
        return
    try:
        model = Interpolator.load(run, device)
        own = model.objective.steps(None)
        steps = own if own > 1 else DRAW_STEPS

        def draw(pair: Any) -> Any:
            return generate_for(latents, model, pair, sampler=config.validation.sampler, num_inference_steps=steps)

        if on_note is not None:
            on_note(f"measuring the detail of draws: {config.validation.pairs} held-out pairs, {steps} steps each")
        private = PrivateStore.open(settings["store"], settings["private"])
        vae = load_vae(settings["vae"] or "tiny", device)
        found = detail_of_draws(
            latents, private, vae, model.encode_key, draw, start_of(run, device), config.validation.pairs
        )
    except CtpipeError as error:
        if on_note is not None:
            on_note(f"detail of draws was not measured: {error}")
        return
    if found is not None:
        texture = Texture.from_json((run / TEXTURE_NAME).read_text(encoding="utf-8"))
        write_text(run / TEXTURE_NAME, texture.with_detail(*found).to_json() + "\n")
