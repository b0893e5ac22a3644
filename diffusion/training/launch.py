"""Starting the processes that train together: torchrun on one machine, Ray Train on a cluster. Both run the same loop.

Ray is imported only when it is used.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from latentcache import CtpipeError, InputError, no_ray_cluster

log = logging.getLogger("ctpipe.train")


def is_worker() -> bool:
    """Whether a launcher started this process already."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Whether this process is the one that reports: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def check_gpus(wanted: int) -> None:
    """Refuse more GPUs than there are.

    Raises:
        InputError: How many are wanted and present.
    """
    present = torch.cuda.device_count()
    if wanted > present:
        raise InputError(
            f"--gpus {wanted}",
            expected=f"at most {present}, the CUDA devices that torch sees here",
            remedy="Ask for fewer, check CUDA_VISIBLE_DEVICES and the driver, or use --gpus 0 for the CPU.",
        )


def torchrun_command(processes: int, program: Sequence[str], shutdown_timeout_s: int = 300) -> list[str]:
    """The command that starts ``program`` once per process on this machine and ends when all have.

    Args:
        shutdown_timeout_s: Seconds between SIGTERM, which torchrun passes on, and SIGKILL: torchrun's own 30 do not
            suffice for a step's end and a checkpoint of 10 GB.
    """
    own = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    if _torchrun_knows("--shutdown-timeout"):
        own.append(f"--shutdown-timeout={shutdown_timeout_s}")
    else:
        log.warning(
            "this torch's torchrun kills its workers 30 s after SIGTERM, whatever parallel.shutdown_timeout_s says: "
            "use a newer torch, or let checkpoints be frequent (budget.checkpoint_every_steps)"
        )
    return [*own, "--no-python", *program]


def _torchrun_knows(option: str) -> bool:
    from torch.distributed.run import get_args_parser

    return option in get_args_parser()._option_string_actions


def become_torchrun(processes: int, program: Sequence[str], shutdown_timeout_s: int = 300) -> None:
    """Replace this process by torchrun, so that signals of whoever started it reach the ranks. Does not return."""
    command = torchrun_command(processes, program, shutdown_timeout_s)
    os.execv(command[0], command)


def train_on_ray(
    worker: Callable[[dict[str, Any]], Mapping[str, Any]],
    settings: dict[str, Any],
    workers: int,
    *,
    use_gpu: bool = True,
    address: str | None = None,
) -> dict[str, Any]:
    """Run ``worker(settings)`` in ``workers`` Ray Train processes that share one process group.

    Args:
        worker: A picklable function of the settings; the first rank's return value is passed back.
        settings: At least ``run``, the run directory. Store and run directory must be reachable from every node.
        address: A running cluster, ``auto``, or none for one embedded in this process.

    Raises:
        InputError: Ray is not installed, or no cluster answers at the address.
        CtpipeError: What a worker raised, as it raised it; the other workers are stopped.
    """
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise InputError(
            "Ray Train is not installed", expected="ray[train]", remedy="Install ctpipe[ray], or use --gpus alone."
        ) from error
    if not ray.is_initialized():
        try:
            # Without an address Ray would join whatever cluster it finds on this machine.
            own = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
            ray.init(**own, log_to_driver=False)
        except ConnectionError as error:
            raise no_ray_cluster() from error

    def loop(config: dict[str, Any]) -> dict[str, Any]:
        figures = dict(worker(config))
        ray.train.report({"figures": figures})
        return figures

    trainer = TorchTrainer(
        loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        # Ray keeps a few files of its own about the run; by default in the home directory of whoever starts it.
        run_config=RunConfig(name="ray", storage_path=str(Path(settings["run"]).resolve())),
    )
    try:
        result = trainer.fit()
    except Exception as error:
        raised = own_error(error)
        if raised is None:
            raise
        raise raised from error
    # Newer versions of Ray Train keep metrics only with a checkpoint of their own, and hand on what rank 0 returned.
    figures = getattr(result, "return_value", None) or (result.metrics or {}).get("figures", {})
    return dict(figures)


def own_error(error: BaseException) -> CtpipeError | None:
    """The error that a Ray worker raised on purpose, out of what Ray Train wraps it in."""
    for found in (error, error.__cause__, *getattr(error, "worker_failures", {}).values()):
        # Ray Train hands a worker's exception on beside its traceback, which no pickle carries.
        inner = getattr(found, "_base_exc", found)
        if isinstance(inner, CtpipeError):
            return inner
    return None
