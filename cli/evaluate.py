"""``ctpipe evaluate``: a run's output on held-out pairs, beside every baseline and the VAE's ceiling."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.output import AsJson, Exit, emit, progress_wanted, stderr

VIEWED_SAMPLES = 8
"""Single samples whose spread the report's viewer shows, at most."""


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    store: Annotated[str, typer.Argument(help="The store that the run was trained on, or one encoded alike.")],
    run: Annotated[Path | None, typer.Argument(help="A training run's folder; `rplhr` works without one.")] = None,
    protocol: Annotated[
        str, typer.Option(help="window (a store's pairs), or rplhr (STORE is the folder of the RPLHR-CT download).")
    ] = "window",
    out: Annotated[Path | None, typer.Option(help="Results of rplhr without a run; ./rplhr by default.")] = None,
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

        ctpipe evaluate RPLHR-CT RUN --protocol rplhr --split test
    """
    from latentcache.errors import InputError

    if protocol == "rplhr":
        choice = {"sampler": sampler, "num_inference_steps": steps, "samples": samples, "seed": seed}
        where = (run / "evaluation" / f"rplhr-{split}") if run else (out or Path("rplhr")) / split
        document = evaluate_rplhr(
            Path(store), run, split, where, vae, choice, detail, consistency, device, memory_gib, limit
        )
        emit(document, summary_text(document, where), as_json)
        return Exit.QUARANTINED if document["failures"] else Exit.OK
    if protocol != "window" or run is None:
        raise InputError(
            f"--protocol {protocol}" + ("" if run else " without a run"),
            expected="window with STORE and RUN, or rplhr with the data set's folder",
            remedy="Give a training run's folder, or --protocol rplhr.",
        )
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
    from diffusion.sample import SampleSettings, condition_of, generate_store
    from latentcache.errors import InputError
    from latentcache.store import LatentStore
    from pipeline.compose import ComposeSettings
    from pipeline.evaluate_files import finish
    from pipeline.evaluate_store import SCORES_VERSION, EvaluationSettings, evaluate_pairs
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

        def single_samples(pair: Any) -> Iterator[Any]:
            condition, _ = condition_of(latents, model, pair)
            for number in range(min(samples, VIEWED_SAMPLES)):
                single = replace(settings, samples=1, seed=seed + number)
                yield model.generate(condition, **asdict(single))

        compose = ComposeSettings(detail=kind, consistency=consistency)
        identity = hashlib.sha256(f"{sampled.generation_key}|{compose}|{SCORES_VERSION}".encode()).hexdigest()[:16]
        evaluation = EvaluationSettings(window, model.encode_key, compose, identity=identity)
        folder = run / "evaluation" / split
        if split == "test":
            _log_test_use(run, sampled.generation_key, len(pairs))
        bar = progress.add_task("scoring", total=len(pairs) or None)
        cases = []
        spread = single_samples if samples > 1 else None
        for case in evaluate_pairs(latents, identities, decoder, pairs, latent_of, evaluation, folder, spread):
            cases.append(case)
            progress.update(bar, advance=1)
    facts = {
        "split": split,
        "window_hu": [window.lower, window.upper],
        "encode_key": model.encode_key,
        "checkpoint_sha256": model.checkpoint_sha256,
        "generation_key": sampled.generation_key,
        "snapshot": latents.snapshot,
        "pairs_digest": hashlib.sha256(json.dumps(sorted(p.pair_key for p in pairs)).encode()).hexdigest()[:16],
        "settings": {"sampling": vars(settings), "detail": detail, "consistency": consistency},
    }
    return finish(folder, cases, facts), folder


def evaluate_rplhr(
    dataset: Path,
    run: Path | None,
    split: str,
    folder: Path,
    vae: str,
    choice: dict[str, Any],
    detail: str,
    consistency: bool,
    device: str,
    memory_gib: float | None,
    limit: int | None,
) -> dict[str, Any]:
    """RPLHR-CT by its own protocol: the baselines, and the run's model where one is given."""
    from rich.progress import Progress

    from pipeline.evaluate_files import finish
    from pipeline.rplhr import evaluate_dataset

    facts: dict[str, Any] = {"protocol": "rplhr", "split": split, "window_hu": [-1024.0, 2048.0]}
    generate = None
    if run is not None:
        facts["settings"] = {"sampling": choice, "detail": detail, "consistency": consistency}
        generate, facts["checkpoint_sha256"] = _volume_model(run, vae, choice, detail, consistency, device, memory_gib)
        if split == "test":
            _log_test_use(run, "rplhr", limit or 0)
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    cases = []
    with Progress(console=stderr, disable=not progress_wanted()) as progress:
        bar = progress.add_task("scoring", total=None)
        for case, total in evaluate_dataset(dataset, split, folder, identity, generate, limit):
            cases.append(case)
            progress.update(bar, completed=len(cases), total=total)
    return finish(folder, cases, facts)


def _volume_model(
    run: Path, vae: str, choice: dict[str, Any], detail: str, consistency: bool, device: str, memory_gib: float | None
) -> tuple[Any, str]:
    """The run's model as a function of a thick volume and a thin lattice, composed as ``ctpipe interpolate`` does."""
    import numpy as np

    from cli.interpolate import encoding_of, load_codec
    from diffusion.model import Interpolator
    from pipeline.compose import ComposeSettings, compose, parse_detail
    from pipeline.hu import Window
    from pipeline.interpolate import condition_latent
    from pipeline.metrics import require_finite

    model = Interpolator.load(run, device=device)
    encoding = encoding_of(model)
    codec = load_codec(vae, device, memory_gib, encoding.vae_sha256)
    window = Window(encoding.window_center, encoding.window_width)
    composing = ComposeSettings(detail=parse_detail(detail), consistency=consistency)

    def generate(thick: Any, thin: Any) -> Any:
        padding = encoding.pad_multiple_zyx
        condition = condition_latent(thick, thin, window, codec, model.alignment, padding)
        latent = model.generate(condition, **choice)
        seen = condition
        if model.alignment != "pixel" and composing.detail == "residual":
            seen = condition_latent(thick, thin, window, codec, "pixel", padding)

        def decoded(z: Any) -> Any:
            return window.from_unit(np.asarray(codec.decode(np.asarray(z, dtype=np.float32), thin.shape_zyx)))

        generated = require_finite(decoded(latent), "the decoded model output")
        hu, _ = compose(generated, window, thick, thin, composing, condition_hu=decoded(seen))
        return hu

    return generate, model.checkpoint_sha256


def _log_test_use(run: Path, generation_key: str, pairs: int) -> None:
    """The test split is locked by daylight: every look at it stands in the run."""
    row = {"time": int(time.time()), "split": "test", "generation_key": generation_key, "pairs": pairs}
    with (run / "test_evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def summary_text(document: dict[str, Any], folder: Path) -> str:
    """The table that people read."""
    from pipeline.report_views import label, ordered

    lines = [
        f"{document['cases']} pairs of {document['patients']} patients, split {document['split']}: "
        "PSNR in the window (dB), SSIM, MAE (HU); PSNR against cubic with its 95% interval over patients"
    ]
    for name in ordered(document["methods"]):
        row = document["methods"][name]
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}"
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.4f}"
        mae = "-" if row["mae_hu"] is None else f"{row['mae_hu']:.2f}"
        gain = document["against_cubic"].get(name)
        lines.append(f"  {label(name):42s} {psnr:>7s}  {ssim:>6s}  {mae:>7s}  {interval_text(gain)}".rstrip())
    lines += [f"  not scored {key}: {'; '.join(why.values())}" for key, why in document["failures"].items()]
    lines.append(f"written to {folder / 'metrics.json'}")
    return "\n".join(lines)


def interval_text(interval: Mapping[str, Any] | None) -> str:
    """A mean and its interval, e.g. ``+0.52 (+0.31 to +0.70)``; empty where there is none."""
    if interval is None:
        return ""
    if interval["low"] is None:
        return f"{interval['mean']:+.2f} (too few patients for an interval)"
    return f"{interval['mean']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"
