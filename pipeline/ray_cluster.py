"""The way to a Ray cluster: the one that is there, or one of our own on this machine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from latentcache.errors import InputError, no_ray_cluster
from pipeline.engine import EngineOptions

log = logging.getLogger("ctpipe.engine")


def connect(options: EngineOptions) -> Any:
    """The module ``ray``, connected to the cluster at ``ray_address`` or to one started on this machine.

    Raises:
        InputError: Ray is not installed, no cluster answers, it does not start here, or it has too few GPUs.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed",
            expected="the extra `ray`",
            remedy="pip install 'ctpipe[ray]', or use --engine dask.",
        ) from error
    if not ray.is_initialized():
        _init(ray, options)
    found = float(ray.cluster_resources().get("GPU", 0))
    wanted = len(options.devices) * options.gpus_per_worker
    if options.wants_gpu and found < wanted:
        raise InputError(
            f"a Ray cluster with {found:g} GPUs",
            expected=f"at least {wanted:g}",
            remedy="Give fewer --gpus, or --gpus 0 to encode on CPUs, or wait until GPU nodes have joined.",
        )
    return ray


def dashboard_of(options: EngineOptions) -> Callable[[], str | None]:
    """Asks for the address of Ray's dashboard, where this process works on a cluster that has one; else None."""

    def ask() -> str | None:
        ray = sys.modules.get("ray")  # never imported for this alone
        if options.name != "ray" or ray is None or not ray.is_initialized():
            return None
        address = ray._private.worker.get_dashboard_url()
        return f"http://{address}" if address else None

    return ask


def _init(ray: Any, options: EngineOptions) -> None:
    local = options.ray_address in (None, "local")
    settings: dict[str, Any] = {"num_cpus": max(2, len(options.devices) + 1)} if local else {}
    for left in (2, 1, 0):
        try:
            ray.init(
                address="local" if local else options.ray_address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **settings,
            )
            return
        except ConnectionError as error:
            raise no_ray_cluster() from error
        except Exception as error:
            # Ray gives its own processes 30 s, which a busy machine may not keep; it raises a bare Exception then.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise InputError(
                    "Ray did not start on this machine in three attempts",
                    expected="its processes up within 30 s",
                    remedy="Make the machine less busy, or use --engine dask.",
                ) from error
            log.warning("Ray did not start within 30 s; trying again")
