"""``ctpipe evaluate --protocol rplhr``: RPLHR-CT by the protocol of its authors. No separate command."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.workflows.evaluate import ScoringJob
from pipeline.workflows.job_progress import JobProgress, OnProgress, silent


@dataclass(frozen=True)
class RplhrJob(ScoringJob):
    """A user's order to score the baselines, and a run's model where one is given, on RPLHR-CT.

    Attributes:
        dataset: The folder of the download.
        out: Folder for results without a run; ``./rplhr`` by default. With a run they go into the run's.
    """

    dataset: Path
    run: Path | None = None
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """Folder for the results."""
        if self.run is not None:
            return self.run / "evaluation" / f"rplhr-{self.split}"
        return (self.out or Path("rplhr")) / self.split

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of the sampler, as the model takes them."""
        return {
            "sampler": self.sampler,
            "num_inference_steps": self.steps,
            "samples": self.samples,
            "seed": self.seed,
        }


def evaluate_rplhr(job: RplhrJob, on_progress: OnProgress = silent) -> tuple[dict[str, Any], Path]:
    """RPLHR-CT by the protocol of its authors: the baselines, and the run's model where one is given.

    The model's output is refined as ``ctpipe interpolate`` refines it: by the run's own refiner, another, or none.

    Returns:
        The document, and the folder of the results.
    """
    from latentcache import InputError
    from pipeline.evaluation import evaluate_dataset, find_cases, finish, log_test_use

    facts: dict[str, Any] = {"protocol": "rplhr", "split": job.split, "window_hu": [-1024.0, 2048.0]}
    networks: dict[str, Any] = {}
    if job.regression is not None:
        found = _volume_regression(job.regression, job.consistency, job.device)
        networks["regression"], facts["regression"] = found
    if job.run is not None:
        networks["model"], facts["checkpoint_sha256"], refined_by = _volume_model(job, job.run)
        facts["settings"] = {
            "sampling": job.sampling,
            "detail": job.detail,
            "consistency": job.consistency,
            "refiner_sha256": refined_by,
        }
    elif job.refiner is not None and str(job.refiner) != "none":
        raise InputError(
            "--refiner without a run",
            expected="a run whose output it corrects",
            remedy="Name the training run: ctpipe evaluate RPLHR-CT RUN --protocol rplhr --refiner REFINER_RUN.",
        )
    identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    for folder_of in (job.run, job.regression):
        if job.split == "test" and folder_of is not None:
            looks = log_test_use(folder_of, "rplhr", len(find_cases(job.dataset, job.split)[: job.limit]))
            facts["test_evaluations"] = looks if folder_of == job.run else facts.get("test_evaluations")
    cases = []
    for case, total in evaluate_dataset(job.dataset, job.split, job.folder, identity, networks, job.limit):
        cases.append(case)
        on_progress(JobProgress("scoring", len(cases), total))
    return finish(job.folder, cases, facts), job.folder


def _volume_model(job: RplhrJob, run: Path) -> tuple[Any, str, str]:
    """The run's model as a function of a thick volume and a thin grid, composed as ``ctpipe interpolate`` does.

    The SHA-256 of its checkpoint, and of the refiner ("" for none).
    """
    import numpy as np

    from diffusion.sampling import Interpolator
    from latentcache import LatentGrid
    from pipeline.decode import compose, textured
    from pipeline.metrics import require_finite
    from pipeline.vae import load_decoder
    from pipeline.volume import Window
    from pipeline.workflows.interpolation import condition_latent, encoding_of, told_of

    model = Interpolator.load(run, device=job.device)
    encoding = encoding_of(model)
    codec = load_decoder(
        job.device, spec=job.vae, encoding=encoding, precision=job.precision, memory_gib=job.memory_gib
    )
    window = Window.of(encoding)
    composing = job.composing(run, model.checkpoint_sha256)

    def generate(thick: Any, thin: Any) -> Any:
        padding = encoding.pad_multiple_zyx
        condition = condition_latent(thick, thin, window, codec, model.alignment, padding, composing.start)
        latent = model.generate_latent(condition, **told_of(thick, LatentGrid.of(thin).positions()), **job.sampling)
        seen = condition
        if model.condition_role == "thick" and composing.detail == "residual":
            seen = condition_latent(thick, thin, window, codec, "pixel", padding)

        def decoded(z: Any) -> Any:
            return window.from_unit(np.asarray(codec.decode(np.asarray(z, dtype=np.float32), thin.shape_zyx)))

        generated = require_finite(decoded(latent), "the decoded model output")
        measured = composing.measured(thick, thin)
        hu, figures = compose(generated, window, measured, composing, condition_hu=decoded(seen))
        return textured(hu, figures, measured, composing)[0]

    return generate, model.checkpoint_sha256, composing.refiner.sha256 if composing.refiner else ""


def _volume_regression(run: Path, consistency: bool, device: str) -> tuple[Any, dict[str, Any]]:
    """A regression run as a function of a thick volume and a thin grid."""
    from pipeline.decode import ComposeSettings, compose
    from pipeline.refiner import RefinerFile, regression_facts
    from pipeline.volume import Window, interpolated

    file = RefinerFile.of(run, device)
    facts = regression_facts(file)
    window = Window(*file.load()[1].window)
    how = ComposeSettings("absolute", consistency, refiner=file)

    def generate(thick: Any, thin: Any) -> Any:
        return compose(interpolated(thick, thin, how.base_method), window, how.measured(thick, thin), how)[0]

    return generate, facts
