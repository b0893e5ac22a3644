"""``ctpipe verify``: every byte of a store against its checksums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Device, Private, Store
from cli.output import AsJson, Exit, emit, progress_wanted, stderr

if TYPE_CHECKING:
    from latentcache import LatentStore


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    store: Store,
    snapshot: Annotated[int | None, typer.Option(help="Check the latents of this snapshot, not the last.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and hash.")] = 2,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also make latents again from their archives and compare them.")
    ] = False,
    sample: Annotated[float, typer.Option(min=0, max=1, help="With --sources: share of the series to compare.")] = 1.0,
    retire: Annotated[
        bool, typer.Option("--retire", help="With --sources: take latents of another series out of the manifest.")
    ] = False,
    vae: Annotated[str, typer.Option(help="With --sources: the VAE that encoded, `tiny` or a path.")] = "tiny",
    device: Device = "auto",
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Check snapshots, tables, encodings and latents: checksums, shapes, finite values, rows against arrays both ways.

    Latents that a model generated are checked too. Exits 1 if anything is wrong. Latents that are damaged or gone are
    made anew by `ctpipe encode STORE --repair`.

    With --sources, latents are made again from their archives and compared: that finds latents of another series, which
    an archive that changed between ingest and encode could leave behind in stores of earlier versions. It costs as much
    as encoding; --sample compares a part. --retire takes what it finds out of the manifest (older snapshots keep it),
    and the next `ctpipe encode` makes it anew.

    Examples:

        ctpipe verify STORE

        ctpipe verify STORE --sources --sample 0.05

        ctpipe verify STORE --sources --retire && ctpipe encode STORE

        ctpipe verify s3://archive/store --threads 8 --json
    """
    from latentcache import LatentStore
    from latentcache.maintenance import verify as verify_store

    if retire and not sources:
        raise typer.BadParameter("it takes out what --sources finds", param_hint="--retire")
    opened = LatentStore.open(store, snapshot)
    stores = {"": opened} | {f"generated/{n}": opened.generated(n) for n in opened.location.folders("generated")}
    problems: list[dict[str, str]] = []
    totals = dict.fromkeys(("latents", "fragments", "snapshots", "encodings", "bytes", "orphans"), 0)
    for name, each in stores.items():
        found = verify_store(each, threads=threads)
        problems += [{"store": name, "subject": p.subject, "what": p.what} for p in found.problems]
        for figure in totals:
            totals[figure] += getattr(found, figure)
    lines = [f"{p['store']}{' ' if p['store'] else ''}{p['subject']}: {p['what']}" for p in problems]
    lines.append(
        f"{totals['latents']} latents, {totals['fragments']} fragments and {totals['snapshots']} snapshots read "
        f"({totals['bytes'] / 1e9:.2f} GB): {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}; "
        f"{totals['orphans']} attempts without a row, which `ctpipe gc` takes after a day"
    )
    facts: dict[str, Any] = {**totals, "ok": not problems, "problems": problems}
    if sources:
        found_sources = _sources(opened, private, vae, device, sample, retire)
        facts |= found_sources
        facts["ok"] = facts["ok"] and not found_sources["foreign"]
        lines += _sources_text(found_sources)
    emit(facts, "\n".join(lines), as_json)
    return Exit.OK if facts["ok"] else Exit.FAILED


def _sources(
    store: LatentStore, private: str | None, vae: str, device: str, sample: float, retire: bool
) -> dict[str, Any]:
    """Compare latents with their archives, and retire those of another series on request."""
    from rich.progress import Progress

    from pipeline.encode import check_sources, retire_foreign
    from pipeline.identity import PrivateStore
    from pipeline.vae import load_vae

    pointer = PrivateStore.open(store.url, private).pointer
    with Progress(console=stderr, disable=not progress_wanted()) as progress:
        bar = progress.add_task("sources", total=None)
        found = check_sources(
            store,
            pointer,
            load_vae(vae, device=device),
            sample=sample,
            on_task=lambda done, planned: progress.update(bar, completed=done, total=planned),
        )
    retired, reopened = retire_foreign(store, found) if retire else (0, 0)
    return {
        "compared": found.compared,
        "skipped": found.skipped,
        "unread": found.unread,
        "foreign": {f"{row.key} {row.role}": round(by, 4) for row, by in found.foreign.values()},
        "retired": retired,
        "pairs_reopened": reopened,
    }


def _sources_text(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{name}: holds another series than its archive (they differ by {by:.2f} of the standard deviation)"
        for name, by in sorted(found["foreign"].items())
    ]
    lines += [f"{name}: not compared: {why}" for name, why in sorted(found["unread"].items())]
    lines += [
        f"{count} latents of encoding {key} not compared: another VAE made them, give it with --vae"
        for key, count in sorted(found["skipped"].items())
    ]
    if found["retired"]:
        pairs = f", {found['pairs_reopened']} pairs to be proved anew" if found["pairs_reopened"] else ""
        lines.append(
            f"{found['retired']} latents retired{pairs}: `ctpipe encode` makes them from what the archive holds"
        )
    elif found["foreign"]:
        lines.append("give --retire to take them out, then run `ctpipe encode`")
    return [
        *lines,
        f"{found['compared']} latents made again from their archives: {len(found['foreign'])} of another series",
    ]
