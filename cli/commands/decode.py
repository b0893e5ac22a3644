"""``ctpipe decode``: stored or sampled latents back to DICOM."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import (
    AlarmMap,
    Answer,
    DaskScheduler,
    Detail,
    Dtype,
    Engine,
    Enhanced,
    Gpus,
    GpuShare,
    MemoryGib,
    Private,
    RayAddress,
    RefinerChoice,
    Sampler,
    Samples,
    Seed,
    SeriesTimeout,
    Steps,
    Texture,
    Threads,
    TransferSyntax,
    Uncertainty,
    UncertaintyMap,
    Workers,
    engine_options,
)
from cli.output import AsJson, Exit, emit, progress_bars


def register(app: typer.Typer) -> None:
    app.command("decode")(decode)


def decode(
    store: Annotated[str, typer.Argument(help="The latent store; a path or s3://bucket/prefix.")],
    out: Annotated[Path, typer.Argument(help="Folder to write into, one folder per series below it.")],
    to_dicom: Annotated[bool, typer.Option("--to-dicom", help="Write DICOM series (the only form there is).")] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A training run: sample thin from thick first, then decode that.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only this split: train, val or test.")] = None,
    series: Annotated[list[str] | None, typer.Option(help="Only this series or pair key; may be repeated.")] = None,
    vae: Annotated[str, typer.Option(help="The VAE that encoded the store: `tiny` or a path.")] = "tiny",
    encode_key: Annotated[str | None, typer.Option(help="Which encoding, where the store holds several.")] = None,
    sampler: Sampler = None,
    steps: Steps = None,
    samples: Samples = 1,
    answer: Answer = "mean",
    seed: Seed = 0,
    uncertainty: Uncertainty = False,
    uncertainty_map: UncertaintyMap = False,
    alarm_map: AlarmMap = False,
    texture: Texture = None,
    detail: Detail = "residual",
    consistency: Annotated[
        bool | None,
        typer.Option(help="Project onto the measured thick slices; by default where thin slices are sampled."),
    ] = None,
    refiner: RefinerChoice = None,
    transfer_syntax: TransferSyntax = "explicit",
    enhanced: Enhanced = False,
    restore_identity: Annotated[
        bool, typer.Option("--restore-identity", help="Write the patient's identity back, for use inside the hospital.")
    ] = False,
    private: Private = None,
    gpus: Gpus = None,
    workers: Workers = 1,
    gpu_share: GpuShare = 1.0,
    engine: Engine = "dask",
    dask_scheduler: DaskScheduler = None,
    ray_address: RayAddress = None,
    threads: Threads = 2,
    series_timeout: SeriesTimeout = None,
    memory_gib: MemoryGib = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> int:
    """Write stored thin latents, or thin latents sampled from thick ones, as DICOM series.

    A stored latent is written as the plain reconstruction of the VAE (with --consistency it is composed with the
    measured thick slices as sampled ones are). Series already in OUT are left alone, so that running it again resumes.

    Examples:

        ctpipe decode STORE OUT --to-dicom

        ctpipe decode STORE OUT --to-dicom --checkpoint RUN --split test

        ctpipe decode STORE OUT --to-dicom --engine ray --ray-address auto --gpus 8

        ctpipe decode STORE OUT --checkpoint RUN --series 0123456789abcdef --samples 8 --uncertainty
    """
    from pipeline.workflows import DecodeJob, decode as run

    spread = engine_options(
        engine, gpus, workers=workers, gpu_share=gpu_share, dask_scheduler=dask_scheduler,
        ray_address=ray_address, series_timeout=series_timeout,
    )  # fmt: skip
    job = DecodeJob(
        store, out, checkpoint, split, series, vae, encode_key, sampler, steps, samples, seed, answer,
        uncertainty=uncertainty, uncertainty_map=uncertainty_map, alarm_map=alarm_map, texture=texture,
        detail=detail, consistency=consistency, refiner=refiner, transfer_syntax=transfer_syntax, enhanced=enhanced,
        restore_identity=restore_identity,
        private=private, device=spread.devices[0], threads=threads, memory_gib=memory_gib, engine=spread,
        precision=dtype,
    )  # fmt: skip
    with progress_bars() as show:
        summary = run(job, show)
    lines = [f"{len(summary.written)} series written, {summary.already} there already, {len(summary.failed)} set aside"]
    lines += [_line(key, figures) for key, figures in sorted(summary.written.items())]
    lines += [f"set aside {key}: {reason}" for key, reason in sorted(summary.failed.items())]
    emit(asdict(summary), "\n".join(lines), as_json)
    return Exit.QUARANTINED if summary.failed else Exit.OK


def _line(key: str, figures: dict[str, Any]) -> str:
    text = f"{key}: {figures['slices']} slices"
    if figures.get("rms_after_hu") is not None:
        text += f", RMS against the measured slices {figures['rms_before_hu']:.1f} -> {figures['rms_after_hu']:.1f} HU"
    return text + (f" (warning: {figures['warning']})" if figures.get("warning") else "")
