"""Write the report of a run or of a store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_report(
    target: str,
    out: Path | None = None,
    *,
    split: str = "test",
    private: str | None = None,
    thumbnails: int = 12,
    runs: Sequence[Path] = (),
) -> Path:
    """Write the page of a run's evaluation, or of a store's data, in one file without network; returns its path.

    Args:
        target: A training run that was evaluated, or a store.
        out: The page; by default ``report.html`` in the target.
        split: The evaluated split of a run.
        private: Where a store's private part is, if not ``STORE/private``.
        thumbnails: Series that a store's page shows.
        runs: Evaluated runs whose certificates a store's page shows by scanner.

    Raises:
        InputError: Neither a run nor a store, or a store at a URL without ``out``.
    """
    from latentcache import InputError, LatentStore

    if (Path(target) / "run.json").is_file():
        return write_run_report(Path(target), split, out or Path(target) / "report.html")
    if not LatentStore.exists(target):
        raise InputError(
            "a folder that is neither a run nor a store",
            expected="run.json or store.json in it",
            remedy="Give the folder that `ctpipe train` or `ctpipe ingest` made.",
        )
    if "://" in target and out is None:
        raise InputError("a store at a URL", expected="a place for the page", remedy="Give --out store.html.")
    return write_dataset_report(target, private, out or Path(target) / "report.html", thumbnails, runs, split)


def write_run_report(run: Path, split: str, path: Path) -> Path:
    """Build the page from RUN/evaluation/<split>, RUN/log.jsonl and RUN/run.json."""
    from importlib.metadata import version

    from pipeline.evaluation import load_metrics, load_views
    from pipeline.report import write_report as write_page
    from pipeline.volume import Window

    folder = run / "evaluation" / split
    document = load_metrics(folder, split)
    low, high = document["window_hu"]
    window = Window((low + high) / 2, high - low)
    provenance = {
        "ctpipe": version("ctpipe"),
        "split": split,
        "evaluations of the test split": document.get("test_evaluations", "not said"),
        "regression network": document.get("regression") or "none",
        "checkpoint SHA-256": document.get("checkpoint_sha256", "none"),
        "encode key": document.get("encode_key", "none"),
        "generation key": document.get("generation_key", "none"),
        "store snapshot": document.get("snapshot", "none"),
        "sampling and composition": document.get("settings", {}),
    }
    write_page(
        path,
        title="Thick to thin: what the model adds",
        lead=lead_paragraph(document),
        document=document,
        window=window,
        views=load_views(folder, [case["key"] for case in document["by_case"]]),
        training=_log_rows(run / "log.jsonl"),
        provenance=provenance,
    )
    return path


def write_dataset_report(
    store_url: str,
    private_url: str | None,
    path: Path,
    thumbnails: int,
    runs: Sequence[Path] = (),
    split: str = "test",
) -> Path:
    """Build a store's page; without its private part it has no images.

    Args:
        runs: Evaluated runs whose certificates are shown by scanner.
        split: The evaluated split that they are taken from.

    Raises:
        InputError: A run was not evaluated on the split.
    """
    from latentcache import CtpipeError, LatentStore
    from pipeline.evaluation import load_metrics
    from pipeline.identity import PrivateStore
    from pipeline.reading import read_series
    from pipeline.report import write_store_report

    evaluated = [load_metrics(run / "evaluation" / split, split) for run in runs]
    store = LatentStore.open(store_url)
    try:
        identities = PrivateStore.open(store_url, private_url)
    except CtpipeError:
        write_store_report(path, store, None, thumbnails, evaluated)
    else:
        write_store_report(path, store, lambda key: read_series(identities.pointer(key)), thumbnails, evaluated)
    return path


def lead_paragraph(document: dict[str, Any]) -> str:
    """Return what a radiologist wants to know first, in plain words and honest about losses."""
    from pipeline.evaluation import count_of, simulated_note
    from pipeline.report import split_name

    methods = document["methods"]
    low, high = document["window_hu"]

    def psnr(name: str) -> float | None:
        value = methods.get(name, {}).get("psnr_db")
        return None if value is None else float(value)

    model, cubic, linear, ceiling = (psnr(n) for n in ("model", "cubic", "linear", "vae_ceiling"))
    consistent = psnr("cubic_consistent")
    whom = f"{count_of(document['cases'], 'pair')} of {count_of(document['patients'], 'patient')}"
    where = f"{simulated_note(document)} On {whom} of {split_name(document)},".lstrip()
    if model is None or cubic is None or linear is None:
        return f"{where} the model's output could not be compared with interpolation; see the table of cases."

    def against(other: float) -> str:
        return f"{abs(model - other):.2f} dB {'more' if model >= other else 'less'}"

    text = where
    errors = [methods[name].get("mae_hu") for name in ("model", "cubic")]
    if None not in errors:
        text += (
            f" a voxel of the generated thin slices is off by {errors[0]:.1f} HU on average, one of cubic "
            f"interpolation of the thick slices by {errors[1]:.1f} HU. The generated slices"
        )
    else:
        text += " the generated thin slices"
    text += (
        f" reach {model:.2f} dB PSNR against the true ones between {low:g} and {high:g} HU (higher is closer): "
        + (
            f"{against(consistent)} than cubic interpolation made to agree with the measured slices, as they are too; "
            if consistent is not None
            else ""
        )
        + f"{against(cubic)} than cubic and {against(linear)} than linear interpolation"
    )
    regression = psnr("regression")
    text += "." if regression is None else f", and {against(regression)} than a small network trained for as long."
    if consistent is not None:
        similar = [methods[name].get("ssim") for name in ("model", "cubic_consistent")]
        text += (
            f" That agreement alone brings cubic interpolation to {consistent:.2f} dB: "
            + (
                f"the network itself adds {model - consistent:.2f} dB"
                if model > consistent
                else "the network adds nothing"
            )
            + (f", with an SSIM of {similar[0]:.4f} against {similar[1]:.4f}." if None not in similar else ".")
        )
    if ceiling is not None:
        text += f" For comparison, the true thin slices sent through the autoencoder and back reach {ceiling:.2f} dB."
    text += _detail(methods)
    if model < max(cubic, linear):
        text += " Interpolation is better here: do not use this model for these data."
    elif regression is not None and model < regression:
        text += " By this figure the small network is better; look at sharpness and detail below before choosing."
    return text + split_warning(document)


def _detail(methods: dict[str, Any]) -> str:
    """Return how much of what is between thick slices is true; a reader must know that the rest is not."""
    own, cubic = (methods[name].get("detail_explained") for name in ("model", "cubic"))
    if own is None or cubic is None:
        return ""
    if own <= 0:
        return " None of the fine detail that it adds between the thick slices is true: read nothing into it."
    return (
        f" Of the fine detail that the thick slices cannot show it gets {own:.0%} right (cubic interpolation "
        f"{max(0.0, cubic):.0%}); the rest is missing or made up, so that no finding should rest on it alone."
    )


def split_warning(document: dict[str, Any]) -> str:
    """Return what the split means for belief in the figures."""
    split = document.get("split")
    if split == "train":
        return " The model has seen these patients: the figures say nothing about new ones."
    if split == "val":
        return " The checkpoint may have been chosen on these patients, so the figures are a little too good."
    looks = document.get("test_evaluations")
    if split != "test" or looks is None:
        return ""
    said = "once" if looks == 1 else f"{looks} times"
    return f" This split has been evaluated {said} with this run; every time stands in the run's log."


def _log_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
