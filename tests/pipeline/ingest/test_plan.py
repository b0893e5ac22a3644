from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
from hypothesis import given, settings, strategies as st

from pipeline.archive import FoundArchive
from pipeline.identity import Keys
from pipeline.ingest.plan import found_table, plan_archives

KEYS = Keys(b"0123456789abcdef")
FOUND = st.builds(
    FoundArchive,
    url=st.sampled_from([f"/d/{i}.zip" for i in range(8)]),
    size=st.integers(1, 3),
    mtime_ns=st.integers(1, 3),
    etag=st.sampled_from(["", "e", "f"]),
    category=st.sampled_from(["APE", "non-APE"]),
)
LISTING = st.lists(FOUND, max_size=8, unique_by=lambda f: f.url)


def known_table(archives: list[FoundArchive]) -> pa.Table:
    digests = pa.array([f"digest of {f.url}" for f in archives], pa.string())
    return found_table(archives, KEYS).append_column("digest", digests)


@settings(max_examples=200, deadline=None)
@given(LISTING, LISTING)
def test_the_joined_plan_is_the_plain_comparison(found: list[FoundArchive], known: list[FoundArchive]) -> None:
    plan = plan_archives(found_table(found, KEYS), known_table(known))
    seen = {f.url: f for f in known}

    def same(f: FoundArchive) -> bool:
        k = seen.get(f.url)
        stamp = k is not None and (f.etag == k.etag if f.etag else f.mtime_ns == k.mtime_ns)
        return k is not None and stamp and f.size == k.size

    assert plan.unchanged == tuple(i for i, f in enumerate(found) if same(f))
    assert plan.to_scan == tuple(i for i, f in enumerate(found) if not same(f))
    assert plan.known_digest == tuple(f"digest of {found[i].url}" if found[i].url in seen else "" for i in plan.to_scan)
    assert plan.relabelled == tuple(i for i in plan.unchanged if found[i].category != seen[found[i].url].category)


def test_a_rescan_reads_everything_whatever_is_known() -> None:
    found = [FoundArchive("/d/a.zip", 1, 1, "", "APE")]
    plan = plan_archives(found_table(found, KEYS), known_table(found), rescan=True)
    assert (plan.to_scan, plan.known_digest, plan.unchanged) == ((0,), ("",), ())


def test_a_moved_archive_is_another_archive() -> None:
    found = FoundArchive("/d/a.zip", 1, 1, "", "APE")
    plan = plan_archives(found_table([replace(found, url="/e/a.zip")], KEYS), known_table([found]))
    assert plan.to_scan == (0,)
