"""Run ctpipe over a planted archive, search all that it wrote and said outside of PRIVATE, and score its actions.

The score is MIDI-B's (Medical Image De-Identification Benchmark): the share of right actions. An action is a planted
value that must appear nowhere, a row of table E.1-1 in a file that was written, a UID that must be new or the same as
in another file, a fact or pixel that must be kept, pixels that must be gone, and the profile's code that must be there.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from typer.testing import CliRunner

from cli.main import app
from pipeline.engines import job_log
from pipeline.identity import PrivateStore
from tests.support.planted_identifiers import SHORT_NAMES, PlantedArchive, found_in, rows_in_files

_KEPT = (
    "KVP SliceThickness Rows Columns PixelSpacing ImageOrientationPatient RescaleType PatientPosition Modality "
    "SamplesPerPixel PhotometricInterpretation BitsAllocated"
)
"""What a decoded thin series must say as its source did."""
_PRESENT = (
    "SOPClassUID SOPInstanceUID StudyInstanceUID SeriesInstanceUID FrameOfReferenceUID PatientName PatientID "
    "PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName Modality "
    "Manufacturer ImageType InstanceNumber ImagePositionPatient PatientIdentityRemoved DeidentificationMethod"
)
"""Attributes of types 1 and 2 of a CT image (PS3.3 A.3), which removal must not take away, and what E.1.1 asks for."""
_DATA_URI = re.compile(r"data:image/[a-z+]+;base64,([A-Za-z0-9+/=]+)")
_ALIKE = 0.7
"""Correlation with the mask of a burned-in word above which an image shows it."""


@dataclass(frozen=True)
class Spoken:
    """What one command said, wherever it said it, and how it ended."""

    text: str
    code: int


Run = Callable[[Sequence[str]], Spoken]


class InProcess:
    """Runs commands without a process for each, and keeps what they log at any level."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._handler = logging.Handler()
        self._handler.emit = self._keep  # type: ignore[method-assign]

    def _keep(self, record: logging.LogRecord) -> None:
        self._lines.append(f"{record.getMessage()} {record.exc_info[1] if record.exc_info else ''}")

    def __call__(self, words: Sequence[str]) -> Spoken:
        before = (logging.root.level, list(logging.root.handlers), logging.getLogger(job_log.OURS).level)
        logging.root.addHandler(self._handler)
        logging.root.setLevel(logging.DEBUG)
        self._lines.clear()
        try:
            result = CliRunner().invoke(app, list(words), standalone_mode=False)
        finally:
            logging.root.setLevel(before[0])
            logging.root.handlers[:] = before[1]
            logging.getLogger(job_log.OURS).setLevel(before[2])
        logged = "\n".join(self._lines)
        code = 1 if result.exception else int(result.return_value or 0)
        return Spoken(f"{result.stdout}\n{result.stderr}\n{result.exception or ''}\n{logged}", code)


@dataclass
class Score:
    """Actions by category, those that were right, and every leak: where it was planted and where it came out."""

    actions: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    leaks: list[str] = field(default_factory=list)
    channels: Counter[str] = field(default_factory=Counter)
    bytes_searched: int = 0

    def count(self, category: str, fine: bool, what: str) -> None:
        self.actions[category] += 1
        self.right[category] += fine
        if not fine:
            self.wrong.append(f"{category}: {what}")

    @property
    def share(self) -> float:
        """Right actions of all."""
        return self.right.total() / max(self.actions.total(), 1)

    def as_dict(self) -> dict[str, Any]:
        return {
            "actions": self.actions.total(),
            "right": self.right.total(),
            "share": round(self.share, 6),
            "leaks": self.leaks,
            "wrong": self.wrong[:50],
            "by_category": {name: [self.right[name], n] for name, n in sorted(self.actions.items())},
            "channels_searched": dict(sorted(self.channels.items())),
            "bytes_searched": self.bytes_searched,
        }


INLINE = ("--engine", "inline", "--threads", "1")
SMALL = [
    word
    for key in ("model.width=8", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.groups=4",
                "model.heads=2", "model.time_embedding=16", "images_every=0", "validation.pairs=1", "losses.probes=1")
    for word in ("--set", key)
]  # fmt: skip


def steps(made: PlantedArchive, work: Path, train: bool) -> Iterator[tuple[str, list[str], tuple[int, ...]]]:
    """(name, words of the command, exit codes that are fine), in order, in the three modes that speak differently."""
    data, store, out = str(made.root), str(work / "store"), work / "out"
    json_only = {" --json": ["--json"]}
    (zipped, *_) = sorted(path for path in (made.root / "APE").glob("*^*.zip"))
    loose = next(path for path in (made.root / "non-APE").iterdir())
    debug = ["--debug", "--log-json"]
    for mode, before, after in (("", [], []), (" --json", [], ["--json"]), (" --debug", debug, ["--verify-pixels"])):
        yield f"ingest{mode}", [*before, "ingest", data, store, "--workers", "1", "--rescan", *after], (3,)
        yield f"encode{mode}", [*before, "encode", store, *INLINE, *json_only.get(mode, [])], (0, 3)
        words = ["decode", store, str(out / "decoded"), *INLINE, *json_only.get(mode, [])]
        yield f"decode{mode}", [*before, *words], (0, 3)
        place = str(out / f"thin{mode.strip(' -')}")
        yield f"interpolate{mode}", [*before, "interpolate", str(zipped), place, *json_only.get(mode, [])], (0,)
    yield "interpolate a folder", ["interpolate", str(loose), str(out / "folder"), "--alarm-map"], (0, 1, 2)
    yield "interpolate NIfTI", ["interpolate", str(made.nifti), str(out / "nifti")], (0,)
    for name, words in {
        "verify": ["verify", store, "--sources", "--json"],
        "status": ["status", store, "--json"],
        "stats": ["stats", store, "--json"],
        "export": ["export", store, str(out / "export.zarr")],
        "report": ["report", store, "--out", str(out / "store.html")],
        "send to nobody": ["send", *_written(out), "--to", "A@127.0.0.1:9", "--attempts", "1"],
    }.items():
        yield name, words, (0, 1, 2, 3)
    if train:
        run = str(work / "run")
        yield "train", ["train", store, run, "--preset", "tiny", "--max-steps", "2", "--gpus", "0", *SMALL], (0,)
        yield "evaluate", ["evaluate", store, run, "--split", "train", "--steps", "1", "--threads", "1"], (0,)
        yield "report of a run", ["report", run, "--split", "train"], (0,)
        sampled = ["decode", store, str(out / "sampled"), "--checkpoint", run, "--steps", "1", *INLINE]
        yield "sample and decode", sampled, (0, 3)
        spread = str(work / "store-ray")
        yield "ingest for Ray", ["ingest", data, spread, "--workers", "1"], (3,)
        words = ["encode", spread, "--engine", "ray", "--workers", "2", "--threads", "1"]
        yield "encode on Ray", [*debug, *words], (0, 3)
        words = ["decode", spread, str(out / "decoded-ray"), "--engine", "ray", "--workers", "2", "--threads", "1"]
        yield "decode on Ray", [*debug, *words], (0, 3)


def _written(out: Path) -> list[str]:
    return [str(folder) for folder in sorted((out / "thin").iterdir()) if folder.is_dir() and folder.name != "private"]


def errors(made: PlantedArchive, work: Path) -> Iterator[tuple[str, list[str]]]:
    """Commands that fail, each on something whose name is planted; the archive has gone meanwhile."""
    store, gone = str(work / "store"), made.root
    broken = next((gone / "APE").glob("*.7z"))
    yield "interpolate what is no CT", ["interpolate", str(broken), str(work / "out" / "no")]
    for command in (["ingest", str(gone), store], ["ingest", str(gone / "APE"), store, "--json"],
                    ["encode", store, *INLINE, "--repair"], ["verify", store, "--sources"],
                    ["decode", store, str(work / "out" / "late"), *INLINE, "--json"],
                    ["--debug", "--log-json", "decode", store, str(work / "out" / "later"), *INLINE],
                    ["report", store, "--out", str(work / "out" / "late.html")]):  # fmt: skip
        yield f"{' '.join(command[:1])}, archive gone", command


def worked(made: PlantedArchive, work: Path, run: Run, train: bool = True) -> dict[str, str]:
    """Run every step; what each said, by its name. Asserts that each ended as it should."""
    said: dict[str, str] = {}
    with rays_logs(work / RAY_LOGS):
        for name, words, fine in steps(made, work, train):
            spoken = run(words)
            assert spoken.code in fine, f"{name} ended with {spoken.code}: {spoken.text[-2000:]}"
            said[name] = spoken.text
    before, *rest = list(errors(made, work))
    said[before[0]] = run(before[1]).text
    hidden = made.root.rename(made.root.with_name("gone"))
    for number, (name, words) in enumerate(rest):
        said[f"{name} {number}"] = run(words).text
    hidden.rename(made.root)
    return said


RAY_LOGS = "ray-logs"


@contextmanager
def rays_logs(folder: Path) -> Iterator[None]:
    """Let Ray log to a folder of the caller's, where it is moved at the end: workers, drivers, raylets, dashboard.

    In between it is in a short place, since the paths of Ray's sockets may have 107 characters.
    """
    before = os.environ.get("RAY_TMPDIR")
    with tempfile.TemporaryDirectory(prefix="r") as short:
        os.environ["RAY_TMPDIR"] = short
        try:
            yield
        finally:
            os.environ.pop("RAY_TMPDIR")
            if before is not None:
                os.environ["RAY_TMPDIR"] = before
        for number, logs in enumerate(sorted(Path(short).rglob("session_*/logs"))):
            if not logs.parent.is_symlink():  # session_latest
                shutil.copytree(logs, folder / str(number))


def channel_of(path: Path) -> str:
    """Which kind of output a file is."""
    name = path.name
    if RAY_LOGS in path.parts:
        return "Ray logs"
    if name.endswith((".dcm", ".html", ".parquet", ".nii", ".nii.gz")):
        kinds = {"dcm": "DICOM", "html": "report", "parquet": "catalog or manifest"}
        return kinds.get(name.rpartition(".")[2], "NIfTI")
    if name.startswith("events.out"):
        return "TensorBoard"
    if "export.zarr" in path.parts:
        return "export"
    return "JSON" if name.endswith((".json", ".jsonl")) else "other files"


def contents(path: Path) -> str:
    """All that a file says: packed tables and volumes unpacked, images within pages not."""
    raw = path.read_bytes()
    text = raw.decode("latin-1")
    if path.suffix == ".parquet":
        file = pq.ParquetFile(path)
        text += json.dumps(file.read().to_pylist(), default=str) + str(file.schema_arrow.metadata)
    elif path.suffix == ".gz":
        text += gzip.decompress(raw).decode("latin-1")
    return text


def outputs(work: Path) -> list[Path]:
    """Every file below a folder that is not in a private part."""
    return sorted(p for p in work.rglob("*") if p.is_file() and "private" not in p.relative_to(work).parts)


def search(made: PlantedArchive, work: Path, said: dict[str, str], score: Score) -> None:
    """Look for every planted value in all files, their names, and all that was said."""
    leaked: dict[tuple[str, str], str] = {}
    short: set[str] = set()

    def look(channel: str, where: str, text: str) -> None:
        score.channels[channel] += 1
        score.bytes_searched += len(text)
        leaked.update({hit: f"{channel} {where}" for hit in found_in(text) if hit in made.planter.planted})
        short.update(name for name in SHORT_NAMES if f'"{name}"' in text)

    for name, text in said.items():
        look("said and logged", name, text.replace(str(made.root.parent), ""))
    for path in outputs(work):
        where = str(path.relative_to(work))
        look(channel_of(path), where, where + "\n" + contents(path))
    for hit, identifier in made.planter.planted.items():
        score.count("value removed", hit not in leaked, f"{identifier.where} is in {leaked.get(hit)}")
        if hit in leaked:
            score.leaks.append(f"{identifier.where} is in {leaked[hit]}")
    for name in SHORT_NAMES:
        score.count("short name removed", name not in short, name)
        score.leaks += [f"the name {name!r}"] * (name in short)


# -- what was written --------------------------------------------------------------------------------------------------


def elements(ds: Dataset) -> Iterator[pydicom.DataElement]:
    """Every element, those of sequences' items among them."""
    for element in ds:
        yield element
        if element.VR == "SQ":
            for item in element.value:
                yield from elements(item)


def judge_files(made: PlantedArchive, work: Path, score: Score) -> None:
    """Every row of table E.1-1, and the profile's code, in the first file of every series that was written."""
    for path in sorted(work.glob("out/**/00001.dcm")):
        ds = pydicom.dcmread(path)
        where = str(path.parent.relative_to(work))
        codes = [str(item.CodeValue) for item in ds.get("DeidentificationMethodCodeSequence", [])]
        score.count("profile's code written", "113100" in codes, where)
        for keyword in _PRESENT.split():
            score.count("attribute present", keyword in ds, f"{keyword} in {where}")
        by_tag: dict[int, list[pydicom.DataElement]] = {}
        for element in (*elements(ds), *ds.file_meta):
            by_tag.setdefault(int(element.tag), []).append(element)
        for tag, (keyword, action) in rows_in_files().items():
            fine = all(_fits(element, action) for element in by_tag.get(tag, []))
            score.count(f"table row {action}", fine, f"{keyword} in {where}")
        private = [e for e in elements(ds) if e.tag.is_private and e.tag.group != 0x0071]
        score.count("private removed", not private, where)
        for keyword in ("ConvolutionKernel", "ManufacturerModelName", "Manufacturer"):
            fine = str(ds.get(keyword, "")) not in SHORT_NAMES
            score.count("short name removed", fine, f"{keyword} in {where}")


def _fits(element: pydicom.DataElement, action: str) -> bool:
    """Whether a written element obeys its action: its value is ctpipe's own, and not empty where only D or U stands."""
    values = element.value if isinstance(element.value, pydicom.multival.MultiValue) else [element.value]
    text = " ".join(map(str, values))
    if element.VR == "SQ":
        return action not in ("X",) or not element.value
    own = not any(kind in ("text", "uid") for kind, _ in found_in(text)) and text not in ("113Y", "4242")
    return own and (bool(text) or "Z" in action or action == "X")


def judge_consistency(made: PlantedArchive, work: Path, score: Score) -> None:
    """UIDs and patients: new ones, the same for the same study and patient, others for others."""
    private = PrivateStore.open(str(work / "store"))
    key_of = {row["series_uid"]: row["series_key"] for row in private.table("series").to_pylist()}
    seen: dict[str, tuple[str, str, str]] = {}
    for patient, uid in made.thin.items():
        ds = pydicom.dcmread(work / "out" / "decoded" / key_of[uid] / "00001.dcm")
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
            score.count("UID changed", str(ds[keyword].value).startswith("2.25."), f"{keyword} of {patient}")
        seen[patient] = (str(ds.StudyInstanceUID), str(ds.FrameOfReferenceUID), str(ds.PatientID))
        _judge_kept(made, work, uid, ds, key_of[uid], score)
    distinct = [len({values[i] for values in seen.values()}) == len(seen) for i in range(3)]
    score.count("UID consistent", all(distinct[:2]), "studies of different patients share a UID")
    score.count("patient consistent", distinct[2], "two patients share an id")
    first = next((work / "out" / "thin").glob("*/00001.dcm"))
    ds = pydicom.dcmread(first)
    same = (str(ds.StudyInstanceUID), str(ds.FrameOfReferenceUID), str(ds.PatientID))
    names = ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID")
    known = [values for values in seen.values() if values[0] == same[0]]
    for i, name in enumerate(names):
        category = "patient consistent" if name == "PatientID" else "UID consistent"
        score.count(category, any(values[i] == same[i] for values in known), f"{name} of interpolate and decode differ")


def _judge_kept(made: PlantedArchive, work: Path, uid: str, ds: Dataset, key: str, score: Score) -> None:
    """Facts and pixels that the profile keeps, in a decoded thin series beside its source."""
    source = made.sources[uid]
    for keyword in _KEPT.split():
        fine = _plain(ds.get(keyword)) == _plain(source.get(keyword) if keyword != "RescaleType" else "HU")
        score.count("fact kept", fine, f"{keyword} of {uid}: {source.get(keyword)} became {ds.get(keyword)}")
    for keyword in ("ConvolutionKernel", "ManufacturerModelName", "BodyPartExamined"):
        if source[keyword].value in ("Br40d", "SOMATOM Force", "CHEST"):
            score.count("fact kept", ds.get(keyword) == source[keyword].value, f"{keyword} of {uid}")
    files = sorted((work / "out" / "decoded" / key).glob("*.dcm"))
    hu = np.stack([pydicom.dcmread(file).pixel_array for file in files]).astype(np.float64)
    alike = {one: _alike(hu, pixels) for one, pixels in made.hu.items() if pixels.shape == hu.shape}
    score.count("pixels kept", alike[uid] == max(alike.values()) and alike[uid] > 0.8, uid)


def _alike(hu: NDArray[np.float64], other: NDArray[np.int16]) -> float:
    return float(np.corrcoef(hu.ravel(), other.ravel())[0, 1])


def _plain(value: Any) -> Any:
    if isinstance(value, pydicom.multival.MultiValue):
        return tuple(round(float(v), 6) for v in value)
    try:
        return round(float(value), 6)
    except (TypeError, ValueError):
        return str(value)


# -- pixels ------------------------------------------------------------------------------------------------------------


def shows(image: NDArray[Any], mask: NDArray[np.bool_]) -> bool:
    """Whether a word is to be read in an image, wherever it stands."""
    from skimage.feature import match_template

    plain = np.asarray(image, dtype=np.float64)
    if min(plain.shape) < max(mask.shape) or not plain.std():
        return False
    return float(np.nanmax(match_template(plain, mask.astype(np.float64)))) > _ALIKE


def images(path: Path) -> Iterator[NDArray[Any]]:
    """The grey images of an output: slices of DICOM, pictures in a page."""
    from PIL import Image

    if path.suffix == ".dcm":
        yield pydicom.dcmread(path).pixel_array
    elif path.suffix == ".html":
        for match in _DATA_URI.finditer(path.read_text(errors="replace")):
            yield np.asarray(Image.open(io.BytesIO(base64.b64decode(match.group(1)))).convert("L"))


def judge_pixels(made: PlantedArchive, work: Path, score: Score) -> None:
    """The word in the captures and overlays is in no image; the search finds it in the captures themselves."""
    assert shows(made.capture, made.mask), "the search for burned-in text has no teeth"
    for path in outputs(work):
        for i, image in enumerate(images(path)):
            planes = image if image.ndim == 3 else [image]
            fine = not any(shows(plane, made.mask) for plane in planes)
            score.count("pixels hidden", fine, f"{path.relative_to(work)} {i}")
            if not fine:
                score.leaks.append(f"a burned-in word is in {path.relative_to(work)}")


def score_all(made: PlantedArchive, work: Path, said: dict[str, str]) -> Score:
    """Search and judge everything that a run left."""
    score = Score()
    search(made, work, said, score)
    judge_files(made, work, score)
    judge_consistency(made, work, score)
    judge_pixels(made, work, score)
    return score
