"""Charts of the report as inline SVG, drawn by matplotlib without a display."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

import numpy as np

from latentcache import missing_extra

try:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise missing_extra("matplotlib", "report", "the report's pictures") from error

INK, ACCENT, QUIET = "#1f2933", "#0b6e99", "#9aa5b1"
MOST_POINTS = 400
"""Points of a training curve: as many as a screen shows, so that a long run does not fill the page."""


def bar_chart(title: str, rows: Sequence[tuple[str, float]], x_label: str) -> str:
    """Horizontal bars with their values; the axis starts below the smallest so that differences show, and says so."""
    figure = Figure(figsize=(7, 0.45 * max(1, len(rows)) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    names, values = [r[0] for r in rows], [r[1] for r in rows]
    colours = [ACCENT if "model" in name else QUIET for name in names]
    axes.barh(range(len(rows)), values, color=colours)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    if values:
        low, high = min(values), max(values)
        axes.set_xlim(low - 0.15 * max(high - low, 1), high + 0.12 * max(high - low, 1))
        axes.set_xlabel(f"{x_label}; the axis does not start at 0", color=INK)
    for i, value in enumerate(values):
        axes.text(value, i, f" {value:.2f}", va="center", fontsize=9, color=INK)
    return _svg(figure, title)


def line_chart(title: str, points: Sequence[tuple[float, float]], y_label: str) -> str:
    """One curve against the training step; long ones as the medians of ``MOST_POINTS`` stretches, and so named."""
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    if len(points) > MOST_POINTS:
        stretches = np.array_split(np.array(points, dtype=np.float64), MOST_POINTS)
        points = [(float(s[:, 0].mean()), float(np.median(s[:, 1]))) for s in stretches]
        title += f", medians of {MOST_POINTS} stretches"
    axes.plot([p[0] for p in points], [p[1] for p in points], color=ACCENT, linewidth=1.2)
    axes.set_xlabel("training step")
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    return _svg(figure, title)


def curves_chart(
    title: str, curves: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_label: str, y_label: str
) -> str:
    """Named curves on common axes; distinguished by mark and line style, not by colour alone."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    marks, styles = "osd^vxP", ("-", "--", ":", "-.")
    for i, (name, points) in enumerate(curves):
        colour = ACCENT if "model" in name else INK
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], color=colour, label=name, linewidth=1.2,
            linestyle=styles[i % 4], marker=marks[i % 7], markersize=4,
        )  # fmt: skip
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _svg(figure, title)


def dot_chart(title: str, rows: Sequence[tuple[str, Sequence[float]]], x_label: str) -> str:
    """The distribution of each row: a dot a value and a bar at the median."""
    figure = Figure(figsize=(7, 0.45 * max(1, len(rows)) + 1.1), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(rows):
        colour = ACCENT if "model" in name else INK
        axes.plot(values, [i] * len(values), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot([float(np.median(values))], [i], "|", color=colour, markersize=18)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlabel(x_label)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.25)
    return _svg(figure, title)


def histogram(title: str, values: Sequence[float], x_label: str, bins: int = 20) -> str:
    """Draw the distribution of values; whole numbers get bins that are whole numbers wide, centred on them."""
    figure = Figure(figsize=(4.8, 2.2), layout="constrained")  # a phone shows it whole: half of it would mislead
    axes = figure.add_subplot()
    low, high = min(values), max(values)
    if all(isinstance(value, int) for value in values):
        width = max(1, -(-int(high - low + 1) // bins))
        edges = np.arange(low - 0.5, high + 0.5 + width, width)
        axes.hist(values, bins=edges.tolist(), color=QUIET, edgecolor="white")
        axes.set_xlim(min(edges[0], low - 2), max(edges[-1], high + 2))
        axes.xaxis.get_major_locator().set_params(integer=True)
        return _counts(figure, title, x_label)
    # Equal values, but for rounding, have no range of their own.
    span = (low, high) if high - low > 1e-6 * max(abs(low), abs(high), 1) else (low - 0.5, high + 0.5)
    axes.hist(values, bins=bins, range=span, color=QUIET, edgecolor="white")
    return _counts(figure, title, x_label)


def _counts(figure: Figure, title: str, x_label: str) -> str:
    (axes,) = figure.axes
    axes.set_xlabel(x_label)
    axes.set_ylabel("number")
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _svg(figure, title)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element with an accessible name."""
    for axes in figure.axes:
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    # Ids repeat between figures of one page; prefix them so that clip paths and glyphs stay apart.
    prefix = re.sub(r"\W+", "", title)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{prefix}-', text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
