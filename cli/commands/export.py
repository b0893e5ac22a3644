"""``ctpipe export``: a store as one Zarr hierarchy, for sharing and cold storage."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit, progress_bars


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    store: Store,
    out: Annotated[Path, typer.Argument(help="Folder to make, e.g. OUT.zarr.")],
    codec: Annotated[str, typer.Option(help="none, zstd or pcodec; all lossless.")] = "zstd",
    encode_key: Annotated[str | None, typer.Option(help="Latents of this encoding only; all by default.")] = None,
    snapshot: Annotated[int | None, typer.Option(help="This snapshot, not the last.")] = None,
    as_json: AsJson = False,
) -> int:
    """Write all latents and rows as one consolidated Zarr v3 hierarchy; `ctpipe import` takes it back.

    Positions, affines and keys are attributes. No patient data is in it, but latents decode to faces: it is
    pseudonymous, not anonymous. Needs the extra `zarr`, and `pcodec` for that codec.

    Examples:

        ctpipe export STORE OUT.zarr

        ctpipe export STORE COLD.zarr --codec pcodec --encode-key 0123456789abcdef
    """
    from latentcache import LatentStore
    from latentcache.exchange import export_zarr
    from pipeline.workflows import JobProgress

    with progress_bars() as bars:
        done = export_zarr(
            LatentStore.open(store, snapshot),
            out,
            codec=codec,
            encode_key=encode_key,
            on_latent=lambda n, total: bars(JobProgress("export", done=n, total=total)),
        )
    share = f", {done.bytes_out / done.bytes_in:.0%}" if done.bytes_in else ""
    text = (
        f"{done.latents} latents of {done.series} series and {done.pairs} pairs: "
        f"{done.bytes_in / 1e9:.3f} GB became {done.bytes_out / 1e9:.3f} GB{share}"
    )
    emit(asdict(done), text, as_json)
    return Exit.OK
