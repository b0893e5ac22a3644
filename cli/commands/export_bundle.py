"""``ctpipe export-bundle``: a run as a MONAI Bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("export-bundle")(export_bundle)


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
