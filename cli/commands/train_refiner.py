"""``ctpipe train-refiner``: a small network in pixel space that corrects thin slices after decoding."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Device, Private
from cli.output import AsJson, Exit, emit, progress_bars, progress_wanted, training_bar

if TYPE_CHECKING:
    from pipeline.workflows import Sampled


def register(app: typer.Typer) -> None:
    app.command("train-refiner")(train_refiner)


def train_refiner(
    store: Annotated[str, typer.Argument(help="An encoded store whose pairs it learns from.")],
    run: Annotated[Path, typer.Argument(help="Folder for the run; give it to --refiner afterwards.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The diffusion run whose output it will correct; else plain interpolation.")
    ] = None,
    vae: Annotated[str, typer.Option(help="The VAE that encoded the store: `tiny` or a path.")] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 4000,
    patch: Annotated[str, typer.Option(help="Voxels of a patch, D,H,W.")] = "20,64,64",
    batch: Annotated[int, typer.Option(min=1, help="Patches a step.")] = 4,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network, on 2x2 pixels folded into one.")] = 48,
    blocks: Annotated[int, typer.Option(min=0, help="Residual blocks; each widens its view by 2 thick slices.")] = 6,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    sampling_steps: Annotated[int | None, typer.Option(min=1, help="Of the diffusion run's sampler.")] = None,
    seed: Annotated[int, typer.Option(help="Of patches, operators and sampling.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RUN.")] = False,
    device: Device = "auto",
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Train the refiner on patches streamed from the archives that the store was made of.

    Half of the patches see the measured thick slices, half see thick slices simulated from the thin ones by other
    slice profiles, phases and overlaps. The validation split is scored with a profile that training never draws. Where
    the output of --checkpoint wins by it there, over a linear estimate too, the refiner becomes that run's own: decode,
    interpolate and evaluate use it unless told otherwise.

    Examples:

        ctpipe train-refiner STORE RUN --steps 4000

        ctpipe train-refiner STORE RUN --checkpoint MODEL_RUN --device cuda --width 64 --blocks 8
    """
    import torch

    from diffusion.config import BudgetConfig, ValidationConfig
    from diffusion.training import LoopConfig, Trainer, World
    from latentcache import LatentStore
    from pipeline.identity import PrivateStore
    from pipeline.refiner import PatchSettings, Refiner, RefinerCard, RefinerConfig, RefinerPatches
    from pipeline.workflows import (
        HELD_OUT_PAIRS,
        PatchStream,
        RefinerSource,
        held_out_figures,
        keep,
        optimiser,
        prepare_run,
        sampled,
        squared_error,
    )

    prepare_run(run, resume)
    latents, people = LatentStore.open(store), PrivateStore.open(store, private)
    config = RefinerConfig(width, blocks)
    cutting = PatchSettings(parse_patch(patch), batch=batch, seed=seed)
    with tempfile.TemporaryDirectory(prefix="ctpipe-refiner-") as scratch:
        model: Sampled | None = None
        facts: dict[str, Any] = {}
        if checkpoint is not None:
            with progress_bars() as show_sampling:
                model, facts = sampled(latents, checkpoint, vae, sampling_steps, seed, device, show_sampling)
        source = RefinerSource(latents, people, Path(scratch), model)
        training = RefinerPatches(source.keys("train"), source.case, source.window, cutting)
        held_out = source.keys("val")[:HELD_OUT_PAIRS]
        torch.manual_seed(seed)
        network = Refiner(config).to(device)
        trainer = Trainer(
            network,
            squared_error,
            PatchStream(training),
            LoopConfig(
                optimiser=optimiser(learning_rate, steps, batch),
                validation=ValidationConfig(every_epochs=max(1, steps // (4 * len(training)))),
                budget=BudgetConfig(log_every_steps=10),
            ),
            run,
            world=World(device=torch.device(device)),
            validate=partial(held_out_figures, source, held_out) if held_out else None,
            identity={"config": asdict(config), "window": [source.window.center, source.window.width], "seed": seed},
            on_progress=None,
        )
        with training_bar(progress_wanted()) as show:
            trainer.on_progress = show
            summary = trainer.run(resume)
        recipe = {"steps": summary.steps, "seed": seed, "pairs": len(training.keys), **facts}
        recipe["held_out"] = {name: round(value, 4) for name, value in summary.validation.items()}
        card = RefinerCard(
            config,
            (source.window.center, source.window.width),
            source.spacing_range(training.keys),
            "residual" if checkpoint else "none",
            recipe,
        )
        with trainer.averaged_weights():
            file, own = keep(network, card, run, checkpoint, summary.validation)
    result = {
        "sha256": file.sha256,
        "default_of_checkpoint": own,
        "parameters": summary.parameters,
        "pairs": len(training.keys),
        **asdict(summary),
    }
    emit(result, _text(result, run), as_json)
    return Exit.OK


def parse_patch(text: str) -> tuple[int, int, int]:
    """``D,H,W`` voxels."""
    from latentcache import InputError

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"patch {text!r}", expected="D,H,W in voxels", remedy="For example --patch 20,64,64.")
    depth, height, wide = (int(part) for part in parts)
    return depth, height, wide


def _text(result: dict[str, Any], run: Path) -> str:
    text = f"{result['steps']} steps on {result['pairs']} pairs, loss {result['loss']:.5f}; use it with --refiner {run}"
    if result["default_of_checkpoint"]:
        text += "\nit wins on held-out pairs: decode, interpolate and evaluate with that checkpoint now use it"
    if result["validation"]:
        text += "\nheld-out pairs and operator: " + ", ".join(
            f"{name.removesuffix('_psnr_db')} {value:.2f} dB"
            for name, value in sorted(result["validation"].items())
            if name.endswith("_psnr_db")
        )
    return text
