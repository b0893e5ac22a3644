"""Train the regression baseline on a store's pairs."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusion.training import Progress

ALL_STEPS = 10**7
"""More than any budget of seconds allows: the clock stops the run."""


def seconds_of(run: Path) -> float:
    """Seconds that a run's steps took, over all its sessions, validation and checkpoints not counted.

    Raises:
        InputError: Its log has no training step.
    """
    from diffusion.runs import LOG, read_log
    from latentcache import InputError

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


def train_regression_network(
    store: str,
    run: Path,
    like: Path | None,
    seconds: float | None,
    width: int,
    blocks: int,
    patch: tuple[int, int, int],
    learning_rate: float,
    seed: int,
    device: str,
    private: str | None,
    cpu_seconds: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train, write the network with what it saw, and say so."""
    import torch

    from diffusion.config import BudgetConfig, OptimiserConfig, ValidationConfig
    from diffusion.runs import RunCard, reopen
    from diffusion.training import LoopConfig, Trainer, World
    from latentcache import LatentStore
    from pipeline.decode import only_encoding, window_of
    from pipeline.identity import PrivateStore
    from pipeline.refiner import (
        FILE_NAME,
        PatchSettings,
        Refiner,
        RefinerCard,
        RefinerConfig,
        RefinerPatches,
        save_refiner,
        training_pairs,
        training_recipe,
    )
    from pipeline.workflows.refiner_cases import RefinerSource
    from pipeline.workflows.train_refiner import PatchStream, squared_error

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
                BudgetConfig(
                    max_seconds=seconds, max_cpu_seconds=cpu_seconds, checkpoint_every_steps=ALL_STEPS,
                    log_every_steps=10,
                ),
            ),
            run,
            world=World(device=torch.device(device)),
            identity={"config": asdict(config), "window": [window.center, window.width], "seed": seed},
        )  # fmt: skip
        trainer.on_progress = on_progress
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
