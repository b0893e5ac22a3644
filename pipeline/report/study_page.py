"""The page beside an interpolated study: before and after, what to trust and what not; one offline file."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.images import data_url
from pipeline.report.page import write_page
from pipeline.volume import Geometry, Volume, Window

WINDOWS = {"soft tissue": Window(40, 400), "lung": Window(-600, 1500), "bone": Window(500, 2000)}
WIDEST = 640
"""Pixels of the longer side of a picture."""
TRUST = (
    "Positions, extent and HU of the thick slices: re-averaging the thin slices gives them back to within the residual "
    "stated here.",
    "Organs, vessels and bones that span several thick slices, and measurements of mean HU in them.",
)
DISTRUST = (
    "Anything smaller than a thick slice along z: a nodule, a fracture line or a plaque may be missing or misplaced, "
    "and nothing here proves that it is not there.",
    "Texture and noise: what is shown is a mean, smoother than a scan; densitometry and radiomics belong to the "
    "source.",
    "The first and the last thick slice, beyond which nothing was measured.",
)


@dataclass(frozen=True)
class StudyPage:
    """Content of the page.

    Attributes:
        thick: The measured series.
        thin: (z, y, x) HU at ``target``.
        model: Name of the model; ``card`` is its card.
        figures: Agreement with the measured slices, as ``pipeline.decode`` gives it.
        warnings: What speaks against trusting it.
    """

    thick: Volume
    thin: NDArray[np.int16]
    target: Geometry
    model: str
    card: Mapping[str, Any]
    figures: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def write_study_page(path: Path, study: StudyPage) -> None:
    """Write the page, whole or not at all."""
    template = resources.files("pipeline.report").joinpath("templates/study_page.html").read_text(encoding="utf-8")
    geometry, count = study.thick.geometry, len(study.thin)
    lead = (
        f"{len(study.thick.hu)} slices every {geometry.spacing_mm_zyx[0]:.3g} mm became {count} every "
        f"{study.target.spacing_mm_zyx[0]:.3g} mm, predicted by the model {study.model}."
    )
    fields = {
        "LEAD": html.escape(lead),
        "WARNINGS": _warnings(study.warnings),
        "CHOICES": "".join(_choice(name, number) for number, name in enumerate(WINDOWS)),
        "FIGURES": "\n".join(_compared(*view, number) for number, view in enumerate(_views(study))),
        "TRUST": _items(TRUST),
        "DISTRUST": _items(DISTRUST),
        "FACTS": "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _facts(study)),
    }
    write_page(path, template, fields)


def _facts(study: StudyPage) -> Iterator[tuple[str, str]]:
    figures = study.figures
    if figures.get("rms_after_hu") is not None:
        yield (
            "Agreement with the measured slices",
            (
                f"{figures['rms_after_hu']:.1f} HU RMS (before correction {figures['rms_before_hu']:.1f}; noise "
                f"allowed {figures['noise_hu']:.1f})"
            ),
        )
    if figures.get("certificate"):
        yield "Certificate", str(figures["certificate"].get("said", ""))
    if figures.get("profile"):
        yield "Slice profile assumed", str(figures["profile"])
    yield "Model", f"{study.model}, weights {str(figures.get('refiner_sha256', ''))[:12]}"
    known = study.card.get("trained_for", {})
    names = {"thickness_mm": "slice thickness", "spacing_mm": "slice spacing", "thin_spacing_mm": "thin spacing"}
    ranges = [f"{name} {known[key][0]:.3g} to {known[key][1]:.3g} mm" for key, name in names.items() if key in known]
    if ranges:
        yield "Trained for", "; ".join(ranges)


def _warnings(warnings: tuple[str, ...]) -> str:
    if not warnings:
        return ""
    return f'<section class="warn" role="note"><h2>Read this first</h2><ul>{_items(warnings)}</ul></section>'


def _items(texts: tuple[str, ...]) -> str:
    return "".join(f"<li>{html.escape(text[:1].upper() + text[1:])}</li>" for text in texts)


def _choice(name: str, number: int) -> str:
    checked = " checked" if number == 0 else ""
    return f'<label><input type="radio" name="window" value="{number}"{checked}> {name}</label>'


def _views(study: StudyPage) -> Iterator[tuple[str, NDArray[Any], NDArray[Any], float]]:
    """(name, before, after, millimetres of a row over those of a column); the head is at the top."""
    thick, thin, target = study.thick.hu, study.thin, study.target
    held = _held(np.asarray(study.thick.geometry.z_mm), np.asarray(target.z_mm))
    dz, dy, dx = target.spacing_mm_zyx
    row, column = thin.shape[1] // 2, thin.shape[2] // 2
    yield "Coronal", thick[held, row][::-1], thin[::-1, row], dz / dx
    yield "Sagittal", thick[held, :, column][::-1], thin[::-1, :, column], dz / dy
    between = np.mean(study.thick.geometry.z_mm[len(thick) // 2 - 1 :][:2])
    middle = int(np.argmin(np.abs(np.asarray(target.z_mm) - between)))
    yield "Axial, halfway between two thick slices", thick[held[middle]], thin[middle], dy / dx


def _held(thick_z: NDArray[Any], thin_z: NDArray[Any]) -> NDArray[np.int64]:
    """The thick slice nearest to each thin one, which is what a workstation shows."""
    return np.asarray(np.abs(thin_z[:, None] - thick_z[None, :]).argmin(axis=1), np.int64)


def _compared(name: str, before: NDArray[Any], after: NDArray[Any], aspect: float, number: int) -> str:
    """A figure of two pictures, one over the other, in every window."""
    height, width = _size(before.shape, aspect)
    shown = (("after", "thin slices", after, True), ("before", "thick slices", before, False))
    ends = '<p class="ends"><span>thick, as scanned</span><span>thin, predicted</span></p>'
    parts = []
    for which, window in enumerate(WINDOWS.values()):
        hidden = "" if which == 0 else " hidden"
        pair = "".join(
            f'<img class="{kind}" alt="{name}, {text}" width="{width}" height="{height}" '
            f'src="{_picture(hu, window, (width, height), smooth)}">'
            for kind, text, hu, smooth in shown
        )
        parts.append(f'<div class="pair" data-window="{which}"{hidden}>{pair}</div>')
    slider = f'<input type="range" min="0" max="100" value="50" aria-label="{name}: share that shows the thick slices">'
    return (
        f'<figure id="view{number}" style="max-width:{width}px"><figcaption>{name}</figcaption><div class="stage">'
        f"{''.join(parts)}</div>{slider}{ends}</figure>"
    )


def _size(shape: tuple[int, ...], aspect: float) -> tuple[int, int]:
    """Height and width with square pixels, the longer WIDEST."""
    height, width = shape[0] * aspect, float(shape[1])
    scale = WIDEST / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _picture(hu: NDArray[Any], window: Window, size: tuple[int, int], smooth: bool) -> str:
    grey = (np.clip((hu.astype(np.float32) - window.lower) / window.width, 0, 1) * 255).astype(np.uint8)
    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    return data_url(np.asarray(Image.fromarray(grey).resize(size, way)), 88)
