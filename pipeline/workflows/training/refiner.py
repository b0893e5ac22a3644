"""Train a pixel refiner for a run's model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.workflows.job_progress import OnProgress, silent

if TYPE_CHECKING:
    from torch import nn

    from diffusion.config import OptimiserConfig
    from diffusion.data import Step
    from diffusion.training import Progress, Terms, Trainer
    from latentcache import LatentStore
    from pipeline.refiner import RefinerCard, RefinerFile, RefinerPatches
    from pipeline.workflows.training.refiner_cases import RefinerSource, Sampled


READ_AHEAD = 4
CLIP_NORM = 0.01
"""A few times the usual norm of the gradient: the first steps of a network without normalisation may overshoot."""
HELD_OUT_PAIRS = 2
WIN_DB = 0.1
"""Gain in PSNR on held-out pairs from which on a refiner is its checkpoint's default."""


@dataclass(frozen=True)
class RefinerJob:
    """A user's order to train a pixel refiner.

    Attributes:
        store: An encoded store whose pairs it learns from; ``private`` is its private part where that is elsewhere.
        run: Folder for the run.
        checkpoint: The diffusion run whose output it will correct; None: plain interpolation.
        vae: ``tiny`` or the path of the VAE that encoded the store.
        patch: Voxels of a patch, (D, H, W); ``batch`` patches a step.
        width, blocks: Channels and residual blocks of the network.
        sampling_steps: Of the diffusion run's sampler; None: its default.
        seed: Of patches, operators and sampling.
        resume: Continue the run in ``run``.
    """

    store: str
    run: Path
    checkpoint: Path | None = None
    vae: str = "tiny"
    steps: int = 4000
    patch: tuple[int, int, int] = (20, 64, 64)
    batch: int = 4
    width: int = 48
    blocks: int = 6
    learning_rate: float = 5e-4
    sampling_steps: int | None = None
    seed: int = 0
    resume: bool = False
    device: str = "cpu"
    private: str | None = None


def train_refiner(
    job: RefinerJob,
    on_progress: OnProgress = silent,
    on_step: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Train the refiner on patches streamed from the archives that the store was made of.

    Half of the patches see the measured thick slices, half see thick slices simulated from the thin ones by other
    slice profiles, phases and overlaps. The validation split is scored with a profile that training never draws. Where
    the output of ``checkpoint`` wins by it there, over a linear estimate too, the refiner becomes that run's own.

    Args:
        on_progress: Progress under ``sampling``, where there is a checkpoint.
        on_step: Called with each logged step of training.

    Returns:
        SHA-256 of the refiner, whether it is its checkpoint's default now, parameters, pairs and the run's summary.
    """
    from latentcache import LatentStore
    from pipeline.identity import PrivateStore
    from pipeline.refiner import PatchSettings, RefinerCard, RefinerConfig, RefinerPatches
    from pipeline.workflows.training.refiner_cases import RefinerSource

    prepare_run(job.run, job.resume)
    latents, private = LatentStore.open(job.store), PrivateStore.open(job.store, job.private)
    cutting = PatchSettings(job.patch, batch=job.batch, seed=job.seed)
    with tempfile.TemporaryDirectory(prefix="ctpipe-refiner-") as scratch:
        model: Sampled | None = None
        facts: dict[str, Any] = {}
        if job.checkpoint is not None:
            model, facts = sampled(latents, job, job.checkpoint, on_progress)
        source = RefinerSource(latents, private, Path(scratch), model)
        training = RefinerPatches(source.keys("train"), source.case, source.window, cutting)
        trainer = _trainer(job, source, training, on_step)
        summary = trainer.run(job.resume)
        recipe = {"steps": summary.steps, "seed": job.seed, "pairs": len(training.keys), **facts}
        recipe["held_out"] = {name: round(value, 4) for name, value in summary.validation.items()}
        card = RefinerCard(
            RefinerConfig(job.width, job.blocks),
            (source.window.center, source.window.width),
            source.spacing_range(training.keys),
            "residual" if job.checkpoint else "none",
            recipe,
        )
        with trainer.averaged_weights():
            file, own = keep(trainer.module, card, job.run, job.checkpoint, summary.validation)
    return {
        "sha256": file.sha256,
        "default_of_checkpoint": own,
        "pairs": len(training.keys),
        **asdict(summary),
    }


def _trainer(
    job: RefinerJob, source: RefinerSource, training: RefinerPatches, on_step: Callable[[Progress], None] | None
) -> Trainer:
    """The training loop around a new network; the window and the network's size belong to the run's identity."""
    import torch

    from diffusion.config import BudgetConfig, ValidationConfig
    from diffusion.training import LoopConfig, Trainer, Watch, World
    from pipeline.refiner import Refiner, RefinerConfig
    from pipeline.workflows.training.refiner_cases import held_out_figures

    config = RefinerConfig(job.width, job.blocks)
    held_out = source.keys("val")[:HELD_OUT_PAIRS]
    torch.manual_seed(job.seed)
    return Trainer(
        Refiner(config).to(job.device),
        squared_error,
        PatchStream(training),
        LoopConfig(
            optimiser=optimiser(job.learning_rate, job.steps, job.batch),
            validation=ValidationConfig(every_epochs=max(1, job.steps // (4 * len(training)))),
            budget=BudgetConfig(log_every_steps=10),
        ),
        job.run,
        world=World(device=torch.device(job.device)),
        identity={"config": asdict(config), "window": [source.window.center, source.window.width], "seed": job.seed},
        watch=Watch(partial(held_out_figures, source, held_out) if held_out else None, on_progress=on_step),
    )


def keep(
    network: nn.Module, card: RefinerCard, run: Path, checkpoint: Path | None, held_out: dict[str, float]
) -> tuple[RefinerFile, bool]:
    """Write the network into its run and, where it wins, into its checkpoint's; returns the file and whether it won."""
    from pipeline.refiner import FILE_NAME, save_refiner

    file = save_refiner(network, card, run / FILE_NAME)
    won = checkpoint is not None and wins(held_out)
    if checkpoint is not None and won:
        save_refiner(network, card, checkpoint / FILE_NAME)
    return file, won


def optimiser(learning_rate: float, steps: int, batch: int) -> OptimiserConfig:
    """AdamW without weight decay, warmed up over at most 100 steps."""
    from diffusion.config import OptimiserConfig

    return OptimiserConfig(
        learning_rate=learning_rate,
        steps=steps,
        samples_per_step=batch,
        weight_decay=0.0,
        warmup_steps=min(100, 1 + steps // 10),
        clip_norm=CLIP_NORM,
    )


def wins(held_out: dict[str, float]) -> bool:
    """Whether the refined slices beat both of the network's inputs on held-out pairs under the held-out operator.

    The linear estimate is one of them: what the consistency step gives without any learning is no win.
    """
    best = max(held_out.get(f"{name}_psnr_db", math.inf) for name in ("composed", "back_projected"))
    return held_out.get("refined_psnr_db", -math.inf) - best >= WIN_DB


def prepare_run(run: Path, resume: bool) -> None:
    """Make the run's folder; refuse to write over another run."""
    from latentcache import InputError

    if (run / "checkpoints").exists() and not resume:
        raise InputError(
            "a run in this folder already",
            expected="a new folder, or --resume",
            remedy="Add --resume, or choose another RUN.",
        )
    run.mkdir(parents=True, exist_ok=True)


class PatchStream:
    """Batches of patches as steps of the training loop: one batch a step, read ahead by a thread."""

    def __init__(self, patches: RefinerPatches) -> None:
        self.patches = patches
        self.epoch, self.index = 0, 0

    def __len__(self) -> int:
        return len(self.patches)

    def __iter__(self) -> Iterator[Step]:
        from diffusion.data import Step, prefetch

        count = len(self.patches)
        reader = prefetch(self._tasks(self.epoch, self.index), 1, READ_AHEAD)
        try:
            while True:
                epoch, index = self.epoch, self.index
                self.epoch, self.index = (epoch + 1, 0) if index + 1 == count else (epoch, index + 1)
                yield Step(epoch, index, count, self.patches.settings.batch, 1, islice(reader, 1))
        finally:
            reader.close()  # type: ignore[attr-defined]

    def _tasks(self, epoch: int, index: int) -> Iterator[Callable[[], dict[str, Any]]]:
        while True:
            for number in range(index, len(self.patches)):
                yield partial(as_batch, self.patches, epoch, number)
            epoch, index = epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "pairs": len(self.patches.keys)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        from latentcache import InputError

        if state["pairs"] != len(self.patches.keys):
            raise InputError(
                f"{len(self.patches.keys)} training pairs where the checkpoint saw {state['pairs']}",
                expected="the store and splits that the run began with",
                remedy="Restore the store, or start a new run directory.",
            )
        self.epoch, self.index = state["epoch"], state["index"]


def as_batch(patches: RefinerPatches, epoch: int, index: int) -> dict[str, Any]:
    """A batch as the loop wants it: tensors, and a weight for every sample."""
    import torch

    cut = patches.batch(epoch, index)
    inputs = {name: torch.from_numpy(part) for name, part in cut["inputs"]._asdict().items()}
    target = torch.from_numpy(cut["target"])
    return {**inputs, "target": target, "study_key": cut["study_key"], "weight": torch.ones(len(target))}


def squared_error(module: Any, batch: dict[str, Any], step: int) -> Terms:
    """Mean squared error per patch, beside that of the network's input; PSNR is what it is judged by."""
    from diffusion.training import Terms

    refined = module(batch["fine"], batch["thick"], batch["below"], batch["between"])
    error = (refined - batch["target"]).square().mean(dim=(1, 2, 3, 4))
    before = (batch["fine"][:, 1:2] - batch["target"]).square().mean(dim=(1, 2, 3, 4))
    return Terms(error, {"input": before})


def sampled(
    latents: LatentStore, job: RefinerJob, checkpoint: Path, on_progress: OnProgress = silent
) -> tuple[Sampled, dict[str, Any]]:
    """Sample every training and validation pair once; what was sampled, and the facts to report of it."""
    from latentcache import InputError
    from pipeline.engines import EngineOptions
    from pipeline.vae import load_decoder
    from pipeline.workflows.sample import SampleJob, Spread, sample_pairs
    from pipeline.workflows.training.refiner_cases import Sampled

    keys = [p.pair_key for p in latents.pairs() if p.status == "ok" and p.split in ("train", "val")]
    here = Spread(EngineOptions("inline", devices=(job.device,)))
    sampling = SampleJob(checkpoint, keys=keys, steps=job.sampling_steps, seed=job.seed)
    done = sample_pairs(latents, sampling, here, on_progress)
    if done.failed:
        raise InputError(
            f"{len(done.failed)} pairs that cannot be sampled, the first {next(iter(done.failed.items()))}",
            expected="a sample of every training and validation pair",
            remedy="Mend those pairs or exclude them, then run this again: what was sampled is kept.",
        )
    decoder = load_decoder(job.device, spec=job.vae, encoding=latents.encoding(done.encode_key))
    return Sampled(done.encode_key, done.stores[0], decoder), done.facts
