"""``ctpipe diff``: compare the latents of two encode keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("diff")(diff)


def diff(
    store: Store,
    a: Annotated[str, typer.Argument(help="The first encode key.")],
    b: Annotated[str, typer.Argument(help="The second encode key.")],
    sample: Annotated[int | None, typer.Option(min=1, help="Read at most this many common latents.")] = None,
    as_json: AsJson = False,
) -> int:
    """Which settings differ, which latents only one has, and how far the common ones are apart.

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
