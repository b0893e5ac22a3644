"""``ctpipe evaluate``: a run's output on held-out pairs, beside every baseline and the VAE's ceiling."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Consistency, Detail, Device, MemoryGib, Private, RefinerChoice, Sampler, Samples, Seed, Steps
from cli.output import AsJson, Exit, emit, progress_wanted, stderr
from cli.spread import DaskScheduler, RayAddress, SeriesTimeout, Threads, engine_options

if TYPE_CHECKING:
    from pipeline.engine import EngineOptions


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
    sampler: Sampler = None,
    steps: Steps = None,
    samples: Samples = 1,
    seed: Seed = 0,
    detail: Detail = "residual",
    consistency: Consistency = True,
    refiner: RefinerChoice = None,
    device: Device = "cpu",
    memory_gib: MemoryGib = None,
    private: Private = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate this many pairs at most.")] = None,
    engine: Annotated[
        str, typer.Option(help="inline (one pair after the other, the default), dask or ray.")
    ] = "inline",
    workers: Annotated[int, typer.Option(min=1, help="Pairs scored at once; with --device cuda, GPUs.")] = 1,
    dask_scheduler: DaskScheduler = None,
    ray_address: RayAddress = None,
    threads: Threads = 2,
    series_timeout: SeriesTimeout = None,
    regression: Annotated[
        Path | None, typer.Option(help="A run of `ctpipe train-regression`, to be compared in the same table.")
    ] = None,
    vgg19: Annotated[
        Path | None, typer.Option(help="State dict of torchvision's vgg19, for the perceptual distance.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Score a run on a split. Resumes: a case that is done is not done again.

    Examples:

        ctpipe evaluate STORE RUN --split test

        ctpipe evaluate STORE RUN --split val --samples 8 --json

        ctpipe evaluate STORE RUN --regression REGRESSION_RUN --vgg19 vgg19.pth

        ctpipe evaluate STORE RUN --engine ray --ray-address auto --workers 16

        ctpipe evaluate RPLHR-CT RUN --protocol rplhr --split test
    """
    from latentcache.errors import InputError
    from pipeline.evaluate_text import summary_text

    if protocol == "rplhr":
        from cli.evaluate_rplhr import evaluate_rplhr

        choice = {"sampler": sampler, "num_inference_steps": steps, "samples": samples, "seed": seed}
        where = (run / "evaluation" / f"rplhr-{split}") if run else (out or Path("rplhr")) / split
        document = evaluate_rplhr(
            Path(store), run, split, where, vae, choice, detail, consistency, device, memory_gib, limit, regression,
            refiner,
        )  # fmt: skip
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
        refiner=refiner, regression=regression, vgg19=vgg19, threads=threads,
        spread=engine_options(
            engine, workers if device.startswith("cuda") else 0, workers=workers, dask_scheduler=dask_scheduler,
            ray_address=ray_address, series_timeout=series_timeout,
        ),
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
    refiner: Path | None = None,
    regression: Path | None = None,
    vgg19: Path | None = None,
    spread: EngineOptions | None = None,
    threads: int = 2,
) -> tuple[dict[str, Any], Path]:
    """Sample what is missing into the generated store, decode, score; returns the document and its folder."""
    from rich.progress import Progress

    from cli.decode import own_refiner, refiner_of
    from cli.sampling import Spread, sample_for_scoring
    from diffusion.model import Interpolator
    from diffusion.sample_plan import SampleSettings
    from latentcache.store import LatentStore
    from pipeline.compose import ComposeSettings, parse_detail
    from pipeline.decode_store import load_decoder
    from pipeline.engine import EngineOptions
    from pipeline.evaluate import failed
    from pipeline.evaluate_files import finish, log_test_use
    from pipeline.evaluate_methods import EvaluationSettings
    from pipeline.evaluate_store import SCORES_VERSION, evaluate_pairs
    from pipeline.hu import Window
    from pipeline.private import PrivateStore
    from pipeline.progress import Progress as Told
    from pipeline.progress import watched
    from pipeline.ray_cluster import dashboard_of

    compose = ComposeSettings(detail=parse_detail(detail), consistency=consistency)
    latents = LatentStore.open(store_url)
    identities = PrivateStore.open(store_url, private)
    model = Interpolator.load(run, "meta")
    corrects = refiner_of(refiner, device) if refiner else own_refiner(run, model.checkpoint_sha256, device)
    compose = replace(compose, refiner=corrects)
    encoding = latents.encoding(model.encode_key)
    load: Any = functools.partial(
        load_decoder, spec=vae, memory_gib=memory_gib, expected_sha256=encoding.vae_sha256, extra=encoding.extra
    )
    spread = spread or EngineOptions("inline", devices=(device,))
    own = spread.name == "inline"
    decoder: Any = load(device) if own else None
    features, features_facts = features_of(vgg19, device)
    pairs, not_encoded = pairs_of(latents, model.encode_key, split, limit)
    network, network_facts = regression_of(latents, regression, device, pairs)
    settings = SampleSettings(sampler=sampler, num_inference_steps=steps, seed=seed, samples=samples)
    window = Window(encoding.window_center, encoding.window_width)
    evaluation = EvaluationSettings(window, model.encode_key, compose, regression=network, features=features)
    with Progress(console=stderr, disable=not progress_wanted()) as progress:
        sampled = sample_for_scoring(
            latents, run, model, pairs, evaluation.views, settings, Spread(spread, threads), progress
        )
        scored_by = f"{sampled.generation_key}|{compose}|{SCORES_VERSION}|{network_facts}|{features_facts}"
        evaluation = replace(evaluation, identity=hashlib.sha256(scored_by.encode()).hexdigest()[:16])
        folder = run / "evaluation" / split
        looks = None
        if split == "test":
            looks = log_test_use(run, sampled.generation_key, len(pairs))
            if regression is not None:
                log_test_use(regression, sampled.generation_key, len(pairs))
        bar = progress.add_task("scoring", total=len(pairs) or None)
        lost = [p for p in pairs if p.pair_key in sampled.failed]
        cases = [failed(p.pair_key, p.category, p.patient_key, sampled.failed[p.pair_key]) for p in lost]
        left = [p for p in pairs if p.pair_key not in sampled.failed]
        scored = evaluate_pairs(
            latents, identities, decoder, left, sampled.latent_of, evaluation, folder, sampled.samples_of,
            options=spread, load=None if own else load, threads=threads,
        )  # fmt: skip
        told = Told(latents.location, model.encode_key, len(left), "evaluate", dashboard_of(spread))
        for case in watched(scored, told) if left or not pairs else ():
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
        "settings": {
            "sampling": vars(settings),
            "detail": detail,
            "consistency": consistency,
            "refiner_sha256": corrects.sha256 if corrects else "",
        },
        "not_encoded": not_encoded,
        "test_evaluations": looks,
        "regression": network_facts,
        "perceptual": features_facts,
    }
    return finish(folder, cases, facts), folder


def pairs_of(latents: Any, encode_key: str, split: str, limit: int | None) -> tuple[list[Any], list[str]]:
    """A split's encoded pairs in the order of their keys, ``limit`` at most, and the keys of those not encoded."""
    encoded = {record.key for record in latents.records(encode_key, "thick_on_thin")}
    usable = sorted((p for p in latents.pairs() if p.split == split and p.status == "ok"), key=lambda p: p.pair_key)
    ready = [p for p in usable if p.pair_key in encoded]
    return ready[:limit], [p.pair_key for p in usable if p.pair_key not in encoded]


def regression_of(latents: Any, run: Path | None, device: str, evaluated: Any) -> tuple[Any, dict[str, Any] | None]:
    """The regression network of a run, checked against the store's training split, and what is to be said of it."""
    if run is None:
        return None, None
    from pipeline.refiner import RefinerFile
    from pipeline.regression import check_same_split, regression_facts

    file = RefinerFile.of(run, device)
    facts = regression_facts(file)
    check_same_split(file, latents, evaluated)
    return file, facts


def features_of(weights: Path | None, device: str) -> tuple[Any, str | None]:
    """VGG19's feature maps of one image as a function, and the SHA-256 of its weights; None without weights."""
    if weights is None:
        return None, None
    import torch

    from diffusion.perceptual import load_vgg19
    from latentcache.errors import InputError

    try:
        network = load_vgg19(weights, device)
    except InputError as error:
        remedy = "Name a state dict of torchvision's vgg19 with --vgg19, or leave it away: the distance is left out."
        raise InputError(error.found, expected=error.expected, remedy=remedy) from error
    with weights.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    @torch.no_grad()
    def features(unit: Any) -> list[Any]:
        return [found[0].float().cpu().numpy() for found in network(torch.from_numpy(unit)[None].to(device))]

    return features, sha256
