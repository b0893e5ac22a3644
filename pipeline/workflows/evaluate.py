"""Score a run's model beside the classical methods on held-out pairs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.workflows.job_progress import JobProgress, OnProgress, silent

if TYPE_CHECKING:
    from pipeline.decode import ComposeSettings
    from pipeline.engines import EngineOptions
    from pipeline.evaluation import CaseWork, EvaluationSettings, ScoreSpread


@dataclass(frozen=True, kw_only=True)
class ScoringJob:
    """Settings of every order to score, whatever the protocol.

    Attributes:
        vae: ``tiny`` or the path of the VAE that encoded the latents which the run was trained on.
        samples: Samples per pair; their mean is scored, and their spread shown.
        detail: ``residual`` or ``absolute``.
        consistency: Project onto the measured thick slices.
        limit: Pairs at most.
        refiner: A refiner's run; None: the run's own; ``none``: without.
        regression: A regression run to be compared in the same table.
        texture: Score a draw with the texture of true thin slices, as a decode writes its samples.
    """

    split: str = "test"
    vae: str = "tiny"
    sampler: str | None = None
    steps: int | None = None
    samples: int = 1
    seed: int = 0
    detail: str = "residual"
    consistency: bool = True
    device: str = "cpu"
    memory_gib: float | None = None
    precision: str = "auto"
    limit: int | None = None
    refiner: Path | None = None
    regression: Path | None = None
    texture: bool = False

    def composing(self, run: Path, checkpoint_sha256: str) -> ComposeSettings:
        """Return how a model's output becomes HU, with the run's own refiner where no other is asked for."""
        from diffusion.sampling import change_gain
        from pipeline.decode import ComposeSettings, parse_detail
        from pipeline.workflows.sample import own_refiner, refiner_of, start_of, texture_of

        own = self.refiner is None
        return ComposeSettings(
            detail=parse_detail(self.detail),
            consistency=self.consistency,
            refiner=own_refiner(run, checkpoint_sha256, self.device) if own else refiner_of(self.refiner, self.device),
            start=start_of(run, self.device),
            change_gain=change_gain(run, self.steps),
            texture=texture_of(run, self.texture, self.steps, samples=self.samples),
        )


@dataclass(frozen=True)
class EvaluationJob(ScoringJob):
    """A user's order to score a run on a split of a store.

    Attributes:
        store: URL or path of the store; ``private`` is its private part where that is elsewhere.
        run: The training run; results go into its folder ``evaluation/<split>``.
        vgg19: State dict of torchvision's vgg19, for the perceptual distance.
        engine: How pairs are distributed; one after the other in this process by default.
        threads: Arithmetic threads per worker, pinned for equal figures.
    """

    store: str
    run: Path
    _: KW_ONLY
    private: str | None = None
    vgg19: Path | None = None
    engine: EngineOptions | None = None
    threads: int = 2


def evaluate_run(job: EvaluationJob, on_progress: OnProgress = silent) -> tuple[dict[str, Any], Path]:
    """Sample what is missing into the generated store, decode, score; returns the document and its folder.

    A case that is done is not done again. Progress comes under ``sampling`` and ``scoring``.
    """
    from diffusion.sampling import Interpolator, SampleSettings
    from latentcache import LatentStore
    from pipeline.engines import EngineOptions
    from pipeline.evaluation import CaseWork, ScoreSpread, finish
    from pipeline.identity import PrivateStore
    from pipeline.vae import tuned_decoder
    from pipeline.workflows.sample import Spread, sample_for_scoring

    latents = LatentStore.open(job.store)
    model = Interpolator.load(job.run, "meta")
    engine = job.engine or EngineOptions("inline", devices=(job.device,))
    vaes = _vaes(job, latents, model.encode_key, engine)
    private = PrivateStore.open(job.store, job.private)
    pairs, not_encoded = pairs_of(latents, model.encode_key, job.split, job.limit, model.condition_role)
    evaluation, facts = _compared(job, latents, model, pairs)
    settings = SampleSettings(sampler=job.sampler, num_inference_steps=job.steps, seed=job.seed, samples=job.samples)
    sampled = sample_for_scoring(
        latents, job.run, model, pairs, evaluation.views, settings, Spread(engine, job.threads), on_progress
    )
    evaluation = replace(
        evaluation, identity=_identity(sampled.generation_key, evaluation, facts, tuned_decoder(job.vae), job.precision)
    )
    folder = job.run / "evaluation" / job.split
    looks = _log_looks(job, sampled.generation_key, len(pairs))
    work = CaseWork(latents, private, vaes.here, sampled.latent_of, evaluation, sampled.samples_of)
    cases = _scored(work, pairs, folder, ScoreSpread(engine, vaes.load, job.threads), sampled.failed, on_progress)
    refiner = evaluation.compose.refiner
    document = {
        "split": job.split,
        "window_hu": [evaluation.window.lower, evaluation.window.upper],
        "encode_key": model.encode_key,
        "checkpoint_sha256": model.checkpoint_sha256,
        "generation_key": sampled.generation_key,
        "snapshot": latents.snapshot,
        "pairs_digest": hashlib.sha256(json.dumps(sorted(p.pair_key for p in pairs)).encode()).hexdigest()[:16],
        "settings": {
            "sampling": vars(settings),
            "detail": job.detail,
            "consistency": job.consistency,
            "refiner_sha256": refiner.sha256 if refiner else "",
            "start_refiner_sha256": model.refiner_sha256,
            "change_gain": evaluation.compose.change_gain,
            "texture": evaluation.compose.texture is not None,
            "decoder_sha256": tuned_decoder(job.vae),
        },
        "not_encoded": not_encoded,
        "simulated_pairs": sum(pair.simulated for pair in pairs),
        "test_evaluations": looks,
        **facts,
    }
    return finish(folder, cases, document), folder


def _compared(
    job: EvaluationJob, latents: Any, model: Any, pairs: list[Any]
) -> tuple[EvaluationSettings, dict[str, Any]]:
    """The methods to compare, each loaded and checked before any work, and the document's facts of them."""
    from pipeline.evaluation import EvaluationSettings
    from pipeline.volume import Window

    compose = job.composing(job.run, model.checkpoint_sha256)
    encoding = latents.encoding(model.encode_key)
    features, features_facts = features_of(job.vgg19, job.device)
    network, network_facts = regression_of(latents, job.regression, job.device, pairs)
    evaluation = EvaluationSettings(
        Window.of(encoding),
        model.encode_key,
        compose,
        regression=network,
        features=features,
    )
    return evaluation, {"regression": network_facts, "perceptual": features_facts}


class _Vaes(NamedTuple):
    """The decoder of this process, or the function by which workers load their own; the other is None."""

    here: Any
    load: Any


def _vaes(job: EvaluationJob, latents: Any, encode_key: str, engine: EngineOptions) -> _Vaes:
    """Load the VAE here, before any work, unless workers of their own score."""
    from pipeline.decode import VaeSettings

    load = VaeSettings(job.vae, job.memory_gib, precision=job.precision).loader(latents.encoding(encode_key))
    return _Vaes(load(job.device), None) if engine.name == "inline" else _Vaes(None, load)


def _identity(
    generation_key: str, evaluation: EvaluationSettings, facts: dict[str, Any], tuned: str, precision: str = "auto"
) -> str:
    """Changes with anything that changes a score."""
    from pipeline.evaluation import SCORES_VERSION

    parts = [generation_key, evaluation.compose, SCORES_VERSION, facts["regression"], facts["perceptual"]]
    parts += [tuned] if tuned else []
    parts += [f"dtype {precision}"] if precision != "auto" else []
    return hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()[:16]


def _log_looks(job: EvaluationJob, generation_key: str, pairs: int) -> Any:
    """Log an evaluation of the test split in every run that takes part; returns the model's."""
    from pipeline.evaluation import log_test_use

    if job.split != "test":
        return None
    looks = log_test_use(job.run, generation_key, pairs)
    if job.regression is not None:
        log_test_use(job.regression, generation_key, pairs)
    return looks


def _scored(
    work: CaseWork,
    pairs: list[Any],
    folder: Path,
    spread: ScoreSpread,
    unsampled: dict[str, str],
    on_progress: OnProgress,
) -> list[Any]:
    """The cases of all pairs, those that could not be sampled first."""
    from pipeline.engines import Progress, dashboard_of, watched
    from pipeline.evaluation import evaluate_pairs, failed

    on_progress(JobProgress("scoring", 0, len(pairs)))
    lost = [p for p in pairs if p.pair_key in unsampled]
    cases = [failed(p.pair_key, p.category, p.patient_key, unsampled[p.pair_key]) for p in lost]
    left = [p for p in pairs if p.pair_key not in unsampled]
    scored = evaluate_pairs(work, left, folder, spread)
    dashboard = dashboard_of(spread.options)
    progress = Progress(work.store.location, work.settings.encode_key, len(left), "evaluate", dashboard)
    for case in watched(scored, progress) if left or not pairs else ():
        cases.append(case)
        on_progress(JobProgress("scoring", len(cases), len(pairs)))
    return cases


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
    """The regression network of a run, checked against the store's training split, and the facts to report of it."""
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
