"""Checkpoints: written aside, checked, renamed into place; whatever interrupts the writing, the previous one survives.

    RUN/checkpoints/step-000000500-0/   model.safetensors  ema.safetensors  training.safetensors  state.json
    RUN/checkpoints/last -> step-...    RUN/checkpoints/best -> step-...

Weights are safetensors under the module's own parameter names. ``training.safetensors`` holds the optimiser's moments,
named ``parameter:moment``, and torch's random state; ``state.json`` holds the counters, the stream's position and a
CRC-32C of every file. There is no pickle: loading a checkpoint runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion.runs.ema import PowerEma
from diffusion.runs.sharding import full_tensor, is_dtensor
from latentcache import InputError
from latentcache.storage import sync_file, sync_folder

FORMAT = 1
WEIGHTS, AVERAGE, TRAINING, STATE = "model.safetensors", "ema.safetensors", "training.safetensors", "state.json"
Which = Literal["last", "best"]


class CheckpointError(InputError):
    """A checkpoint that cannot be written, read or used."""


@dataclass(frozen=True)
class Contents:
    """Everything of a checkpoint in CPU memory, as full (unsharded) tensors.

    On every rank but the first only their shapes, on the device ``meta``.
    """

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]


def gather(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: PowerEma | None,
    state: Mapping[str, Any],
    *,
    keep: bool = True,
) -> Contents:
    """Collect a module, its optimiser and average. A collective where they are sharded: every rank must call it.

    Args:
        keep: False on every rank but the one that writes: its part in the collectives is done, a tensor at a time, and
            no copy is made in host memory (9.6 GB a rank for the preset ``medium``).
    """
    weights = {name: _full(tensor, keep) for name, tensor in module.state_dict().items()}
    average = dict(weights)
    if ema is not None:
        average |= {name: _full(tensor, keep) for name, tensor in ema.named_tensors()}
    training = {
        f"{name}:{moment}": _full(value, keep)
        for name, parameter in module.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }
    training["random:cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        training["random:cuda"] = torch.cuda.get_rng_state()
    return Contents(weights, average, training, dict(state))


@torch.no_grad()
def restore(contents: Contents, module: nn.Module, optimizer: torch.optim.Optimizer, ema: PowerEma | None) -> None:
    """Put a checkpoint back, bit for bit, into a module and optimiser of the same architecture, sharded or not.

    A collective where several ranks train: the first one's tensors (see :func:`load_on_first`) reach the others through
    the devices, one at a time.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape.
    """
    check_tensors(module, contents.weights)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    own = module.state_dict()
    for name, tensor in own.items():
        _copy(tensor, contents.weights[name])
    if ema is not None:
        for name, tensor in ema.named_tensors():
            _copy(tensor, contents.average[name])
    for name, parameter in module.named_parameters():
        prefix = f"{name}:"
        moments = {k[len(prefix) :]: v for k, v in contents.training.items() if k.startswith(prefix)}
        optimizer.state[parameter] = {m: _like(value, parameter, fused) for m, value in moments.items()}
    device = next(module.parameters()).device
    states = {k: _from_first(v, device).cpu() for k, v in contents.training.items() if k.startswith("random:")}
    torch.set_rng_state(states["random:cpu"])
    if "random:cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random:cuda"])


def check_tensors(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of another architecture, naming the first tensors that differ."""
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if own == theirs:
        return
    missing = [n for n in own if n not in theirs]
    extra = [n for n in theirs if n not in own]
    other = [f"{n} {theirs[n]} instead of {own[n]}" for n in own if n in theirs and own[n] != theirs[n]]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for names, what in ((missing, "tensors missing"), (extra, "unexpected"), (other, "of another shape"))
        if names
    ]
    raise CheckpointError(
        f"a checkpoint of another architecture: {len(own) - len(missing) - len(other)}/{len(own)} tensors fit, "
        + "; ".join(parts),
        expected="the model that this run trains",
        remedy="Resume with the preset and model settings of the run (RUN/config.json), or start a new run directory.",
    )


def validation_of(folder: Path) -> dict[str, float]:
    """Figures of the last validation before a checkpoint in this folder; empty where it says none."""
    state = folder / STATE
    if not state.is_file():
        return {}
    found: dict[str, float] = json.loads(state.read_text(encoding="utf-8")).get("validation", {})
    return found


class CheckpointFolder:
    """``RUN/checkpoints``. One process writes; any may read."""

    def __init__(self, run_dir: Path) -> None:
        self.root = run_dir / "checkpoints"

    def path(self, which: Which = "last") -> Path | None:
        """Folder of the last or best checkpoint, or none yet."""
        link = self.root / which
        return link if (link / STATE).exists() else None

    def save(self, contents: Contents, *, best: bool = False) -> Path:
        """Write a checkpoint durably, then point ``last`` (and ``best``) at it and drop what neither names.

        Raises:
            CheckpointError: The disk is full or refuses to be written; the previous checkpoint is untouched.
        """
        step = int(contents.state["step"])
        aside = self.root / f".writing-{os.getpid()}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._drop_leftovers()
            aside.mkdir()
            files = {WEIGHTS: contents.weights, AVERAGE: contents.average, TRAINING: contents.training}
            for name, tensors in files.items():
                save_file(tensors, aside / name)
                sync_file(aside / name)
            state = {**contents.state, "format": FORMAT, "crc32c": {name: _crc32c(aside / name) for name in files}}
            (aside / STATE).write_text(json.dumps(state, indent=1, sort_keys=True), encoding="utf-8")
            sync_file(aside / STATE)
            sync_folder(aside)
            serial = len(list(self.root.glob(f"step-{step:09d}-*")))
            final = self.root / f"step-{step:09d}-{serial}"
            os.rename(aside, final)
            for which in ("last", "best") if best else ("last",):
                self._point(which, final.name)
            sync_folder(self.root)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written ({_reason(error)})",
                expected=f"{contents_bytes(contents) / 2**30:.2f} GiB free beside the checkpoints kept",
                remedy="Free space, then run the same command with --resume: the previous checkpoint is whole.",
            ) from error
        self._prune()
        return final

    def load(self, which: Which = "last") -> Contents:
        """Read a checkpoint and check every file against its CRC-32C.

        Raises:
            CheckpointError: There is none, it is of a newer format, or its bytes have changed.
        """
        folder = self.path(which)
        if folder is None:
            raise CheckpointError(
                f"no {which} checkpoint in this run",
                expected="a run that has saved one",
                remedy="Start it without --resume.",
            )
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["format"] > FORMAT:
            raise CheckpointError(
                f"a checkpoint of format {state['format']}",
                expected=f"format {FORMAT} or older",
                remedy="Use the ctpipe release that wrote it.",
            )
        tensors: list[dict[str, Tensor]] = []
        for name in (WEIGHTS, AVERAGE, TRAINING):
            if _crc32c(folder / name) != state["crc32c"][name]:
                raise CheckpointError(
                    f"{which}/{name} does not match its checksum",
                    expected="the bytes that were written",
                    remedy="Point checkpoints/last at another step-* folder, or restore the run from a copy.",
                )
            tensors.append(load_file(folder / name))
        return Contents(tensors[0], tensors[1], tensors[2], state)

    def _point(self, which: str, target: str) -> None:
        link = self.root / f".{which}-{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        os.replace(link, self.root / which)

    def _prune(self) -> None:
        kept = {os.readlink(link) for link in (self.root / "last", self.root / "best") if link.is_symlink()}
        for folder in self.root.glob("step-*"):
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _drop_leftovers(self) -> None:
        for folder in self.root.glob(".writing-*"):
            shutil.rmtree(folder, ignore_errors=True)


def load_on_first(folder: CheckpointFolder, which: Which = "last") -> Contents:
    """Read a checkpoint on the first rank; the others learn its state and the shapes of its tensors.

    Raises:
        CheckpointError: On every rank what the first one found: see :meth:`CheckpointFolder.load`.
    """
    if not _several():
        return folder.load(which)
    contents: Contents | None = None
    told: Any = None
    if dist.get_rank() == 0:
        try:
            contents = folder.load(which)
            told = tuple(_shapes(group) for group in (contents.weights, contents.average, contents.training))
        except CheckpointError as error:
            told = error
    message: list[Any] = [told, contents.state if contents else None]
    dist.broadcast_object_list(message)
    if isinstance(message[0], CheckpointError):
        raise message[0]
    if contents is not None:
        return contents
    weights, average, training = (
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in group.items()}
        for group in message[0]
    )
    return Contents(weights, average, training, message[1])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def contents_bytes(contents: Contents) -> int:
    """Return the bytes that the tensors of a checkpoint take."""
    return sum(t.nbytes for group in (contents.weights, contents.average, contents.training) for t in group.values())


def _full(tensor: Any, keep: bool) -> Tensor:
    """A CPU copy of a whole tensor, or its shape alone; scalars of an optimiser become tensors."""
    if not isinstance(tensor, Tensor):
        return torch.tensor(float(tensor))
    whole = full_tensor(tensor)
    if not keep:
        return torch.empty(whole.shape, dtype=whole.dtype, device="meta")
    return whole.detach().to("cpu", copy=True).contiguous()


def _like(value: Tensor, parameter: Tensor, fused: bool) -> Tensor:
    """An optimiser's tensor as the optimiser would have made it itself.

    Moments have the parameter's own strides: the fused kernel takes them for granted (on a CPU without looking: it
    would go on with the wrong elements). The step count, a scalar, is on the parameter's device where the kernel is
    fused, and on the CPU otherwise (torch/optim/adam.py, ``_init_group``).
    """
    if value.dim() == 0 and parameter.dim() > 0:
        step = _from_first(value, parameter.device) if fused or _several() else value
        return step if fused else step.cpu()
    moment = torch.empty_like(parameter, dtype=value.dtype)
    _copy(moment, value)
    return moment


def _copy(target: Tensor, source: Tensor) -> None:
    """The first rank's ``source`` into ``target``, whatever its strides and placement."""
    if is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        whole = torch.empty_like(source, device=target.device) if source.is_meta else source.to(target.device)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements))  # scattered by the first rank
    else:
        target.copy_(_from_first(source, target.device))


def _from_first(source: Tensor, device: torch.device) -> Tensor:
    """A tensor of the first rank on this one's device."""
    if not _several():
        return source.to(device)
    whole = torch.empty_like(source, device=device) if source.is_meta else source.to(device)
    dist.broadcast(whole, 0)
    return whole


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            yield block


def _crc32c(path: Path) -> int:
    value = 0
    for block in _blocks(path):
        value = google_crc32c.extend(value, block)
    return value


def _reason(error: Exception) -> str:
    """The system's own words, without the file's path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).rsplit(":", 1)[-1].strip()
