"""Certificates of a report: mean(A x - y) by tissue, gathered by scanner, with every series that fails or lacks one.

A mean over series can hide one that is displaced. So the largest shift is given beside the mean, and what fails or
could not be judged is listed by key.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.report.tables import table

TISSUES = ("lung", "fat", "soft_tissue")
UNKNOWN_SCANNER = "not stated"

Judged = tuple[str, str, Mapping[str, Any]]
"""The key of a pair or series, its scanner, and its certificate's figures; an empty mapping where there is none."""


def judged_cases(document: Mapping[str, Any]) -> list[Judged]:
    """The certificates of an evaluation's model outputs, in the order of its cases."""
    found = []
    for case in document.get("by_case", ()):
        figures = case.get("consistency") or {}
        scanner = str(figures.get("scanner") or UNKNOWN_SCANNER)
        found.append((str(case["key"]), scanner, figures.get("certificate") or {}))
    return found


def certificate_section(judged: Sequence[Judged]) -> str:
    """The table by scanner and the list of what fails or was not judged; empty where no series has a certificate."""
    if not any(figures for _, _, figures in judged):
        return ""
    scanners = sorted({scanner for _, scanner, _ in judged})
    rows = [_row(scanner, [figures for _, name, figures in judged if name == scanner]) for scanner in scanners]
    head = ["Scanner", "Series", *(f"{tissue.replace('_', ' ')}: mean (largest), HU" for tissue in TISSUES), "Failing",
            "Not wholly judged"]  # fmt: skip
    caption = (
        "Certificate of the generated series: mean of A x - y in eroded lung, fat and soft tissue, which needs no thin "
        "series. A shift of more than 1 HU fails"
    )
    return table(head, rows, caption) + _exceptions(judged)


def _row(scanner: str, figures: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [scanner, str(len(figures))]
    for tissue in TISSUES:
        shifts = [float(one["shift_hu"][tissue]) for one in figures if tissue in one.get("shift_hu", {})]
        cells.append(f"{np.mean(shifts):+.2f} ({max(shifts, key=abs):+.2f})" if shifts else "not judged")
    failing = sum(bool(one.get("failing")) for one in figures)
    return [*cells, str(failing), str(sum(not one or bool(one.get("missing")) for one in figures))]


def _exceptions(judged: Sequence[Judged]) -> str:
    lines = []
    for key, scanner, figures in judged:
        if not figures:
            lines.append(f"{key} ({scanner}): no certificate, because nothing was generated")
        elif figures.get("failing") or figures.get("missing"):
            lines.append(f"{key} ({scanner}): {figures['said']}")
    return "<ul class=note>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>" if lines else ""
