"""``ctpipe interpolate``: a thick study to a thin series, in one command."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli.options import (
    AlarmMap,
    Answer,
    Consistency,
    Detail,
    Device,
    Dtype,
    Enhanced,
    MemoryGib,
    RefinerChoice,
    Sampler,
    Samples,
    Seed,
    Steps,
    Texture,
    TransferSyntax,
    Uncertainty,
    UncertaintyMap,
)
from cli.output import AsJson, Exit, emit, progress_bars, stderr
from cli.summaries import interpolate_text, spell_seconds


def register(app: typer.Typer) -> None:
    app.command("interpolate")(interpolate)


def interpolate(
    source: Annotated[str, typer.Argument(help="A zip, folder, DICOMDIR or NIfTI file with a thick CT series.")],
    out: Annotated[Path, typer.Argument(help="Folder to write into; the series gets a folder named by its key.")],
    model: Annotated[
        str | None, typer.Option(help="Name or path of a model (`ctpipe models`); by default the one named default.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A training run's folder: its diffusion model instead of a shipped one.")
    ] = None,
    spacing_mm: Annotated[float, typer.Option(min=0.2, max=10, help="Slice spacing wanted, in mm.")] = 1.0,
    trained_spacing_mm: Annotated[
        float | None, typer.Option(min=0.2, max=10, help="Spacing the model learnt; by default the run's own, else 1.")
    ] = None,
    vae: Annotated[str, typer.Option(help="The VAE that the run was trained with: `tiny` or a path.")] = "tiny",
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
    consistency: Consistency = True,
    fwhm_mm: Annotated[
        float | None, typer.Option(min=0.1, help="Measured width of the slice profile; by default the thickness.")
    ] = None,
    refiner: RefinerChoice = None,
    transfer_syntax: TransferSyntax = "explicit",
    enhanced: Enhanced = False,
    restore_identity: Annotated[
        bool, typer.Option("--restore-identity", help="Keep the patient's identity, for use inside the hospital.")
    ] = False,
    device: Device = "auto",
    memory_gib: MemoryGib = None,
    dtype: Dtype = "auto",
    page: Annotated[bool, typer.Option(help="Write OUT/KEY.html: before and after, what to trust.")] = True,
    as_json: AsJson = False,
) -> int:
    """Predict thin slices over the whole extent of a thick series; DICOM out, or NIfTI where the source is.

    Without options a model that ships does it; nothing is downloaded. A head's thin slices show the face, which is not
    removed: pseudonymous, not anonymous. Pseudonyms come from
    CTPIPE_SECRET, else from a secret kept in OUT/private.

    Examples:

        ctpipe interpolate thick.zip OUT

        ctpipe interpolate thick.nii.gz OUT --model fast

        ctpipe interpolate thick.zip OUT --checkpoint RUN

        ctpipe interpolate folder/ OUT --checkpoint RUN --spacing-mm 1.25 --samples 8 --uncertainty
    """
    from pipeline.workflows import InterpolateJob, Sampling, run_interpolation

    if model is not None and checkpoint is not None:
        raise typer.BadParameter("--model and --checkpoint exclude each other")
    if checkpoint is not None and not checkpoint.is_dir():
        raise typer.BadParameter(f"--checkpoint {checkpoint}: no folder of a training run")
    job = InterpolateJob(
        source, out, model or checkpoint, spacing_mm, trained_spacing_mm, vae, Sampling(sampler, steps, samples, seed),
        uncertainty, uncertainty_map, detail, consistency, fwhm_mm, refiner, transfer_syntax, enhanced,
        restore_identity, device, memory_gib, answer=answer, page=page, alarm_map=alarm_map,
        texture=texture, precision=dtype,
    )  # fmt: skip

    def estimate(seconds: float, shape: tuple[int, ...]) -> None:
        stderr.print(f"about {spell_seconds(seconds)} for {'x'.join(map(str, shape))} voxels", markup=False)

    with progress_bars() as show:
        done = run_interpolation(job, show, estimate)
    result = {**asdict(done), "folders": list(done.folders), "warnings": list(done.warnings), **done.figures}
    del result["figures"], result["folder"]
    emit(result, interpolate_text(result, out), as_json)
    return Exit.OK
