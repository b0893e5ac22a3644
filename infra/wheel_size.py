"""What `pip install ctpipe` costs: the wheel in a new environment, its size by package, seconds, and what works there.

    python infra/wheel_size.py [--extras dask,report] [--wheel dist/ctpipe-....whl]

Prints a table and, as its last line, one JSON object. The environment is made, measured and removed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="comma-separated extras; by default none")
    parser.add_argument("--wheel", type=Path, help="a wheel; built from this tree by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        wheel = options.wheel or build(place / "dist")
        print(json.dumps(measure(wheel, options.extras, place / "venv")))


def build(out: Path) -> Path:
    """Build the wheel of this tree."""
    subprocess.run([sys.executable, "-m", "build", "-q", "--wheel", "--outdir", str(out), str(ROOT)], check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def measure(wheel: Path, extras: str, place: Path) -> dict[str, object]:
    """Install a wheel into a new environment and try the interpolation's help there."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    site = Path(_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]))
    before = sizes(site)
    wanted = f"{wheel.resolve()}[{extras}]" if extras else str(wheel.resolve())
    began = time.monotonic()
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, wanted], check=True)
    seconds = time.monotonic() - began
    found = {name: size - before.get(name, 0) for name, size in sizes(site).items()}
    for name, size in sorted(found.items(), key=lambda item: -item[1])[:SHOWN]:
        print(f"{name:<28}{size / 2**20:9.1f} MiB")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    program = place / "bin" / "ctpipe"
    help_text = _output([program, "interpolate", "--help"], cwd=place, env=environment)
    works = "--spacing-mm" in help_text and slices_without_network(program, place, environment)
    return {
        "bench": "wheel_size",
        "extras": extras,
        "wheel_mib": round(wheel.stat().st_size / 2**20, 2),
        "installed_mib": round(sum(found.values()) / 2**20, 1),
        "without_torch_mib": round(sum(size for name, size in found.items() if not _is_torch(name)) / 2**20, 1),
        "packages": len(_output([python, "-m", "pip", "list", "--format=freeze"]).splitlines()),
        "install_s": round(seconds, 1),
        "slices_interpolated_offline": works,
    }


def slices_without_network(program: Path, place: Path, environment: dict[str, str]) -> int:
    """Thin slices of a synthetic study, in a namespace without a network; 0 where the program fails or may not."""
    commands = (
        ["phantom", "study", "--patients", "1", "--size", "64"],
        ["interpolate", "study/APE/patient_001.zip", "thin"],
    )
    for words in commands:
        done = subprocess.run(
            ["unshare", "-rn", program, *words], cwd=place, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            print((done.stderr.strip() or "failed").splitlines()[-1])
            return 0
    return len(list(place.glob("thin/*/*.dcm")))


def sizes(site: Path) -> dict[str, int]:
    """Bytes below each entry of a site-packages folder."""
    return {
        entry.name: sum(p.lstat().st_size for p in entry.rglob("*") if p.is_file())
        if entry.is_dir()
        else entry.stat().st_size
        for entry in site.iterdir()
    }


def _is_torch(name: str) -> bool:
    return name.startswith(("torch", "nvidia", "triton", "functorch"))


def _output(command: list[str | Path], **options: object) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    return str(done.stdout).strip()


if __name__ == "__main__":
    main()
