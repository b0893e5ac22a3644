"""Choice of the device that computes: the one rule that every command follows."""

from __future__ import annotations

from latentcache import InputError

AUTO = "auto"


def resolve_device(device: str = AUTO) -> str:
    """``auto`` as ``cuda`` where there is a usable GPU, else ``cpu``; any other device as it is.

    Raises:
        InputError: Not a device that this machine has.
    """
    import torch

    if device == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or int(number or 0) >= count:
        has = f"auto, cpu{'' if not torch.cuda.is_available() else ', cuda'}"
        raise InputError(
            f"device {device!r}",
            expected=f"{has}, as this machine has them",
            remedy="Leave --device out, or check CUDA_VISIBLE_DEVICES and the driver (`ctpipe doctor`).",
        )
    return device


def resolve_gpus(gpus: int | None) -> int:
    """Return the number of GPUs to use: as many as asked for; all that there are where nothing was."""
    if gpus is not None:
        return gpus
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
