"""Duration of a job: series per second as the least of what storage, CPUs, network, GPUs and the commit can do.

Every stage runs at the same time as the others (the engine keeps them all fed), so the slowest sets the pace. The model
is arithmetic on rates; ``measured`` takes them from a store's timings, so that a small job predicts a large one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace

import pyarrow as pa
import pyarrow.compute as pc

from latentcache import InputError

MB = 1e6
VOXELS = 300 * 512 * 512
"""Slices, rows and columns of the thin series that the rates are of."""


@dataclass(frozen=True)
class Rates:
    """Costs of one series and capacities of the machines. A series here is a thin one of 300 slices, 512 x 512.

    ``SOURCES`` says of each where it comes from: measured, and where, or assumed. ``measured`` replaces what a store's
    own encode tells; replace the rest by hand before money is spent.

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
    decode_core_s: float = 0.5
    encode_gpu_s: float = 0.89
    encode_core_s: float = 720.0
    commit_s: float = 0.0002
    cores_per_gpu: float = 6.0
    gpus_per_node: float = 8.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise InputError(f"a rate {name} of {value:g}", expected="a number above 0", remedy="Measure it.")


SOURCES: Mapping[str, str] = {
    "source_mb": "assumed: 300 slices of lossless JPEG, about half of 16 bits",
    "latent_mb": "from the shape: 4 x 75 x 128 x 128 float16",
    "latents_per_series": "from the shape: thin and thick_on_thin, the thick one's fifth left out",
    "storage_read_mb_s": "assumed: a parallel file system or object store",
    "storage_write_mb_s": "assumed: a parallel file system or object store",
    "network_mb_s": "assumed: 10 Gbit/s a node",
    "decode_core_s": "measured: infra/bench/ingest.py, lossless JPEG in a deflated zip, one thread of a 2-core x86-64",
    "encode_gpu_s": "measured: infra/bench/gpu.py, MAISI architecture in bfloat16 on one H100 80GB",
    "encode_core_s": "measured: infra/bench/vae.py, MAISI architecture, one thread of a 2-core x86-64",
    "commit_s": "measured: infra/bench/engine.py, a million rows on a local disk, one driver",
    "cores_per_gpu": "assumed: as infra/k8s/base gives",
    "gpus_per_node": "assumed: one node of eight",
}
"""Source of each shipped rate. A test holds the measured ones against the benches' results."""


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


def cost(series: float, gpus: int, rates: Rates, cores: int | None = None, workers: int | None = None) -> Cost:
    """Predict a job.

    Args:
        series: How many series.
        gpus: GPUs in all; 0 encodes on the cores.
        cores: CPU cores in all; by default ``cores_per_gpu`` beside each GPU, or one per worker.
        workers: Series encoded at once without GPUs (``--workers`` of encode); by default one a core. With fewer than
            cores, the cores that are left read ahead while the workers encode.

    Raises:
        InputError: No series, or neither GPUs nor cores.
    """
    if cores is None:
        cores = round(gpus * rates.cores_per_gpu) or workers or 0
    workers = cores if workers is None else workers
    if not series > 0 or gpus < 0 or cores <= 0 or workers <= 0:
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
        capacity["CPU workers (encoding)"] = workers / encode_s
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


def measured(timings: pa.Table, rates: Rates) -> tuple[Rates, tuple[str, ...]]:
    """Rates from what a store's own encode cost, for more series of the kinds that it holds, and which those are.

    An item of a job is a pair or a lone series. Times go with voxels, in reading and in the VAE alike. So the cost of
    an item is the median over items of seconds a voxel, times the mean of voxels: the median leaves out the first item,
    which loads libraries, and one that waited for a sick disk; the mean keeps the mix of sizes. On CPUs a core is a
    worker like those of the measured job, with as many threads.

    Args:
        timings: The store's timings table.

    Raises:
        InputError: The store holds no encode timings of finished series.
    """
    chosen = timings.filter(pc.and_(pc.equal(timings["stage"], "encode"), pc.equal(timings["outcome"], "ok")))
    rows = [(row["device"], dict(row["values"])) for row in chosen.to_pylist()]
    done = [(device, v) for device, v in rows if v.get("voxels", 0) > 0 and {"prepare", "run", "latents"} <= v.keys()]
    if not done:
        raise InputError(
            "a store without timings of encoded series",
            expected="at least one pair or series that this version of `ctpipe encode` finished",
            remedy="Encode a few series first, or leave --from out.",
        )
    found: dict[str, float] = {}
    latents = _mean([v["latents"] for _, v in done])
    found["latents_per_series"] = latents
    found["latent_mb"] = _mean([v["latent_bytes"] / v["latents"] for _, v in done]) / MB
    found["source_mb"] = rates.source_mb * _mean([v["voxels"] for _, v in done]) / (rates.latents_per_series * VOXELS)
    found["decode_core_s"] = _item_s([v for _, v in done], "prepare")
    for kind, name in (("cpu", "encode_core_s"), ("cuda", "encode_gpu_s")):
        if own := [v for device, v in done if device == kind]:
            found[name] = _item_s(own, "run") / latents
    return replace(rates, **found), tuple(found)


def _item_s(items: list[dict[str, float]], stage: str) -> float:
    """Seconds of a stage for an item of mean size."""
    return _median([v[stage] / v["voxels"] for v in items]) * _mean([v["voxels"] for v in items])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
