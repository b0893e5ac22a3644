"""The order to interpolate, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling; None leaves a choice to its objective.

    Attributes:
        samples: Samples whose mean is the output.
    """

    sampler: str | None = None
    steps: int | None = None
    samples: int = 1
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``Interpolator.generate``."""
        return {"sampler": self.sampler, "num_inference_steps": self.steps, "seed": self.seed}


@dataclass(frozen=True)
class InterpolateJob:
    """A thick study to a thin DICOM series.

    Attributes:
        source: A zip, folder, DICOMDIR or NIfTI file that holds a thick CT series.
        out: Folder to write into; the series gets a folder named by its key.
        model: Name or path of a model that ships or is like one, or a training run's folder; None for the default one.
        spacing_mm: Slice spacing wanted.
        trained_spacing_mm: Spacing that the model learnt; by default the run's own, else 1.
        vae: The VAE that the run was trained with: ``tiny`` or a path. This, ``sampling``, ``uncertainty``,
            ``uncertainty_map``, ``detail``, ``refiner`` and ``memory_gib`` concern a training run alone.
        detail: ``absolute`` or ``residual``: how decoded slices become HU.
        fwhm_mm: Measured width of the slice profile; by default the thickness.
        refiner: A run of ``ctpipe train-refiner``, ``none``, or None for the model's own.
        restore_identity: Keep the patient's identity, for use inside the hospital.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        memory_gib: Memory budget of the VAE.
        precision: Arithmetic of a training run's VAE: ``auto``, ``fp32`` or ``bf16``.
        private: Where the secret of the pseudonyms is kept; by default ``out``.
        answer: ``mean`` of the samples for viewing, one ``sample`` for measuring, or ``both``.
        page: Write a page for people beside the series.
        alarm_map: Where the written sample differs from the others, as a Parametric Map.
        texture: Whether a draw gets the texture of true thin slices; None where the answer is a sample.
    """

    source: str
    out: Path
    model: str | Path | None = None
    spacing_mm: float = 1.0
    trained_spacing_mm: float | None = None
    vae: str = "tiny"
    sampling: Sampling = field(default_factory=Sampling)
    uncertainty: bool = False
    uncertainty_map: bool = False
    detail: str = "residual"
    consistency: bool = True
    fwhm_mm: float | None = None
    refiner: Path | None = None
    transfer_syntax: str = "explicit"
    enhanced: bool = False
    restore_identity: bool = False
    device: str = "auto"
    memory_gib: float | None = None
    private: Path | None = None
    answer: str = "mean"
    page: bool = True
    alarm_map: bool = False
    texture: bool | None = None
    precision: str = "auto"


@dataclass(frozen=True)
class Interpolated:
    """A thin series that was written.

    Attributes:
        folder: Where its slices are.
        folders: The same, and that of the spread over samples where there is one.
        warnings: What speaks against trusting it, each with what to do.
        page: The page for people, where one was written.
        figures: RMS against the measured slices in HU before and after, and whatever else was measured.
    """

    key: str
    folder: Path
    folders: tuple[str, ...]
    series_uid: str
    slices: int
    source_slices: int
    spacing_mm: float
    seconds: float
    estimated_seconds: float
    figures: dict[str, Any]
    model: str = ""
    warnings: tuple[str, ...] = ()
    page: Path | None = None
