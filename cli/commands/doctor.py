"""``ctpipe doctor``: whether this machine, this store and these weights fit the run that is planned."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cli.output import AsJson, Exit, emit

if TYPE_CHECKING:
    from collections.abc import Callable

    from latentcache import LatentStore


REMEDIES = {
    "out of memory": "set data.batch_size lower, model.activation_checkpointing=true, data.window=32, --latent-patch 2 "
    "or, with several GPUs, parallel.strategy=fsdp; for the VAE, --memory-gib",
    "NaN or infinity": "the run stops and names step, study and tensor; run `ctpipe verify STORE`; if it is clean, "
    "lower optimiser.learning_rate or set optimiser.precision=fp32, and --resume",
    "checkpoint not 130/130": "the file is not a MAISI VAE's, or is cut: compare its size with the publisher's; the "
    "loader names the missing tensors",
    "unreadable archive": "it is quarantined with its reason, the others go on: repair or replace the zip, then run "
    "`ctpipe ingest` again",
    "disk full": "the checkpoint before is whole: free space and run the same command with --resume; `ctpipe gc STORE` "
    "removes what no snapshot names",
}
"""The README's troubleshooting table; error messages say the same."""


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    store: Annotated[str | None, typer.Argument(help="Also look at this store and at a run on it.")] = None,
    preset: Annotated[str, typer.Option(help="The run that is planned: tiny, medium or classic.")] = "medium",
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as for `ctpipe train`.")] = None,
    vae: Annotated[str, typer.Option(help="The VAE to look at: `tiny` or a path.")] = "tiny",
    as_json: AsJson = False,
) -> int:
    """Device, memory for the preset, VAE weights, store health, expected epoch time.

    Examples:

        ctpipe doctor

        ctpipe doctor STORE --preset medium --vae weights/autoencoder_epoch273.pt
    """
    from diffusion.config import load_config
    from latentcache import CtpipeError, LatentStore
    from pipeline.workflows import Finding, device, disk, epoch_time, machine, memory, store_health, vae_weights

    overrides = ["losses.perceptual_weight=0", *(set_ or [])] if preset == "classic" else list(set_ or [])
    config, _ = load_config(preset, None, overrides)
    findings: list[Finding] = []

    def look(name: str, found: Callable[[], tuple[str, str]]) -> None:
        try:
            findings.append(Finding(name, *found()))
        except CtpipeError as error:
            findings.append(Finding(name, "problem", str(error)))

    latents: list[LatentStore] = []
    look("machine", machine)
    look("device", device)
    look("disk", disk)
    look("VAE weights", lambda: vae_weights(vae))
    if store is not None:
        look("store", lambda: store_health(latents, LatentStore.open(store)))
    look("memory", lambda: memory(config, latents))
    look("epoch", lambda: epoch_time(config, latents))
    healthy = not any(f.level == "problem" for f in findings)
    lines = [f"{f.level:8s} {f.name:12s} {f.detail}" for f in findings]
    lines += ["", "When something goes wrong:"] + [f"  {name}: {remedy}" for name, remedy in REMEDIES.items()]
    result = {"healthy": healthy, "findings": [asdict(f) for f in findings], "remedies": REMEDIES}
    emit(result, "\n".join(lines), as_json)
    return Exit.OK if healthy else Exit.FAILED
