"""Archives in place: members by index, limits, damage, and ranged reads of a zip in an object store."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from latentcache import InputError
from pipeline.archive import Limits, Scratch, open_archive
from pipeline.archive.object_store import ObjectFile
from pipeline.archive.source import FolderSource, ZipSource
from pipeline.archive.zip_directory import LOCAL_HEADER, ArchiveError, Member, head_of, head_range
from pipeline.reading import pointer_of, read_scanned, read_series, scan
from tests.support.dicom_files import series_files, zip_of


class Memory:
    """A range reader over bytes that counts what it was asked for."""

    def __init__(self, data: bytes) -> None:
        self._data, self.size, self.stamp, self.asked = data, len(data), "memory", 0

    def read(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        part = self._data[offset : offset + length]
        self.asked += len(part)
        return part

    def read_many(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        return [self.read(*one) for one in ranges]

    def close(self) -> None:
        pass


def packed(contents: list[bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for index, data in enumerate(contents):
            archive.writestr(f"folder/{index}", data)
    return buffer.getvalue()


@given(
    st.lists(st.binary(max_size=3000), max_size=6),
    st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]),
    st.integers(1, 4000),
    st.binary(max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_members_come_back_whole_and_in_part(contents: list[bytes], method: int, limit: int, stub: bytes) -> None:
    source = ZipSource("memory", Memory(stub + packed(contents, method)))
    assert [member.size for member in source.members()] == [len(data) for data in contents]
    for member, data in zip(source.members(), contents, strict=True):
        assert source.read(member.index) == data
        assert source.read(member.index, limit) == data[:limit]
    heads = dict(source.heads([m.index for m in source.members()], limit))
    assert [heads[m.index] for m in source.members()] == [data[:limit] for data in contents]


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_memory_used_again_holds_the_same_content(sizes: list[int], seed: int) -> None:
    """Whatever the order of sizes, and beyond one piece of inflation; a damaged member is refused this way too."""
    rng = random.Random(seed)
    contents = [bytes(rng.choices(b"abcdefgh", k=size)) for size in sizes]
    data = packed(contents)
    source, scratch = ZipSource("memory", Memory(data)), Scratch()
    for member, content in zip(source.members(), contents, strict=True):
        view = source.read_into(member.index, scratch)
        assert view.readonly
        assert view == content == source.read(member.index)
    largest = max(source.members(), key=lambda member: member.compressed_size)
    broken = bytearray(data)
    broken[largest.offset + 30 + len(largest.name) + largest.compressed_size // 2] ^= 0x55
    with pytest.raises(ArchiveError):
        ZipSource("memory", Memory(bytes(broken))).read_into(largest.index, scratch)


def test_zip64_as_python_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("one", "w", force_zip64=True) as member:
            member.write(b"x" * 5000)
        archive.writestr("two", b"yes")
    raw = bytearray(path.read_bytes())
    end = raw.rfind(b"PK\x05\x06")
    count, length, offset = struct.unpack_from("<HLL", raw, end + 10)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
    struct.pack_into("<HHLL", raw, end + 8, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    source = ZipSource("memory", Memory(bytes(raw[:end]) + end64 + locator + bytes(raw[end:])))
    assert [source.read(m.index) for m in source.members()] == [b"x" * 5000, b"yes"]


def test_a_member_that_grows_beyond_its_declared_size_is_refused() -> None:
    raw = bytearray(packed([b"a" * 100_000]))
    central = raw.index(b"PK\x01\x02")
    struct.pack_into("<L", raw, central + 24, 500)
    source = ZipSource("memory", Memory(bytes(raw)))
    with pytest.raises(ArchiveError, match="larger than declared"):
        source.read(0)
    assert len(source.read(0, 400)) == 400


@pytest.mark.parametrize(
    "comment",
    [
        b"PK\x05\x06",
        b"PK\x05\x06" + b"\x01" * 30,
        b"PK\x05\x06" + bytes(16) + b"\x08\x00" + b"8 letter",
        b"PK\x05\x06" + bytes(18),
    ],
)
def test_a_comment_that_looks_like_the_end_of_the_zip_is_a_comment(tmp_path: Path, comment: bytes) -> None:
    path = zip_of(tmp_path / "a.zip", [b"1" * 100, b"2"])
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = comment
    for data in (path.read_bytes(), b"stub" * 100 + path.read_bytes()):
        source = ZipSource("memory", Memory(data))
        assert [source.read(m.index) for m in source.members()] == [b"1" * 100, b"2"]
    appended = ZipSource("memory", Memory(zip_of(tmp_path / "b.zip", [b"1"]).read_bytes() + b"signed by a gateway"))
    assert [appended.read(m.index) for m in appended.members()] == [b"1"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_head_is_whole_however_long_the_extra_field_and_however_it_is_packed(method: int) -> None:
    """Packed with a flush after every byte, data expand, which a guess at their length does not see."""
    data = bytes(range(256)) * 40
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        member = zipfile.ZipInfo("I1")
        member.compress_type, member.extra = method, struct.pack("<HH", 0x7777, 60_000) + bytes(60_000)
        archive.writestr(member, data)
    source = ZipSource("memory", Memory(buffer.getvalue()))
    for limit in (1, 100, 4096, 10_000, 10_240, 99_999):
        assert list(source.heads([0], limit)) == [(0, data[:limit])]
        assert source.read(0, limit) == data[:limit]
    flushed = zlib.compressobj(wbits=-15)
    packed = b"".join(flushed.compress(data[i : i + 1]) + flushed.flush(zlib.Z_FULL_FLUSH) for i in range(len(data)))
    packed += flushed.flush()
    one = Member(0, "I1", len(packed), len(data), zlib.crc32(data), method=8)
    raw = LOCAL_HEADER.pack(b"PK\x03\x04", 20, 0, 8, 0, 0, 0, 0, 0, 0, 0) + packed
    memory = Memory(raw)
    head = head_of(one, memory.read(*head_range(one, 4096)), 4096, memory.read)
    assert head == data[:4096]


def test_bomb_and_total_limits() -> None:
    bomb = packed([bytes(8 << 20), b"fine"])
    source = ZipSource("memory", Memory(bomb), Limits(ratio_from=1 << 20))
    assert "zip bomb" in source.members()[0].refusal
    with pytest.raises(ArchiveError, match="zip bomb"):
        source.read(0, 10)
    assert source.read(1) == b"fine"
    with pytest.raises(ArchiveError, match="unpack to"):
        ZipSource("memory", Memory(bomb), Limits(total_bytes=1 << 20))
    with pytest.raises(ArchiveError, match="claims"):
        ZipSource("memory", Memory(bomb), Limits(members=1))


def test_overlapping_members_are_a_bomb() -> None:
    raw = bytearray(packed([b"a" * 3000, b"b" * 3000], zipfile.ZIP_STORED))
    second = raw.index(b"PK\x01\x02", raw.index(b"PK\x01\x02") + 4)
    struct.pack_into("<L", raw, second + 42, 0)
    with pytest.raises(ArchiveError, match="overlap"):
        ZipSource("memory", Memory(bytes(raw)))


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_are_refused_by_name(method: int) -> None:
    source = ZipSource("memory", Memory(packed([b"x" * 100], method)))
    with pytest.raises(ArchiveError, match=r"bzip2|LZMA"):
        source.read(0)


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip at all" * 100, b"PK\x05\x06" + bytes(18)])
def test_what_is_no_zip(data: bytes) -> None:
    if len(data) == 22:
        assert not ZipSource("memory", Memory(data)).members()
    else:
        with pytest.raises(ArchiveError, match="no zip"):
            ZipSource("memory", Memory(data))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_zips_raise_nothing_but_input_errors(data: st.DataObject) -> None:
    raw = bytearray(packed([bytes(range(50)), b"b" * 2000, b""]))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(len(raw) // 2, len(raw)))]
    with contextlib.suppress(InputError):
        source = ZipSource("memory", Memory(bytes(raw)))
        for member in source.members():
            list(source.heads([member.index], 64))
            source.read(member.index)


def test_digest_and_stamp_follow_the_content(tmp_path: Path) -> None:
    one = open_archive(zip_of(tmp_path / "a.zip", [b"1", b"2"]))
    same = open_archive(zip_of(tmp_path / "b.zip", [b"1", b"2"]))
    differs = open_archive(zip_of(tmp_path / "c.zip", [b"1", b"3"]))
    assert one.digest == same.digest != differs.digest
    assert one.stamp != open_archive(zip_of(tmp_path / "a.zip", [b"1", b"2", b"3"])).stamp


def test_folder_reads_like_a_zip_and_follows_no_link_out_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "dicom"
    (folder / "deep" / "er").mkdir(parents=True)
    for index, data in enumerate(series_files()):
        (folder / "deep" / "er" / f"I{index}").write_bytes(data)
    secret = tmp_path / "secret"
    secret.write_bytes(series_files()[0])
    (folder / "link").symlink_to(secret)
    source = open_archive(folder)
    assert isinstance(source, FolderSource)
    result = scan(source)
    assert [reason for _, reason in result.problems] == ["a member cannot be read: a link that leaves the folder"]
    (one,) = result.series
    assert one.folder_hint == "deep/er"
    assert read_series(pointer_of(one)).hu.shape == (8, 32, 32)
    (folder / "deep" / "er" / "I3").write_bytes(b"")
    with pytest.raises(InputError):
        read_series(pointer_of(one))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        open_archive(tmp_path / "PATIENT.zip")
    with pytest.raises(InputError) as caught:
        open_archive(tmp_path / "PATIENT.zip")
    assert "PATIENT" not in str(caught.value)


def test_object_store_is_read_by_ranges(tmp_path: Path) -> None:
    import obstore
    from obstore.store import MemoryStore

    data = zip_of(tmp_path / "a.zip", series_files(), zipfile.ZIP_STORED).read_bytes()
    store = MemoryStore()
    obstore.put(store, "deep/a.zip", data)
    source = ZipSource("memory:///deep/a.zip", ObjectFile("", store, "deep/a.zip"))
    (one,) = scan(source, keep_instances=True).series
    assert read_scanned(source, one, threads=2).hu.shape == (8, 32, 32)
    with pytest.raises(InputError, match="cannot be opened"):
        ObjectFile("", store, "missing.zip")


def test_listing_reads_a_fraction_of_the_archive() -> None:
    from tests.support.dicom_files import anatomy

    memory = Memory(packed(series_files(anatomy(6, 256)), zipfile.ZIP_STORED))
    assert len(scan(ZipSource("memory", memory)).series) == 1
    assert memory.asked < memory.size * 0.2
