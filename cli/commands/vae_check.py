"""``ctpipe vae-check``: what the VAE alone loses, window by window."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Device, Dtype, MemoryGib, Private
from cli.output import AsJson, Exit, advancing_bar, emit


def register(app: typer.Typer) -> None:
    app.command("vae-check")(vae_check)


def vae_check(
    store: Annotated[str, typer.Argument(help="The store that `ctpipe ingest` filled.")],
    vae: Annotated[str, typer.Option(help="`tiny`, or the path of MAISI weights (.pt or .safetensors).")] = "tiny",
    windows: Annotated[
        str, typer.Option(help="By comma: soft-tissue, maisi, lung, or C:W.")
    ] = "soft-tissue,maisi,lung",
    sample: Annotated[int, typer.Option(min=1, help="Series to measure.")] = 4,
    device: Device = "auto",
    memory_gib: MemoryGib = None,
    dtype: Dtype = "auto",
    plot: Annotated[Path | None, typer.Option(help="Also draw the figures into this .png or .svg.")] = None,
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Reconstruct a sample of the store's series: PSNR, SSIM, error and HU bias by tissue, and the bound they set.

    Examples:

        ctpipe vae-check STORE

        ctpipe vae-check STORE --vae weights/autoencoder_epoch273.pt --windows soft-tissue,maisi --plot ceiling.png
    """
    import torch

    from latentcache import LatentStore, check_bf16_convolutions, compute_dtype
    from pipeline.evaluation import as_dict, check, plot as draw, sample_series, summarise, table
    from pipeline.identity import PrivateStore
    from pipeline.reading import read_series
    from pipeline.vae import load_vae
    from pipeline.volume import Window

    names = [name.strip() for name in windows.split(",") if name.strip()]
    for name in names:
        Window.parse(name)
    chosen = sample_series(LatentStore.open(store).series(), sample)
    pointers = PrivateStore.open(store, private)
    arithmetic = getattr(torch, compute_dtype(dtype, device))
    if arithmetic == torch.bfloat16:
        check_bf16_convolutions(torch.device(device))
    network = load_vae(vae, device=device, memory_gib=memory_gib, dtype=arithmetic)
    with advancing_bar("reconstructions", len(chosen) * len(names)) as advance:
        scores = check(
            network,
            chosen,
            lambda key: read_series(pointers.pointer(key)).hu,
            names,
            on_score=lambda _: advance(1),
        )
    if plot is not None:
        draw(scores, plot)
    emit({**as_dict(scores), "vae_sha256": network.sha256}, table(summarise(scores)), as_json)
    return Exit.OK
