"""Thin out every study of a folder, one after the other; run it again to go on where it stopped.

    python infra/examples/thin_out_a_folder.py STUDIES OUT

A study that cannot be used is named with its reason, and the others go on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ctpipe import InputError, interpolate_study


def main(studies: Path, out: Path, **options: Any) -> int:
    """Return the number of studies that could not be used."""
    failed = 0
    for study in sorted(path for path in studies.iterdir() if path.is_dir() or path.suffix == ".zip"):
        target = out / study.stem
        if any(target.glob("*/*.dcm")):  # a series' folder is whole or absent
            print(f"{study.name}: there already")
            continue
        try:
            done = interpolate_study(study, target, **options)
        except InputError as error:
            failed += 1
            print(f"{study.name}: {error}")
            continue
        print(f"{study.name}: {done.source_slices} -> {done.slices} slices, RMS {done.figures['rms_after_hu']:.1f} HU")
    return failed


if __name__ == "__main__":
    sys.exit(3 if main(Path(sys.argv[1]), Path(sys.argv[2])) else 0)
