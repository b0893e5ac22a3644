"""An archive full of planted identifiers, each unique and searchable, wherever DICOM, zip and file names can hold one.

Every attribute of table E.1-1 of PS3.15 that pydicom's dictionary knows is planted in every series, with private
elements of several VRs, UN, sequences within sequences, overlays, burned-in text in a secondary capture, dates in
words, and names of files, folders, zip members, kernels and scanners. A value is recognised by its form (`found_in`),
so that a text of any length is searched once for all of them.
"""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.datadict import DicomDictionary, dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence

from pipeline.phantom import make_patient
from tests.support.hospital import Scan, study, write_zip

TABLE = Path(__file__).with_name("ps315_table_e11.csv")
ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
NOT_IN_A_FILE = frozenset({"00001000", "00001001"})
"""Attributes of network messages, which no file may hold (PS3.10 7.2)."""
REPEATING = {"50xxxxxx": 0x50003000, "60xx3000": 0x60003000, "60xx4000": 0x60004000}
SHARED = {
    **dict.fromkeys(("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate"), "patient"),
    **dict.fromkeys(("StudyInstanceUID", "FrameOfReferenceUID"), "study"),
}
"""What all files of a patient or study share; all else differs from series to series."""
SHORT_NAMES = ("Kim", "Li", "Ana", "B. Lee", "Force Li 1943 1209", "19430612", "JD 7")
"""Too short to be searched for in bytes: they are compared with whole values."""
NOT_SEARCHABLE = frozenset({"AS", "US"})
"""VRs too short for a unique value; whether the value is kept is seen in the elements that are written."""
_FORMS = (
    ("text", re.compile(r"zq([0-9a-z]{5})xk")),
    ("uid", re.compile(r"1\.2\.826\.9\.(\d{9})")),
    ("time", re.compile(r"(\d{2}):?(\d{2}):?(\d{2})\.(\d{6})(?!\d)")),
    ("decimal", re.compile(r"(?<![\d.])(\d{2}\.\d{8})(?!\d)")),
    ("integer", re.compile(r"(?<![\d.])(\d{9})(?!\d)")),
    ("date", re.compile(r"(?<![\d.])(1[78]\d{2})-?(\d{2})-?(\d{2})")),
    ("day first", re.compile(r"(?<![\d.])(\d{2})[./](\d{2})[./](1[78]\d{2})(?!\d)")),
)


def table() -> dict[str, tuple[str, str]]:
    """Keyword and action of the Basic Profile for every row of table E.1-1, by tag as eight hexadecimal digits."""
    lines = (line for line in TABLE.read_text().splitlines() if not line.startswith("#"))
    return {row["tag"]: (row["keyword"], row["action"]) for row in csv.DictReader(lines)}


@dataclass(frozen=True)
class Identifier:
    """One planted value: its kind, the form under which `found_in` finds it, and where it was planted."""

    kind: str
    form: str
    where: str


def found_in(text: str) -> Iterator[tuple[str, str]]:
    """Everything in a text that has the form of a planted value, as (kind, form); most is none."""
    text = text.lower()
    for kind, pattern in _FORMS:
        for match in pattern.finditer(text):
            parts = match.groups()
            yield ("date", "".join(reversed(parts))) if kind == "day first" else (kind, "".join(parts))


@dataclass
class Planter:
    """Makes values that no two places share, and keeps where each was planted."""

    planted: dict[tuple[str, str], Identifier] = field(default_factory=dict)
    unsearchable: list[str] = field(default_factory=list)
    _shared: dict[tuple[str, str], Any] = field(default_factory=dict)

    def text(self, where: str, note: str = "") -> str:
        """A word of nine characters, upper case, and what follows it."""
        number, digits = len(self.planted), ""
        for _ in range(5):
            number, digit = divmod(number, 36)
            digits = ALPHABET[digit] + digits
        self._keep("text", digits, where)
        return f"ZQ{digits.upper()}XK{note}"

    def day(self, where: str) -> date:
        made = date(1701, 1, 1) + timedelta(days=len(self.planted))
        self._keep("date", f"{made:%Y%m%d}", where)
        return made

    def time(self, where: str) -> str:
        hours, rest = divmod(len(self.planted) * 7 % 86_400, 3600)
        seconds = f"{hours:02d}{rest // 60:02d}{rest % 60:02d}"
        fraction = f"{(len(self.planted) * 104_729 + 7) % 1_000_000:06d}"
        self._keep("time", seconds + fraction, where)
        return f"{seconds}.{fraction}"

    def uid(self, where: str) -> str:
        number = f"{len(self.planted) + 100_000_000}"
        self._keep("uid", number, where)
        return f"1.2.826.9.{number}"

    def integer(self, where: str) -> str:
        number = f"{700_000_000 + len(self.planted) * 7919 % 99_999_989}"
        self._keep("integer", number, where)
        return number

    def decimal(self, where: str) -> str:
        number = f"{40 + len(self.planted) % 50}.{(len(self.planted) * 999_983 + 11) % 100_000_000:08d}"
        self._keep("decimal", number, where)
        return number

    def _keep(self, kind: str, form: str, where: str) -> None:
        assert (kind, form) not in self.planted, where
        self.planted[kind, form] = Identifier(kind, form, where)

    def value(self, vr: str, where: str) -> Any:
        """A unique value of a VR; a sequence holds one item of many VRs and a sequence of its own."""
        match vr:
            case "DA":
                return f"{self.day(where):%Y%m%d}"
            case "DT":
                return f"{self.day(where):%Y%m%d}{self.time(where)}"
            case "TM":
                return self.time(where)
            case "UI":
                return self.uid(where)
            case "IS":
                return self.integer(where)
            case "DS":
                return self.decimal(where)
            case "PN":
                return f"{self.text(where)}^{self.text(where)}"
            case "LT" | "ST" | "UT":
                day = self.day(where)
                return f"Mr {self.text(where)} seen {day:%Y-%m-%d}, then {self.day(where):%d.%m.%Y}"
            case "OB" | "OW" | "UN":
                return self.text(where, " ").encode()
            case "UR":
                return f"http://{self.text(where).lower()}.example/"
            case "US":
                return 4242
            case "AS":
                return "113Y"
            case "SQ":
                return DicomSequence([self.item(where, 2)])
        return self.text(where)

    def item(self, where: str, depth: int) -> Dataset:
        """An item with a name, an id, a date and a UID, and an item within it."""
        ds = Dataset()
        for keyword in ("PatientName", "OtherPatientNames", "InstitutionName", "StudyDate", "StudyTime", "TextValue"):
            setattr(ds, keyword, self.value(dictionary_VR(keyword), f"{where} > {keyword}"))
        ds.ReferencedSOPInstanceUID = self.uid(f"{where} > ReferencedSOPInstanceUID")
        block = ds.private_block(0x0031, self.text(f"{where} > private creator"), create=True)
        block.add_new(0x01, "UN", self.value("UN", f"{where} > private UN"))
        if depth > 1:
            ds.RequestAttributesSequence = DicomSequence([self.item(f"{where} > item", depth - 1)])
        return ds

    def once(self, scope: str, vr: str, where: str) -> Any:
        """The value that all files of a scope share."""
        if (scope, where) not in self._shared:
            self._shared[scope, where] = self.value(vr, f"{scope} {where}")
        return self._shared[scope, where]


def rows_in_files() -> dict[int, tuple[str, str]]:
    """Tag to (keyword, action) for every row of the table that can stand in a dataset of a file."""
    found: dict[int, tuple[str, str]] = {}
    for text, row in table().items():
        if text in REPEATING:
            found[REPEATING[text]] = row
        elif text not in NOT_IN_A_FILE and text != "odd group" and int(text, 16) >> 16 != 2:
            found[int(text, 16)] = row
    return found


def plant(ds: Dataset, planter: Planter, scopes: dict[str, str]) -> None:
    """Fill every row of table E.1-1, private elements, and what readers look at beside them."""
    series = scopes["series"]
    for tag, (keyword, _) in rows_in_files().items():
        if keyword in ("SeriesInstanceUID", "SOPInstanceUID") or tag == REPEATING["60xx3000"]:
            continue
        vr = "OW" if tag >> 24 in (0x50, 0x60) else DicomDictionary[tag][0]
        vr = "LT" if tag == REPEATING["60xx4000"] else vr
        scope = scopes.get(SHARED.get(keyword, "series"), series)
        ds.add_new(tag, vr, planter.once(scope, vr, f"{tag:08x} {keyword}"))
        if vr in NOT_SEARCHABLE:
            planter.unsearchable.append(f"{series} {keyword}")
    block = ds.private_block(0x0029, planter.once(series, "LO", "private creator"), create=True)
    for number, vr in enumerate(("LO", "PN", "DA", "TM", "DT", "UI", "UT", "OB", "UN", "SQ", "IS", "DS"), start=1):
        block.add_new(number, vr, planter.once(series, vr, f"private {vr}"))
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", planter.once(series, "CS", "ImageType")]


@dataclass(frozen=True)
class PlantedArchive:
    """The archive, its planter, and what a fair reader may know of it."""

    root: Path
    planter: Planter
    nifti: Path
    thick: dict[str, str]
    """SeriesInstanceUID of each patient's thick series by the patient's scope."""
    thin: dict[str, str]
    captures: tuple[str, ...]
    mask: NDArray[np.bool_]
    hu: dict[str, NDArray[np.int16]]
    """Pixels of every whole series by SeriesInstanceUID."""
    sources: dict[str, Dataset]
    """First header of every whole series by SeriesInstanceUID."""
    capture: NDArray[np.int16]
    """Pixels of a secondary capture."""


def text_mask(word: str) -> NDArray[np.bool_]:
    """The pixels that a word covers where it is written into an image: (rows, columns)."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("L", (24, 12))
    ImageDraw.Draw(image).text((0, 0), word, fill=255, font=ImageFont.load_default(10))
    mask: NDArray[np.bool_] = np.asarray(image) > 127
    return mask


def make_archive(root: Path, patients: int, size: int = 48) -> PlantedArchive:
    """Write an archive of ``patients`` studies, each a thick and a thin series, and all that may go wrong beside them.

    Odd ones are zips, even ones loose folders; the last one's scanner and kernels are people's names.
    """
    planter, thick, thin, captures = Planter(), dict[str, str](), dict[str, str](), list[str]()
    mask, hu = text_mask("WX7"), dict[str, NDArray[np.int16]]()
    for number in range(1, patients + 1):
        scans = _study(planter, number, size, mask, short_names=number == patients)
        thick[f"P{number}"], thin[f"P{number}"] = scans[0].uid, scans[1].uid
        hu |= {scan.uid: scan.image for scan in scans if scan.image is not None}
        capture = _capture(planter, scans[0], mask)
        captures.append(capture.uid)
        label = "APE" if number % 2 else "non-APE"
        name = f"{planter.text('folder or file name')}^{planter.day('folder or file name'):%Y%m%d}"
        if number % 2:
            _write_zip(root / label / f"{name}.zip", [*scans, capture], planter)
        else:
            folder = root / label / name / planter.text("folder name")
            folder.mkdir(parents=True)
            for scan in (*scans, capture):
                for data in scan.files():
                    (folder / planter.text("file name")).write_bytes(data)
    sources = _headers(root)
    _odd_entries(root, planter)
    nifti, shown = _nifti(root.parent, planter), capture.image
    assert shown is not None
    return PlantedArchive(root, planter, nifti, thick, thin, tuple(captures), mask, hu, sources, shown[0])


def _headers(root: Path) -> dict[str, Dataset]:
    """A header of every series of an archive, by SeriesInstanceUID, whatever the files are called."""
    found: dict[str, Dataset] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        contents = [path.read_bytes()]
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                contents = [archive.read(name) for name in archive.namelist()]
        for raw in contents:
            if raw[128:132] == b"DICM":
                ds = dcmread(io.BytesIO(raw), stop_before_pixels=True)
                found.setdefault(str(ds.SeriesInstanceUID), ds)
    return found


def _study(planter: Planter, number: int, size: int, mask: NDArray[np.bool_], short_names: bool) -> list[Scan]:
    image = make_patient(number, size=size, n_thin=20).thin.hu
    means = image.reshape(4, 5, size, size).mean(axis=1).round().astype(image.dtype)
    scans = []
    for scan, hu in zip(study("x", number), (means, image), strict=True):
        uid = planter.uid(f"P{number} SeriesInstanceUID")
        scopes = {"patient": f"P{number}", "study": f"P{number}", "series": f"P{number} {len(scans)}"}

        def edit(ds: Dataset, uid: str = uid, scopes: dict[str, str] = scopes) -> None:
            plant(ds, planter, scopes)
            ds.SeriesInstanceUID = uid
            ds.SOPInstanceUID = planter.uid(f"{scopes['series']} SOPInstanceUID")
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.Manufacturer, ds.ManufacturerModelName, ds.BodyPartExamined = "SIEMENS", "SOMATOM Force", "CHEST"
            ds.PatientPosition = "FFS"
            ds.ConvolutionKernel = "Br40d"
            _overlay(ds, mask)
            if short_names:
                ds.ManufacturerModelName, ds.Manufacturer = SHORT_NAMES[4], SHORT_NAMES[3]
                ds.ConvolutionKernel = SHORT_NAMES[len(scopes["series"]) % 3]
                ds.BodyPartExamined = planter.once(scopes["series"], "CS", "BodyPartExamined")

        scans.append(replace(scan, uid=uid, image=hu, pixel=8.0, edit=edit))
    return scans


def _overlay(ds: Dataset, mask: NDArray[np.bool_]) -> None:
    """Text as an overlay plane (PS3.3 C.9.2), over the image's upper left corner."""
    plane = np.zeros((int(ds.Rows), int(ds.Columns)), bool)
    plane[: mask.shape[0], : mask.shape[1]] = mask
    ds.add_new(0x60000010, "US", ds.Rows)
    ds.add_new(0x60000011, "US", ds.Columns)
    ds.add_new(0x60000040, "CS", "G")
    ds.add_new(0x60000050, "SS", [1, 1])
    ds.add_new(0x60000100, "US", 1)
    ds.add_new(0x60000102, "US", 0)
    ds.add_new(0x60003000, "OW", np.packbits(plane.ravel(), bitorder="little").tobytes())


def _capture(planter: Planter, beside: Scan, mask: NDArray[np.bool_]) -> Scan:
    """A secondary capture of the same study, with a name written into its pixels."""
    image = np.zeros((1, 48, 48), np.int16)
    image[0, 10 : 10 + mask.shape[0], 8 : 8 + mask.shape[1]] = mask * 1500
    uid = planter.uid("secondary capture SeriesInstanceUID")

    def edit(ds: Dataset) -> None:
        beside.edit(ds)
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        ds.SeriesInstanceUID, ds.Modality, ds.ConversionType = uid, "OT", "WSD"
        ds.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
        ds.BurnedInAnnotation = "YES"

    return replace(beside, uid=uid, n=1, image=image, edit=edit)


def _write_zip(path: Path, scans: list[Scan], planter: Planter) -> None:
    """A zip whose comment, folders, members and notes are planted."""
    notes = [(planter.text("zip member name", ".txt"), planter.text("a note's content").encode())]
    nested = path.with_name(planter.text("name of a zip within a zip", ".zip"))
    inner = write_zip(nested, [], extra=[(planter.text("member of a zip within a zip"), b"x")])
    notes.append((nested.name, inner.read_bytes()))
    inner.unlink()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = f"{planter.text('zip comment')} {planter.day('zip comment'):%Y%m%d}".encode()
        for scan in scans:
            folder = planter.text("zip folder name")
            for data in scan.files():
                archive.writestr(f"{folder}/{planter.text('zip member name')}", data)
        for name, data in notes:
            archive.writestr(name, data)


def _odd_entries(root: Path, planter: Planter) -> None:
    """What cannot be read, each under a planted name: a cut zip, notes alone, a 7z, a link to nothing."""
    folder = root / "APE"
    whole = next(folder.glob("*.zip")).read_bytes()
    (folder / planter.text("name of a cut zip", ".zip")).write_bytes(whole[: len(whole) // 2])
    write_zip(folder / planter.text("name of a zip of notes", ".zip"), [], extra=[(planter.text("notes"), b"x")])
    (folder / planter.text("name of a 7z", ".7z")).write_bytes(b"7z\xbc\xaf\x27\x1c")
    (folder / planter.text("name of a link", ".zip")).symlink_to(planter.text("target of a link"))
    broken = folder / planter.text("folder of broken files")
    broken.mkdir()
    (broken / planter.text("name of a broken file", ".dcm")).write_bytes(bytes(128) + b"DICM" + b"\x02\0\0\0UL\x04\0")


def _nifti(folder: Path, planter: Planter) -> Path:
    """A thick NIfTI volume whose name and header fields are planted."""
    import nibabel

    from tests.support.nifti_files import RAS, body

    image = nibabel.Nifti1Image(body(6, 48), RAS)
    image.header.set_xyzt_units("mm")
    image.set_sform(RAS, 1)
    image.set_qform(RAS, 1)
    day = planter.day("NIfTI descrip")
    image.header["descrip"] = f"{planter.text('NIfTI descrip')} {day:%Y-%m-%d}".encode()
    image.header["aux_file"] = planter.text("NIfTI aux_file").encode()
    image.header["db_name"] = planter.text("NIfTI db_name").encode()
    image.header["intent_name"] = planter.text("NIfTI intent_name").encode()
    path = folder / planter.text("NIfTI file name", ".nii.gz")
    nibabel.save(image, path)
    return path
