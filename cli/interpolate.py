"""``ctpipe interpolate``: a thick-only study to a thin DICOM series, in one command."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.decode import own_refiner, refiner_of, sampling_facts
from cli.options import (
    Consistency,
    Detail,
    Device,
    Enhanced,
    MemoryGib,
    RefinerChoice,
    Sampler,
    Samples,
    Seed,
    Steps,
    TransferSyntax,
    Uncertainty,
    UncertaintyMap,
)
from cli.output import AsJson, Exit, emit, progress_wanted, stderr


def register(app: typer.Typer) -> None:
    app.command("interpolate")(interpolate)


def interpolate(
    source: Annotated[str, typer.Argument(help="A zip or a folder that holds a thick CT series.")],
    out: Annotated[Path, typer.Argument(help="Folder to write into; the series gets a folder named by its key.")],
    checkpoint: Annotated[Path, typer.Option(help="A training run's folder.")],
    spacing_mm: Annotated[float, typer.Option(min=0.2, max=10, help="Slice spacing wanted, in mm.")] = 1.0,
    trained_spacing_mm: Annotated[
        float | None, typer.Option(min=0.2, max=10, help="Spacing the model learnt; by default the run's own, else 1.")
    ] = None,
    vae: Annotated[str, typer.Option(help="The VAE that the run was trained with: `tiny` or a path.")] = "tiny",
    sampler: Sampler = None,
    steps: Steps = None,
    samples: Samples = 1,
    seed: Seed = 0,
    uncertainty: Uncertainty = False,
    uncertainty_map: UncertaintyMap = False,
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
    device: Device = "cpu",
    memory_gib: MemoryGib = None,
    as_json: AsJson = False,
) -> int:
    """Predict thin slices over the whole extent of a thick series and write them as DICOM.

    Pseudonyms come from CTPIPE_SECRET, else from a secret kept in OUT/private.

    Examples:

        ctpipe interpolate thick.zip OUT --checkpoint RUN

        ctpipe interpolate folder/ OUT --checkpoint RUN --spacing-mm 1.25 --samples 8 --uncertainty
    """
    from diffusion.model import Interpolator
    from pipeline.compose import ComposeSettings, parse_detail
    from pipeline.derived import WriteSettings
    from pipeline.dicom_encode import transfer_syntax_uid
    from pipeline.dicom_enhanced import check_enhanced
    from pipeline.hu import Window
    from pipeline.interpolate import InterpolateSettings
    from pipeline.private import PrivateStore
    from pipeline.slice_profile import SliceProfile

    transfer_syntax_uid(transfer_syntax)
    uncertainty = uncertainty or uncertainty_map
    model = Interpolator.load(checkpoint, device=device)
    encoding = encoding_of(model)
    options = {"sampler": sampler, "num_inference_steps": steps, "seed": seed}
    settings = InterpolateSettings(
        WriteSettings(
            out,
            Window(encoding.window_center, encoding.window_width),
            transfer_syntax=transfer_syntax,
            uncertainty=uncertainty,
            uncertainty_map=uncertainty_map,
            enhanced=enhanced,
            checkpoint_sha256=model.checkpoint_sha256,
            sampling=sampling_facts(model, options, samples),
        ),
        ComposeSettings(
            detail=parse_detail(detail),
            consistency=consistency,
            profile=SliceProfile("gaussian", fwhm_mm) if fwhm_mm else None,
            refiner=refiner_of(refiner, device)
            if refiner
            else own_refiner(checkpoint, model.checkpoint_sha256, device),
        ),
        spacing_mm=spacing_mm,
        trained_spacing_mm=trained_spacing_mm or learnt_spacing(model) or 1.0,
        alignment=model.alignment,
        encode_key=model.encode_key,
        pad_multiple_zyx=encoding.pad_multiple_zyx,
        restore_identity=restore_identity,
    )
    chosen, thick = read_thick(source, spacing_mm)
    if enhanced:
        check_enhanced(thick.header)
    decoder = load_codec(vae, device, memory_gib, encoding)
    people = PrivateStore.open(str(out), create=True)
    expected = estimate_seconds(
        model, decoder, thick.geometry.thin_grid(settings.trained_spacing_mm).shape_zyx, samples, options, uncertainty
    )
    stderr.print(f"about {spell_seconds(expected)} for {'x'.join(map(str, thick.hu.shape))} voxels", markup=False)
    start = time.perf_counter()
    done = generate_series(thick, chosen, people.keys, decoder, model, settings, samples, options)
    seconds = round(time.perf_counter() - start, 2)
    result = {
        "key": done.key,
        "folders": list(done.folders),
        "series_uid": done.series_uid,
        "slices": done.n_slices,
        "source_slices": len(thick.hu),
        "spacing_mm": spacing_mm,
        "seconds": seconds,
        "estimated_seconds": round(expected, 2),
        **done.figures,
    }
    emit(result, _text(result, out), as_json)
    return Exit.OK


def estimate_seconds(
    model: Any, codec: Any, shape_zyx: tuple[int, int, int], samples: int, options: dict[str, Any], apart: bool
) -> float:
    """Seconds of sampling and coding a volume, from one step and one decode of a small piece on this very device.

    Both are nearly proportional to the voxels. Encoding costs about a third of decoding; with residual detail the
    condition is decoded too. Reading, composing and writing are left out: they are small beside a full model.
    """
    import numpy as np

    depth, side = 8, 16
    piece = np.zeros((4, depth, side, side), np.float32)

    def timed(work: Any) -> float:
        work()  # the first call pays for loading kernels
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    one_step = timed(lambda: model.generate(piece, **{**options, "num_inference_steps": 1}))
    one_decode = timed(lambda: codec.decode(piece, (4 * depth, 4 * side, 4 * side)))
    times_larger = float(np.prod(shape_zyx)) / (64.0 * depth * side * side)
    steps = options["num_inference_steps"] or model.objective.default_steps
    decodes = (samples if apart else 1) + 1 + 1 / 3
    return float(times_larger * (samples * steps * one_step + decodes * one_decode))


def spell_seconds(seconds: float) -> str:
    """``40 s``, ``12 min`` or ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def read_thick(source: str, spacing_mm: float) -> tuple[Any, Any]:
    """The thick series of an archive or folder: what was found, and its volume in HU."""
    from pipeline.archive import open_source
    from pipeline.interpolate import choose_thick, pointer_of
    from pipeline.series import scan
    from pipeline.volume_reader import read_series

    opened = open_source(source)
    try:
        chosen: Any = choose_thick(scan(opened).series, spacing_mm=spacing_mm)
    finally:
        opened.close()
    return chosen, read_series(pointer_of(chosen, "interpolated"), threads=2)


def load_codec(spec: str, device: str, memory_gib: float | None, encoding: Any) -> Any:
    """The VAE that the run was trained with."""
    from pipeline.decode_store import load_decoder

    return load_decoder(
        device, spec=spec, memory_gib=memory_gib, expected_sha256=encoding.vae_sha256, extra=encoding.extra
    )


def encoding_of(model: Any) -> Any:
    """How the run's latents were encoded. Raises InputError where the run does not say."""
    from latentcache.errors import InputError

    if model.encoding is None:
        raise InputError(
            "a run that does not say how its latents were encoded",
            expected="run.json with the encoding",
            remedy="Train it again with this version.",
        )
    return model.encoding


def generate_series(
    thick: Any, chosen: Any, keys: Any, codec: Any, model: Any, settings: Any, samples: int, options: dict[str, Any]
) -> Any:
    """Run the interpolation with a progress bar; the model goes in as a callable on latents."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from pipeline.interpolate import interpolate as run_interpolation

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not progress_wanted()) as progress:
        bar = progress.add_task("encode", total=2 + samples)

        def generate(condition: Any) -> Any:
            if not settings.write.uncertainty:
                yield model.generate(condition, samples=samples, **options)
                return
            for number in range(samples):
                progress.update(bar, description=f"generate {number + 1}/{samples}", advance=1)
                yield model.generate(condition, **{**options, "seed": options["seed"] + number})

        return run_interpolation(
            thick,
            chosen,
            keys,
            codec,
            generate,
            settings,
            progress=lambda step: progress.update(bar, description=step, advance=1),
        )


def _text(result: dict[str, Any], out: Path) -> str:
    text = (
        f"{result['source_slices']} slices -> {result['slices']} at {result['spacing_mm']:g} mm "
        f"in {out / result['key']} ({result['seconds']:.1f} s)"
    )
    if result.get("rms_after_hu") is not None:
        text += f"\nRMS against the measured slices {result['rms_before_hu']:.1f} -> {result['rms_after_hu']:.1f} HU"
    return text + (f"\nwarning: {result['warning']}" if result.get("warning") else "")


def learnt_spacing(model: Any) -> float | None:
    """The thin spacing that a run was trained on, where its card says so."""
    card = getattr(model, "card", None)
    value = card.extra.get("thin_spacing_mm") if card is not None else None
    return None if value is None else float(value)
