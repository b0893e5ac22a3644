"""What a job will take: series per second as the least of what storage, CPUs, network, GPUs and the commit can do.

Every stage runs at the same time as the others (the engine keeps them all fed), so the slowest sets the pace. The model
is arithmetic on rates; ``measured`` takes them from a store's timings, so that a small job predicts a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.errors import InputError

MB = 1e6
VOXELS = 300 * 512 * 512
"""Slices, rows and columns of the thin series that the rates are of."""


@dataclass(frozen=True)
class Rates:
    """What one series costs and what the machines give. A series here is a thin one of 300 slices, 512 x 512.

    Measured: decode seconds (deflated JPEG lossless, one core) and commit (infra/bench/engine.py). From the shape:
    the latent's size (4 x 75 x 128 x 128 float16). The rest are round figures of common hardware, to be replaced by
    ``measured`` or by hand before money is spent.

    Attributes:
        source_mb: Compressed bytes read a series.
        latent_mb: Bytes written a latent.
        latents_per_series: Latents made of one series; a pair's ``thick_on_thin`` counts for its thin series.
        storage_read_mb_s: What the archive's storage gives, all workers together.
        storage_write_mb_s: What the store's storage takes.
        network_mb_s: One node's link; archive and store both lie behind it.
        decode_core_s: CPU seconds of one core to read, inflate and decode a series.
        encode_gpu_s: GPU seconds to encode one latent.
        encode_core_s: Seconds of one CPU worker to encode one latent, when there are no GPUs.
        commit_s: Seconds of the one committing driver a series.
        cores_per_gpu: CPU cores beside each GPU.
        gpus_per_node: GPUs behind one network link.
    """

    source_mb: float = 80.0
    latent_mb: float = 9.83
    latents_per_series: float = 2.0
    storage_read_mb_s: float = 1000.0
    storage_write_mb_s: float = 1000.0
    network_mb_s: float = 1250.0
    decode_core_s: float = 1.57
    encode_gpu_s: float = 3.0
    encode_core_s: float = 1600.0
    commit_s: float = 0.002
    cores_per_gpu: float = 6.0
    gpus_per_node: float = 8.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise InputError(f"a rate {name} of {value:g}", expected="a number above 0", remedy="Measure it.")


@dataclass(frozen=True)
class Cost:
    """The prediction. ``series_per_s`` by resource, and the least of them."""

    series: float
    gpus: int
    series_per_s: Mapping[str, float]
    binds: str
    hours: float
    gpu_hours: float
    store_tb: float
    archive_tb: float
    idle: Mapping[str, float]
    """Share of each resource that is not used because another binds."""


def cost(series: float, gpus: int, rates: Rates, cores: int | None = None) -> Cost:
    """Predict a job.

    Args:
        series: How many series.
        gpus: GPUs in all; 0 encodes on the cores.
        cores: CPU cores in all; by default ``cores_per_gpu`` beside each GPU.

    Raises:
        InputError: No series, or neither GPUs nor cores.
    """
    cores = round(gpus * rates.cores_per_gpu) if cores is None else cores
    if not series > 0 or gpus < 0 or cores <= 0:
        raise InputError(
            f"{series:g} series on {gpus} GPUs and {cores} cores",
            expected="at least one series, and one core",
            remedy="Give --series, and --gpus or --cores.",
        )
    nodes = max(1.0, gpus / rates.gpus_per_node)
    written_mb = rates.latent_mb * rates.latents_per_series
    capacity = {
        "storage (reading the archive)": rates.storage_read_mb_s / rates.source_mb,
        "storage (writing latents)": rates.storage_write_mb_s / written_mb,
        "network": nodes * rates.network_mb_s / (rates.source_mb + written_mb),
        "commit": 1 / rates.commit_s,
    }
    encode_s = rates.latents_per_series * (rates.encode_gpu_s if gpus else rates.encode_core_s)
    if gpus:
        capacity["CPU (decoding)"] = cores / rates.decode_core_s
        capacity["GPU (encoding)"] = gpus / encode_s
    else:  # the same cores read and encode
        capacity["CPU (decoding and encoding)"] = cores / (rates.decode_core_s + encode_s)
    binds = min(capacity, key=lambda name: capacity[name])
    hours = series / capacity[binds] / 3600
    return Cost(
        series=series,
        gpus=gpus,
        series_per_s=capacity,
        binds=binds,
        hours=hours,
        gpu_hours=hours * gpus,
        store_tb=series * written_mb * MB / 1e12,
        archive_tb=series * rates.source_mb * MB / 1e12,
        idle={name: 1 - capacity[binds] / rate for name, rate in capacity.items()},
    )


def override(rates: Rates, given: Mapping[str, str]) -> Rates:
    """Rates with some replaced by name.

    Raises:
        InputError: An unknown name, or a value that is no number.
    """
    known = {field.name for field in fields(Rates)}
    values: dict[str, float] = {}
    for name, text in given.items():
        if name not in known:
            raise InputError(f"a rate {name!r}", expected=f"one of {', '.join(sorted(known))}", remedy="See --json.")
        try:
            values[name] = float(text)
        except ValueError as error:
            raise InputError(f"{name}={text!r}", expected="a number", remedy=f"For example {name}=1.5.") from error
    return replace(rates, **values)


def measured(timings: pa.Table, manifest: pa.Table, rates: Rates) -> Rates:
    """Rates from what a store's own encode cost, per thin series of the shipped size.

    Times are scaled by voxels: reading and the VAE are linear in them. The median attempt counts, so that the first
    one, which loads libraries, and one that waited for a sick disk do not.

    Args:
        timings: The store's timings table.
        manifest: Its manifest, columns ``key``, ``shape``, ``valid_zyx``.

    Raises:
        InputError: The store holds no encode timings of finished series.
    """
    chosen = timings.filter(pc.and_(pc.equal(timings["stage"], "encode"), pc.equal(timings["outcome"], "ok")))
    rows = [(row["key"], row["device"], dict(row["values"])) for row in chosen.to_pylist()]
    voxels = {row["key"]: float(_volume(row["valid_zyx"])) for row in manifest.to_pylist()}
    per_voxel: dict[str, list[float]] = {"prepare": [], "cpu": [], "cuda": []}
    for key, device, values in rows:
        latents = values.get("latents", 0)
        if latents and key in voxels and {"prepare", "vae"} <= values.keys():
            per_voxel["prepare"].append(values["prepare"] / voxels[key])
            per_voxel[device].append(values["vae"] / latents / voxels[key])
    if not per_voxel["prepare"]:
        raise InputError(
            "a store without timings of encoded pairs",
            expected="at least one pair that `ctpipe encode` finished",
            remedy="Encode a few series first, or leave --store out.",
        )
    found = {"decode_core_s": _median(per_voxel["prepare"]) * VOXELS}
    if per_voxel["cpu"]:
        found["encode_core_s"] = _median(per_voxel["cpu"]) * VOXELS
    if per_voxel["cuda"]:
        found["encode_gpu_s"] = _median(per_voxel["cuda"]) * VOXELS
    return replace(rates, **found)


def _volume(zyx: list[int]) -> int:
    return zyx[0] * zyx[1] * zyx[2]


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
