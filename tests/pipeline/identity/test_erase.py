from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from latentcache import Encoding, InputError, LatentMeta, LatentStore
from pipeline.identity import PrivateStore, forget, whois
from pipeline.ingest import IngestOptions, ingest, open_stores, scan as ingest_scan
from tests.support.hospital import study, write_zip


class Archive:
    """Three patients; the first shares a zip with the second, and every latent of theirs is in the store."""

    def __init__(self, root: Path) -> None:
        self.data, self.root = root / "data", root / "store"
        self.shared = write_zip(self.data / "APE" / "shared.zip", [*study("P1", 31), *study("P2", 32)])
        self.alone = write_zip(self.data / "APE" / "Doe^Jane.zip", study("P1", 33))
        write_zip(self.data / "APE" / "other.zip", study("P3", 34))
        self.store, self.private = open_stores(str(self.root))
        self.ingest()
        encoding = Encoding(vae_sha256="0" * 64, vae_architecture={}, window_center=40.0, window_width=400.0)
        key = self.store.register_encoding(encoding)
        generated = self.store.generated("0123456789abcdef", create=True)
        generated.register_encoding(encoding)
        for store in (self.store, generated):
            records = [
                store.stage(
                    np.ones((4, 1, 4, 4), np.float16),
                    LatentMeta(
                        encode_key=key,
                        key=row.series_key,
                        role=row.role,  # type: ignore[arg-type]
                        z0_mm=0.0,
                        dz_mm=4.0,
                        valid_zyx=(4, 16, 16),
                        source_digest=row.source_digest,
                    ),
                )
                for row in self.store.series()
            ]
            with store.writer() as writer:
                writer.commit(records)
        self.patient = self.private.keys.patient("P1")
        self.keys = {self.patient}
        self.keys |= {r.series_key for r in self.store.series() if r.patient_key == self.patient}
        self.keys |= {p.pair_key for p in self.store.pairs() if p.patient_key == self.patient}
        self.keys |= {r.study_key for r in self.store.series() if r.patient_key == self.patient}

    def ingest(self) -> dict[str, int]:
        return ingest(str(self.data), self.store, self.private, IngestOptions()).archives


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    return Archive(tmp_path)


def everything(root: Path) -> str:
    """All that the files below a folder say, their names included."""
    parts = []
    for path in sorted(root.rglob("*")):
        parts.append(str(path.relative_to(root)))
        if path.suffix == ".parquet":
            parts.append(json.dumps(pq.read_table(path).to_pylist(), default=str))
        elif path.is_file():
            parts.append(path.read_bytes().decode("latin-1"))
    return "\n".join(parts)


def test_nothing_of_a_forgotten_patient_is_left_anywhere(archive: Archive) -> None:
    before = everything(archive.root)
    planted = {*archive.keys, "P1", "1.2.31", "1.2.33", "Doe^Jane", "Name^P1"}
    assert all(text in before for text in planted)
    summary = forget(archive.store, archive.private, archive.patient)
    assert (summary.series, summary.pairs, summary.latents, summary.generated_latents) == (4, 2, 4, 4)
    after = everything(archive.root).replace(f"private/forgotten/{archive.patient}.json", "")
    assert [text for text in planted if text in after] == []


def test_the_others_stay_whole(archive: Archive) -> None:
    forget(archive.store, archive.private, archive.patient)
    store = LatentStore.open(archive.store.url)
    assert {row.patient_key for row in store.series()} == {archive.private.keys.patient(p) for p in ("P2", "P3")}
    assert len(store.pairs()) == 2
    for record in store.records():
        assert store.read(record).shape == (4, 1, 4, 4)
    for row in store.series():
        assert archive.private.pointer(row.series_key).members
    assert archive.private.table("archives").num_rows == 3


def test_a_forgotten_patient_does_not_come_back(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(archive.store, archive.private, archive.patient)
    with monkeypatch.context() as patch:
        patch.setattr(ingest_scan, "open_archive", None)
        assert archive.ingest() == {"unchanged": 3}
    write_zip(archive.alone, study("P1", 33), extra=[("more", b"x")])
    write_zip(archive.shared, [*study("P1", 31), *study("P2", 32)], extra=[("more", b"x")])
    assert archive.ingest() == {"changed": 2, "unchanged": 1}
    assert archive.patient not in {row.patient_key for row in archive.store.series()}
    assert "Doe^Jane" not in everything(archive.root)


def test_an_interrupted_forgetting_is_completed(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PrivateStore, "rewrite_without", die)
        with pytest.raises(KeyboardInterrupt):
            forget(archive.store, archive.private, archive.patient)
    forget(archive.store, archive.private, archive.patient)
    after = everything(archive.root).replace(f"private/forgotten/{archive.patient}.json", "")
    assert [text for text in (*archive.keys, "P1", "Doe^Jane") if text in after] == []
    forget(archive.store, archive.private, archive.patient)


def test_a_dry_run_only_counts(archive: Archive) -> None:
    before = everything(archive.root)
    summary = forget(archive.store, archive.private, archive.patient, dry_run=True)
    assert (summary.series, summary.pairs, summary.latents) == (4, 2, 4)
    assert everything(archive.root) == before


def test_an_unknown_patient_is_refused(archive: Archive) -> None:
    with pytest.raises(InputError, match="no such patient"):
        forget(archive.store, archive.private, "f" * 16)


def test_whois_answers_for_every_kind_of_key(archive: Archive) -> None:
    keys, private, store = archive.private.keys, archive.private, archive.store
    pair = next(p for p in store.pairs() if p.patient_key == archive.patient)
    asked = {
        archive.patient: ("patient", 4),
        keys.study("1.2.31"): ("study", 2),
        keys.series("1.2.31.5"): ("series", 1),
        pair.pair_key: ("pair", 2),
        keys.archive(str(archive.alone)): ("archive", 0),
    }
    for key, (kind, n) in asked.items():
        answer = whois(private, key, store)
        assert (answer.kind, len(answer.series)) == (kind, n)
        assert all(one.patient_id == "P1" for one in answer.series)
    assert whois(private, keys.archive(str(archive.alone))).archives == (str(archive.alone),)
    text = whois(private, keys.series("1.2.31.5")).text()
    assert "Name^P1" in text
    assert str(archive.shared) in text


def test_every_question_is_written_down_even_without_an_answer(archive: Archive) -> None:
    with pytest.raises(InputError, match="of this store has the key"):
        whois(archive.private, "f" * 16)
    whois(archive.private, archive.patient)
    log = archive.private.whois_log()
    assert [(q["key"], q["found"]) for q in log] == [("f" * 16, False), (archive.patient, True)]
    assert log[0]["time"].startswith(time.strftime("%Y-", time.gmtime()))
