"""One store encoded in-process, by embedded dask and on Ray: the same bytes and the same manifest."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pydicom
import pytest
from typer.testing import CliRunner

from cli.main import app
from latentcache import InputError, LatentStore
from latentcache.tables import timings_table
from pipeline.decode.store import set_up as set_up_decoder
from pipeline.encode import EncodeSettings
from pipeline.encode.plan import EncodePlan
from pipeline.encode.store import load_encoder, set_up
from pipeline.engines import GroupCommit, Outcome, Progress, mark, read_progress
from pipeline.engines.group_commit import INTERVAL_S
from pipeline.identity import PrivateStore
from tests.support.small_site import Site

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ENGINES = ("inline", "dask", "ray")


def ctpipe(*words: str | Path, code: int = 0) -> dict[str, Any]:
    """Run a command in this process and return its JSON."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    assert (done.return_value or 0) == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def manifest(store: Path) -> list[dict[str, Any]]:
    """Rows without the attempt's own path: all that must be equal, checksums of the bytes among it."""
    rows = [asdict(record) for record in LatentStore.open(store).records()]
    for row in rows:
        del row["path"]
    return sorted(rows, key=lambda row: (row["key"], row["role"]))


def encode_with_each(ingested: Path, folder: Path, round_trip: str = "0.3") -> dict[str, Path]:
    stores = {name: folder / name for name in ENGINES}
    for name, store in stores.items():
        shutil.copytree(ingested, store)
        spread = () if name == "inline" else ("--workers", "2")
        done = ctpipe("encode", store, "--engine", name, *spread, "--threads", "1", "--round-trip", round_trip)
        assert done["failed"] == {}
        assert done["committed"] == len(manifest(store))
    return stores


def assert_equal_stores(stores: dict[str, Path], latents: int) -> None:
    reference = manifest(stores["inline"])
    assert len(reference) == latents
    for name in ("dask", "ray"):
        assert manifest(stores[name]) == reference, name
    # The checksums are of what lies there, not copied from somewhere.
    opened = [LatentStore.open(stores[name]) for name in ENGINES]
    first = opened[0].records()[0]
    others = [store.find(first.key, first.role) for store in opened[1:]]
    for store, record in zip(opened[1:], others, strict=True):
        assert record is not None
        assert record.path != first.path
        assert store.read(record).tobytes() == opened[0].read(first).tobytes()


@pytest.fixture(scope="module")
def ingested(ingested_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingested_site.copy(tmp_path_factory.mktemp("agree")).store


def test_engines_give_equal_bytes_and_equal_manifests(ingested: Path, ray_session: None, tmp_path: Path) -> None:
    stores = encode_with_each(ingested, tmp_path)
    assert_equal_stores(stores, latents=12)
    for store in stores.values():
        timings = LatentStore.open(store).table("timings").to_pylist()
        assert len(timings) == 4
        for row in timings:
            assert (row["stage"], row["outcome"], row["device"]) == ("encode", "ok", "cpu")
            assert {"prepare", "run", "vae", "store", "window", "proof", "attempts"} <= dict(row["values"]).keys()


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_decode_writes_equal_files_on_every_engine(ingested: Path, ray_session: None, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(ingested, store)
    ctpipe("encode", store, "--engine", "inline", "--threads", "1", "--roles", "thin")
    written = {}
    for name in ENGINES:
        spread = () if name == "inline" else ("--workers", "2")
        out = tmp_path / name
        done = ctpipe("decode", store, out, "--engine", name, *spread, "--threads", "1", "--consistency")
        assert (len(done["written"]), done["failed"]) == (4, {})
        written[name] = files(out)
    assert len(written["inline"]) == 4 * 36
    assert written["dask"] == written["inline"]
    assert written["ray"] == written["inline"]


def test_ingest_gives_equal_catalogs_on_every_engine(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CTPIPE_SECRET", "ab" * 32)
    ctpipe("phantom", tmp_path / "data", "--patients", "3", "--size", "32", "--thin-slices", "36")
    (tmp_path / "data" / "broken.zip").write_bytes(b"PK\x03\x04 cut off")
    found = {}
    for name in ("inline", "ray"):
        ctpipe("ingest", tmp_path / "data", tmp_path / name, "--engine", name, code=3)
        store = LatentStore.open(tmp_path / name)
        found[name] = [sorted(map(repr, rows)) for rows in (store.series(), store.pairs())]
    assert [len(rows) for rows in found["inline"]] == [7, 3]
    assert found["ray"] == found["inline"]


def test_evaluate_gives_equal_scores_on_every_engine(trained_site: Site, ray_session: None, tmp_path: Path) -> None:
    site = trained_site.copy(tmp_path)
    store, run = site.store, site.run
    scored = {}
    for name in ("inline", "ray"):
        mine = tmp_path / f"run-{name}"
        shutil.copytree(run, mine)
        spread = ("--engine", name, *(() if name == "inline" else ("--workers", "2")))
        done = ctpipe("evaluate", store, mine, "--split", "train", "--steps", "1", "--threads", "1", *spread)
        cases = files(mine / "evaluation" / "train" / "cases")
        assert len(cases) == done["cases"] >= 2
        assert done["failures"] == {}
        scored[name] = cases
    assert scored["ray"] == scored["inline"]


def test_a_decoding_worker_that_sees_another_folder_says_so(tmp_path: Path) -> None:
    with mark(tmp_path / "out") as seen:
        assert set_up_decoder("cpu", seen=seen, threads=1, load=lambda device: device) == "cpu"  # type: ignore[arg-type,return-value,comparison-overlap]
    assert not (tmp_path / "out").exists(), "nothing was written, so nothing is left"
    with pytest.raises(InputError, match="does not see the output folder"):
        set_up_decoder("cpu", seen=seen, threads=1, load=lambda device: device)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ray-address", "auto"), "without Ray"),
        (("--engine", "ray", "--dask-scheduler", "tcp://h:1"), "without dask"),
    ],
)
def test_an_address_is_for_its_engine(ingested: Path, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    for command in (("encode", ingested), ("decode", ingested, tmp_path / "out")):
        with pytest.raises(InputError, match=said):
            ctpipe(*command, *words)


def slab(archive: Path, out: Path, mm: float) -> Path:
    """A zip with those images of a zip that lie within ``mm`` of the middle of its extent along z, as they are."""
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(out, "w") as part:
        files = {info.filename: whole.read(info) for info in whole.infolist() if not info.is_dir()}
        z = {}
        for name, data in files.items():
            with contextlib.suppress(pydicom.errors.InvalidDicomError):
                header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
                z[name] = float(header.ImagePositionPatient[2])
        middle = (min(z.values()) + max(z.values())) / 2
        for name in (name for name, at in z.items() if abs(at - middle) <= mm):
            part.writestr(name, files[name])
    return out


@pytest.mark.real
def test_engines_agree_on_a_slab_of_the_genuine_pair(real_data: Path, ray_session: None, tmp_path: Path) -> None:
    """The genuine pair's own bytes, 24 mm of them, so that it takes minutes off the whole; the whole is below."""
    (archive,) = (real_data / "ape-layout").rglob("*.zip")
    (tmp_path / "data").mkdir()
    slab(archive, tmp_path / "data" / "slab.zip", 12.0)
    ctpipe("ingest", tmp_path / "data", tmp_path / "store")
    (pair,) = LatentStore.open(tmp_path / "store").pairs()
    assert pair.status == "ok"
    assert_equal_stores(encode_with_each(tmp_path / "store", tmp_path, round_trip="0"), latents=3)


@pytest.mark.real
@pytest.mark.slow
def test_engines_agree_on_the_genuine_pair(real_data: Path, ray_session: None, tmp_path: Path) -> None:
    ctpipe("ingest", real_data / "ape-layout", tmp_path / "store")
    assert_equal_stores(encode_with_each(tmp_path / "store", tmp_path), latents=3)


def test_a_worker_that_sees_no_store_or_another_one_says_so(ingested: Path, tmp_path: Path) -> None:
    settings = EncodeSettings(torch_threads=1)
    store = LatentStore.open(ingested)
    facts = {"fingerprint": store.secret_fingerprint, "encode_key": "0" * 16, "settings": settings}
    with pytest.raises(InputError, match="does not see the store") as unseen:
        set_up("cpu", store_url=str(tmp_path / "nowhere"), **facts)  # type: ignore[arg-type]
    assert "s3://" in unseen.value.remedy
    LatentStore.create(tmp_path / "other", secret_fingerprint="f" * 16)
    with pytest.raises(InputError, match="sees another store"):
        set_up("cpu", store_url=str(tmp_path / "other"), **facts)  # type: ignore[arg-type]


def test_a_worker_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"no CUDA device.*--gpus 0"):
        load_encoder("cuda", EncodeSettings())


def test_gpu_share_is_for_ray(ingested: Path) -> None:
    with pytest.raises(InputError, match="gpu-share without Ray"):
        ctpipe("encode", ingested, "--gpus", "1", "--gpu-share", "0.5")


def test_planning_looks_up_archives_only_as_tasks_are_taken(ingested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    private = PrivateStore.open(str(ingested))
    look_up = private.pointer
    monkeypatch.setattr(private, "pointer", lambda key: (asked.append(key), look_up(key))[1])
    plan = EncodePlan(LatentStore.open(ingested), "0" * 16, private.pointer, ("thin", "thick", "thick_on_thin"))
    assert len(plan) == 4
    assert asked == []
    next(iter(plan))
    assert len(asked) == 2


class SlowWriter:
    """A store whose commits take a while, and which notes how many tasks each one brought."""

    def __init__(self, fails: bool = False) -> None:
        self.sizes: list[int] = []
        self.fails = fails

    def commit(self, records: list[Any], timings: list[dict[str, Any]]) -> list[Any]:
        if self.fails:
            raise InputError("the lease is lost", expected="one driver", remedy="Stop the other.")
        self.sizes.append(len(timings))
        timings_table(timings)
        return records


def outcome(number: int) -> Outcome[Any, Any]:
    from pipeline.encode import EncodeTask
    from pipeline.engines import StagedLatents

    task = EncodeTask(f"{number:016x}", "0" * 16, None, None, ())
    return Outcome(task, StagedLatents(task.name, ()), seconds={"run": 1.0})


def test_commits_are_grouped_and_none_is_left_out() -> None:
    writer = SlowWriter()
    noted: list[int] = []
    with GroupCommit(writer, "0" * 16, "cpu", lambda n, latents: noted.append(n)) as commits:  # type: ignore[arg-type]
        for number in range(500):
            commits.put(outcome(number))
    assert sum(writer.sizes) == 500
    assert len(writer.sizes) < 20
    assert noted[-1] == 500
    assert INTERVAL_S <= 1.0


def test_a_failed_commit_stops_the_driver() -> None:
    with (
        pytest.raises(InputError, match="lease is lost"),
        GroupCommit(SlowWriter(fails=True), "0" * 16, "cpu", lambda n, latents: None) as commits,  # type: ignore[arg-type]
    ):
        commits.put(outcome(1))


def test_progress_of_a_running_job_is_in_the_store(ingested: Path) -> None:
    location = LatentStore.open(ingested).location
    assert read_progress(location) is None
    progress = Progress(location, "0" * 16, planned=10)
    progress.note(attempted=4, committed=11)
    found = read_progress(location)
    assert found is not None
    assert (found["planned"], found["attempted"], found["done"]) == (10, 4, 11)
    assert found["seconds_left"] > 0
    assert ctpipe("status", ingested)["running"]["attempted"] == 4
    progress.end()
    assert ctpipe("status", ingested)["running"] is None
