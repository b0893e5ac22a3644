"""Score a run's model beside the classical methods on held-out pairs."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.workflows.job_progress import JobProgress, OnProgress, silent

if TYPE_CHECKING:
    from pipeline.engines import EngineOptions


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
    on_progress: OnProgress = silent,
) -> tuple[dict[str, Any], Path]:
    """Sample what is missing into the generated store, decode, score; returns the document and its folder."""
    from diffusion.sampling import Interpolator, SampleSettings
    from latentcache import LatentStore
    from pipeline.decode import ComposeSettings, parse_detail
    from pipeline.engines import EngineOptions, Progress, dashboard_of, watched
    from pipeline.evaluation import SCORES_VERSION, EvaluationSettings, evaluate_pairs, failed, finish, log_test_use
    from pipeline.identity import PrivateStore
    from pipeline.vae import load_decoder, tuned_decoder
    from pipeline.volume import Window
    from pipeline.workflows.sample import Spread, own_refiner, refiner_of, sample_for_scoring, start_of

    compose = ComposeSettings(detail=parse_detail(detail), consistency=consistency)
    latents = LatentStore.open(store_url)
    identities = PrivateStore.open(store_url, private)
    model = Interpolator.load(run, "meta")
    corrects = refiner_of(refiner, device) if refiner else own_refiner(run, model.checkpoint_sha256, device)
    compose = replace(compose, refiner=corrects, start=start_of(run, device))
    encoding = latents.encoding(model.encode_key)
    load: Any = functools.partial(
        load_decoder, spec=vae, memory_gib=memory_gib, expected_sha256=encoding.vae_sha256, extra=encoding.extra
    )
    spread = spread or EngineOptions("inline", devices=(device,))
    own = spread.name == "inline"
    decoder: Any = load(device) if own else None
    features, features_facts = features_of(vgg19, device)
    pairs, not_encoded = pairs_of(latents, model.encode_key, split, limit, model.condition_role)
    network, network_facts = regression_of(latents, regression, device, pairs)
    settings = SampleSettings(sampler=sampler, num_inference_steps=steps, seed=seed, samples=samples)
    window = Window(encoding.window_center, encoding.window_width)
    evaluation = EvaluationSettings(window, model.encode_key, compose, regression=network, features=features)
    sampled = sample_for_scoring(
        latents, run, model, pairs, evaluation.views, settings, Spread(spread, threads), on_progress
    )
    scored_by = f"{sampled.generation_key}|{compose}|{SCORES_VERSION}|{network_facts}|{features_facts}"
    tuned = tuned_decoder(vae)
    scored_by += f"|{tuned}" if tuned else ""
    evaluation = replace(evaluation, identity=hashlib.sha256(scored_by.encode()).hexdigest()[:16])
    folder = run / "evaluation" / split
    looks = None
    if split == "test":
        looks = log_test_use(run, sampled.generation_key, len(pairs))
        if regression is not None:
            log_test_use(regression, sampled.generation_key, len(pairs))
    on_progress(JobProgress("scoring", 0, len(pairs)))
    lost = [p for p in pairs if p.pair_key in sampled.failed]
    cases = [failed(p.pair_key, p.category, p.patient_key, sampled.failed[p.pair_key]) for p in lost]
    left = [p for p in pairs if p.pair_key not in sampled.failed]
    scored = evaluate_pairs(
        latents, identities, decoder, left, sampled.latent_of, evaluation, folder, sampled.samples_of,
        options=spread, load=None if own else load, threads=threads,
    )  # fmt: skip
    progress = Progress(latents.location, model.encode_key, len(left), "evaluate", dashboard_of(spread))
    for case in watched(scored, progress) if left or not pairs else ():
        cases.append(case)
        on_progress(JobProgress("scoring", len(cases), len(pairs)))
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
            "start_refiner_sha256": model.refiner_sha256,
            "decoder_sha256": tuned,
        },
        "not_encoded": not_encoded,
        "test_evaluations": looks,
        "regression": network_facts,
        "perceptual": features_facts,
    }
    return finish(folder, cases, facts), folder


def pairs_of(
    latents: Any, encode_key: str, split: str, limit: int | None, role: str = "thick_on_thin"
) -> tuple[list[Any], list[str]]:
    """A split's encoded pairs in the order of their keys, ``limit`` at most, and the keys of those not encoded.

    Pairs whose thick series is simulated are left out where the split has real ones: their figures never mix.
    """
    condition = "refined_on_thin" if role == "refined_on_thin" else "thick_on_thin"
    encoded = {record.key for record in latents.records(encode_key, condition)}
    usable = sorted((p for p in latents.pairs() if p.split == split and p.status == "ok"), key=lambda p: p.pair_key)
    usable = [p for p in usable if not p.simulated] or usable
    ready = [p for p in usable if p.pair_key in encoded]
    return ready[:limit], [p.pair_key for p in usable if p.pair_key not in encoded]


def regression_of(latents: Any, run: Path | None, device: str, evaluated: Any) -> tuple[Any, dict[str, Any] | None]:
    """The regression network of a run, checked against the store's training split, and what is to be said of it."""
    if run is None:
        return None, None
    from pipeline.refiner import RefinerFile, check_same_split, regression_facts

    file = RefinerFile.of(run, device)
    facts = regression_facts(file)
    check_same_split(file, latents, evaluated)
    return file, facts


def features_of(weights: Path | None, device: str) -> tuple[Any, str | None]:
    """VGG19's feature maps of one image as a function, and the SHA-256 of its weights; None without weights."""
    if weights is None:
        return None, None
    import torch

    from diffusion.losses import load_vgg19
    from latentcache import InputError

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
