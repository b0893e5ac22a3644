"""``ctpipe stats``: what the latents of a store look like."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("stats")(stats)


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
