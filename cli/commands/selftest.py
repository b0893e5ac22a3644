"""``ctpipe selftest``: six quick checks that training can work on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("selftest")(selftest)


def selftest(
    synthetic: Annotated[bool, typer.Option("--synthetic", help="On made-up latents (the default).")] = False,
    store: Annotated[str | None, typer.Option(help="On this store's latents instead.")] = None,
    preset: Annotated[str, typer.Option(help="tiny, medium or classic: the model and batch to try.")] = "tiny",
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as for `ctpipe train`.")] = None,
    as_json: AsJson = False,
) -> int:
    """Check data, model, losses, forward, training step and memory.

    Examples:

        ctpipe selftest

        ctpipe selftest --store STORE --preset medium --json
    """
    import tempfile
    from pathlib import Path

    from diffusion.config import load_config
    from diffusion.data import make_store
    from diffusion.training import SelfTest
    from latentcache import LatentStore
    from pipeline.vae import load_vae

    if synthetic and store is not None:
        raise typer.BadParameter("give --synthetic or --store, not both")
    overrides = ["losses.perceptual_weight=0", *(set_ or [])] if preset == "classic" else list(set_ or [])
    config, _ = load_config(preset, None, overrides)
    with tempfile.TemporaryDirectory() as folder:
        if store is None:
            latents = make_store(Path(folder) / "store", side=max(16, config.model.in_plane_multiple))
        else:
            latents = LatentStore.open(store)
        results = SelfTest(latents, config, load_vae("tiny").decode_slab if store is None else None).run()
    passed = all(result.passed for result in results)
    lines = [f"{'ok  ' if r.passed else 'FAIL'} {r.name:14s} {r.detail} ({r.seconds:.1f} s)" for r in results]
    lines.append(f"{sum(r.passed for r in results)} of {len(results)} checks passed")
    emit({"passed": passed, "checks": [asdict(r) for r in results]}, "\n".join(lines), as_json)
    return Exit.OK if passed else Exit.FAILED
