"""The report of a store: what was ingested and excluded, geometry, latents and thumbnails, in one offline page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import CtpipeError, LatentStore
from latentcache.maintenance import summarise
from pipeline.report.certificates import certificate_section, judged_cases
from pipeline.report.charts import histogram
from pipeline.report.images import data_url
from pipeline.report.page import write_page
from pipeline.report.tables import table
from pipeline.volume import Volume, Window

SIDE = 160
"""Pixels of a thumbnail's longer side."""
MOST_ROWS = 40
SAMPLED_LATENTS = 16


ReadSeries = Callable[[str], Volume]


def write_store_report(
    path: Path,
    store: LatentStore,
    read: ReadSeries | None,
    thumbnails: int = 12,
    evaluated: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the page, whole or not at all.

    Args:
        read: Gives a series by key for its thumbnail; None where the private part is out of reach.
        thumbnails: Thin series shown, the first by key.
        evaluated: Evaluations of runs on this store, whose certificates are shown by scanner.
    """
    columns = ("series_key", "role", "status", "reason", "category", "split", "kernel", "flags", "n_slices",
               "spacing_mm_zyx", "patient_key")  # fmt: skip
    rows = [r for r in store.catalog_table(columns).to_pylist() if "superseded" not in (r["flags"] or ())]
    pairs = store.pairs_table(("status", "reason", "category", "split", "patient_key")).to_pylist()
    page = resources.files("pipeline.report").joinpath("templates/store_page.html").read_text(encoding="utf-8")
    fields = {
        "TITLE": "What is in this store",
        "LEAD": html.escape(lead(rows, pairs)),
        "FOUND": _found(rows, pairs),
        "ASIDE": _aside(rows, pairs),
        "GEOMETRY": _geometry(rows),
        "LATENTS": _latents(store),
        "CERTIFICATES": _certificates(evaluated),
        "THUMBNAILS": _thumbnails(rows, read, thumbnails),
    }
    write_page(path, page, fields)


def lead(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> str:
    """The state of the data in plain words."""
    good = [p for p in pairs if p["status"] == "ok"]
    aside = sum(r["status"] != "ok" for r in rows)
    splits = Counter(p["split"] or "no split" for p in good)
    parts = ", ".join(f"{n} {name}" for name, n in sorted(splits.items()))
    text = (
        f"{len({r['patient_key'] for r in rows})} patients, {len(rows)} series, {len(good)} usable thick/thin pairs"
        + (f" ({parts})." if parts else ".")
    )
    if aside or len(good) < len(pairs):
        text += f" {aside} series and {len(pairs) - len(good)} pairs were set aside; the reasons are below."
    return text if good else text + " Nothing can be trained on this store yet."


def _counted(head: Sequence[str], counts: Counter[Any], caption: str) -> str:
    rows = [[*key, str(n)] for key, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_ROWS]]
    return table([*head, "Number"], rows, caption)


def _found(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> str:
    series = Counter((r["role"], r["status"], r["category"]) for r in rows)
    by_split = Counter((p["split"] or "none", p["category"], p["status"]) for p in pairs)
    return _counted(["Role", "Status", "Category"], series, "Series") + _counted(
        ["Split", "Category", "Status"], by_split, "Pairs"
    )


def _aside(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]]) -> str:
    series = Counter((r["reason"],) for r in rows if r["status"] != "ok")
    refused = Counter((p["reason"],) for p in pairs if p["status"] != "ok")
    flags = Counter((flag,) for r in rows for flag in r["flags"] or ())
    out = _counted(["Reason"], series, "Series set aside") if series else "<p>No series was set aside.</p>"
    out += _counted(["Reason"], refused, "Pairs refused by their pixels") if refused else "<p>No pair was refused.</p>"
    return out + (_counted(["Flag"], flags, "What the reader remarked") if flags else "")


def _geometry(rows: Sequence[dict[str, Any]]) -> str:
    out = ""
    used = [r for r in rows if r["status"] == "ok" and r["role"] in ("thick", "thin")]
    for role in ("thick", "thin"):
        chosen = [r for r in used if r["role"] == role]
        if not chosen:
            continue
        for title, values, unit in (
            (f"Spacing between slices, {role} series", [r["spacing_mm_zyx"][0] for r in chosen], "mm"),
            (f"Number of slices, {role} series", [r["n_slices"] for r in chosen], "slices"),
        ):
            out += f"<figure class=chart>{histogram(title, values, unit)}</figure>"
    out = f"<div class=charts>{out}</div>"
    kernels = Counter((r["kernel"] or "not stated", r["role"]) for r in used)
    caption = "Reconstruction kernels" + (
        ". One that begins with # has a name that is on no list of known kernels, and could name a person"
        if any(name.startswith("#") for name, _ in kernels)
        else ""
    )
    return out + _counted(["Kernel", "Role"], kernels, caption)


def _latents(store: LatentStore) -> str:
    manifest = store.manifest_table(("encode_key", "role", "round_trip_psnr")).to_pylist()
    if not manifest:
        return "<p>Nothing has been encoded yet.</p>"
    out = ""
    for key, role in sorted({(m["encode_key"], m["role"]) for m in manifest}):
        found = summarise(store, key, role, SAMPLED_LATENTS)
        rows = [
            [f"channel {c}", f"{mean:+.4f}", f"{std:.4f}", *(f"{v:+.2f}" for v in found.correlation[c])]
            for c, (mean, std) in enumerate(zip(found.moments.mean, found.moments.std, strict=True))
        ]
        head = ["Channel", "Mean", "Standard deviation", *(f"corr. {c}" for c in range(len(rows)))]
        out += table(head, rows, f"{role} latents under {key}: {found.latents}, correlations from {found.sampled}")
    ceilings = [m["round_trip_psnr"] for m in manifest if m["round_trip_psnr"] is not None]
    if ceilings:
        title = "VAE round trip in the window: the ceiling of any model on these latents"
        out += f"<figure class=chart>{histogram(title, ceilings, 'PSNR (dB)')}</figure>"
    else:
        out += "<p>No round trip was measured.</p>"
    return out


def _certificates(evaluated: Sequence[Mapping[str, Any]]) -> str:
    judged = [one for document in evaluated for one in judged_cases(document)]
    return certificate_section(judged) or "<p>No evaluated run was named, so no generated series is judged here.</p>"


def _thumbnails(rows: Sequence[dict[str, Any]], read: ReadSeries | None, count: int) -> str:
    if read is None:
        return "<p>The private part of the store is out of reach, so no images can be shown.</p>"
    chosen = sorted((r for r in rows if r["role"] == "thin" and r["status"] == "ok"), key=lambda r: r["series_key"])
    out = ""
    for row in chosen[:count]:
        key = html.escape(row["series_key"])
        try:
            volume = read(row["series_key"])
        except CtpipeError as error:
            out += f"<figure><figcaption>{key}: {html.escape(str(error))}</figcaption></figure>"
            continue
        dz, dy, dx = volume.geometry.spacing_mm_zyx
        depth, height, _ = volume.hu.shape
        axial = data_url(_grey(volume.hu[depth // 2], dy, dx))
        coronal = data_url(_grey(volume.hu[::-1, height // 2], dz, dx))
        out += (
            f'<figure><img src="{axial}" alt="Middle axial slice of {key}"><img src="{coronal}" '
            f'alt="Middle coronal slice of {key}"><figcaption>{key}, {html.escape(row["category"])}, {depth} slices'
            "</figcaption></figure>"
        )
    return f"<div class=thumbs>{out}</div>" if out else "<p>No usable thin series.</p>"


def _grey(hu: NDArray[Any], row_mm: float, column_mm: float) -> NDArray[np.uint8]:
    """A slice in the soft-tissue window at square pixels, by nearest neighbour."""
    rows_mm, columns_mm = hu.shape[0] * row_mm, hu.shape[1] * column_mm
    scale = SIDE / max(rows_mm, columns_mm)
    height, width = (max(1, round(mm * scale)) for mm in (rows_mm, columns_mm))
    picked = hu[np.arange(height) * hu.shape[0] // height][:, np.arange(width) * hu.shape[1] // width]
    return np.asarray(((Window().to_unit(picked) + 1) * 127.5).astype(np.uint8))
