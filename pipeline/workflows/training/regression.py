"""Train the regression baseline on a store's pairs."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusion.training import Progress, Trainer
    from pipeline.refiner import RefinerPatches
    from pipeline.volume import Window

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


@dataclass(frozen=True)
class RegressionJob:
    """A user's order to train the regression baseline.

    Attributes:
        store: The store that the model was trained on; ``private`` is its private part where that is elsewhere.
        run: Folder for the network; it must hold none yet.
        like: A diffusion run whose snapshot, window and training time it takes.
        seconds: Training time, where no run is given; ``cpu_seconds``: in processor time of this process; ``steps``:
            so many steps, however long they take.
        width, blocks: Channels and residual blocks of the network.
        patch: Voxels of a patch, (D, H, W).
        learning_rate: Constant after a warm-up.
    """

    store: str
    run: Path
    like: Path | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    steps: int | None = None
    width: int = 48
    blocks: int = 6
    patch: tuple[int, int, int] = (20, 64, 64)
    learning_rate: float = 5e-4
    seed: int = 0
    device: str = "cpu"
    private: str | None = None


def train_regression(job: RegressionJob, on_step: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Train the network, write it with what it saw into the run's folder, and return its figures.

    Raises:
        InputError: No budget or two, or a folder that holds a network already.
    """
    from diffusion.runs import RunCard, reopen
    from latentcache import LatentStore
    from pipeline.identity import PrivateStore
    from pipeline.refiner import (
        FILE_NAME,
        PatchSettings,
        RefinerCard,
        RefinerConfig,
        RefinerPatches,
        save_refiner,
        training_pairs,
        training_recipe,
    )
    from pipeline.volume import Window
    from pipeline.workflows.training.refiner_cases import RefinerSource

    seconds = _budget(job)
    latents, private = LatentStore.open(job.store), PrivateStore.open(job.store, job.private)
    card = None if job.like is None else RunCard.read(job.like)
    if card is not None:
        latents = reopen(latents, card)
    window = Window.of(latents.encoding(card.encode_key) if card else latents.encoding_in_use())
    config = RefinerConfig(job.width, job.blocks)
    with tempfile.TemporaryDirectory(prefix="ctpipe-regression-") as scratch:
        source = RefinerSource(latents, private, Path(scratch))
        keys = training_pairs(latents.pairs())
        patches = RefinerPatches(keys, source.case, window, PatchSettings(job.patch, seed=job.seed))
        trainer = _trainer(job, patches, window, seconds, on_step)
        summary = trainer.run()
        recipe = training_recipe(latents, keys, summary.seconds, summary.steps, job.seed)
        written = RefinerCard(config, (window.center, window.width), source.spacing_range(keys), "none", recipe)
        with trainer.averaged_weights():
            file = save_refiner(trainer.module, written, job.run / FILE_NAME)
    figures = {"sha256": file.sha256, "parameters": summary.parameters, "loss": summary.loss, **recipe}
    (job.run / "regression.json").write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return figures


def _budget(job: RegressionJob) -> float | None:
    """Seconds to train, None for a budget in processor time or in steps; the run's folder is made."""
    from latentcache import InputError
    from pipeline.refiner import FILE_NAME
    from pipeline.workflows.training.refiner import prepare_run

    if sum(given is not None for given in (job.like, job.seconds, job.cpu_seconds, job.steps)) != 1:
        raise InputError(
            "none or several of --like, --seconds, --cpu-seconds and --steps",
            expected="one budget",
            remedy="Give --like RUN, the diffusion run to be compared with.",
        )
    if (job.run / FILE_NAME).exists():
        raise InputError("a network in this folder already", expected="a new folder", remedy="Choose another RUN.")
    prepare_run(job.run, resume=False)
    return job.seconds if job.like is None else seconds_of(job.like)


def _trainer(
    job: RegressionJob,
    patches: RefinerPatches,
    window: Window,
    seconds: float | None,
    on_step: Callable[[Progress], None] | None,
) -> Trainer:
    """The training loop around a new network, which the clock stops."""
    import torch

    from diffusion.config import BudgetConfig, OptimiserConfig, ValidationConfig
    from diffusion.training import LoopConfig, Trainer, Watch, World
    from pipeline.refiner import Refiner, RefinerConfig
    from pipeline.workflows.training.refiner import PatchStream, squared_error

    config = RefinerConfig(job.width, job.blocks)
    torch.manual_seed(job.seed)
    return Trainer(
        Refiner(config).to(job.device),
        squared_error,
        PatchStream(patches),
        LoopConfig(
            OptimiserConfig(
                learning_rate=job.learning_rate,
                schedule="constant",
                steps=ALL_STEPS,
                warmup_steps=50,
                samples_per_step=patches.settings.batch,
                weight_decay=0.0,
            ),
            ValidationConfig(every_epochs=0),
            BudgetConfig(
                max_steps=job.steps,
                max_seconds=seconds,
                max_cpu_seconds=job.cpu_seconds,
                checkpoint_every_steps=ALL_STEPS,
                log_every_steps=10,
            ),
        ),
        job.run,
        world=World(device=torch.device(job.device)),
        identity={"config": asdict(config), "window": [window.center, window.width], "seed": job.seed},
        watch=Watch(on_progress=on_step),
    )
