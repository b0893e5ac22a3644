"""The training loop. It trains any module on any stream of batches: the U-Net, a refiner, a VAE's fine-tuning.

What the tensors mean is the batch loss's business; the loop knows samples, steps, ranks and files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusion.config import BudgetConfig, OptimiserConfig, ParallelConfig, ValidationConfig
from diffusion.data import Batch, Step
from diffusion.runs import CheckpointFolder, Journal, PowerEma, full_tensor, gather, load_on_first, restore
from diffusion.training.distributed import World, compile_after_spreading, gradients_meet, reshard, spread
from diffusion.training.early_stopping import Best
from diffusion.training.failures import non_finite, stop_signals
from diffusion.training.optimiser import build_adamw, learning_rate
from diffusion.training.throughput import Meter, Progress
from latentcache import InputError

COMPILER = "inductor"
"""The backend of ``torch.compile``."""


@dataclass(frozen=True)
class Terms:
    """The loss of a batch: ``per_sample`` (B,) is what is minimised; ``parts`` name (B,) summands for the log."""

    per_sample: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """All of them by name, without their graphs."""
        return {name: values.detach() for name, values in {"loss": self.per_sample, **self.parts}.items()}


BatchLoss = Callable[[nn.Module, Batch, int], Terms]
"""(module, batch on the device, step) to terms. A batch holds at least ``weight`` (B,) and ``study_key``."""


Validate = Callable[[nn.Module, int], dict[str, float]]
"""(module with averaged weights, in evaluation mode; step) to figures. Every rank calls it; all return the same."""


class Stream(Protocol):
    """An endless sequence of steps that can be resumed; ``len`` is the steps of an epoch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Step]: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


@dataclass(frozen=True)
class LoopConfig:
    """The parts of a training configuration that the loop reads."""

    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class TrainSummary:
    """End of a session of a run. ``stopped_by``: finished, max-steps, max-seconds, early-stopping or signal."""

    steps: int
    epochs: int
    seconds: float
    stopped_by: str
    loss: float
    best_metric: float | None
    validation: dict[str, float]
    data_wait_fraction: float
    parameters: int


@dataclass(frozen=True)
class Watch:
    """Observers of a run: they see its weights and its steps, and change neither.

    Attributes:
        validate: Scores held-out data with the averaged weights.
        meter: Measures throughput; by default one that does not know the model's arithmetic.
        on_progress: Called on the first rank with each logged step.
    """

    validate: Validate | None = None
    meter: Meter | None = None
    on_progress: Callable[[Progress], None] | None = None


class Trainer:
    """One module, one stream, one run directory.

    Args:
        module: Already on the world's device, initialised alike on every rank.
        identity: What a resumed checkpoint must agree on (architecture, encode key, ...); kept in its state.
        watch: Validation, throughput and progress of the run.
    """

    def __init__(
        self,
        module: nn.Module,
        batch_loss: BatchLoss,
        stream: Stream,
        config: LoopConfig,
        run_dir: Path,
        *,
        world: World | None = None,
        identity: Mapping[str, Any] | None = None,
        watch: Watch = Watch(),
    ) -> None:
        self.module, self.batch_loss, self.stream, self.config = module, batch_loss, stream, config
        self.run_dir, self.validate = run_dir, watch.validate
        self.world = world or World()
        self.identity = dict(identity or {})
        self.on_progress = watch.on_progress
        self.meter = watch.meter or Meter(self.world.device, None, None)
        self.parameter_count = sum(p.numel() for p in module.parameters())
        self.model = spread(module, self.world, config.parallel.strategy, bf16=self._in_bf16)
        if config.optimiser.compile:
            compile_after_spreading(module, config.optimiser.compile, COMPILER)
        settings = config.optimiser
        self.optimizer = build_adamw(module, settings, self.world.device)
        self.ema = PowerEma(module, settings.ema_std) if settings.ema_std > 0 else None
        self.total_steps = settings.steps or settings.epochs * len(stream)
        self.checkpoints = CheckpointFolder(run_dir)
        self.step = 0
        self.best = Best(config.validation)
        self.saved_at = 0
        self.figures: dict[str, float] = {}
        self.validation: dict[str, float] = {}
        self.loss = math.nan
        self._cpu_begin = time.process_time()

    # One step ---------------------------------------------------------------------------------------------------------

    def training_step(self, step: Step, signalled: Sequence[int] = ()) -> tuple[float, bool, bool]:
        """One optimiser step over the samples of all ranks.

        Returns the mean loss, and whether any rank was asked to stop, or is out of time. Asked to stop between two of
        the batches whose gradients it sums, it takes no step: ``self.step`` stays what it was.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self._set_learning_rate()
        seen: list[tuple[Sequence[str], dict[str, Tensor]]] = []
        total = torch.tensor([0.0, 0.0, self._out_of_time()], dtype=torch.float64, device=self.world.device)
        for number, read in enumerate(self.meter.waiting(step.batches), start=1):
            batch = to_device(read, self.world.device)
            with gradients_meet(self.model, number == step.n_batches):
                with self._autocast():
                    terms = self.batch_loss(self.model, batch, self.step)
                # The mean over the samples that the step really has: a short last step weighs each of them right.
                loss = (terms.per_sample.float() * batch["weight"]).sum() / step.samples
                # Ranks' gradients are averaged on the way, hence the factor.
                (loss * self.world.size).backward()
            total[0] += loss.detach()
            seen.append((batch["study_key"], terms.named()))
            if number < step.n_batches and self.world.any(bool(signalled)):
                return math.nan, True, False
        total[1] = bool(signalled)
        assert len(seen) == step.n_batches, "the stream was closed while a step was under way"
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.config.optimiser.clip_norm)
        norm = full_tensor(norm)
        mean_loss, told, late = self.world.sum(total).tolist()
        if not (math.isfinite(mean_loss) and math.isfinite(float(norm))):
            raise non_finite(self.step, seen, self.module)
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.step)
        self.figures = {"grad_norm": float(norm), **mean_parts(seen)}
        return mean_loss, told > 0, late > 0

    # The run ----------------------------------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> TrainSummary:
        """Train until the last step, the budget, early stopping or SIGTERM; the state is saved in every case.

        Raises:
            NonFiniteError: A loss or gradient is NaN or infinite; names the step, the series and the tensor.
            CheckpointError: Resuming from a checkpoint of another model, or a disk that cannot be written.
        """
        if resume:
            self.resume()
        journal = Journal(self.run_dir, self.step) if self.world.rank == 0 else None
        try:
            with stop_signals() as signalled:
                reason = self._train(journal, signalled)
                if self.saved_at < self.step:
                    self.save(journal)
            if journal:
                journal.write("event", self.step, {"stopped_by": reason})
        finally:
            if journal:
                journal.close()
        return TrainSummary(
            steps=self.step,
            epochs=-(-self.step // max(1, len(self.stream))),
            seconds=self.meter.elapsed,
            stopped_by=reason,
            loss=self.loss,
            best_metric=self.best.value,
            validation=self.validation,
            data_wait_fraction=self.meter.data_wait_fraction,
            parameters=self.parameter_count,
        )

    def _train(self, journal: Journal | None, signalled: list[int]) -> str:
        """Step after step until there is a reason to stop, which is returned."""
        reason = self._reason_at_a_step()
        if reason:
            return reason
        position, taken = self.stream.state_dict(), self.step
        self._cpu_begin = time.process_time()
        for step in self.stream:
            self.meter.begin_step()
            loss, told, late = self.training_step(step, signalled)
            if self.step == taken:
                self.stream.load_state_dict(position)  # the step is taken anew after a resume
                return "signal"
            self.loss, position, taken = loss, self.stream.state_dict(), self.step
            self.meter.end_step(step.samples)
            if journal:
                self._report(journal, step)
            reason = self._reason_at_a_step() or ("max-seconds" if late else None)
            reason = "signal" if told else reason
            if reason != "signal" and self._validation_is_due(step, last=bool(reason)):
                reason = self._validate(journal) or reason
            if reason:
                return reason
            if self.step - self.saved_at >= self.config.budget.checkpoint_every_steps:
                self.save(journal)
        raise AssertionError("a stream of steps has no end")

    def _reason_at_a_step(self) -> str | None:
        if self.step >= self.total_steps:
            return "finished"
        limit = self.config.budget.max_steps
        return "max-steps" if limit is not None and self.step >= limit else None

    def _out_of_time(self) -> bool:
        budget = self.config.budget
        if budget.max_cpu_seconds is not None and time.process_time() - self._cpu_begin >= budget.max_cpu_seconds:
            return True
        return budget.max_seconds is not None and self.meter.elapsed >= budget.max_seconds

    # Validation, checkpoints, resume ----------------------------------------------------------------------------------

    def _validation_is_due(self, step: Step, last: bool) -> bool:
        every = self.config.validation.every_epochs
        epoch_ends = step.index + 1 == step.steps_in_epoch
        return self.validate is not None and every > 0 and (last or (epoch_ends and (step.epoch + 1) % every == 0))

    def _validate(self, journal: Journal | None) -> str | None:
        """Look at the held-out data with the averaged weights; save if they are the best; perhaps stop early."""
        assert self.validate is not None
        with self.averaged_weights():
            self.validation = self.validate(self.module, self.step)
        better = self.best.take(self.validation)
        if journal:
            journal.write("validation", self.step, {**self.validation, "best": self.best.value})
        if better:
            self.save(journal, best=True)
        return "early-stopping" if self.best.given_up else None

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The module in evaluation mode with its averaged weights; afterwards to the bit as it was."""
        self.module.eval()
        if self.ema is not None:
            self.ema.swap()
        try:
            yield
        finally:
            if self.ema is not None:
                reshard(self.module)  # or the next step would compute with gathered averages
                self.ema.swap()
            self.module.train()

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "stream": self.stream.state_dict(),
            **self.best.state_dict(),
            "validation": self.validation,
            "identity": self.identity,
        }

    def save(self, journal: Journal | None = None, *, best: bool = False) -> None:
        """Write a checkpoint; every rank must call it."""
        contents = gather(self.module, self.optimizer, self.ema, self.state(), keep=self.world.rank == 0)
        if self.world.rank == 0:
            self.checkpoints.save(contents, best=best)
            if journal:
                journal.write("checkpoint", self.step, {"best": best})
        self.world.barrier()
        self.saved_at = self.step

    def resume(self) -> None:
        """Continue from the last checkpoint.

        Raises:
            CheckpointError: There is none, or it is of another model.
            InputError: The run's identity differs: another encode key, snapshot, objective, seed, ...
        """
        contents = load_on_first(self.checkpoints)
        state = contents.state
        restore(contents, self.module, self.optimizer, self.ema)
        differ = [k for k in self.identity if state["identity"].get(k) != self.identity[k]]
        if differ or state["total_steps"] != self.total_steps:
            name = differ[0] if differ else "number of steps"
            was, now = state["total_steps"], self.total_steps
            if differ:
                was, now = state["identity"].get(name), self.identity[name]
            raise InputError(
                f"the {name} is {now} where the checkpoint has {was}",
                expected="the settings and store that the run began with",
                remedy="Resume with the same settings, or start a new run directory.",
            )
        self.stream.load_state_dict(state["stream"])
        self.step = self.saved_at = int(state["step"])
        self.best.load_state_dict(state)
        self.validation = dict(state["validation"])

    # Inside a step ----------------------------------------------------------------------------------------------------

    def _set_learning_rate(self) -> None:
        rate = learning_rate(self.config.optimiser, self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def _in_bf16(self) -> bool:
        precision = self.config.optimiser.precision
        return precision == "bf16" or (precision == "auto" and self.world.device.type == "cuda")

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.world.device.type, torch.bfloat16) if self._in_bf16 else nullcontext()

    def _report(self, journal: Journal, step: Step) -> None:
        if self.step % self.config.budget.log_every_steps:
            return
        progress = self.meter.progress(
            step=self.step,
            total_steps=min(self.total_steps, self.config.budget.max_steps or self.total_steps),
            epoch=step.epoch,
            loss=self.loss,
            learning_rate=learning_rate(self.config.optimiser, self.step - 1, self.total_steps),
            world=self.world.size,
        )
        figures = {**asdict(progress), **self.figures, "samples": step.samples}
        figures.pop("step")
        journal.write("train", self.step, figures)
        if self.on_progress is not None:
            self.on_progress(progress)


def mean_parts(seen: Sequence[tuple[Sequence[str], Mapping[str, Tensor]]]) -> dict[str, float]:
    """Mean of every named summand over this rank's samples."""
    names = sorted({name for _, tensors in seen for name in tensors} - {"loss"})
    return {name: float(torch.cat([t[name].float() for _, t in seen if name in t]).mean()) for name in names}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Tensors on the device (copied while it computes, where they are pinned); everything else as it is."""
    if device.type == "cpu":
        return batch
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
