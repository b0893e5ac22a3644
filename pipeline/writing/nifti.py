"""Write a volume in HU as NIfTI, laid out as its source was, with its provenance as JSON beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from latentcache import InputError
from latentcache.storage import atomic_folder, refuse_existing, sync_file
from pipeline.volume import Geometry, NiftiLayout
from pipeline.writing.provenance import Provenance

_SCANNER = 1
"""NIFTI_XFORM_SCANNER_ANAT: coordinates of the scanner."""
_DESCRIPTION_MAX = 79


def write_nifti(
    volumes: dict[str, NDArray[Any]], geometry: Geometry, layout: NiftiLayout, out_dir: Path, provenance: Provenance
) -> tuple[Path, ...]:
    """Write volumes (z, y, x) by name into a new folder, which appears whole or not at all; returns their paths.

    Args:
        volumes: ``thin`` say; int16 HU, or float32.
        out_dir: Folder to make; it must not exist.

    Raises:
        InputError: nibabel is not installed, or ``out_dir`` exists.
    """
    try:
        import nibabel
    except ImportError:
        raise InputError(
            "nibabel is not installed", expected="it, to write NIfTI", remedy="Install ctpipe[nifti]."
        ) from None
    refuse_existing(out_dir)
    affine = layout.affine_ras(geometry)
    with atomic_folder(out_dir) as partial:
        for name, volume in volumes.items():
            image = nibabel.Nifti1Image(layout.from_zyx(volume), affine)
            image.header.set_xyzt_units("mm")
            image.set_sform(affine, _SCANNER)
            image.set_qform(affine, _SCANNER, strip_shears=True)
            image.header["descrip"] = provenance.summary().encode()[:_DESCRIPTION_MAX]
            path = partial / f"{name}{layout.suffix}"
            nibabel.save(image, path)
            sync_file(path)
        sidecar = partial / "provenance.json"
        sidecar.write_text(
            json.dumps({"SyntheticData": "YES", **json.loads(provenance.to_json())}, indent=1), encoding="utf-8"
        )
        sync_file(sidecar)
    return tuple(out_dir / f"{name}{layout.suffix}" for name in volumes)
