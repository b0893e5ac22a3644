"""Fuzz the readers with atheris: zip bytes, DICOM bytes and compressed frames.

    python tests/fuzz/fuzz_reading.py [--seconds 60] [--target zip|dicom|frame|all] [--corpus FOLDER] [--seed N]
        [--record FILE]

A run of any length can be put together from short ones: give them one corpus, seeds of their own, and one record, which
sums up seconds, executions and findings as JSON.

Whatever the bytes, reading ends with volumes or an InputError: no other exception, no memory beyond 2 GiB, no input
that takes longer than 20 s, and no file opened for writing or outside of the archive (an audit hook watches).
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import atheris
from PIL import Image

with atheris.instrument_imports(include=["pipeline"]):
    from pipeline.archive import Limits
    from pipeline.archive.source import ZipSource
    from pipeline.reading import read_scanned, scan
    from pipeline.reading.codecs import READABLE, PixelError, SampleFormat, encapsulated_frame
    from pipeline.reading.pixels import read_slice

from latentcache import InputError

LIMITS = Limits(member_bytes=1 << 24, total_bytes=1 << 26, ratio_from=1 << 20, members=64)
ENCAPSULATED = sorted(uid for uid in READABLE if uid.startswith(("1.2.840.10008.1.2.4", "1.2.840.10008.1.2.5")))
TARGETS = ("zip", "dicom", "frame")


class Memory:
    """A range reader over bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size, self.stamp = data, len(data), "fuzz"

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0:
            raise AssertionError("a range outside of the archive")
        return self._data[offset : offset + length]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(*one) for one in ranges]

    def close(self) -> None:
        """Nothing is open."""


def read_everything(data: bytes) -> None:
    """Everything that ingest and encode would do with an archive."""
    try:
        source = ZipSource("memory", Memory(data), LIMITS)
        result = scan(source, keep_instances=True)
    except InputError:
        return
    for one in result.series:
        if sum(i.form.rows * i.form.columns for i in one.instances) > 1 << 22:
            continue
        try:
            read_scanned(source, one)
        except InputError:
            for instance in one.instances[:2]:
                try:
                    read_slice(source, instance)
                except InputError:
                    continue


def fuzz_zip(data: bytes) -> None:
    read_everything(data)


def fuzz_dicom(data: bytes) -> None:
    """The input is one slice's file, put into a sound archive three times at different positions."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for k in range(3):
            archive.writestr(str(k), data.replace(b"\\5.0", f"\\{k}.5".encode(), 1))
    read_everything(buffer.getvalue())


def fuzz_frame(data: bytes) -> None:
    """The first byte picks the transfer syntax, the rest is the frame."""
    if not data:
        return
    form = SampleFormat(16, 16, 16, 12, 11, bool(data[0] & 64))
    try:
        cells = encapsulated_frame(data[1:], ENCAPSULATED[data[0] % len(ENCAPSULATED)], form)
    except PixelError:
        return
    if cells.shape != (16, 16):
        raise AssertionError(f"a frame of shape {cells.shape}")


def seeds(target: str) -> list[bytes]:
    """Sound inputs to start from, one of every kind."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.support.dicom_files import J2K, LOSSLESS, anatomy, compress, enhanced, series_files, zip_of

    stored = anatomy(3, 16)
    if target == "frame":
        tiled = io.BytesIO()
        Image.fromarray(stored[0]).save(tiled, "JPEG2000", no_jp2=True, irreversible=False, tile_size=(8, 8))
        plain = [bytes([i]) + compress(stored[0], uid) for i, uid in enumerate(ENCAPSULATED) if uid in LOSSLESS]
        return [*plain, bytes([ENCAPSULATED.index(J2K)]) + tiled.getvalue()]
    files = [series_files(stored, syntax=syntax) for syntax in LOSSLESS]
    if target == "dicom":
        return [one[1] for one in files] + [enhanced(stored, [0, 5, 10])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.zip"
        return [zip_of(path, one).read_bytes() for one in files[:4]] + [
            zip_of(path, files[1], zipfile.ZIP_STORED).read_bytes()
        ]


def watch_files() -> None:
    """Fail on any file opened for writing, any directory made and any process started from here on."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            raise AssertionError("a reader opened a file for writing")
        if event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "subprocess.Popen"):
            raise AssertionError(f"a reader called {event}")

    sys.addaudithook(audit)


def run_apart(target: str, options: argparse.Namespace) -> bool:
    """Fuzz one target in a process of its own and add to the record; returns whether it found nothing."""
    command = [sys.executable, __file__, "--target", target, "--seconds", str(options.seconds // len(TARGETS))]
    command += ["--seed", str(options.seed)]
    if options.corpus:
        command += ["--corpus", str(options.corpus)]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout if done.returncode else "".join(done.stdout.splitlines(keepends=True)[-8:]), flush=True)
    executed = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stdout)
    if options.record:
        add_to_record(
            options.record,
            target,
            seconds=time.perf_counter() - started,
            executions=int(executed.group(1)) if executed else 0,
            findings=int(done.returncode != 0),
        )
    return done.returncode == 0


def add_to_record(path: Path, target: str, **figures: float) -> None:
    """Sum up a run's figures, by target and over all."""
    record: dict[str, Any] = {"bench": "fuzz-reading", "runs": 0, "all": {}}
    if path.exists():
        record = json.loads(path.read_text())
    for name in ("all", target):
        sums = record.setdefault(name, {})
        for figure, value in figures.items():
            sums[figure] = round(sums.get(figure, 0) + value, 1)
    record["runs"] += 1
    record["device"] = platform.machine()
    record["versions"] = {name: version(name) for name in ("atheris", "imagecodecs", "pydicom", "isal")}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--corpus", type=Path, help="folder to keep and reuse inputs that reach new code")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0 takes one from the clock")
    parser.add_argument("--record", type=Path, help="JSON file to add seconds, executions and findings to")
    options = parser.parse_args()
    if options.target == "all":
        clean = [run_apart(target, options) for target in TARGETS]
        sys.exit(0 if all(clean) else 1)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = (options.corpus or Path(scratch)) / options.target
        corpus.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(seeds(options.target)):
            (corpus / f"seed-{number}").write_bytes(data)
        arguments = [
            sys.argv[0],
            str(corpus),
            f"-max_total_time={options.seconds}",
            f"-seed={options.seed}",
            "-rss_limit_mb=2048",
            "-timeout=20",
            "-max_len=65536",
            "-print_final_stats=1",
            f"-artifact_prefix={tempfile.gettempdir()}/ctpipe-fuzz-{options.target}-",
        ]
        function = {"zip": fuzz_zip, "dicom": fuzz_dicom, "frame": fuzz_frame}[options.target]
        function(seeds(options.target)[0])  # lazy imports open files; the watch starts behind them
        watch_files()
        atheris.Setup(arguments, function)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
