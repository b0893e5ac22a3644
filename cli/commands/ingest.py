"""``ctpipe ingest``: archives to catalog, pairs and splits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DaskScheduler, Private, RayAddress, engine_options
from cli.output import AsJson, Exit, counting_bar, emit


def register(app: typer.Typer) -> None:
    app.command("ingest")(ingest)


def ingest(
    dataset: Annotated[str, typer.Argument(help="Folder, zip or s3:// URL of the archive.")],
    store: Annotated[str, typer.Argument(help="Where the store is or shall be.")],
    private: Private = None,
    pairs: Annotated[Path | None, typer.Option(help="CSV: thick, thin (series keys or UIDs).")] = None,
    splits: Annotated[Path | None, typer.Option(help="CSV: patient, split (patient keys or PatientIDs).")] = None,
    exclude: Annotated[Path | None, typer.Option(help="CSV: any of archive, patient, study, series.")] = None,
    categories: Annotated[str, typer.Option(help="Folder names that are labels; others are unlabelled.")] = (
        "APE,non-APE"
    ),
    pair_across_fov: Annotated[
        bool, typer.Option(help="Also pair series whose fields of view differ, if the thin is within the thick.")
    ] = False,
    resample_variable_spacing: Annotated[
        bool, typer.Option(help="Take series of uneven spacing too, interpolated to even positions.")
    ] = False,
    simulate_thick: Annotated[
        float | None,
        typer.Option(min=3, max=7.5, help="Slice thickness, mm, of simulated thick series for thin-only studies."),
    ] = None,
    verify_pixels: Annotated[bool, typer.Option(help="Decode every series now, not only at encode.")] = False,
    rescan: Annotated[bool, typer.Option(help="Read unchanged archives again too.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes, or a cluster's workers, that read headers.")] = 2,
    engine: Annotated[str, typer.Option(help="dask (processes of this machine, the default), ray, or inline.")] = (
        "dask"
    ),
    dask_scheduler: DaskScheduler = None,
    ray_address: RayAddress = None,
    seed: Annotated[int, typer.Option(help="Seed of the splits of a new store.")] = 0,
    dry_run: Annotated[bool, typer.Option(help="Say what would be read; write nothing.")] = False,
    as_json: AsJson = False,
) -> int:
    """Read a dataset's headers into a store: series, pairs and splits.

    DATASET is a folder of zips or DICOM folders, one zip, or s3://bucket/prefix. Nothing is unpacked, and archives
    that have not changed since the last ingest are not opened. Run it again at any time: it goes on where it was
    stopped.

    Exit code 3 means that something that should have been usable was excluded: an archive that cannot be read or
    holds no CT, an entry that cannot be used (a link to nothing, a named pipe, a folder that may not be listed, a
    7z or tar), a series that is damaged or ambiguous, or a patient without a thick/thin pair. Each is named by its
    key with the reason; `ctpipe whois` tells who a key is. Scouts, reformats and dose reports are part of a normal
    study and do not count.

    With --pair-across-fov a thick series that no thin one shares its in-plane grid with is paired with one whose
    field of view is within that of the thick one. Such a pair is marked, its thick series is resampled in plane, and
    only the alignment `pixel` can use it. Run it on a store at any time.

    With --resample-variable-spacing a series whose slices are unevenly spaced, otherwise excluded, is interpolated
    to even positions whenever it is read, and marked. Archives already in the store need --rescan for it.

    With --simulate-thick 5 a study that has thin series alone gets a thick one that is computed from it whenever it
    is read: averaged by a drawn slice profile, with drawn noise, the same for the same secret. It is marked as
    simulated in catalog, pairs, reports and DICOM, and never counted with real pairs. Archives already in the store
    need --rescan.

    Examples:

      ctpipe ingest /data/archive store

      ctpipe ingest /data/archive store --splits splits.csv --exclude exclude.csv

      ctpipe ingest /data/archive store --pair-across-fov

      ctpipe ingest /data/archive store --resample-variable-spacing --rescan

      ctpipe ingest /data/thin-only store --simulate-thick 5

      ctpipe ingest s3://hospital/ct s3://research/store --private /secure/ct-private

      ctpipe ingest /data/archive store --engine ray --ray-address auto --workers 32
    """
    from pipeline.ingest import IngestOptions
    from pipeline.workflows import IngestJob, ingest_dataset

    spread = engine_options(engine, 0, workers=workers, dask_scheduler=dask_scheduler, ray_address=ray_address)
    options = IngestOptions(
        tuple(label.strip() for label in categories.split(",") if label.strip()),
        verify_pixels=verify_pixels,
        dry_run=dry_run,
        rescan=rescan,
        workers=1 if engine == "inline" else workers,
        pair_across_fov=pair_across_fov,
        resample_variable_spacing=resample_variable_spacing,
        simulate_thick_mm=simulate_thick,
    )
    job = IngestJob(dataset, store, options, private, pairs, splits, exclude, spread, seed)
    with counting_bar("reading headers") as show:
        summary = ingest_dataset(job, show)
    emit(summary.as_dict(), summary.text(), as_json)
    return Exit.QUARANTINED if summary.quarantined else Exit.OK
