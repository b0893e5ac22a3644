"""decode and interpolate killed while they write: every output folder is whole or absent, and a second run finishes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.pipeline.decode.test_task import World
from tests.support.prepared import Script

_COMMON = """
import os, signal
from pathlib import Path
from tests.support.average_codec import AverageCodec
from pipeline.writing import ct_image as dicom_write
from pipeline.decode.compose import ComposeSettings
from pipeline.decode.samples import WriteSettings
from pipeline.volume.window import Window

written, write = [0], dicom_write._write_file

def write_or_die(path, parts):
    written[0] += 1
    if written[0] == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, parts)

dicom_write._write_file = write_or_die
out, window = Path({out!r}), Window(40, 400)
writing = WriteSettings(out, window, uncertainty=True)
"""

_DECODE = (
    _COMMON
    + """
from latentcache.store import LatentStore
from pipeline.decode import task as decode
from pipeline.decode import DecodeSettings
from pipeline.identity.private_store import PrivateStore

store, private = LatentStore.open({url!r}), PrivateStore.open({url!r})
(encode_key,) = store.encode_keys()
for task in decode.plan(store, private.pointer, private.identity, encode_key):
    if not (out / task.key).exists():
        decode.decode_one(AverageCodec(), decode.prepare(task, threads=1), settings=DecodeSettings(writing))
"""
)

_INTERPOLATE = (
    _COMMON
    + """
from pipeline.archive import open_archive
from pipeline.workflows.interpolation.interpolate import InterpolateSettings, interpolate
from pipeline.workflows.interpolation.thick_study import choose_thick, pointer_of
from pipeline.identity.keys import Keys
from pipeline.reading.series import scan
from pipeline.reading.volume_reader import read_series

chosen = choose_thick(scan(open_archive({zipped!r})).series, spacing_mm=1.0)
thick = read_series(pointer_of(chosen, "k"), threads=1)
two = lambda condition: [condition - 0.05, condition + 0.05]
interpolate(thick, chosen, Keys(b"0123456789abcdef"), AverageCodec(), two, InterpolateSettings(writing))
"""
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def run(code: str) -> int:
    process = Script(code)
    _, said = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), said[-2000:]
    return process.returncode


def folders(out: Path) -> dict[str, int]:
    """Visible folders by name, with the number of their files."""
    return {p.name: len(os.listdir(p)) for p in out.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("after", [1, 46, 47, 100])
def test_decode_killed_at_any_file(world: World, tmp_path: Path, after: int) -> None:
    said = {"out": str(tmp_path), "url": world.url}
    assert run(_DECODE.format(after=after, **said)) == -signal.SIGKILL
    whole = (after - 1) // 46
    assert list(folders(tmp_path).values()) == [46] * whole
    assert run(_DECODE.format(after=0, **said)) == 0
    assert list(folders(tmp_path).values()) == [46] * 4
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("after", [1, 30, 60])
def test_interpolate_killed_at_any_file(world: World, tmp_path: Path, after: int) -> None:
    zipped = sorted(Path(world.url).parent.rglob("*.zip"))[0]
    said = {"out": str(tmp_path), "zipped": str(zipped)}
    assert run(_INTERPOLATE.format(after=after, **said)) == -signal.SIGKILL
    left = folders(tmp_path)
    assert all(name.endswith("-uncertainty") for name in left), "the uncertainty comes first, the series last"
    assert run(_INTERPOLATE.format(after=0, **said)) == 0
    found = folders(tmp_path)
    assert len(found) == 2
    assert len(set(found.values())) == 1
    assert all(found[name] == n for name, n in left.items())
