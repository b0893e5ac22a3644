"""Commands that hand stores and models to others: ``export``, ``import`` and ``export-bundle``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit, progress_bars


def register(app: typer.Typer) -> None:
    app.command("export")(export)
    app.command("import")(import_store)
    app.command("export-bundle")(export_bundle)


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


def import_store(
    source: Annotated[Path, typer.Argument(help="What `ctpipe export` wrote.")],
    store: Store,
    as_json: AsJson = False,
) -> int:
    """Take an export into a new store, or into one of the same secret and split seed.

    Every value is checked against the export's SHA-256, and every shard must come out byte for byte as it was. If it is
    interrupted, run it again: it goes on from what is committed. The private part is not in an export: `ctpipe whois`
    and `ctpipe encode` need it beside the store.

    Examples:

        ctpipe import OUT.zarr STORE
    """
    from latentcache.exchange import import_zarr
    from pipeline.workflows import JobProgress

    with progress_bars() as bars:
        done = import_zarr(source, store, on_latent=lambda n, total: bars(JobProgress("import", done=n, total=total)))
    text = (
        f"{done.latents} latents, {done.series} series and {done.pairs} pairs are new; "
        f"{done.kept} latents were there already"
    )
    emit(asdict(done), text, as_json)
    return Exit.OK


def export_bundle(
    run: Annotated[Path, typer.Argument(help="A run of `ctpipe train`.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    last: Annotated[bool, typer.Option("--last", help="The last checkpoint instead of the best.")] = False,
    authors: Annotated[str, typer.Option(help="Who trained it, for the metadata.")] = "not stated",
    rights: Annotated[str, typer.Option("--copyright", help="Whose the weights are.")] = "not stated",
    version: Annotated[str, typer.Option("--bundle-version", help="Version of the bundle.")] = "0.1.0",
    as_json: AsJson = False,
) -> int:
    """Write network, weights, metadata and an inference configuration as MONAI's tools read them.

    The bundle works on latents and needs ctpipe where it runs; the VAE is not in it. Needs the extra `monai`.

    Examples:

        ctpipe export-bundle RUN BUNDLE

        python -m monai.bundle run --config_file BUNDLE/configs/inference.json --bundle_root BUNDLE
    """
    from diffusion.sampling import BundleFacts, export_bundle as write_bundle

    facts = BundleFacts(authors=authors, copyright=rights, version=version)
    parameters = write_bundle(run, out, which="last" if last else "best", facts=facts)
    emit({"parameters": parameters, "bundle": str(out)}, f"{parameters:,} parameters in {out}", as_json)
    return Exit.OK
