"""``ctpipe train-regression``: the compact network that a diffusion model must be compared with."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Device, Private
from cli.output import AsJson, Exit, emit, progress_wanted

ALL_STEPS = 10**7
"""More than any budget of seconds allows: the clock stops the run."""


def register(app: typer.Typer) -> None:
    app.command("train-regression")(train_regression)


def train_regression(
    store: Annotated[str, typer.Argument(help="The store that the model was trained on.")],
    run: Annotated[Path, typer.Argument(help="Folder for the network; give it to `ctpipe evaluate --regression`.")],
    like: Annotated[Path | None, typer.Option(help="A diffusion run: its snapshot, window and training time.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Training time, where no run is given.")] = None,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network, on 2x2 pixels folded into one.")] = 48,
    blocks: Annotated[int, typer.Option(min=0, help="Residual blocks; each widens its view by 2 thick slices.")] = 6,
    patch: Annotated[str, typer.Option(help="Voxels of a patch, D,H,W.")] = "20,64,64",
    learning_rate: Annotated[float, typer.Option(help="Learning rate, constant after a warm-up.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of weights and patches.")] = 0,
    device: Device = "cpu",
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Train a small residual network from interpolated thick to thin slices, on the same split and for as long.

    It is the network of `ctpipe train-refiner` on plain interpolation; no latents take part. It predicts the mean of
    what is possible, which PSNR rewards: a generative model has to come near it.

    Examples:

        ctpipe train-regression STORE REGRESSION_RUN --like RUN

        ctpipe evaluate STORE RUN --regression REGRESSION_RUN
    """
    from cli.train_refiner import parse_patch, prepare_run
    from latentcache.errors import InputError
    from pipeline.refiner import FILE_NAME

    if (like is None) == (seconds is None):
        raise InputError(
            "both or neither of --like and --seconds",
            expected="one budget",
            remedy="Give --like RUN, the diffusion run to be compared with.",
        )
    if (run / FILE_NAME).exists():
        raise InputError("a network in this folder already", expected="a new folder", remedy="Choose another RUN.")
    prepare_run(run, resume=False)
    budget = seconds if like is None else seconds_of(like)
    result = run_training(
        store, run, like, budget or 0.0, width, blocks, parse_patch(patch), learning_rate, seed, device, private
    )
    text = (
        f"{result['parameters']} parameters, {result['steps']} steps in {result['seconds']:.0f} s on "
        f"{result['pairs']} training pairs; compare with: ctpipe evaluate STORE RUN --regression {run}"
    )
    emit(result, text, as_json)
    return Exit.OK


def seconds_of(run: Path) -> float:
    """Seconds that a run's steps took, over all its sessions, validation and checkpoints not counted.

    Raises:
        InputError: Its log has no training step.
    """
    from diffusion.journal import LOG, read_log
    from latentcache.errors import InputError

    rows = [row for row in read_log(run / LOG) if row["kind"] == "train"] if (run / LOG).is_file() else []
    if not rows:
        raise InputError(
            "a run without a logged training step", expected="RUN/log.jsonl", remedy="Give the folder of a trained run."
        )
    total, before = 0.0, 0
    for row in rows:
        # A row's step_s is the mean over the last steps.
        total += float(row["step_s"]) * (int(row["step"]) - before)
        before = int(row["step"])
    return total


def run_training(
    store: str,
    run: Path,
    like: Path | None,
    seconds: float,
    width: int,
    blocks: int,
    patch: tuple[int, int, int],
    learning_rate: float,
    seed: int,
    device: str,
    private: str | None,
) -> dict[str, Any]:
    """Train, write the network with what it saw, and say so."""
    import torch

    from cli.train import progress_line
    from cli.train_refiner import PatchStream, squared_error
    from diffusion.config import BudgetConfig, OptimiserConfig, ValidationConfig
    from diffusion.loop import Trainer
    from diffusion.loop_interface import LoopConfig
    from diffusion.pinned import reopen
    from diffusion.run_card import RunCard
    from diffusion.world import World
    from latentcache.store import LatentStore
    from pipeline.decode_store import only_encoding, window_of
    from pipeline.private import PrivateStore
    from pipeline.refiner import FILE_NAME, RefinerCard, save_refiner
    from pipeline.refiner_data import PatchSettings, RefinerPatches
    from pipeline.refiner_network import Refiner, RefinerConfig
    from pipeline.refiner_source import RefinerSource
    from pipeline.regression import training_pairs, training_recipe

    latents, people = LatentStore.open(store), PrivateStore.open(store, private)
    card = None if like is None else RunCard.read(like)
    if card is not None:
        latents = reopen(latents, card)
    window = window_of(latents, card.encode_key if card else only_encoding(latents, None))
    config = RefinerConfig(width, blocks)
    with tempfile.TemporaryDirectory(prefix="ctpipe-regression-") as scratch:
        source = RefinerSource(latents, people, Path(scratch))
        keys = training_pairs(latents.pairs())
        patches = RefinerPatches(keys, source.case, window, PatchSettings(patch, seed=seed))
        torch.manual_seed(seed)
        network = Refiner(config).to(device)
        trainer = Trainer(
            network,
            squared_error,
            PatchStream(patches),
            LoopConfig(
                OptimiserConfig(
                    learning_rate=learning_rate, schedule="constant", steps=ALL_STEPS, warmup_steps=50,
                    samples_per_step=patches.settings.batch, weight_decay=0.0,
                ),
                ValidationConfig(every_epochs=0),
                BudgetConfig(max_seconds=seconds, checkpoint_every_steps=ALL_STEPS, log_every_steps=10),
            ),
            run,
            world=World(device=torch.device(device)),
            identity={"config": asdict(config), "window": [window.center, window.width], "seed": seed},
        )  # fmt: skip
        with progress_line(progress_wanted()) as show:
            trainer.on_progress = show
            summary = trainer.run()
        recipe = training_recipe(latents, keys, summary.seconds, summary.steps, seed)
        spacing = source.spacing_range(keys)
        with trainer.averaged_weights():
            file = save_refiner(
                network, RefinerCard(config, (window.center, window.width), spacing, "none", recipe), run / FILE_NAME
            )
    said = {"sha256": file.sha256, "parameters": summary.parameters, "loss": summary.loss, **recipe}
    (run / "regression.json").write_text(json.dumps(said, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return said
