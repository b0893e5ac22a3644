"""Peak memory of `ctpipe evaluate` over many full-size cases: the real path, from zips and stored latents to scores.

    python infra/bench/evaluate_memory.py [--quick] [--shape 300 512 512] [--cases 3] [--decoder held|windows]
                                          [--keep FOLDER] [--name TEXT]

One zip (a thick and a thin series, as a scanner would file them) is ingested, its latents are stored, and as many
pairs as cases are asked for are entered into the catalog, each a patient of its own that reads these same series: disk
does not grow with the cases, work and memory do. Then ``pipeline.evaluation.run.evaluate_pairs`` runs as the command
runs it: every pair reads its slices, decodes three latents, and scores every default method with every figure.

``--decoder held`` decodes as a GPU does for this process: what comes back is the volume. ``windows`` is the CPU's way
within 4 GiB: 64x64x64 windows (`ctpipe encode --tiling sliding`) through a VAE of random weights with few channels, so
that time does not matter; what one window takes at the real widths, and what the exact VAE plans for the whole volume,
is told by ``--windows``.

The peak is VmHWM, the process's own high-water mark, reset before every case: a case that left something behind would
show in the next one's peak. ``--keep`` keeps the folder; the next run with the same cases goes on where this one ended.
Prints a line a case, then one JSON object, which is also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from latentcache import Encoding, LatentMeta, LatentRole, LatentStore, PairRecord
from pipeline.decode import ComposeSettings
from pipeline.evaluation import CaseWork, EvaluationSettings, evaluate_pairs
from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.identity import PrivateStore
from pipeline.ingest import ingest
from pipeline.phantom import patient_zip
from pipeline.reading import read_series
from pipeline.volume import Geometry, Volume, Window, resample_z

WINDOW = Window(0.0, 2000.0)
BOUND_GIB = 4.0
NARROW = {"channels": (4, 8, 16), "norm_num_groups": 4}
FULL_SIZE = (300, 512, 512)
PEERS = 4
"""Pairs that are in the catalog at least, so that the slice profile is fitted on others, as it usually is."""


def status_gib(field: str) -> float:
    """A field of /proc/self/status in GiB; ``ru_maxrss`` would carry the parent's peak over."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"no {field} in /proc/self/status")


def reset_peak() -> None:
    """Set VmHWM back to what is resident now (Linux: proc(5), clear_refs 5)."""
    Path("/proc/self/clear_refs").write_text("5")


def made(shape: tuple[int, int, int], seed: int) -> tuple[Volume, Volume]:
    """A body with lungs and noise, (thick, thin), int16."""
    depth, rows, columns = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    body = ((y - rows / 2) / (0.4 * rows)) ** 2 + ((x - columns / 2) / (0.45 * columns)) ** 2 < 1
    lung = ((y - rows / 2) / (0.2 * rows)) ** 2 + ((x - columns / 2) / (0.3 * columns)) ** 2 < 1
    thin = np.empty(shape, np.int16)
    for k in range(depth):
        dome = lung & (np.hypot(y - rows / 2, x - columns / 2) / rows < 0.25 * k / depth)
        thin[k] = np.where(dome, -850, np.where(body, 40, -1000)) + rng.normal(0, 15, (rows, columns))
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    fine = Geometry(shape, affine, tuple(float(k) for k in range(depth)), 1.0)
    coarse = fine.with_z(2.0 + 5.0 * np.arange(depth // 5), 5.0)
    operator = slice_operator(SliceProfile("box", 5.0), np.array(coarse.z_mm), np.array(fine.z_mm))
    flat = np.empty(coarse.shape_zyx, np.int16)
    for row in range(0, rows, 32):
        flat[:, row : row + 32] = np.rint(operator.apply(thin[:, row : row + 32]))
    return Volume(flat, coarse), Volume(thin, fine)


class HeldDecoder:
    """Latents that are means of 4x4x4 voxels, and back: it holds what a GPU's decoder leaves on the host."""

    sha256 = "00" * 32
    architecture: dict[str, Any] = {}  # noqa: RUF012

    def encode(self, unit: Any, *, pad_multiple_zyx: tuple[int, int, int] = (4, 32, 32)) -> Any:
        full = np.pad(unit, [(0, -n % m) for n, m in zip(unit.shape, pad_multiple_zyx, strict=True)], mode="edge")
        d, h, w = (n // 4 for n in full.shape)
        means = full.reshape(d, 4, h, 4, w, 4).mean(axis=(1, 3, 5), dtype=np.float32)
        return np.repeat(means[None], 4, axis=0)

    def decode(self, latent: Any, valid_zyx: tuple[int, int, int]) -> Any:
        depth, height, width = valid_zyx
        out = np.empty(valid_zyx, dtype=np.float32)
        for k in range(depth):
            out[k] = np.asarray(latent)[0, k // 4].repeat(4, 0).repeat(4, 1)[:height, :width]
        return out


def random_vae(**architecture: Any) -> Any:
    """A VAE of an architecture with random weights."""
    import torch

    from pipeline.vae import KlAutoencoder, Vae, VaeArchitecture, VaeWeights

    torch.manual_seed(0)
    shape = VaeArchitecture(**architecture)
    return Vae(VaeWeights(KlAutoencoder(shape).state_dict(), shape, "00" * 32), torch.device("cpu"))


def decoder_of(kind: str) -> Any:
    if kind == "held":
        return HeldDecoder()
    from pipeline.vae import SlidingVae, Tiling

    return SlidingVae(random_vae(**NARROW), Tiling())


def prepare(folder: Path, shape: tuple[int, int, int], cases: int) -> tuple[LatentStore, PrivateStore, str]:
    """The store of one archive, its latents, and ``cases`` pairs on them; made once a folder."""
    url = str(folder / "store")
    private = PrivateStore.open(url, create=True)
    encoding = Encoding(HeldDecoder.sha256, {}, WINDOW.center, WINDOW.width)
    if not (folder / "made").exists():
        zip_path = folder / "archive" / "APE" / "patient_001.zip"
        zip_path.parent.mkdir(parents=True)
        zip_path.write_bytes(patient_zip(*made(shape, 0), "bench"))
        store = LatentStore.create(url, secret_fingerprint=private.fingerprint)
        ingest(str(folder / "archive"), store, private)
        store.register_encoding(encoding)
        _stored(store, private, encoding.encode_key)
        (folder / "made").touch()
    store = LatentStore.open(url)
    (real,) = (p for p in store.pairs() if not p.pair_key.startswith("c" * 12))
    wanted = [replace(real, pair_key=f"{'c' * 12}{n:04d}", patient_key=f"{'d' * 12}{n:04d}") for n in range(cases)]
    known = {p.pair_key for p in store.pairs()}
    if missing := [p for p in wanted if p.pair_key not in known]:
        store.append_catalog([], missing)
        record = store.find(real.pair_key, "thick_on_thin", encoding.encode_key)
        assert record is not None
        with store.writer() as writer:
            writer.commit([replace(record, key=p.pair_key) for p in missing])
        store = LatentStore.open(url)
    return store, private, encoding.encode_key


def _stored(store: LatentStore, private: PrivateStore, encode_key: str) -> None:
    """Stage and commit the latents of the one real pair."""
    (pair,) = store.pairs()
    thick, thin = (read_series(private.pointer(key)) for key in (pair.thick_key, pair.thin_key))
    z = np.array(thin.geometry.z_mm)
    on_thin = resample_z(thick.hu, np.array(thick.geometry.z_mm), z)
    wanted: tuple[tuple[LatentRole, str, Any], ...] = (
        ("thin", pair.thin_key, thin.hu),
        ("thick_on_thin", pair.pair_key, on_thin),
    )
    records = [
        store.stage(
            HeldDecoder().encode(WINDOW.to_unit(hu)).astype(np.float16),
            LatentMeta(encode_key, key, role, float(z[0]) + 1.5, 4.0, thin.hu.shape, source_digest="bench"),
        )
        for role, key, hu in wanted
    ]  # fmt: skip
    with store.writer() as writer:
        writer.commit(records)


def run_cases(folder: Path, shape: tuple[int, int, int], cases: int, decoder: str) -> list[dict[str, Any]]:
    """Evaluate all cases; a row for each, those of earlier runs in this folder included."""
    store, private, encode_key = prepare(folder, shape, max(cases, PEERS))
    pairs = sorted((p for p in store.pairs() if p.pair_key.startswith("c" * 12)), key=lambda p: p.pair_key)[:cases]

    def generated(pair: PairRecord) -> Any:
        record = store.find(pair.thin_key, "thin", encode_key)
        assert record is not None
        return store.read(record)

    settings = EvaluationSettings(WINDOW, encode_key, ComposeSettings(), identity=decoder)
    vae, out = decoder_of(decoder), folder / "evaluation"
    before = {path.stem for path in (out / "cases").glob("*.json")}
    log = folder / "rows.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    process = len({row["process"] for row in rows})
    reset_peak()
    start = time.perf_counter()
    for case in evaluate_pairs(CaseWork(store, private, vae, generated, settings), pairs, out):
        assert not case.failures, case.failures
        if case.key not in before:
            row = {
                "case": int(case.key[-4:]),
                "process": process,
                "seconds": round(time.perf_counter() - start, 1),
                "peak_gib": round(status_gib("VmHWM"), 3),
                "left_gib": round(status_gib("VmRSS"), 3),
                "methods": len(case.scores),
            }
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        reset_peak()
        start = time.perf_counter()
    return rows


def window_peaks() -> dict[str, float]:
    """GiB that one window of 64x64x64 takes to decode, by width of the VAE."""
    import torch

    found = {}
    for name, architecture in (("narrow", NARROW), ("tiny", {"channels": (16, 32, 64), "norm_num_groups": 4}),
                               ("full", {})):  # fmt: skip
        vae = random_vae(**architecture)
        with torch.inference_mode():
            for _ in range(2):  # the first call also allocates what the library keeps
                reset_peak()
                resident = status_gib("VmRSS")
                vae.decode_slab(torch.zeros(1, 4, 16, 16, 16))
        found[name] = round(status_gib("VmHWM") - resident, 3)
    return found


def sliding_volumes() -> float:
    """What decoding in windows holds beside one window, in volumes of float32: the slope between two sizes."""
    import torch

    vae = decoder_of("windows")
    vae.decode(torch.zeros(4, 16, 16, 16), (64, 64, 64))  # the first call also allocates what the library keeps
    points = []
    for side in (64, 192):
        shape = (300, side, side)
        latent = torch.zeros(4, *(n // 4 for n in shape))
        reset_peak()
        resident = status_gib("VmRSS")
        vae.decode(latent, shape)
        points.append((4 * math.prod(shape) / 2**30, status_gib("VmHWM") - resident))
    (small, first), (large, second) = points
    return round((second - first) / (large - small), 2)


def exact_plans(shape: tuple[int, int, int]) -> dict[str, float]:
    """GiB that the exact VAE plans for decoding this shape on a CPU, in float32."""
    import torch

    from pipeline.vae import VaeArchitecture
    from pipeline.vae.streaming import rehearse

    d, h, w = (-(-n // 4) for n in shape)
    widths = {"tiny": VaeArchitecture((16, 32, 64), norm_num_groups=4), "full": VaeArchitecture()}
    return {
        name: round(rehearse(layout, "decoder", (d, h, w, 4), torch.float32, 1, False)[0] / 2**30, 2)
        for name, layout in widths.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60x128x128, 2 cases: shows that it runs")
    parser.add_argument("--shape", type=int, nargs=3, default=FULL_SIZE)
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--decoder", choices=("held", "windows"), default="held")
    parser.add_argument("--windows", action="store_true", help="measure the decoder's windows and plans alone")
    parser.add_argument("--keep", type=Path, help="work here, and go on here the next time")
    parser.add_argument("--name", help="what the result is kept under")
    args = parser.parse_args()
    depth, height, width = (60, 128, 128) if args.quick else args.shape
    found: dict[str, Any] = {
        "shape": [depth, height, width],
        "decoder": args.decoder,
        "bound_gib": BOUND_GIB,
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy", "torch")},
    }
    if args.windows:
        found |= {
            "window_gib": window_peaks(),
            "sliding_volumes": sliding_volumes(),
            "exact_plan_gib": exact_plans((depth, height, width)),
        }
    else:
        work: Callable[[Path], list[dict[str, Any]]] = lambda folder: run_cases(  # noqa: E731
            folder, (depth, height, width), 2 if args.quick else args.cases, args.decoder
        )
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            rows = work(args.keep)
        else:
            with tempfile.TemporaryDirectory() as folder:
                rows = work(Path(folder))
        found |= {"cases": rows, "peak_gib": max((row["peak_gib"] for row in rows), default=0.0)}
    if not args.quick:
        kept = "evaluate_memory" + (f"-{args.name}" if args.name else "")
        out = Path(__file__).parent / "results" / f"{kept}-{platform.machine()}-{os.cpu_count()}cpu.json"
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))
    if found.get("peak_gib", 0.0) >= BOUND_GIB:
        raise SystemExit(f"peak {found['peak_gib']} GiB, expected less than {BOUND_GIB}")


if __name__ == "__main__":
    main()
