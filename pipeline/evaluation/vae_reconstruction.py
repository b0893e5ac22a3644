"""Loss of the VAE alone: genuine series encoded and decoded, window by window. It bounds every model."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from latentcache import InputError, SeriesRecord, missing_extra
from pipeline.metrics import TISSUE_CLASSES_HU, bias_by_tissue, mean_absolute_error, psnr, ssim
from pipeline.vae import Autoencoder
from pipeline.volume import Window


@dataclass(frozen=True)
class Score:
    """One series under one window, against the series clipped to that window.

    Attributes:
        psnr_db: Over the window's width.
        ssim: Mean 2-D index of the slices, over the window's width.
        bias_hu: Mean signed error by tissue class; only classes that the window does not clip.
    """

    series_key: str
    window: str
    psnr_db: float
    ssim: float
    mae_hu: float
    bias_hu: dict[str, float]


def round_trip(vae: Autoencoder, hu: NDArray[Any], window: Window) -> NDArray[np.float32]:
    """HU (z, y, x) through the window, the VAE's posterior mean as stored (float16), and back to HU."""
    unit = window.to_unit(hu)
    latent = vae.encode(unit).to(torch.float16)
    depth, height, width = hu.shape
    return window.from_unit(vae.decode(latent.float(), (depth, height, width)).numpy())


def score(vae: Autoencoder, hu: NDArray[Any], name: str, series_key: str = "") -> Score:
    """Measure one volume (z, y, x) in HU under the window ``name`` (a known one, or C:W)."""
    window = Window.parse(name)
    decoded = round_trip(vae, hu, window)
    truth = np.clip(hu, window.lower, window.upper).astype(np.float32)
    bias = {k: v["bias_hu"] for k, v in bias_by_tissue(decoded, truth).items() if k in unclipped_classes(window)}
    return Score(
        series_key,
        name,
        psnr(decoded, truth, data_range=window.width),
        ssim(decoded, truth, data_range=window.width),
        mean_absolute_error(decoded, truth),
        bias,
    )


def unclipped_classes(window: Window) -> set[str]:
    """Tissue classes inside a window; bone, whose class is open above, counts if the window reaches 1000 HU."""
    return {
        name
        for name, (low, high) in TISSUE_CLASSES_HU.items()
        if low >= window.lower and min(high, 1000.0) <= window.upper
    }


def sample_series(series: Iterable[SeriesRecord], count: int, seed: int = 0) -> list[SeriesRecord]:
    """At most ``count`` usable series, the same ones every time, from as many patients as there are.

    Raises:
        InputError: The catalog has no usable series.
    """
    usable = sorted((s for s in series if s.status == "ok"), key=lambda s: s.series_key)
    if not usable:
        raise InputError("no usable series", expected="at least one", remedy="Run `ctpipe ingest` first.")
    random.Random(seed).shuffle(usable)
    seen: dict[str, int] = {}
    rank = {}
    for one in usable:
        rank[one.series_key] = seen[one.patient_key] = seen.get(one.patient_key, 0) + 1
    return sorted(usable, key=lambda s: rank[s.series_key])[:count]


def check(
    vae: Autoencoder,
    series: Sequence[SeriesRecord],
    read: Callable[[str], NDArray[Any]],
    windows: Sequence[str],
    on_score: Callable[[Score], None] = lambda _: None,
) -> list[Score]:
    """Score every series under every window; ``read`` gives a series key's HU (z, y, x)."""
    scores = []
    for one in series:
        hu = read(one.series_key)
        for name in windows:
            scores.append(score(vae, hu, name, one.series_key))
            on_score(scores[-1])
    return scores


def summarise(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return one row per window: means over the series, and the sentence that says what they mean."""
    rows = []
    for name in dict.fromkeys(s.window for s in scores):
        chosen = [s for s in scores if s.window == name]
        window = Window.parse(name)
        classes = [c for c in TISSUE_CLASSES_HU if any(c in s.bias_hu for s in chosen)]
        mean_psnr = float(np.mean([s.psnr_db for s in chosen]))
        row = {
            "window": name,
            "series": len(chosen),
            "psnr_db": mean_psnr,
            "psnr_db_lowest": min(s.psnr_db for s in chosen),
            "ssim": float(np.mean([s.ssim for s in chosen])),
            "mae_hu": float(np.mean([s.mae_hu for s in chosen])),
            "bias_hu": {c: float(np.mean([s.bias_hu[c] for s in chosen if c in s.bias_hu])) for c in classes},
        }
        rmse = window.width * 10 ** (-mean_psnr / 20)
        row["meaning"] = (
            f"Under {name} ({window.lower:.0f} to {window.upper:.0f} HU) the VAE alone leaves an error of about "
            f"{rmse:.1f} HU, {mean_psnr:.1f} dB: no model on these latents should be expected to do better."
        )
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary for people."""
    head = f"{'window':<14}{'series':>7}{'PSNR dB':>9}{'lowest':>8}{'SSIM':>7}{'MAE HU':>8}  bias HU by tissue"
    lines = [head]
    for row in rows:
        bias = ", ".join(f"{name} {value:+.1f}" for name, value in row["bias_hu"].items()) or "no unclipped tissue"
        lines.append(
            f"{row['window']:<14}{row['series']:>7}{row['psnr_db']:>9.2f}{row['psnr_db_lowest']:>8.2f}"
            f"{row['ssim']:>7.3f}{row['mae_hu']:>8.1f}  {bias}"
        )
    return "\n".join([*lines, "", *(row["meaning"] for row in rows)])


def plot(scores: Sequence[Score], path: Path) -> None:
    """PSNR of every series and mean bias of every tissue, by window, as a picture."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("matplotlib", "report", "the picture of vae-check") from error

    rows = summarise(scores)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for i, row in enumerate(rows):
        values = [s.psnr_db for s in scores if s.window == row["window"]]
        left.scatter([i] * len(values), values, color="tab:blue", alpha=0.6)
        left.hlines(row["psnr_db"], i - 0.25, i + 0.25, color="black")
    left.set_xticks(range(len(rows)), [row["window"] for row in rows])
    left.set_ylabel("round-trip PSNR (dB over the window)")
    left.margins(x=0.2)
    classes = [c for c in TISSUE_CLASSES_HU if any(c in row["bias_hu"] for row in rows)]
    for i, row in enumerate(rows):
        known = [(j, row["bias_hu"][c]) for j, c in enumerate(classes) if c in row["bias_hu"]]
        offset = (i - (len(rows) - 1) / 2) * 0.25
        right.bar([j + offset for j, _ in known], [v for _, v in known], width=0.22, label=row["window"])
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xticks(range(len(classes)), classes)
    right.set_ylabel("mean signed error (HU)")
    if classes:
        right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def as_dict(scores: Sequence[Score]) -> dict[str, Any]:
    """JSON-able: the summary and every score."""
    return {"windows": summarise(scores), "scores": [asdict(s) for s in scores]}
