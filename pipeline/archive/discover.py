"""Find the archives of a dataset: zips, NIfTI files, folders of DICOM files, and zips on an object store.

Work is linear in the number of files, each of which is looked at once; memory does not grow with them, apart from the
names of the folder at hand. Archives come out while the rest of the tree is still to be listed.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from latentcache import InputError
from latentcache.storage import Entry, local_path, open_location
from pipeline.archive.directory_entries import (
    LOOSE_SUFFIXES,
    DirectoryEntry,
    is_nifti,
    list_folder,
    open_regular,
    other_archive,
    unlisted_folder,
    url_of,
    why_unlisted,
)

DEFAULT_CATEGORIES = ("APE", "non-APE")
UNLABELLED = "unlabelled"
PREAMBLE = 128
"""Bytes before ``DICM`` in a DICOM file (PS3.10 section 7.1)."""
_IGNORED_FOLDERS = {"__MACOSX"}
NIFTI_ELSEWHERE = "a NIfTI file in an object store, where only zips are read: copy it to a disk"
_SPECIAL = frozenset("%?#")
"""Characters of a key that have another meaning in the folders of a URL."""


@dataclass(frozen=True)
class FoundArchive:
    """A zip, a NIfTI file or a folder, as the file system or object store describes it.

    ``etag`` changes with the content where size and time do not tell: an object store's own, and for a folder a hash of
    its listing. ``category`` is a label of the allow-list. ``url`` is private: it may name a patient.
    ``refusal`` is set for what cannot be read, such as a link to nothing or a 7z: why, in words that name no file.
    """

    url: str = field(repr=False)
    size: int
    mtime_ns: int
    etag: str
    category: str
    refusal: str = ""


def discover(
    dataset: str, categories: Sequence[str] = DEFAULT_CATEGORIES, exclude: Sequence[Path] = ()
) -> list[FoundArchive]:
    """Return every archive below a dataset, in order of URL; see :func:`stream_archives`."""
    return sorted(stream_archives(dataset, categories, exclude), key=lambda archive: archive.url)


def stream_archives(
    dataset: str, categories: Sequence[str] = DEFAULT_CATEGORIES, exclude: Sequence[Path] = ()
) -> Iterator[FoundArchive]:
    """Yield every archive below a dataset, in a fixed order, while the tree is being listed.

    A ``.zip`` is an archive, and so is a NIfTI file; other loose files count as one folder for each patient: the first
    level below the category. What cannot be used is yielded with its refusal: links to nothing or to folders, named
    pipes, sockets, folders that may not be listed, archives of other kinds. Within a folder that counts as one archive,
    only its reader reports the former.

    Args:
        dataset: A folder, a single zip or NIfTI file, or an object store's URL such as s3://bucket/prefix.
        categories: Allow-list of labels; the topmost folder with such a name labels what is below it.
        exclude: Folders not to enter (the store itself may lie inside the dataset).

    Raises:
        InputError: There is nothing at that place, or it may not be listed; raised here, before the first archive.
    """
    if "://" in dataset and urlsplit(dataset).scheme != "file":
        return _remote(dataset.rstrip("/"), categories)
    root = local_path(dataset).absolute()
    if root.is_file():
        return iter([_single(root, categories)])
    if not root.is_dir():
        raise _nothing_there()
    try:
        list_folder(str(root))
    except OSError as error:
        raise InputError(
            f"the dataset is {why_unlisted(error)}",
            expected="a folder that this user may list",
            remedy="Give this user the right to read and enter it, then run the command again.",
        ) from None
    return _Tree(root, categories, exclude).archives()


def category_of(parts: Sequence[str], categories: Sequence[str]) -> str:
    """The label for a path: its topmost folder that is in the allow-list, whatever the case, else ``unlabelled``."""
    labels = {label.casefold(): label for label in categories}
    return next((labels[part.casefold()] for part in parts if part.casefold() in labels), UNLABELLED)


def _single(path: Path, categories: Sequence[str]) -> FoundArchive:
    info = path.stat()
    return FoundArchive(
        url_of(str(path)), info.st_size, info.st_mtime_ns, "", category_of([path.parent.name], categories)
    )


class _Tree:
    """A dataset on a file system, listed depth first."""

    def __init__(self, root: Path, categories: Sequence[str], exclude: Sequence[Path]) -> None:
        self._root = str(root)
        self._name = root.name
        self._categories = categories
        self._exclude = {str(path.absolute()) for path in exclude}

    def archives(self) -> Iterator[FoundArchive]:
        return self._shared(self._root, ())

    def _shared(self, folder: str, parts: tuple[str, ...]) -> Iterator[FoundArchive]:
        """Below the dataset itself or a category, where stray files (lists, notes) are to be expected.

        One that itself holds DICOM files is a single archive with all that is below it.
        """
        entries = self._entries(folder)
        if any(entry.kind == "file" and _is_dicom(entry.path) for entry in entries):
            yield from self._unit(folder, parts)
            return
        for entry in entries:
            if entry.kind == "folder":
                below = (*parts, entry.name)
                is_category = not parts and category_of(below, self._categories) != UNLABELLED
                yield from (self._shared if is_category else self._unit)(entry.path, below)
            elif entry.kind != "file":
                yield self._found(entry)

    def _unit(self, unit: str, parts: tuple[str, ...]) -> Iterator[FoundArchive]:
        """The zips below a patient's folder, and the folder itself if there are loose files in it.

        Files are listed name by name, folders among them, which is the order of their paths: the hash needs no list.
        """
        listing, size, newest, files = hashlib.sha256(), 0, 0, 0
        above = len(os.path.join(unit, ""))
        within: list[DirectoryEntry] = []
        pending = [iter(self._entries(unit))]
        while pending:
            entry = next(pending[-1], None)
            if entry is None:
                pending.pop()
            elif entry.kind == "folder":
                pending.append(iter(self._entries(entry.path)))
            elif entry.kind == "file":
                line = f"{entry.path[above:]}\0{entry.size}\0{entry.mtime_ns}\n"
                listing.update(line.encode(errors="surrogateescape"))
                size, newest, files = size + entry.size, max(newest, entry.mtime_ns), files + 1
            elif entry.kind == "unusable" and not entry.name.casefold().endswith(".zip"):
                within.append(entry)
                line = f"{entry.path[above:]}\0{entry.refusal}\n"
                listing.update(line.encode(errors="surrogateescape"))
            else:
                yield self._found(entry)
        if files:
            category = category_of([*parts, self._name], self._categories)
            yield FoundArchive(url_of(unit), size, newest, listing.hexdigest(), category)
        else:
            yield from map(self._found, within)

    def _entries(self, folder: str) -> list[DirectoryEntry]:
        """Return a folder's entries, hidden and excluded ones left out; the folder itself where it cannot be listed."""
        try:
            entries = list_folder(folder)
        except OSError as error:
            return [unlisted_folder(folder, error)]
        return [
            entry
            for entry in entries
            if not entry.name.startswith(".")
            and not (entry.kind == "folder" and (entry.name in _IGNORED_FOLDERS or entry.path in self._exclude))
        ]

    def _found(self, entry: DirectoryEntry) -> FoundArchive:
        parts = os.path.relpath(entry.path, self._root).split(os.sep)
        category = category_of([*parts[:-1], self._name], self._categories)
        return FoundArchive(url_of(entry.path), entry.size, entry.mtime_ns, "", category, entry.refusal)


def _is_dicom(path: str) -> bool:
    try:
        with os.fdopen(open_regular(path), "rb") as opened:
            return opened.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"
    except OSError:
        return False


def _remote(url: str, categories: Sequence[str]) -> Iterator[FoundArchive]:
    """Zips below a prefix of an object store, from one listing; ETags tell of overwrites that size and time do not."""
    above = PurePosixPath(urlsplit(url).path)
    if above.suffix.casefold() == ".zip":
        from pipeline.archive.object_store import ObjectFile

        file = ObjectFile(url)
        category = category_of([above.parent.name], categories)
        return iter([FoundArchive(url, file.size, file.modified_ns, file.etag, category)])
    entries = iter(open_location(url).list(""))
    first = next(entries, None)
    if first is None:
        raise _nothing_there()
    return _objects(url, itertools.chain([first], entries), above.name, categories)


def _objects(url: str, entries: Iterable[Entry], name: str, categories: Sequence[str]) -> Iterator[FoundArchive]:
    """Zips as they are listed, archives of other kinds with a refusal, and at the end what holds loose files."""
    loose: Counter[tuple[str, ...]] = Counter()  # by name: in an object store none is opened to find out
    for entry in entries:
        path = PurePosixPath(entry.path)
        category = category_of([*path.parts[:-1], name], categories)
        refusal = other_archive(path.name) or (NIFTI_ELSEWHERE if is_nifti(path.name) else "")
        if refusal or path.suffix.casefold() == ".zip":
            modified = int(entry.modified * 1e9)
            where = "/".join((url, *map(_literal, path.parts[:-1]), path.name))
            yield FoundArchive(where, entry.size, modified, entry.etag, category, refusal)
        elif path.suffix.casefold() in LOOSE_SUFFIXES and not path.name.startswith("."):
            labelled = category_of(path.parts[:-1][:1], categories) != UNLABELLED
            unit = path.parts[:-1][: 2 if labelled else 1]
            if path.suffix or len(unit) > labelled:  # files without a suffix beside the archives are notes
                loose[unit] += 1
    for unit, count in sorted(loose.items()):
        refusal = f"{count} loose files in an object store, where only zips are read: pack them into a zip"
        yield FoundArchive("/".join((url, *unit)), count, 0, "", category_of([*unit, name], categories), refusal)


def _literal(part: str) -> str:
    """A folder's name as it is written in a URL; everything but the special characters stays as it is."""
    return "".join(f"%{ord(c):02X}" if c in _SPECIAL else c for c in part)


def _nothing_there() -> InputError:
    return InputError(
        "the dataset does not exist",
        expected="a folder of zips or DICOM folders, one zip, or s3://bucket/prefix",
        remedy="Check the path of DATASET.",
    )
