"""``ctpipe status``: what a store holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("status")(status)


def status(
    store: Store,
    snapshot: Annotated[int | None, typer.Option(help="Show this snapshot instead of the last.")] = None,
    as_json: AsJson = False,
) -> int:
    """Count series, pairs and latents, say what is still to encode and how far a running job is.

    Of a service's state folder, or its configuration: its studies, results and deliveries, and what is quarantined.

    Examples:

        ctpipe status STORE

        ctpipe status serve.yaml

        ctpipe status STORE --snapshot 12 --json
    """
    from latentcache import LatentStore
    from latentcache.maintenance import status as count
    from pipeline.engines import read_progress
    from pipeline.serve import read_status, state_folder, status_text

    if (state := state_folder(store)) is not None:
        served = read_status(state)
        emit(served, status_text(served), as_json)
        return Exit.OK
    opened = LatentStore.open(store, snapshot)
    found = {**count(opened), "running": read_progress(opened.location)}
    emit(found, _text(found), as_json)
    return Exit.OK


def _text(found: dict[str, Any]) -> str:
    series, pairs = found["series"], found["pairs"]
    lines = [
        f"snapshot {found['snapshot']} of {len(found['snapshots'])} kept",
        f"series {series['total']} ({series['quarantined']} quarantined): {_counts(series['by_role'])}",
        f"  splits: {_counts(series['by_split'])}",
        f"pairs {pairs['total']} ({pairs['quarantined']} quarantined): {_counts(pairs['by_split'])}",
    ]
    for key, encoding in found["encodings"].items():
        stale = f", {encoding['stale']} stale (`ctpipe encode --refresh`)" if encoding["stale"] else ""
        to_do = f"{encoding['series_missing']} series to encode{stale}"
        lines.append(f"encode key {key}: {_counts(encoding['latents'])}; {to_do}")
        if "window" in encoding:
            lines.append(
                f"  window {encoding['window']}, tiling {encoding['tiling']}, VAE {encoding['vae_sha256'][:12]}"
            )
        else:
            lines.append(f"  {encoding['problem']}")
    lines += [f"pinned: snapshot {number} by {', '.join(names)}" for number, names in found["pinned"].items()]
    lines += [f"generated: {key}" for key in found["generated"]]
    return "\n".join([*_running(found["running"]), *lines])


def _running(job: dict[str, Any] | None) -> list[str]:
    """How far the job is that last wrote to the store; a silent one may have been killed."""
    from pipeline.engines import STAGES

    if job is None:
        return []
    left = "" if job["seconds_left"] is None else f", {job['seconds_left'] / 60:.0f} min left"
    lines = [
        f"{job['stage']} {job['attempted']} of {job['planned']}, {job['per_second']:.2f} a second{left}; "
        f"{job['done']} {STAGES[job['stage']]}; last heard of {job['silent_s']:.0f} s ago"
    ]
    if job["dashboard"]:
        lines.append(f"  Ray's dashboard: {job['dashboard']}")
    return lines


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "none"
