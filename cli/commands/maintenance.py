"""Commands that look after a store: ``diff``, ``gc``, ``migrate``, ``stats`` and ``status``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("diff")(diff)
    app.command("gc")(gc)
    app.command("migrate")(migrate)
    app.command("stats")(stats)
    app.command("status")(status)


def diff(
    store: Store,
    a: Annotated[str, typer.Argument(help="The first encode key.")],
    b: Annotated[str, typer.Argument(help="The second encode key.")],
    sample: Annotated[int | None, typer.Option(min=1, help="Read at most this many common latents.")] = None,
    as_json: AsJson = False,
) -> int:
    """Compare two encodings: settings that differ, latents that only one has, distance of the common ones.

    Examples:

        ctpipe diff STORE 0123456789abcdef fedcba9876543210

        ctpipe diff STORE 0123456789abcdef fedcba9876543210 --sample 20 --json
    """
    from latentcache import LatentStore
    from latentcache.maintenance import diff as compare

    found = compare(LatentStore.open(store), a, b, sample)
    lines = [f"{name}: {one!r} against {other!r}" for name, (one, other) in found.settings.items()]
    lines.append(f"only in {a}: {len(found.only_a)}; only in {b}: {len(found.only_b)}; in both: {found.common}")
    if found.incomparable:
        lines.append(f"{len(found.incomparable)} common latents differ in shape")
    same = sum(d.identical_bytes for d in found.compared)
    lines.append(f"{len(found.compared)} compared, {same} byte for byte the same")
    lines += [f"  {d.key} {d.role}: relative {d.relative:.2e}, largest {d.largest:.3g}" for d in found.compared[:10]]
    emit(asdict(found), "\n".join(lines), as_json)
    return Exit.OK


def gc(
    store: Store,
    grace_hours: Annotated[float, typer.Option(min=0, help="Spare attempts younger than this.")] = 24.0,
    expire_snapshots: Annotated[
        bool, typer.Option("--expire-snapshots", help="Drop older snapshots that no run has pinned, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and stop.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove attempts without a row, fragments without a snapshot, and files that killed writers left aside.

    Whatever any snapshot or pinned run names is spared, and every attempt that may still be in flight.

    Examples:

        ctpipe gc STORE --dry-run

        ctpipe gc STORE --expire-snapshots
    """
    from latentcache import LatentStore
    from latentcache.maintenance import collect

    found = collect(
        LatentStore.open(store), grace_s=grace_hours * 3600, dry_run=dry_run, expire_snapshots=expire_snapshots
    )
    text = (
        f"{'would remove' if dry_run else 'removed'} {found.objects} objects ({found.bytes / 1e6:.1f} MB): "
        f"{found.attempts} attempts, {found.fragments} fragments, {found.snapshots} snapshots, "
        f"{found.asides} left aside"
    )
    emit({**asdict(found), "dry_run": dry_run}, text, as_json)
    return Exit.OK


def migrate(
    store: Store,
    as_json: AsJson = False,
) -> int:
    """Rewrite the tables of an older store in place; latents stay as they are. A current store is left alone.

    Stop every other command on the store first. If it is interrupted, run it again.

    Examples:

        ctpipe migrate STORE
    """
    from latentcache import FORMAT_VERSION
    from latentcache.maintenance import migrate as migrate_store
    from latentcache.storage import open_location

    found, rewritten = migrate_store(open_location(store))
    text = (
        f"already at format version {found}"
        if found == FORMAT_VERSION
        else f"format version {found} became {FORMAT_VERSION}: {rewritten} fragments rewritten"
    )
    emit({"from": found, "to": FORMAT_VERSION, "fragments": rewritten}, text, as_json)
    return Exit.OK


def stats(
    store: Store,
    encode_key: Annotated[str | None, typer.Option(help="Only this encode key.")] = None,
    sample: Annotated[int, typer.Option(min=1, help="Latents read for histograms and correlations.")] = 32,
    as_json: AsJson = False,
) -> int:
    """Per-channel moments (exact, over all latents), histograms, channel correlations and outliers.

    Examples:

        ctpipe stats STORE

        ctpipe stats STORE --encode-key 0123456789abcdef --sample 200 --json
    """
    from latentcache import LatentStore
    from latentcache.maintenance import summarise

    opened = LatentStore.open(store)
    chosen = opened.encoded()
    if encode_key is not None:
        opened.encoding(encode_key)
        chosen = [c for c in chosen if c[0] == encode_key]
    found = [summarise(opened, key, role, sample) for key, role in chosen]
    result: list[dict[str, Any]] = [
        {
            "encode_key": s.encode_key,
            "role": s.role,
            "latents": s.latents,
            "mean": s.moments.mean.tolist(),
            "std": s.moments.std.tolist(),
            "values_per_channel": s.moments.count,
            "sampled": s.sampled,
            "histogram_edges_std": s.edges.tolist(),
            "histogram": s.histogram.tolist(),
            "correlation": s.correlation.tolist(),
            "outliers": [vars(o) for o in s.outliers],
        }
        for s in found
    ]
    lines = []
    for s in found:
        lines.append(f"{s.encode_key} {s.role}: {s.latents} latents, {s.sampled} sampled")
        for c, (mean, std) in enumerate(zip(s.moments.mean, s.moments.std, strict=True)):
            row = " ".join(f"{v:+.2f}" for v in s.correlation[c])
            lines.append(f"  channel {c}  mean {mean:+8.4f}  std {std:7.4f}  |{_bars(s.histogram[c])}|  corr {row}")
        lines += [
            f"  outlier {o.key}: {o.figure} of channel {o.channel} is {o.z:.0f} sigma off" for o in s.outliers[:10]
        ]
    emit({"statistics": result, "snapshot": opened.snapshot}, "\n".join(lines) or "no latents yet", as_json)
    return Exit.OK


def _bars(counts: Any) -> str:
    """A histogram in one line, -5 to +5 std."""
    levels = " ▁▂▃▄▅▆▇█"
    pairs = counts.reshape(-1, 2).sum(axis=1)
    top = max(int(pairs.max()), 1)
    return "".join(levels[round(8 * int(n) / top)] for n in pairs)


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
    emit(found, _status_text(found), as_json)
    return Exit.OK


def _status_text(found: dict[str, Any]) -> str:
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
    """Show the progress of the job that last wrote to the store; a silent one may have been killed."""
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
