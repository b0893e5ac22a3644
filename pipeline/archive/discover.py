"""Find the archives of a dataset: zips, folders of DICOM files, and zips on an object store. Opens none of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from latentcache import InputError
from latentcache.storage import open_location

DEFAULT_CATEGORIES = ("APE", "non-APE")
UNLABELLED = "unlabelled"
PREAMBLE = 128
"""Bytes before ``DICM`` in a DICOM file (PS3.10 section 7.1)."""
_IGNORED_FOLDERS = {"__MACOSX"}


@dataclass(frozen=True)
class FoundArchive:
    """A zip or a folder, as the file system or object store describes it.

    ``etag`` changes with the content where size and time do not tell: an object store's own, and for a folder a hash of
    its listing. ``category`` is a label of the allow-list. ``url`` is private: it may name a patient.
    """

    url: str = field(repr=False)
    size: int
    mtime_ns: int
    etag: str
    category: str


def discover(
    dataset: str, categories: Sequence[str] = DEFAULT_CATEGORIES, exclude: Sequence[Path] = ()
) -> list[FoundArchive]:
    """Every archive below a dataset, in a fixed order.

    A ``.zip`` is an archive; loose files count as one folder for each patient: the first level below the category.

    Args:
        dataset: A folder, a single zip, or an object store's URL such as s3://bucket/prefix.
        categories: Allow-list of labels; the topmost folder with such a name labels what lies below it.
        exclude: Folders not to enter (the store itself may lie inside the dataset).

    Raises:
        InputError: There is nothing at that place.
    """
    split = urlsplit(dataset)
    if "://" in dataset and split.scheme != "file":
        found = list(_remote(dataset.rstrip("/"), categories))
    else:
        root = Path(unquote(split.path)) if split.scheme == "file" else Path(dataset)
        if not root.exists():
            raise _nothing_there()
        found = _local(root.absolute(), categories, {p.absolute() for p in exclude})
    return sorted(found, key=lambda archive: archive.url)


def category_of(parts: Sequence[str], categories: Sequence[str]) -> str:
    """The label for a path: its topmost folder that is in the allow-list, whatever the case, else ``unlabelled``."""
    labels = {label.casefold(): label for label in categories}
    return next((labels[part.casefold()] for part in parts if part.casefold() in labels), UNLABELLED)


def _local(root: Path, categories: Sequence[str], exclude: set[Path]) -> list[FoundArchive]:
    if root.is_file():
        info = root.stat()
        category = category_of([root.parent.name], categories)
        return [FoundArchive(str(root), info.st_size, info.st_mtime_ns, "", category)]
    zips: list[Path] = []
    loose: dict[Path, list[Path]] = {}
    for folder, subfolders, names in os.walk(root):
        here = Path(folder)
        subfolders[:] = sorted(
            s for s in subfolders if not s.startswith(".") and s not in _IGNORED_FOLDERS and here / s not in exclude
        )
        for name in sorted(names):
            if name.startswith("."):
                continue
            if name.casefold().endswith(".zip"):
                zips.append(here / name)
            else:
                loose.setdefault(_unit(root, here, categories), []).append(here / name)
    found = []
    for path in zips:
        info = path.stat()
        category = category_of([*path.relative_to(root).parts[:-1], root.name], categories)
        found.append(FoundArchive(str(path), info.st_size, info.st_mtime_ns, "", category))
    return found + _folders(root, loose, categories)


def _folders(root: Path, loose: Mapping[Path, Sequence[Path]], categories: Sequence[str]) -> list[FoundArchive]:
    """Folders that count as archives: those with DICOM of their own swallow what lies below them."""
    whole = [unit for unit, files in loose.items() if _holds_loose_dicom(unit, files)]
    found = []
    for unit in loose:
        covered = any(other in unit.parents for other in whole)
        if covered or (unit not in whole and _is_shared(root, unit, categories)):
            continue
        below = sorted(f for other, files in loose.items() if other == unit or unit in other.parents for f in files)
        found.append(_folder(unit, below, category_of([*unit.relative_to(root).parts, root.name], categories)))
    return found


def _unit(root: Path, folder: Path, categories: Sequence[str]) -> Path:
    """The folder that counts as one archive for a loose file in ``folder``: a patient's, as a rule."""
    parts = folder.relative_to(root).parts
    depth = 2 if parts and category_of(parts[:1], categories) != UNLABELLED else 1
    return root.joinpath(*parts[:depth])


def _is_shared(root: Path, unit: Path, categories: Sequence[str]) -> bool:
    """Whether a unit is the dataset or a category itself, where stray files (lists, notes) are to be expected."""
    parts = unit.relative_to(root).parts
    return not parts or (len(parts) == 1 and category_of(parts, categories) != UNLABELLED)


def _holds_loose_dicom(unit: Path, files: Sequence[Path]) -> bool:
    return any(file.parent == unit and _is_dicom(file) for file in files)


def _is_dicom(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"
    except OSError:
        return False


def _folder(unit: Path, files: Sequence[Path], category: str) -> FoundArchive:
    digest, size, newest = hashlib.sha256(), 0, 0
    for file in files:
        info = file.stat()
        digest.update(f"{file.relative_to(unit).as_posix()}\0{info.st_size}\0{info.st_mtime_ns}\n".encode())
        size, newest = size + info.st_size, max(newest, info.st_mtime_ns)
    return FoundArchive(str(unit), size, newest, digest.hexdigest(), category)


def _remote(url: str, categories: Sequence[str]) -> Iterator[FoundArchive]:
    """Zips below a prefix of an object store, from one listing; ETags tell of overwrites that size and time do not."""
    above = PurePosixPath(urlsplit(url).path)
    if above.suffix.casefold() == ".zip":
        from pipeline.archive.object_store import ObjectFile

        file = ObjectFile(url)
        yield FoundArchive(url, file.size, file.modified_ns, file.etag, category_of([above.parent.name], categories))
        return
    entries = list(open_location(url).list(""))
    if not entries:
        raise _nothing_there()
    for entry in entries:
        path = PurePosixPath(entry.path)
        if path.suffix.casefold() == ".zip":
            category = category_of([*path.parts[:-1], above.name], categories)
            yield FoundArchive(f"{url}/{path}", entry.size, int(entry.modified * 1e9), entry.etag, category)


def _nothing_there() -> InputError:
    return InputError(
        "the dataset does not exist",
        expected="a folder of zips or DICOM folders, one zip, or s3://bucket/prefix",
        remedy="Check the path of DATASET.",
    )
