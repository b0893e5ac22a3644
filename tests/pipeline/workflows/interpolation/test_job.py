"""What a job asks for where nothing is said."""

from __future__ import annotations

from pathlib import Path

from pipeline.workflows import InterpolateJob, Sampling


def test_a_job_needs_a_source_and_a_place_only() -> None:
    job = InterpolateJob("thick.zip", Path("out"))
    assert job.model is None
    assert (job.device, job.consistency, job.page, job.spacing_mm) == ("auto", True, True, 1.0)


def test_sampling_spells_what_the_model_takes() -> None:
    assert Sampling("ddim", 20, 4, 7).options == {"sampler": "ddim", "num_inference_steps": 20, "seed": 7}
