"""Directory entries as a reader sees them: a file, a folder, an archive, or something that cannot be used, and why."""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

EntryKind = Literal["file", "folder", "zip", "nifti", "other-archive", "unusable"]


_OTHER_ARCHIVES = re.compile(
    r"\.(7z|rar|r\d\d|z\d\d|tar|tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|z)|iso|cab|(zip|7z|rar)\.\d{3})$"
)
"""Endings of archives that are not read, the parts of split zips among them."""
LOOSE_SUFFIXES = {"", ".dcm", ".dicom", ".ima"}
"""Endings of files that are DICOM as a rule."""
_SIGNATURES = (
    (b"PK\x03\x04", "zip"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
    (b"\x1f\x8b\x08", "gz"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zst"),
)
_TAR_AT = 257
"""Offset at which a tar's header says ``ustar`` (POSIX.1-1988)."""
_COMPRESSED_DICOM = re.compile(r"\.(dcm|dicom|ima)\.(gz|bz2|xz|zst)$")
_TYPES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(slots=True)
class DirectoryEntry:
    """One entry of a folder. ``refusal`` says why it cannot be used and names no file; empty for what can be.

    ``size`` and ``mtime_ns`` are the target's for a link to a file, and the entry's own for what is unusable.
    """

    path: str
    name: str
    kind: EntryKind
    size: int = 0
    mtime_ns: int = 0
    link: bool = False
    refusal: str = ""


def list_folder(folder: str) -> list[DirectoryEntry]:
    """Return a folder's entries in order of name, each looked at once and none of them opened.

    Raises:
        OSError: The folder may not be listed, or has gone; `why_unlisted` says it in words.
    """
    with os.scandir(folder) as entries:
        return [_entry_of(entry) for entry in sorted(entries, key=lambda entry: entry.name)]


def is_nifti(name: str | os.PathLike[str]) -> bool:
    """Return whether a path names a NIfTI file by its ending."""
    return str(name).casefold().endswith((".nii", ".nii.gz"))


def why_unlisted(error: OSError) -> str:
    """Return why a folder could not be listed, without its name."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return "a folder that may not be listed: its permissions forbid it"
    return f"a folder that cannot be listed ({error.strerror})"


def unlisted_folder(folder: str, error: OSError) -> DirectoryEntry:
    """Return the entry of a folder which could not be listed."""
    entry = DirectoryEntry(folder, os.path.basename(folder), "unusable", refusal=why_unlisted(error))
    try:
        info = os.lstat(folder)
    except OSError:
        return entry
    entry.mtime_ns = info.st_mtime_ns
    return entry


def other_archive(name: str) -> str:
    """Return why an archive of another kind than zip is not read, by its file name; empty for all else."""
    name = name.casefold()
    if match := _OTHER_ARCHIVES.search(name):
        return f"an archive of a kind that is not read ({match.group(1)}): pack it as a zip, or unpack it"
    if match := _COMPRESSED_DICOM.search(name):
        return f"a DICOM file inside a compressed one ({match.group(2)}), which is not read: unpack it"
    return ""


def nested_archive(name: str, head: bytes, in_zip: bool) -> str:
    """Return why a file that is no DICOM is not looked into although it is an archive; empty for all else.

    Args:
        name: The file's name within its zip or folder.
        head: Its first bytes. They count where the name has no ending or a DICOM file's: a document may be a zip too.
        in_zip: Whether a zip holds it. Archives by name that a folder holds are archives of their own.
    """
    name = name.replace("\\", "/").rpartition("/")[2].casefold()
    if name.startswith("."):  # a Mac's notes on a file bear the file's name
        return ""
    kind = ""
    if os.path.splitext(name)[1] in LOOSE_SUFFIXES:
        tar = "tar" if head[_TAR_AT : _TAR_AT + 5] == b"ustar" else ""
        kind = next((kind for start, kind in _SIGNATURES if head.startswith(start)), tar)
    elif in_zip and name.endswith(".zip"):
        kind = "zip"
    elif in_zip and (match := _OTHER_ARCHIVES.search(name)):
        kind = match.group(1)
    return _within(kind) if kind else other_archive(name) if in_zip else ""


def _within(kind: str) -> str:
    return f"an archive within the archive ({kind}), which is not looked into: unpack it beside the others"


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor; never waits, as opening a named pipe would.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else _TYPES.get(stat.S_IFMT(mode), "something special")
        raise OSError(errno.EINVAL, f"{what}, not a file")
    return descriptor


def url_of(path: str) -> str:
    """Return a path as the URL that names it everywhere: itself, or file:// where it is not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


def _entry_of(entry: os.DirEntry[str]) -> DirectoryEntry:
    link = False
    try:
        if entry.is_dir(follow_symlinks=False):
            return DirectoryEntry(entry.path, entry.name, "folder")
        link = entry.is_symlink()
        info = entry.stat()
    except OSError as error:
        return _unusable(entry, _why_no_stat(error, link))
    if stat.S_ISDIR(info.st_mode):
        return _unusable(entry, "a link to a folder, which is not followed: give that folder itself")
    if not stat.S_ISREG(info.st_mode):
        return _unusable(entry, f"{_TYPES.get(stat.S_IFMT(info.st_mode), 'something special')}, not a file")
    found = DirectoryEntry(entry.path, entry.name, "file", info.st_size, info.st_mtime_ns, link)
    if entry.name[-4:].casefold() == ".zip":
        found.kind = "zip"
    elif is_nifti(entry.name):
        found.kind = "nifti"
    elif refusal := other_archive(entry.name):
        found.kind, found.refusal = "other-archive", refusal
    return found


def _why_no_stat(error: OSError, link: bool) -> str:
    if error.errno == errno.ENOENT:
        return "a link to nothing" if link else "an entry that vanished while its folder was listed"
    if error.errno == errno.ELOOP:
        return "a link that leads back to itself"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "an entry that may not be looked at: permissions forbid it"
    return f"an entry that cannot be looked at ({error.strerror})"


def _unusable(entry: os.DirEntry[str], refusal: str) -> DirectoryEntry:
    found = DirectoryEntry(entry.path, entry.name, "unusable", refusal=refusal)
    try:
        info = entry.stat(follow_symlinks=False)
    except OSError:
        return found
    found.mtime_ns = info.st_mtime_ns
    return found
