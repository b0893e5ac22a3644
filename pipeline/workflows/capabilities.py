"""Formats that are read and written, and names that options take: what a caller of the program may rely on."""

from __future__ import annotations

from typing import Any


def formats() -> dict[str, Any]:
    """Return formats, transfer syntaxes and the store version that are read and written."""
    from latentcache import FORMAT_VERSION
    from pipeline.reading.codecs import LOSSY_SYNTAXES, READABLE
    from pipeline.writing import TRANSFER_SYNTAXES

    return {
        "archives": ["zip", "folder", "s3://bucket/prefix"],
        "studies": ["zip", "folder", "DICOMDIR", ".nii", ".nii.gz"],
        "transfer_syntaxes_read": [
            {"uid": uid, "name": READABLE[uid], "lossy": uid in LOSSY_SYNTAXES} for uid in sorted(READABLE)
        ],
        "transfer_syntaxes_written": {name: str(uid) for name, uid in TRANSFER_SYNTAXES.items()},
        "dicom_written": ["CT Image", "Enhanced CT Image", "Parametric Map"],
        "store_format_version": FORMAT_VERSION,
    }


def models() -> dict[str, Any]:
    """Return names that options take: models and VAEs that ship, presets of training, objectives."""
    from diffusion.config import PRESETS
    from diffusion.objectives import OBJECTIVES
    from pipeline.refiner import shipped_models

    return {
        "interpolate": [{"name": model.name, "sha256": model.sha256} for model in shipped_models()],
        "presets": sorted(PRESETS),
        "objectives": sorted(OBJECTIVES),
        "vae": ["tiny"],
    }
