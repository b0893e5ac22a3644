"""Pixels to HU: every slice is decoded straight into its slot of one preallocated volume, in threads where asked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from latentcache import InputError
from latentcache.storage import local_path
from pipeline.archive import Scratch, Source, is_nifti, open_archive
from pipeline.reading.assembly import order
from pipeline.reading.instance import Instance
from pipeline.reading.nifti import read_nifti
from pipeline.reading.pixels import FrameReader, hu_dtype, rescale_into
from pipeline.reading.read_headers import read_instances, source_header
from pipeline.reading.series import NIFTI_FLAG, ScannedSeries, digest_and_seal, pointer_of
from pipeline.reading.stacks import Stack
from pipeline.volume import SeriesPointer, SimulatedThick, Volume, on_even_positions

MAX_VOLUME_BYTES = 16 << 30


Slice = tuple[Source, Instance]


def read_series(pointer: SeriesPointer, *, threads: int = 1) -> Volume:
    """Read a series as HU, and refuse whatever is not the series that the pointer was made for.

    Headers are parsed and judged anew. Members are found by their number and taken by what they are: every slice must
    bear the SeriesInstanceUID, and all of them together the seal, that ingest recorded; a member of a zip must match
    the CRC-32 of its directory, and a file of a folder its size and time before and after it was read. What was read
    is in `Volume.source_digest`.

    Args:
        pointer: Slices in ascending order, possibly of several archives.
        threads: Decoding threads; codecs release the GIL.

    Raises:
        InputError: An archive or slice is gone, damaged, of another series, or no longer what it was; names no file.
    """
    with ExitStack() as opened:
        if is_nifti(pointer.members[0][0] if pointer.members else ""):
            volume = _read_nifti(pointer)
        else:
            volume = _read(pointer, _slices(pointer, opened), threads)
        volume = on_even_positions(volume) if pointer.even else volume
        return SimulatedThick.from_json(pointer.simulated).of(volume) if pointer.simulated else volume


def check_series(pointer: SeriesPointer) -> str:
    """Check from headers alone that a series is what ingest found; returns its digest.

    Raises:
        InputError: As `read_series`, but for damage that only pixels show.
    """
    if is_nifti(pointer.members[0][0] if pointer.members else ""):
        return _read_nifti(pointer).source_digest
    with ExitStack() as opened:
        return _recognised(pointer, _slices(pointer, opened))[1]


def _read_nifti(pointer: SeriesPointer) -> Volume:
    """The volume of a NIfTI file, once its bytes are known to be those that the pointer was made for."""
    path = local_path(pointer.members[0][0])
    if not path.is_file():
        raise _changed("its file is no longer there")
    found = read_nifti(path)
    digest = found.digest[:32]
    if pointer.seal not in ("", digest) or len(found.volume.hu) != len(pointer.members):
        raise _changed("its file holds other bytes than were ingested")
    return replace(found.volume, flags=(*found.volume.flags, NIFTI_FLAG), source_digest=digest)


def _slices(pointer: SeriesPointer, opened: ExitStack) -> list[Slice]:
    """Return the slices that the pointer names, headers parsed; sources are closed with ``opened``."""
    sources: dict[str, Source] = {}
    for url in dict.fromkeys(url for url, _, _ in pointer.members):
        sources[url] = open_archive(url)
        opened.callback(sources[url].close)
    found: dict[tuple[str, int, int], Instance] = {}
    for url, source in sources.items():
        wanted = frozenset(index for where, index, _ in pointer.members if where == url)
        problems: list[tuple[int, str]] = []
        for one in read_instances(source, problems, [], wanted):
            found[(url, one.member, one.frame)] = one
        if problems:
            raise _changed(problems[0][1])
    missing = [where for where in pointer.members if where not in found]
    if missing or not pointer.members:
        raise _changed(f"{len(missing)} of {len(pointer.members)} slices are no longer there")
    return [(sources[where[0]], found[where]) for where in pointer.members]


def read_scanned(source: Source, scanned: ScannedSeries, *, threads: int = 1) -> Volume:
    """Read a series that was just scanned with ``keep_instances=True``, without parsing its headers again.

    Raises:
        InputError: Quarantined, or its pixels are damaged.
    """
    if scanned.status != "ok" or scanned.geometry is None:
        raise InputError(
            f"a series that cannot be read: {scanned.reason or 'it has no geometry'}",
            expected="a series whose status is ok",
            remedy="Exclude it, or export it again.",
        )
    if len(scanned.instances) != len(scanned.pointer_members):
        return read_series(pointer_of(scanned), threads=threads)
    stack = Stack(list(scanned.instances), flags=list(scanned.flags), geometry=scanned.geometry)
    volume = _fill(stack, [(source, one) for one in scanned.instances], threads)
    return replace(volume, source_digest=scanned.source_digest)


def _recognised(pointer: SeriesPointer, slices: list[Slice]) -> tuple[Stack, str]:
    """The slices as a stack, and their digest, once they are known to be those that the pointer was made for."""
    # A file without the UID got one at ingest (`series._give_uids`), which only the seal can confirm.
    others = sum(one.series_uid not in ("", pointer.series_uid) for _, one in slices) if pointer.series_uid else 0
    if others:
        raise _changed(f"{others} of {len(slices)} slices are of another series now")
    stack = Stack([one for _, one in slices])
    order(stack, lambda a, b: False)
    if stack.status == "quarantined" or stack.geometry is None:
        raise _changed(stack.reason)
    if any(kept is not one for kept, (_, one) in zip(stack.instances, slices, strict=True)):
        raise _changed("its slices are in another order than recorded")
    digest, seal = digest_and_seal(slices)
    if pointer.seal and seal != pointer.seal:
        raise _changed("its slices are not the files that were ingested")
    return stack, digest


def _read(pointer: SeriesPointer, slices: list[Slice], threads: int) -> Volume:
    stack, digest = _recognised(pointer, slices)
    return replace(_fill(stack, slices, threads), source_digest=digest)


def _fill(stack: Stack, slices: list[Slice], threads: int) -> Volume:
    """Decode every slice into its slot. Slices of one file are decoded from one copy of it."""
    geometry = stack.geometry
    assert geometry is not None
    dtype = hu_dtype(stack.instances)
    if int(np.prod(geometry.shape_zyx)) * dtype.itemsize > MAX_VOLUME_BYTES:
        raise InputError(
            f"a volume of {geometry.shape_zyx} voxels",
            expected=f"at most {MAX_VOLUME_BYTES >> 30} GiB",
            remedy="Its header is wrong, or the series must be split before ingest.",
        )
    hu = np.empty(geometry.shape_zyx, dtype)
    files: dict[tuple[int, int], list[int]] = {}
    for slot, (source, one) in enumerate(slices):
        files.setdefault((id(source), one.member), []).append(slot)

    def decode_file(slots: list[int], scratch: Scratch, pool: ThreadPoolExecutor | None = None) -> frozenset[str]:
        source, first = slices[slots[0]]
        reader = FrameReader(source.read_into(first.member, scratch), first)

        cells = scratch.cells(first.form.rows, first.form.columns) if len(slots) == 1 else None

        def decode(slot: int) -> frozenset[str]:
            one = slices[slot][1]
            return rescale_into(reader.stored_values(one, cells), one, hu[slot])

        return frozenset().union(*(pool.map if pool else map)(decode, slots))

    todo = iter(files.values())

    def decode_on() -> frozenset[str]:
        """Take files while there are any: a task for each would cost more than its share of the parsing."""
        facts: frozenset[str] = frozenset()
        scratch = Scratch()
        try:
            for slots in todo:
                facts |= decode_file(slots, scratch)
        except BaseException:
            for _ in todo:  # nothing is left for the other threads to begin
                pass
            raise
        return facts

    if threads <= 1:
        facts = decode_on()
    else:
        with ThreadPoolExecutor(threads) as pool:
            if len(files) < threads:
                facts = frozenset().union(*(decode_file(slots, Scratch(), pool) for slots in todo))
            else:
                facts = frozenset().union(*(part.result() for part in [pool.submit(decode_on) for _ in range(threads)]))
    flags = tuple(dict.fromkeys([*stack.flags, *sorted(facts)]))
    return Volume(hu, geometry, source_header(stack.instances), flags)


def _changed(found: str) -> InputError:
    return InputError(
        f"a series that can no longer be read as it was ingested: {found}",
        expected="the archive as it was",
        remedy="Run `ctpipe ingest` again, which records what the archive holds now, or exclude the series.",
    )
