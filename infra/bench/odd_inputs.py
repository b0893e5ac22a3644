"""What dcm2niix, SimpleITK, MONAI and ctpipe make of odd archives: a table of every case in tests/support/odd_cases.py.

    python infra/bench/odd_inputs.py [--quick] [--real FOLDER] [--markdown FILE]

Made cases are judged against the truth they were made from: `right`, `right, 2 volumes`, `right, 1 more beside` (such
as a localizer, as a volume of its own), `refused: why`, or `WRONG: ...` where a reader returns something else without a
word on its error channel. `wrong, but warns` is a wrong result with a warning. Real archives have no such truth; for
them the table says what came back. Every reader runs in a process of its own with limits on time and memory; the peers
get the archive unpacked, as they cannot read zips.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.support.odd_cases import CASES, OddCase

Found = tuple[list[Any], str]
"""Volumes that came back with their spacing along z, and what the reader said."""
LIMIT_S, LIMIT_BYTES = 60, 12 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every fifth case")
    parser.add_argument("--real", type=Path, default=ROOT.parent / "shared" / "data" / "real" / "odd")
    parser.add_argument("--markdown", type=Path, default=Path(__file__).parent / "results" / "odd-inputs.md")
    options = parser.parse_args()
    import monai.data  # noqa: F401  before forking, so that every case starts at once
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(True)
    rows: dict[str, dict[str, str]] = {}
    cases = CASES[::5] if options.quick else CASES
    with tempfile.TemporaryDirectory() as scratch:
        for number, odd in enumerate(cases):
            path = odd.make(Path(scratch) / f"{number}.zip")
            rows[odd.name] = {name: _judge(odd, *_apart(read, path)) for name, read in READERS.items()}
            path.unlink()
        for path in sorted(options.real.glob("*.zip")) if not options.quick else []:
            rows[f"real: {path.stem}"] = {name: _tell(*_apart(read, path)) for name, read in READERS.items()}
    table = _table(rows)
    print(table)
    bad = {name: sum(row[name].startswith(("WRONG", "crash", "hang")) for row in rows.values()) for name in READERS}
    result = {
        "bench": "odd-inputs",
        "cases": len(rows),
        "silently_wrong_or_crashed": bad,
        "device": platform.machine() + f"-{os.cpu_count()}cpu",
        "versions": {name: version(name) for name in ("dcm2niix", "SimpleITK", "monai", "pydicom")},
    }
    if not options.quick:
        options.markdown.parent.mkdir(exist_ok=True)
        options.markdown.write_text(f"# Odd inputs\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\n{table}\n")
        target = Path(__file__).parent / "results" / f"odd-inputs-{result['device']}.json"
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    if bad["ctpipe"]:
        raise SystemExit("ctpipe returned a wrong volume or crashed")


def _ctpipe(path: Path) -> Found:
    from latentcache import InputError
    from pipeline.archive import open_archive
    from pipeline.reading import pointer_of, read_series, scan

    try:
        result = scan(open_archive(path))
    except InputError as error:
        return [], error.found
    volumes, said = [], [reason for _, reason in result.problems]
    for one in result.series:
        said += [one.reason, *one.flags]
        if one.status == "ok" and one.geometry is not None and len(one.pointer_members) >= 3:
            try:
                volume = read_series(pointer_of(one))
            except InputError as error:
                said.append(error.found)
            else:
                volumes.append((volume.hu, volume.geometry.spacing_mm_zyx[0]))
                said += volume.flags
    return volumes, ", ".join(dict.fromkeys(s for s in said if s))


def _dcm2niix(path: Path) -> Found:
    import nibabel

    with tempfile.TemporaryDirectory() as folder:
        said = _unpack(path, folder)
        tool = str(Path(sys.executable).parent / "dcm2niix")
        command = [tool, "-z", "n", "-b", "n", "-f", "o%s_%p", "-o", folder, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        lines = (done.stdout + done.stderr).splitlines()
        # It warns about made files' empty protocol name every time; that says nothing about the volume.
        said += " ".join(x for x in lines if ("arning" in x or "rror" in x) and "protocol name" not in x)
        volumes = []
        for found in sorted(Path(folder).rglob("*.nii")):
            image = nibabel.load(found)
            volumes.append((np.asarray(image.dataobj).T[..., ::-1, :], float(image.header.get_zooms()[2])))
        return volumes, said or ("" if volumes else f"exit {done.returncode}")


def _simpleitk(path: Path) -> Found:
    import SimpleITK

    with tempfile.TemporaryDirectory() as folder:
        said = _unpack(path, folder)
        volumes = []
        for where in sorted({p.parent for p in Path(folder).rglob("*") if p.is_file()}):
            reader = SimpleITK.ImageSeriesReader()
            # The usual recipe: the first series that GDCM finds in the folder.
            names = reader.GetGDCMSeriesFileNames(str(where))
            if names:
                reader.SetFileNames(names)
                image = reader.Execute()
                volumes.append((SimpleITK.GetArrayFromImage(image), image.GetSpacing()[2]))
        return volumes, said


def _monai(path: Path) -> Found:
    from monai.data import PydicomReader

    with tempfile.TemporaryDirectory() as folder:
        said = _unpack(path, folder)
        volumes = []
        for where in sorted({p.parent for p in Path(folder).rglob("*") if p.is_file()}):
            reader = PydicomReader(force=True)
            with tempfile.TemporaryDirectory() as flat:  # it takes a folder in a folder for a file
                for file in where.iterdir():
                    if file.is_file():
                        (Path(flat) / file.name).symlink_to(file)
                array, meta = reader.get_data(reader.read(flat))
            volumes.append((np.asarray(array).T, float(np.linalg.norm(np.asarray(meta["affine"])[:3, 2]))))
        return volumes, said


READERS: dict[str, Callable[[Path], Found]] = {
    "dcm2niix": _dcm2niix,
    "SimpleITK": _simpleitk,
    "MONAI": _monai,
    "ctpipe": _ctpipe,
}


def _unpack(path: Path, folder: str) -> str:
    """Unpack as `unzip` would: members that fail are reported, the others are there."""
    done = subprocess.run(["unzip", "-o", "-q", "-P", "x", str(path), "-d", folder], capture_output=True, text=True)
    return "" if done.returncode == 0 else f"unzip: exit {done.returncode}; "


def _apart(read: Callable[[Path], Found], path: Path) -> tuple[Found | None, str]:
    """Run a reader in a forked process; returns what it found, or None and how it ended."""
    folder = Path(tempfile.mkdtemp())
    out, channel = folder / "found.npz", folder / "said"
    process = os.fork()
    if process == 0:
        _child(read, path, out, channel)
    _, status = os.waitpid(process, 0)
    try:
        warned = channel.read_text(errors="replace") if channel.exists() else ""
        if os.WIFSIGNALED(status):
            return None, "hang" if os.WTERMSIG(status) == signal.SIGALRM else f"crash (signal {os.WTERMSIG(status)})"
        if not out.exists():
            return None, warned.strip().splitlines()[-1][:80] if warned.strip() else "no answer"
        with np.load(out) as kept:
            volumes = [(kept[f"v{i}"], float(kept["spacing"][i])) for i in range(len(kept["spacing"]))]
            return (volumes, str(kept["said"])), warned
    finally:
        shutil.rmtree(folder)


def _child(read: Callable[[Path], Found], path: Path, out: Path, channel: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(LIMIT_S)
    descriptor = os.open(channel, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        volumes, said = read(path)
        arrays: dict[str, Any] = {f"v{i}": v for i, (v, _) in enumerate(volumes)}
        np.savez(out, spacing=[s for _, s in volumes], said=said, **arrays)
        code = 0
    except BaseException as error:  # noqa: BLE001  the table records whatever a reader raises
        os.write(2, f"{type(error).__name__}: {' '.join(str(error).split())[:70]}".encode())
    finally:
        os._exit(code)


def _judge(odd: OddCase, found: Found | None, warned: str) -> str:
    if found is None:
        return warned if warned.startswith(("crash", "hang")) else f"refused: {warned}"
    volumes, said = found
    expected = list(odd.volumes)
    matched = [_among(volume, spacing, odd) for volume, spacing in volumes]
    found_all = set(range(len(expected))) <= {place for place in matched if place is not None}
    count = f", {len(volumes)} volumes" if len(volumes) > 1 else ""
    note = f" ({said[:90]})" if said and odd.why else ""
    if volumes and found_all and expected:
        beside = len(volumes) - len(expected)
        return f"right{count if not beside else ''}{f', {beside} more beside' if beside else ''}{note}"
    if not volumes:
        if not expected:
            return f"refused: {said[:90] or 'no reason given'}"
        return f"{'WRONG: nothing' if not said else 'wrong, but warns: nothing'} of {len(expected)} volumes{note}"
    what = " + ".join(f"{'x'.join(map(str, volume.shape))} every {gap:.3g} mm" for volume, gap in volumes[:3])
    warns = bool(said) or "arning" in warned or "rror" in warned
    return f"{'wrong, but warns' if warns else 'WRONG'}: {what} of {len(expected)} volumes"


def _among(volume: Any, spacing: float, odd: OddCase) -> int | None:
    """Which expected volume this is, either way up, with its slices as far apart as they are (1%)."""
    if abs(spacing - odd.spacing_mm) > 0.01 * odd.spacing_mm:
        return None
    for place, truth in enumerate(odd.volumes):
        if volume.shape == truth.shape:
            either = (volume, volume[::-1])
            if any(np.allclose(one, truth, atol=0.51 if one.dtype.kind == "f" else 0) for one in either):
                return place
    return None


def _tell(found: Found | None, warned: str) -> str:
    if found is None:
        return warned if warned.startswith(("crash", "hang")) else f"refused: {warned}"
    volumes, said = found
    shapes = " + ".join(f"{'x'.join(map(str, v.shape))} every {s:.3g} mm" for v, s in volumes[:4])
    return f"{shapes or 'nothing'}{f' ({said[:110]})' if said else ''}"


def _table(rows: dict[str, dict[str, str]]) -> str:
    names = list(READERS)
    lines = ["| input | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [
        "| " + " | ".join([case, *(row[name].replace("|", "/") for name in names)]) + " |" for case, row in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
