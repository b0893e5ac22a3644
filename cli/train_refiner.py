"""``ctpipe train-refiner``: a small network in pixel space that corrects thin slices after decoding."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Device, Private
from cli.output import AsJson, Exit, emit, progress_wanted, stderr

if TYPE_CHECKING:
    from diffusion.config import OptimiserConfig
    from diffusion.loop_interface import Terms
    from diffusion.stream import Step
    from latentcache.store import LatentStore
    from pipeline.refiner import RefinerCard, RefinerFile
    from pipeline.refiner_data import RefinerPatches
    from pipeline.refiner_network import Refiner
    from pipeline.refiner_source import Sampled

READ_AHEAD = 4
CLIP_NORM = 0.01
"""A few times the usual norm of the gradient: the first steps of a network without normalisation may overshoot."""
HELD_OUT_PAIRS = 2
WIN_DB = 0.1
"""Gain in PSNR on held-out pairs from which on a refiner is its checkpoint's default."""


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
    device: Device = "cpu",
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

    from cli.train import progress_line
    from diffusion.config import BudgetConfig, ValidationConfig
    from diffusion.loop import Trainer
    from diffusion.loop_interface import LoopConfig
    from diffusion.world import World
    from latentcache.store import LatentStore
    from pipeline.private import PrivateStore
    from pipeline.refiner import RefinerCard
    from pipeline.refiner_data import PatchSettings, RefinerPatches
    from pipeline.refiner_network import Refiner, RefinerConfig
    from pipeline.refiner_source import RefinerSource, held_out_figures

    prepare_run(run, resume)
    latents, people = LatentStore.open(store), PrivateStore.open(store, private)
    config = RefinerConfig(width, blocks)
    cutting = PatchSettings(parse_patch(patch), batch=batch, seed=seed)
    with tempfile.TemporaryDirectory(prefix="ctpipe-refiner-") as scratch:
        model: Sampled | None = None
        facts: dict[str, Any] = {}
        if checkpoint is not None:
            model, facts = sampled(latents, checkpoint, vae, sampling_steps, seed, device)
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
        with progress_line(progress_wanted()) as show:
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


def keep(
    network: Refiner, card: RefinerCard, run: Path, checkpoint: Path | None, held_out: dict[str, float]
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
    from latentcache.errors import InputError

    if (run / "checkpoints").exists() and not resume:
        raise InputError(
            "a run in this folder already",
            expected="a new folder, or --resume",
            remedy="Add --resume, or choose another RUN.",
        )
    run.mkdir(parents=True, exist_ok=True)


def parse_patch(text: str) -> tuple[int, int, int]:
    """``D,H,W`` voxels."""
    from latentcache.errors import InputError

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"patch {text!r}", expected="D,H,W in voxels", remedy="For example --patch 20,64,64.")
    depth, height, wide = (int(part) for part in parts)
    return depth, height, wide


class PatchStream:
    """Batches of patches as steps of the training loop: one batch a step, read ahead by a thread."""

    def __init__(self, patches: RefinerPatches) -> None:
        self.patches = patches
        self.epoch, self.index = 0, 0

    def __len__(self) -> int:
        return len(self.patches)

    def __iter__(self) -> Iterator[Step]:
        from diffusion.prefetch import prefetch
        from diffusion.stream import Step

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
        from latentcache.errors import InputError

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
    from diffusion.loop_interface import Terms

    refined = module(batch["fine"], batch["thick"], batch["below"], batch["between"])
    error = (refined - batch["target"]).square().mean(dim=(1, 2, 3, 4))
    before = (batch["fine"][:, 1:2] - batch["target"]).square().mean(dim=(1, 2, 3, 4))
    return Terms(error, {"input": before})


def sampled(
    latents: LatentStore, checkpoint: Path, vae: str, steps: int | None, seed: int, device: str
) -> tuple[Sampled, dict[str, Any]]:
    """Sample every training and validation pair once; what was sampled, and what is to be said of it."""
    from rich.progress import Progress

    from cli.sampling import Spread, sample_pairs
    from latentcache.errors import InputError
    from pipeline.decode_store import load_decoder
    from pipeline.engine import EngineOptions
    from pipeline.refiner_source import Sampled

    options = {"sampler": None, "num_inference_steps": steps, "seed": seed}
    keys = [p.pair_key for p in latents.pairs() if p.status == "ok" and p.split in ("train", "val")]
    with Progress(console=stderr, disable=not progress_wanted()) as progress:
        here = Spread(EngineOptions("inline", devices=(device,)))
        done = sample_pairs(latents, checkpoint, None, keys, options, 1, False, here, progress)
    if done.failed:
        raise InputError(
            f"{len(done.failed)} pairs that cannot be sampled, the first {next(iter(done.failed.items()))}",
            expected="a sample of every training and validation pair",
            remedy="Mend those pairs or exclude them, then run this again: what was sampled is kept.",
        )
    encoding = latents.encoding(done.encode_key)
    decoder = load_decoder(device, spec=vae, expected_sha256=encoding.vae_sha256, extra=encoding.extra)
    return Sampled(done.encode_key, done.stores[0], decoder), done.facts


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
