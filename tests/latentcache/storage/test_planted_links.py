"""Links that another user planted in OUT, STORE and PRIVATE are never written through."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from latentcache import InputError, StoreError
from latentcache.storage import LocalLocation, atomic_folder, fresh_draft, is_foreign, write_text, written_aside
from pipeline.identity import PrivateStore

Plant = Callable[[Path, Path], Path]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Makes a link of another user's: the superuser gives it away, others take themselves for somebody else."""
    if os.geteuid() != 0:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)

    def plant_link(link: Path, target: Path) -> Path:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
        if os.getuid() == 0:
            os.lchown(link, 65534, 65534)
        return link

    return plant_link


def test_a_draft_does_not_write_through_a_link_planted_in_its_place(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".report.html.part").symlink_to(victim)
    write_text(tmp_path / "out" / "report.html", "new")
    assert victim.read_text() == "precious"
    assert (tmp_path / "out" / "report.html").read_text() == "new"
    assert not (tmp_path / "out" / "report.html").is_symlink()
    (tmp_path / "out" / "report.html").unlink()
    (tmp_path / "out" / "report.html").symlink_to(victim)
    write_text(tmp_path / "out" / "report.html", "new")
    assert victim.read_text() == "precious"
    with written_aside(tmp_path / "out" / "x") as draft:
        assert draft.stat().st_size == 0


def test_what_is_left_of_a_draft_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("half")
    assert fresh_draft(tmp_path / "d").read_bytes() == b""


def test_a_folder_is_not_written_behind_a_link_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for target in ("elsewhere", "nowhere"):
        out = tmp_path / f"link to {target}"
        out.symlink_to(tmp_path / target)
        with pytest.raises(InputError, match="exists"), atomic_folder(out):
            pass
    assert list((tmp_path / "elsewhere").iterdir()) == []
    guessed = tmp_path / f".series.{os.uname().nodename}.{os.getpid()}.partial"
    guessed.symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "series") as partial:
        (partial / "1.dcm").write_bytes(b"x")
    assert [p.name for p in (tmp_path / "series").iterdir()] == ["1.dcm"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_store_does_not_write_through_a_folder_that_another_user_linked(tmp_path: Path, plant: Plant) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    place = LocalLocation(tmp_path / "store")
    place.put("mine.json", b"1")
    plant(tmp_path / "store" / "snapshots", victim)
    if os.getuid() != 0:
        pytest.skip("the store's own folder counts as another user's too")
    for write in (lambda: place.put("snapshots/deep/1.json", b"1"), lambda: place.put_once("snapshots/2.json", [b"1"])):
        with pytest.raises(StoreError, match="another user"):
            write()
    assert list(victim.iterdir()) == []
    (tmp_path / "disk").mkdir()
    (tmp_path / "store" / "latents").symlink_to(tmp_path / "disk")
    place.put("latents/1", b"1")
    assert (tmp_path / "disk" / "1").read_bytes() == b"1"


def test_a_file_of_a_store_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    place = LocalLocation(tmp_path / "store")
    place.put("lease.json", b"1")
    for name in ("a.json", "lease.json"):
        (tmp_path / "store" / name).unlink(missing_ok=True)
        (tmp_path / "store" / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        place.put_once("a.json", [b"2"])
    place.put("lease.json", b"2")
    assert victim.read_text() == "precious"
    (tmp_path / "store" / "b.json").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError):
        place.put_once("b.json", [b"2"])
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("there", [True, False])
def test_identities_are_not_written_behind_a_link_that_another_user_made(
    tmp_path: Path, plant: Plant, there: bool
) -> None:
    open_to_all = tmp_path / "open to all"
    if there:
        open_to_all.mkdir(mode=0o777)
    plant(tmp_path / "store" / "private", open_to_all)
    with pytest.raises(StoreError, match="another user") as error:
        PrivateStore.open(str(tmp_path / "store"), create=True)
    assert str(tmp_path) not in str(error.value)
    assert not there or list(open_to_all.iterdir()) == []


def test_identities_are_not_written_into_another_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "store" / "private").mkdir(parents=True)
    os.chown(tmp_path / "store" / "private", 65533 if os.getuid() == 0 else -1, -1)
    monkeypatch.setattr(os, "geteuid", lambda: 65532)
    assert is_foreign(tmp_path / "store" / "private")
    with pytest.raises(InputError, match="belongs to another user"):
        PrivateStore.open(str(tmp_path / "store"), create=True)
    assert list((tmp_path / "store" / "private").iterdir()) == []


def test_a_link_of_ones_own_is_followed(tmp_path: Path) -> None:
    (tmp_path / "secure disk").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "private").symlink_to(tmp_path / "secure disk")
    PrivateStore.open(str(tmp_path / "store"), create=True)
    assert (tmp_path / "secure disk" / "secret").exists()
