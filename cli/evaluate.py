"""``ctpipe evaluate``: a run's output on held-out pairs, beside every baseline and the VAE's ceiling."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.output import AsJson, Exit, emit, progress_wanted, stderr


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    store: Annotated[str, typer.Argument(help="The store that the run was trained on, or one encoded alike.")],
    run: Annotated[Path, typer.Argument(help="A training run's folder.")],
    split: Annotated[
        str, typer.Option(help="train, val or test. Every evaluation of test is logged in the run.")
    ] = "test",
    vae: Annotated[str, typer.Option(help="The VAE that the store was encoded with: `tiny` or a path.")] = "tiny",
    sampler: Annotated[str | None, typer.Option(help="Sampler; by default the objective's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; by default the objective's own.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples whose mean is scored.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sampling noise.")] = 0,
    detail: Annotated[str, typer.Option(help="absolute or residual: how decoded slices become HU.")] = "residual",
    consistency: Annotated[bool, typer.Option(help="Project onto the measured thick slices.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory_gib: Annotated[float | None, typer.Option(help="Memory budget of the VAE.")] = None,
    private: Annotated[str | None, typer.Option(help="Where the private part is, if not STORE/private.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate this many pairs at most.")] = None,
    as_json: AsJson = False,
) -> int:
    """Score a run on a split. Resumes: a case that is done is not done again.

    Examples:

        ctpipe evaluate STORE RUN --split test

        ctpipe evaluate STORE RUN --split val --samples 8 --json
    """
    document, folder = evaluate_run(
        store, run, split, vae=vae, sampler=sampler, steps=steps, samples=samples, seed=seed, detail=detail,
        consistency=consistency, device=device, memory_gib=memory_gib, private=private, limit=limit,
    )  # fmt: skip
    emit(document, summary_text(document, folder), as_json)
    return Exit.QUARANTINED if document["failures"] else Exit.OK


def evaluate_run(
    store_url: str,
    run: Path,
    split: str,
    *,
    vae: str,
    sampler: str | None,
    steps: int | None,
    samples: int,
    seed: int,
    detail: str,
    consistency: bool,
    device: str,
    memory_gib: float | None,
    private: str | None,
    limit: int | None,
) -> tuple[dict[str, Any], Path]:
    """Sample what is missing into the generated store, decode, score; returns the document and its folder."""
    from rich.progress import Progress

    from diffusion.model import Interpolator
    from diffusion.sample import SampleSettings, generate_store
    from latentcache.errors import InputError
    from latentcache.store import LatentStore
    from pipeline.compose import ComposeSettings
    from pipeline.evaluate_store import SCORES_VERSION, EvaluationSettings, evaluate_pairs, finish
    from pipeline.hu import Window
    from pipeline.private import PrivateStore
    from pipeline.vae import load_vae

    if detail not in ("absolute", "residual"):
        raise InputError(f"--detail {detail}", expected="absolute or residual", remedy="Choose one.")
    kind: Literal["absolute", "residual"] = "absolute" if detail == "absolute" else "residual"
    latents = LatentStore.open(store_url)
    identities = PrivateStore.open(store_url, private)
    model = Interpolator.load(run, device=device)
    decoder = load_vae(vae, device=device, memory_gib=memory_gib)
    encoding = latents.encoding(model.encode_key)
    if encoding.vae_sha256 != decoder.sha256:
        raise InputError(
            f"a VAE whose SHA-256 begins {decoder.sha256[:12]}",
            expected=f"the one that encoded this run's latents, {encoding.vae_sha256[:12]}",
            remedy="Give its path with --vae.",
        )
    encoded = {r.key for r in latents.records(model.encode_key, "thick_on_thin")}
    pairs = [p for p in latents.pairs() if p.split == split and p.status == "ok" and p.pair_key in encoded]
    pairs = sorted(pairs, key=lambda p: p.pair_key)[:limit]
    settings = SampleSettings(sampler=sampler, num_inference_steps=steps, seed=seed, samples=samples)
    window = Window(encoding.window_center, encoding.window_width)
    with Progress(console=stderr, disable=not progress_wanted()) as progress:
        bar = progress.add_task("sampling", total=len(pairs) or None)
        sampled = generate_store(
            latents,
            model,
            [p.pair_key for p in pairs],
            None,
            settings,
            progress=lambda done, total, _: progress.update(bar, completed=done, total=total),
        )
        generated = latents.generated(sampled.generation_key)

        def latent_of(pair: Any) -> Any:
            record = generated.find(pair.pair_key, "thin", model.encode_key)
            assert record is not None, "generate_store commits every pair asked for"
            return generated.read(record)

        compose = ComposeSettings(detail=kind, consistency=consistency)
        identity = hashlib.sha256(f"{sampled.generation_key}|{compose}|{SCORES_VERSION}".encode()).hexdigest()[:16]
        evaluation = EvaluationSettings(window, model.encode_key, compose, identity=identity)
        folder = run / "evaluation" / split
        if split == "test":
            _log_test_use(run, sampled.generation_key, len(pairs))
        bar = progress.add_task("scoring", total=len(pairs) or None)
        cases = []
        for case in evaluate_pairs(latents, identities, decoder, pairs, latent_of, evaluation, folder):
            cases.append(case)
            progress.update(bar, advance=1)
    facts = {
        "split": split,
        "window_hu": [window.lower, window.upper],
        "encode_key": model.encode_key,
        "checkpoint_sha256": model.checkpoint_sha256,
        "generation_key": sampled.generation_key,
        "snapshot": latents.snapshot,
        "settings": {"sampling": vars(settings), "detail": detail, "consistency": consistency},
    }
    return finish(folder, cases, facts), folder


def _log_test_use(run: Path, generation_key: str, pairs: int) -> None:
    """The test split is locked by daylight: every look at it stands in the run."""
    row = {"time": int(time.time()), "split": "test", "generation_key": generation_key, "pairs": pairs}
    with (run / "test_evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def summary_text(document: dict[str, Any], folder: Path) -> str:
    """The table that people read."""
    from pipeline.report_views import label

    lines = [f"{document['cases']} pairs of split {document['split']}, PSNR in the window (dB), SSIM, MAE (HU)"]
    for name, row in document["methods"].items():
        psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}"
        lines.append(f"  {label(name):42s} {psnr:>9s}  {row['ssim']:.4f}  {row['mae_hu']:7.2f}")
    lines += [f"  not scored {key}: {'; '.join(why.values())}" for key, why in document["failures"].items()]
    lines.append(f"written to {folder / 'metrics.json'}")
    return "\n".join(lines)
