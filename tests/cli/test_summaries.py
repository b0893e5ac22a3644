"""Texts at the end of commands: they name what needs the reader's attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cli.summaries import encode_text, sources_text, spell_seconds, verify_text


def encoded(**changes: Any) -> Any:
    plain = {
        "planned": 2, "committed": 3, "already": 1, "encode_key": "k", "snapshot": 4, "retired": 0, "stale": 0,
        "restored": 0, "damaged": 0, "hopeless": {}, "pinned": {}, "failed": {}, "unpaired_by_pixels": {},
        "mirrored": {},
    }  # fmt: skip
    return SimpleNamespace(**(plain | changes))


def job(**changes: Any) -> Any:
    return SimpleNamespace(**({"dry_run": False, "refresh": False, "repair": False} | changes))


def test_a_plain_encoding_takes_two_lines() -> None:
    assert encode_text(encoded(), job()).splitlines() == [
        "encoded 2 studies or series (3 latents committed, 1 already there)",
        "encode key k, snapshot 4",
    ]


def test_mirrored_pairs_name_their_encode_keys() -> None:
    lines = encode_text(encoded(mirrored={"y": "m", "x": "n"}), job()).splitlines()
    assert lines[2:] == ["mirrored along x: encode key n", "mirrored along y: encode key m"]


def test_stale_latents_name_the_option_that_replaces_them() -> None:
    assert "give --refresh" in encode_text(encoded(stale=2), job())
    assert "would be retired" in encode_text(encoded(stale=2), job(refresh=True, dry_run=True))


def test_a_repair_names_what_cannot_be_repaired_and_whom_it_holds_up() -> None:
    text = encode_text(encoded(damaged=3, hopeless={"a": "gone"}, pinned={"run": 1}), job(repair=True))
    assert "3 latents are damaged or gone, 2 retired" in text
    assert "cannot be repaired a: gone" in text
    assert "run run is pinned" in text


def test_problems_of_a_store_come_with_their_place() -> None:
    facts = dict.fromkeys(("latents", "fragments", "snapshots", "encodings", "bytes", "orphans"), 1)
    problem = {"store": "generated/x", "subject": "key", "what": "checksum"}
    assert verify_text({**facts, "problems": [problem]}).splitlines()[0] == "generated/x key: checksum"
    assert "no problems" in verify_text({**facts, "problems": []})


def test_latents_of_another_series_name_the_remedy() -> None:
    found = {"foreign": {"k thin": 0.5}, "unread": {}, "skipped": {}, "retired": 0, "pairs_reopened": 0, "compared": 3}
    assert "give --retire" in "\n".join(sources_text(found))


def test_seconds_are_spelled_in_the_unit_that_fits() -> None:
    assert [spell_seconds(s) for s in (0.2, 89, 90, 5400)] == ["1 s", "89 s", "2 min", "1.5 h"]
