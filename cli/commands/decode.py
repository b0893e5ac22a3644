"""``ctpipe decode``: stored or sampled latents back to DICOM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import (
    AlarmMap,
    Answer,
    DaskScheduler,
    Detail,
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
    out: Annotated[Path, typer.Argument(help="Folder to write into, one folder a series below it.")],
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
    as_json: AsJson = False,
) -> int:
    """Write stored thin latents, or thin latents sampled from thick ones, as DICOM series.

    A stored latent is written as the plain round trip through the VAE (with --consistency it is composed with the
    measured thick slices as sampled ones are). Series already in OUT are left alone, so that running it again resumes.

    Examples:

        ctpipe decode STORE OUT --to-dicom

        ctpipe decode STORE OUT --to-dicom --checkpoint RUN --split test

        ctpipe decode STORE OUT --to-dicom --engine ray --ray-address auto --gpus 8

        ctpipe decode STORE OUT --checkpoint RUN --series 0123456789abcdef --samples 8 --uncertainty
    """
    from latentcache import InputError, LatentStore
    from pipeline.decode import (
        ComposeSettings,
        DecodeSettings,
        WriteSettings,
        decode_store,
        only_encoding,
        parse_answer,
        parse_detail,
        window_of,
    )
    from pipeline.identity import PrivateStore
    from pipeline.workflows import JobProgress, own_refiner, refiner_of, start_of
    from pipeline.writing import transfer_syntax_uid

    transfer_syntax_uid(transfer_syntax)
    spread = engine_options(
        engine,
        gpus,
        workers=workers,
        gpu_share=gpu_share,
        dask_scheduler=dask_scheduler,
        ray_address=ray_address,
        series_timeout=series_timeout,
    )
    uncertainty = uncertainty or uncertainty_map
    wanted = parse_answer(answer, samples)
    if enhanced and checkpoint is None:
        raise InputError(
            "--enhanced for stored latents",
            expected="slices sampled from one thick series",
            remedy="Add --checkpoint RUN, or leave --enhanced away.",
        )
    device = spread.devices[0]
    composing = ComposeSettings(
        detail=parse_detail(detail), consistency=consistency is not False, refiner=refiner_of(refiner, device)
    )
    latents = LatentStore.open(store)
    people = PrivateStore.open(store, private)
    generated: Sequence[LatentStore] = ()
    facts: dict[str, Any] = {"checkpoint_sha256": "", "sampling": {}}
    lost: dict[str, str] = {}
    decoded = 0
    with progress_bars() as show:
        if checkpoint is None:
            encode_key = only_encoding(latents, encode_key)
        else:
            from pipeline.workflows import Spread, sample_pairs

            apart = uncertainty or alarm_map or wanted != "mean"
            options = {"sampler": sampler, "num_inference_steps": steps, "seed": seed}
            sampled = sample_pairs(
                latents, checkpoint, split, series, options, samples, apart, Spread(spread, threads), show
            )
            encode_key, generated, facts, lost = sampled.encode_key, sampled.stores, sampled.facts, sampled.failed
            composing = replace(composing, start=start_of(checkpoint, device))
            if refiner is None:
                composing = replace(composing, refiner=own_refiner(checkpoint, facts["checkpoint_sha256"], device))
        writing = WriteSettings(
            out.absolute(),
            window_of(latents, encode_key),
            transfer_syntax=transfer_syntax,
            uncertainty=uncertainty,
            uncertainty_map=uncertainty_map,
            alarm_map=alarm_map,
            enhanced=enhanced,
            answer=wanted,
            store_snapshot=latents.snapshot,
            **facts,
        )

        def count(_: Any, total: int) -> None:
            nonlocal decoded
            decoded += 1
            show(JobProgress("decoding", decoded, total))

        summary = decode_store(
            latents,
            people,
            encode_key,
            DecodeSettings(writing, composing, restore_identity=restore_identity, compose_stored=consistency is True),
            spread,
            vae=vae,
            memory_gib=memory_gib,
            generated=generated,
            lost=lost,
            keys=series,
            split=split,
            torch_threads=threads,
            on_outcome=count,
        )
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
