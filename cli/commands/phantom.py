"""``ctpipe phantom``: a synthetic dataset in the archive's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import AsJson, advancing_bar, emit


def register(app: typer.Typer) -> None:
    app.command("phantom")(phantom)


def phantom(
    out: Annotated[Path, typer.Argument(help="Folder to write to.")],
    patients: Annotated[int, typer.Option(min=1, help="How many; categories take turns.")] = 4,
    size: Annotated[int, typer.Option(min=16, help="Rows and columns; the field of view stays 320 mm.")] = 128,
    thin_slices: Annotated[int, typer.Option(min=10, help="Slices of 1 mm; the thick series covers less.")] = 120,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other patients.")] = 0,
    thin_noise: Annotated[float, typer.Option(min=0.0, help="Noise of thin slices, HU.")] = 9.0,
    thick_noise: Annotated[float, typer.Option(min=0.0, help="Noise of thick slices, HU.")] = 4.5,
    dry_run: Annotated[bool, typer.Option(help="Say what would be written; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write synthetic chest CT, thick and thin, as zips of DICOM: OUT/APE/patient_001.zip, OUT/non-APE/...

    Each zip holds 1/ (5 mm slices) and 2/ (1 mm slices) of one made-up patient, every one different; those of APE have
    filling defects in the pulmonary arteries. The same settings give the same bytes. Zips already made are kept, so the
    command can be interrupted and run again.

    Examples:

      ctpipe phantom data --patients 4 --size 128

      ctpipe phantom data --patients 12 --size 512 --thin-slices 300 --seed 7
    """
    from pipeline.phantom import PhantomSettings, write_dataset

    result = {"out": str(out), "patients": patients, "size": size, "thin_slices": thin_slices, "seed": seed}
    if dry_run:
        emit({**result, "written": 0}, f"would write {patients} patients to {out}", as_json)
        return
    settings = PhantomSettings(thin_sigma_hu=thin_noise, thick_sigma_hu=thick_noise)
    with advancing_bar("phantoms", patients) as advance:
        paths = write_dataset(
            out,
            patients=patients,
            size=size,
            n_thin=thin_slices,
            seed=seed,
            settings=settings,
            progress=advance,
        )
    text = f"{len(paths)} patients in {out}: {size}x{size}, {thin_slices} thin slices of 1 mm each"
    emit({**result, "written": len(paths), "zips": [str(p) for p in paths]}, text, as_json)
