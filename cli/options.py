"""Options that several commands take alike, declared once; those of the engines are in ``cli.spread``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Store = Annotated[str, typer.Argument(help="The store; a path or s3://bucket/prefix.")]
Private = Annotated[str | None, typer.Option(help="Where the private part is, if not STORE/private.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
MemoryGib = Annotated[float | None, typer.Option(help="Memory budget of the VAE on each device, GiB.")]

Sampler = Annotated[str | None, typer.Option(help="Sampler; by default the objective's own.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; by default the objective's own.")]
Samples = Annotated[int, typer.Option(min=1, help="Samples whose mean is the output.")]
Seed = Annotated[int, typer.Option(help="Seed of the sampling noise.")]

Detail = Annotated[str, typer.Option(help="absolute or residual: how decoded slices become HU.")]
Consistency = Annotated[bool, typer.Option(help="Project onto the measured thick slices.")]
RefinerChoice = Annotated[
    Path | None,
    typer.Option(help="A run of `ctpipe train-refiner`; by default the checkpoint's own, where it won. Or `none`."),
]

Uncertainty = Annotated[
    bool, typer.Option("--uncertainty", help="Also write the standard deviation over samples, in HU.")
]
UncertaintyMap = Annotated[
    bool, typer.Option("--uncertainty-map", help="The same as a Parametric Map instead of a second CT series.")
]
TransferSyntax = Annotated[str, typer.Option(help="explicit, jpegls or htj2k; all lossless.")]
Enhanced = Annotated[
    bool, typer.Option("--enhanced", help="Write one Enhanced CT instance instead of one CT instance a slice.")
]
