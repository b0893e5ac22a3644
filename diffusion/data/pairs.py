"""Pairs of a store that can be trained on: their latents, and the run of thin latents that the overlap contains.

Planning stays in Arrow and numpy, a column at a time: a million rows take a second or two. Python objects are made for
a pair when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from diffusion.config import DataConfig
from diffusion.networks import ThickSlices
from latentcache import (
    ACROSS_FIELDS,
    LATENT_CHANNELS,
    PAIR_ROLES,
    ROW,
    InputError,
    LatentRole,
    LatentStore,
    Moments,
    Split,
    mirror_axes,
    moments_of,
)
from latentcache.maintenance import pair_digests, refiner_of_digest, sources, unlike
from latentcache.tables import matrix, positions

EDGE_MM = 1e-3
PAIR = ("pair_key", "study_key", "category", "thick_key", "thin_key", "overlap_mm", "split", "status")
LATENT = ("key", "role", "shape", "path", "z0_mm", "dz_mm", "valid_zyx", "crc32c", "source_digest")
NUMERICS = ("compute_dtype", "device_kind")
SERIES = ("series_key", "split", "n_slices", "source_digest")
PLACES = ("z_mm", "spacing_mm_zyx", "thickness_mm")
"""Of a thick series, for models that take the places of its slices."""


@dataclass(frozen=True)
class PlannedLatent:
    """Part of a manifest row that a stream needs; see ``LatentRecord``."""

    key: str
    role: LatentRole
    shape: tuple[int, int, int, int]
    path: str
    z0_mm: float
    dz_mm: float
    valid_zyx: tuple[int, int, int]
    crc32c: tuple[int, ...]


@dataclass(frozen=True)
class PlannedPair:
    """A pair whose latents are in the store, and the run of thin latents that its overlap wholly contains."""

    pair_key: str
    study_key: str
    category: str
    thin: PlannedLatent
    condition: PlannedLatent
    first: int
    depth: int
    num_thick_slices: int
    thick: ThickSlices | None = None


class Latents:
    """The latents of a run of pairs: row ``at[i]`` of a manifest table belongs to pair i."""

    def __init__(self, rows: pa.Table, at: NDArray[np.int64]) -> None:
        self.rows, self.at = rows, at
        self.shape = matrix(rows, "shape").reshape(-1, 4)[at].astype(np.int64)

    def column(self, name: str) -> NDArray[Any]:
        """(n,) of a column of numbers, (n, k) of one of lists."""
        if pa.types.is_list(self.rows.schema.field(name).type):
            return matrix(self.rows, name)[self.at]
        return np.asarray(self.rows[name])[self.at]

    def text(self, name: str) -> pa.ChunkedArray:
        return self.rows[name].take(pa.array(self.at))

    def chosen(self, pairs: NDArray[np.int64]) -> Latents:
        """Those of some of the pairs."""
        return Latents(self.rows, self.at[pairs])

    def __getitem__(self, pair: int) -> PlannedLatent:
        row = int(self.at[pair])

        def value(name: str) -> Any:
            found = self.rows[name][row].as_py()
            return tuple(found) if isinstance(found, list) else found

        return PlannedLatent(*(value(name) for name in PlannedLatent.__dataclass_fields__))


class PlannedPairs(Sequence[PlannedPair]):
    """The usable pairs of a split in key order. Each is made from its rows when it is asked for.

    Attributes:
        thin, condition: The latents of every pair.
        places: (n, 4) of every thick series: first position, spacing, slices, thickness in mm; None where not read.
        first, depth: (n,) the run of thin latent slices that the overlap contains.
    """

    def __init__(
        self,
        pairs: pa.Table,
        thin: Latents,
        condition: Latents,
        first: NDArray[np.int64],
        depth: NDArray[np.int64],
        num_thick_slices: NDArray[np.int64],
        places: NDArray[np.float64] | None = None,
    ) -> None:
        self._pairs, self._num_thick_slices = pairs, num_thick_slices
        self.places = places
        self.thin, self.condition = thin, condition
        self.first, self.depth = first, depth

    def __len__(self) -> int:
        return len(self.first)

    def places_among(self, others: PlannedPairs) -> NDArray[np.int64]:
        """(len(others),) where each of the others is in this sequence, by pair key; -1 for none."""
        return positions(others._pairs["pair_key"], self._pairs["pair_key"])

    @overload
    def __getitem__(self, index: int) -> PlannedPair: ...

    @overload
    def __getitem__(self, index: slice) -> list[PlannedPair]: ...

    def __getitem__(self, index: int | slice) -> PlannedPair | list[PlannedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[index]
        names = ("pair_key", "study_key", "category")
        pair_key, study_key, category = (self._pairs[name][row].as_py() for name in names)
        first, depth, thick = (int(a[row]) for a in (self.first, self.depth, self._num_thick_slices))
        where = None
        if self.places is not None:
            z0_mm, spacing_mm, count, thickness_mm = self.places[row].tolist()
            where = ThickSlices(z0_mm, spacing_mm, int(count), thickness_mm)
        latents = self.thin[row], self.condition[row]
        return PlannedPair(pair_key, study_key, category, *latents, first, depth, thick, where)


def whole_latents_inside(
    z0_mm: NDArray[np.float64], dz_mm: NDArray[np.float64], depth: NDArray[np.int64], overlap_mm: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First index and number of latent slices that lie wholly in a range of z; slice j spans z0 + (j -/+ 1/2) dz.

    Args:
        z0_mm, dz_mm, depth: (n,) of n latents.
        overlap_mm: (n, 2) lower and upper end.
    """
    low = (overlap_mm[:, 0] - EDGE_MM - z0_mm) / dz_mm + 0.5
    high = (overlap_mm[:, 1] + EDGE_MM - z0_mm) / dz_mm - 0.5
    first = np.maximum(0, np.ceil(low)).astype(np.int64)
    last = np.minimum(depth - 1, np.floor(high)).astype(np.int64)
    return first, np.maximum(0, last - first + 1)


def choose_encode_key(store: LatentStore, wanted: str | None) -> str:
    """The encode key to train on: the one asked for, else the store's only one with thin latents."""
    present = [key for key, role in store.encoded() if role == "thin" and not store.encoding(key).mirrored]
    if wanted is not None and wanted not in present:
        raise InputError(
            f"encode key {wanted}",
            expected=f"one of {', '.join(present) or 'none yet'}",
            remedy="See `ctpipe status STORE`.",
        )
    if not present:
        raise InputError(
            "a store without thin latents", expected="encoded pairs", remedy="Run `ctpipe encode STORE` first."
        )
    if wanted is None and len(present) > 1:
        raise InputError(
            f"latents of {len(present)} encode keys ({', '.join(present)})",
            expected="one, since latents of different VAEs or windows must never meet in one run",
            remedy="Choose with --set data.encode_key=KEY.",
        )
    return wanted or present[0]


def mirrored_keys(store: LatentStore, encode_key: str, augment: str) -> dict[str, str]:
    """Encode keys of the same volumes mirrored, by the name of the augmentation.

    Raises:
        InputError: An augmentation of another name, or one that the store does not hold.
    """
    found = {}
    present = {key for key, role in store.encoded() if role == "thin"}
    for name, axis in mirror_axes(augment).items():
        found[name] = store.encoding(encode_key).of_mirrored(axis).encode_key
        if found[name] not in present:
            raise InputError(
                f"data.augment {name} on a store without mirrored latents of encode key {encode_key}",
                expected=f"those of encode key {found[name]}",
                remedy=f"Run `ctpipe encode STORE --augment {name}` with the other settings that it was encoded with.",
            )
    return found


@dataclass(frozen=True)
class Tables:
    """Tables of a snapshot that planning and whitening need, each read once.

    Attributes:
        condition: Role of the condition's latents.
        latents: Rows of the thin latents and of the conditions, of one encode key.
    """

    encode_key: str
    condition: LatentRole
    pairs: pa.Table
    latents: pa.Table
    catalog: pa.Table

    @classmethod
    def read(cls, store: LatentStore, encode_key: str, data: DataConfig, told: bool = False) -> Tables:
        condition = condition_role(data.alignment, data.start == "refined")

        def wanted(rows: pa.Table) -> Any:
            role = pc.or_(pc.equal(rows["role"], "thin"), pc.equal(rows["role"], condition))
            return pc.and_(pc.equal(rows["encode_key"], encode_key), role)

        latents = store.manifest_table(tuple(dict.fromkeys((*LATENT, *ROW, *NUMERICS))), wanted)
        if not data.mixed_numerics:
            _refuse_mixed(latents)
        return cls(
            encode_key,
            condition,
            store.pairs_table((*PAIR, "evidence") if condition == "thick" else PAIR),
            latents,
            store.catalog_table((*SERIES, *PLACES) if told else SERIES),
        )

    def moments(self) -> Moments:
        """Per channel over the training split's thin latents; see ``LatentStore.whitening``."""
        return moments_of(self.latents, self.catalog, self.encode_key)


def _refuse_mixed(latents: pa.Table) -> None:
    """Refuse latents of one encode key that were computed in different dtypes or on different kinds of device."""
    counts = latents.group_by(list(NUMERICS)).aggregate([([], "count_all")]).to_pylist()
    if len(counts) > 1:
        kinds = sorted(f"{row['count_all']} in {row['compute_dtype']} on {row['device_kind']}" for row in counts)
        raise InputError(
            f"latents of different arithmetic ({', '.join(kinds)})",
            expected="one dtype and one kind of device: bfloat16 on a GPU and float32 on a CPU differ by 6e-3",
            remedy="Encode anew on one kind of device (`ctpipe encode --dtype`, which gives a key of its own), or "
            "accept it with --set data.mixed_numerics=true.",
        )


def plan_pairs(
    store: LatentStore, encode_key: str, data: DataConfig, split: Split | Literal["all"], tables: Tables | None = None
) -> tuple[PlannedPairs, dict[str, int]]:
    """The split's pairs whose latents are committed, in key order, and how many were left out for which reason.

    Args:
        tables: Of this store, encode key and alignment, where they were read already.

    Raises:
        InputError: Latents that cannot be one sample: of unlike grids, or of another channel count.
    """
    tables = tables or Tables.read(store, encode_key, data)
    role, pairs, catalog = tables.condition, tables.pairs, tables.catalog
    if split != "all":
        pairs = pairs.filter(pc.equal(pairs["split"], split))
    usable = pairs.filter(pc.equal(pairs["status"], "ok"))
    usable = usable.take(pc.sort_indices(usable["pair_key"])).combine_chunks()
    left_out = {"quarantined": len(pairs) - len(usable)}
    if role == "thick":
        across = np.asarray(pc.match_substring(usable["evidence"], ACROSS_FIELDS), bool)
        left_out["another field of view than the thick series (alignment `pixel` takes them)"] = int(across.sum())
        usable = usable.filter(pa.array(~across)).combine_chunks()
    latents = tables.latents.select(LATENT)
    thin_at, condition_at = _latents_of(latents, usable, role)
    left_out["no thin latent yet"] = int((thin_at < 0).sum())
    left_out[f"no {role} latent yet"] = int(((thin_at >= 0) & (condition_at < 0)).sum())
    there = np.flatnonzero((thin_at >= 0) & (condition_at >= 0))
    usable = usable.take(pa.array(there))
    thin, condition = Latents(latents, thin_at[there]), Latents(latents, condition_at[there])

    thin_series, thick_series = (positions(usable[name], catalog["series_key"]) for name in ("thin_key", "thick_key"))
    digests = [_taken(catalog["source_digest"], at, "") for at in (thin_series, thick_series)]
    stale = _stale(digests, thin, condition, role)
    first, depth = whole_latents_inside(
        thin.column("z0_mm"), thin.column("dz_mm"), thin.shape[:, 1], matrix(usable, "overlap_mm").reshape(-1, 2)
    )
    left_out["a latent of an archive that has changed since (`ctpipe encode STORE --refresh`)"] = int(stale.sum())
    left_out["the overlap holds no whole latent"] = int((~stale & (depth == 0)).sum())
    thick = np.asarray(_taken(catalog["n_slices"], thick_series, 0), np.int64)
    thick = np.where(thick > 0, thick, condition.column("valid_zyx").reshape(-1, 3)[:, 0])

    kept = np.flatnonzero(~stale & (depth > 0))
    places = places_of(catalog, thick_series[kept], thick[kept]) if PLACES[0] in catalog.column_names else None
    planned = PlannedPairs(
        usable.take(pa.array(kept)), thin.chosen(kept), condition.chosen(kept), first[kept], depth[kept], thick[kept],
        places,
    )  # fmt: skip
    check_shapes(planned, on_thin=role != "thick")
    return planned, {reason: count for reason, count in left_out.items() if count}


def _latents_of(latents: pa.Table, pairs: pa.Table, role: LatentRole) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each pair, which rows are its thin latent and its condition; -1 where it has none."""
    named = "pair_key" if role in PAIR_ROLES else "thick_key"
    found = []
    for name, each in (("thin_key", "thin"), (named, role)):
        # By position among all rows: copying the rows of either role out would double the memory.
        own = pc.equal(latents["role"], each)
        rows = np.append(np.flatnonzero(np.asarray(own)), -1)  # index -1 is the last: still -1
        found.append(rows[positions(pairs[name], latents["key"].filter(own))])
    return found[0], found[1]


def _taken(column: pa.ChunkedArray, at: NDArray[np.int64], absent: str | int) -> pa.ChunkedArray:
    """A column's values at positions, ``absent`` where a position is -1."""
    return pc.fill_null(pc.take(column, pa.array(at, mask=at < 0)), absent)


def _stale(
    digests: Sequence[pa.ChunkedArray], thin: Latents, condition: Latents, role: LatentRole
) -> NDArray[np.bool_]:
    """Return which pairs hold a latent made from another archive than the catalog now describes.

    Args:
        digests: Of every pair's thin and thick series in the catalog.
    """
    of_condition = pair_digests(*digests) if role in PAIR_ROLES else digests[1]
    made_of = sources(condition.text("source_digest"))
    return unlike(thin.text("source_digest"), digests[0]) | unlike(made_of, of_condition)


def condition_role(alignment: str, refined: bool) -> LatentRole:
    """Role of the latents that a model starts from."""
    if refined:
        return "refined_on_thin"
    return "thick_on_thin" if alignment == "pixel" else "thick"


def places_of(catalog: pa.Table, at: NDArray[np.int64], count: NDArray[np.int64]) -> NDArray[np.float64]:
    """First position, spacing, number and thickness of the slices of thick series, (n, 4) float64.

    Args:
        at: The series' rows.

    Raises:
        InputError: A thick series that the catalog no longer has.
    """
    if (at < 0).any():
        raise InputError(
            f"{int((at < 0).sum())} pairs whose thick series the catalog does not have",
            expected="its positions, which the model is told",
            remedy="Ingest the data set again, or train with model.told=false.",
        )
    rows = catalog.select(PLACES).take(pa.array(at))
    first = [pc.list_element(chunk, 0) for chunk in rows["z_mm"].chunks]
    spacing = [pc.list_element(chunk, 0) for chunk in rows["spacing_mm_zyx"].chunks]
    columns = (pa.chunked_array(first, pa.float64()), pa.chunked_array(spacing, pa.float64()), rows["thickness_mm"])
    z0_mm, spacing_mm, thickness_mm = (np.asarray(column, np.float64) for column in columns)
    return np.column_stack([z0_mm, spacing_mm, count, thickness_mm])


def only_refiner(planned: PlannedPairs) -> str:
    """SHA-256 of the refiner that made the pairs' conditions; empty where none did.

    Raises:
        InputError: Several refiners did: one model cannot start from all of them.
    """
    found = sorted({refiner_of_digest(text) for text in pc.unique(planned.condition.text("source_digest")).to_pylist()})
    if len(found) > 1:
        raise InputError(
            "refined latents of several refiners: " + ", ".join(sha256[:12] for sha256 in found),
            expected="latents of one refiner",
            remedy="Encode the others anew: `ctpipe encode STORE --refiner RUN --refresh`.",
        )
    return found[0] if found else ""


def check_shapes(planned: PlannedPairs, on_thin: bool) -> None:
    """Refuse latents that cannot be one sample."""
    thin, condition = planned.thin, planned.condition
    channels = (LATENT_CHANNELS, 2 * LATENT_CHANNELS)
    for latents in (thin, condition):
        for row in np.flatnonzero(~np.isin(latents.shape[:, 0], channels))[:1]:
            raise InputError(
                f"a latent of {latents.shape[row, 0]} channels (series {latents[int(row)].key})",
                expected=f"{LATENT_CHANNELS} channels of means, or as many of log-variance after them",
                remedy="Choose another data.encode_key; see `ctpipe status STORE`.",
            )
    first = 0 if on_thin else 2
    for row in np.flatnonzero((thin.shape[:, first:] != condition.shape[:, first:]).any(axis=1))[:1]:
        one, other = thin[int(row)], condition[int(row)]
        raise InputError(
            f"a thin latent of shape {one.shape} beside a {other.role} latent of shape {other.shape} "
            f"(series {one.key})",
            expected="latents of one grid",
            remedy="Run `ctpipe verify STORE`; encode the pair again or exclude it.",
        )
