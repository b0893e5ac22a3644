"""Names, ids, dates and UIDs planted wherever a DICOM archive can hold them: none may be found outside PRIVATE."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from typer.testing import CliRunner, Result

from cli.main import app
from pipeline.identity import PrivateStore
from pipeline.phantom import make_patient
from tests.support.hospital import Scan, study, write_zip

NAME, DATE, TIME, NUMBER, UID = "Zyxwvut", "19470613", "101112.377", "8675309", "1.2.826.424242"
PLANTED = ("zyxwvut", DATE, "1947-06-13", TIME, NUMBER, "424242")
VALUES = {
    "PN": f"{NAME}^Planted",
    "LO": f"{NAME} LO",
    "SH": f"{NAME} SH",
    "LT": f"{NAME} LT",
    "ST": f"{NAME} ST",
    "UT": f"{NAME} UT",
    "UC": f"{NAME} UC",
    "CS": f"{NAME.upper()}",
    "AE": f"{NAME}_AE",
    "DA": DATE,
    "DT": f"{DATE}{TIME}",
    "TM": TIME,
    "IS": NUMBER,
    "UI": f"{UID}.99",
}
NEEDED = {
    # What makes the file a readable CT slice, or is planted apart.
    "SOPClassUID SOPInstanceUID Modality ImageType PhotometricInterpretation SpecificCharacterSet NumberOfFrames "
    "PatientPosition InstanceNumber RescaleType BurnedInAnnotation TransferSyntaxUID LossyImageCompression "
    "PixelPresentation VolumetricProperties LongitudinalTemporalInformationModified AcquisitionNumber "
    "TemporalPositionIdentifier PresentationLUTShape SynchronizationFrameOfReferenceUID"
}
NEEDED_WORDS = frozenset(word for words in NEEDED for word in words.split())


def plant(ds: Dataset) -> None:
    """Fill every standard string element that is not needed for reading, and private ones, with planted text."""
    for tag, (vr, vm, _, retired, keyword) in DicomDictionary.items():
        group = tag >> 16
        if retired or vm not in ("1", "1-n") or keyword in NEEDED_WORDS or keyword in ds or vr not in VALUES:
            continue
        if 0x0008 <= group <= 0x0040 and group != 0x0028:
            setattr(ds, keyword, VALUES[vr])
    ds.PatientName, ds.PatientID = VALUES["PN"], f"{NUMBER}-{NAME}"
    ds.PatientBirthDate = ds.StudyDate = ds.SeriesDate = ds.AcquisitionDate = DATE
    ds.ConvolutionKernel = f"{NAME}30f"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", NAME.upper()]
    ds.Manufacturer = NAME
    block = ds.private_block(0x0029, f"{NAME} CSA", create=True)
    block.add_new(0x01, "LO", f"{NAME} private")
    block.add_new(0x02, "OB", f"{NAME} {DATE}".encode())


def planted_study(number: int) -> list[Scan]:
    ids = {"study": f"{UID}.{number}", "patient": NUMBER, "frame": f"{UID}.{number}.9", "seed": number, "edit": plant}
    return [replace(scan, uid=f"{UID}.{number}.{i}", **ids) for i, scan in enumerate(study("x", number))]  # type: ignore[arg-type]


def outside_private(store: Path) -> Iterator[tuple[str, str]]:
    """Every file of a store outside PRIVATE: its name and all that it says, compressed tables unpacked."""
    for path in sorted(store.rglob("*")):
        if path.is_dir() or path.relative_to(store).parts[0] == "private":
            continue
        text = path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            text += json.dumps(file.read().to_pylist(), default=str) + str(file.schema_arrow.metadata)
        yield str(path.relative_to(store)), text


def leaks(text: str) -> list[str]:
    return [planted for planted in PLANTED if planted in text.lower()]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A good study, one with a broken series, archives that are broken whole, and a plain folder; planted names."""
    root = tmp_path / f"{NAME}-archive"
    good = root / "APE" / f"{NAME}^Jane {DATE}.zip"
    write_zip(good, planted_study(1), extra=[(f"{NAME}/{DATE}/report {NUMBER}.pdf", f"{NAME} {DATE}".encode())])
    thick, thin = planted_study(2)
    gap = [(f"{NAME}/{i}", thin.file(i)) for i in range(thin.n) if i not in (7, 8, 9)]
    write_zip(root / NAME / f"{NUMBER}.zip", [thick], extra=gap)
    whole = good.read_bytes()
    (root / "APE" / f"{NAME}-cut.zip").write_bytes(whole[: len(whole) // 2])
    (root / "APE" / f"{NAME}-notes.zip").write_bytes(write_zip(tmp_path / "n.zip", [], [(NAME, b"x")]).read_bytes())
    folder = root / "non-APE" / f"{NAME}^Joan" / DATE
    folder.mkdir(parents=True)
    for i, data in enumerate(planted_study(3)[0].files()):
        (folder / f"{NAME}-{i}").write_bytes(data if i else data[:400])
    return root


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), standalone_mode=False)


def test_nothing_planted_leaves_private(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    caplog.set_level(logging.DEBUG)
    store = tmp_path / "store"
    spoken = []
    for extra in ([], ["--json", "--rescan", "--verify-pixels"]):
        result = run("ingest", str(dataset), str(store), "--workers", "1", *extra)
        assert result.exception is None
        assert result.return_value == 3
        spoken += [result.stdout, result.stderr]
    summary = json.loads(result.stdout)
    assert summary["pairs"] == 1
    assert sorted(item["kind"] for item in summary["set_aside"]) == ["archive"] * 3 + ["series"]
    lists = tmp_path / "lists.csv"
    lists.write_text(f"patient,split\n{NAME},{NAME}\n")
    for option in ("--splits", "--pairs"):
        spoken.append(str(run("ingest", str(dataset), str(store), option, str(lists)).exception))
    spoken.append(str(run("ingest", str(tmp_path / NAME), str(store)).exception))
    spoken.append(caplog.text)
    assert [leaks(text) for text in spoken] == [[] for _ in spoken]
    files = dict(outside_private(store))
    assert len(files) > 5
    assert {name: leaks(name + text) for name, text in files.items() if leaks(name + text)} == {}


def anatomical_study(number: int) -> list[Scan]:
    """A planted study whose pixels prove its pair: each thick slice is the mean of its five thin ones."""
    thick, thin = planted_study(number)
    patient = make_patient(number, size=32, n_thin=20).thin.hu
    means = patient.reshape(4, 5, 32, 32).mean(axis=1).round().astype(patient.dtype)
    return [replace(thick, image=means, pixel=10.0), replace(thin, image=patient, pixel=10.0)]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store through every step up to DICOM and report, with pixels that break and an archive that vanishes."""
    root = tmp_path_factory.mktemp("worked")
    data, store = root / f"{NAME}-archive", root / "store"
    write_zip(data / "APE" / f"{NAME}^Jane {DATE}.zip", anatomical_study(11))
    folder = data / "non-APE" / f"{NAME}^Joan" / DATE
    folder.mkdir(parents=True)
    for i, content in enumerate(planted_study(12)[1].files()):
        (folder / f"{NAME}-{i}").write_bytes(content if i != 7 else content[:-64])
    inline = ("--engine", "inline", "--threads", "1")
    spoken: dict[str, str] = {}
    handler, lines = logging.Handler(), list[str]()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CTPIPE_SECRET", raising=False)
        patch.setattr(logging.root, "level", logging.DEBUG)
        logging.root.addHandler(handler)
        try:
            steps: dict[str, tuple[object, ...]] = {
                "ingest": ("ingest", data, store, "--workers", "1"),
                "encode": ("encode", store, *inline),
                "encode again": ("encode", store, *inline, "--json"),
                "verify": ("verify", store),
                "status": ("status", store, "--json"),
                "decode": ("decode", store, root / "out", *inline),
                "report": ("report", store, "--out", root / "store.html"),
                "identified": ("decode", store, root / "identified", "--restore-identity", *inline),
            }
            for name, words in steps.items():
                result = run(*map(str, words))
                spoken[name] = f"{result.stdout}{result.stderr}{result.exception or ''} [{result.return_value}]"
            data.rename(root / "gone")
            for name, words in {
                "decode, archive gone": ("decode", store, root / "late", *inline, "--json"),
                "report, archive gone": ("report", store, "--out", root / "late.html"),
                "ingest, archive gone": ("ingest", data, store),
            }.items():
                result = run(*map(str, words))
                spoken[name] = f"{result.stdout}{result.stderr}{result.exception or ''} [{result.return_value}]"
        finally:
            logging.root.removeHandler(handler)
    return {"root": root, "store": store, "spoken": spoken, "logged": "\n".join(lines)}


def test_no_step_says_a_planted_word(worked: dict[str, Any]) -> None:
    spoken = worked["spoken"]
    assert "pixel data cut short" in spoken["encode"], "a broken slice must have been met"
    assert "cannot be opened" in spoken["decode, archive gone"], "a vanished archive must have been met"
    paths = str(worked["root"])
    assert {name: leaks(text.replace(paths, "")) for name, text in spoken.items() if leaks(text)} == {}
    assert worked["logged"]
    assert leaks(worked["logged"]) == []


def test_no_latent_dicom_or_page_holds_a_planted_word(worked: dict[str, Any]) -> None:
    root: Path = worked["root"]
    files = dict(outside_private(worked["store"]))
    for path in sorted([*root.glob("out/**/*"), *root.glob("late/**/*"), *root.glob("*.html")]):
        if path.is_file():
            files[str(path.relative_to(root))] = path.read_bytes().decode("latin-1")
    kinds = Counter(Path(name).suffix for name in files)
    assert kinds[".dcm"] >= 20
    assert kinds[".html"] == 2
    assert kinds[".parquet"] >= 4
    assert any("latents.zarr" in name for name in files)
    assert {name: leaks(name + text) for name, text in files.items() if leaks(name + text)} == {}


def test_identity_comes_back_where_it_is_asked_for(worked: dict[str, Any]) -> None:
    """The control for DICOM: the same search finds the patient in a series that was to carry the identity."""
    files = sorted(worked["root"].glob("identified/**/*.dcm"))
    assert files
    assert set(leaks(files[0].read_bytes().decode("latin-1"))) >= {"zyxwvut", NUMBER, "424242"}


def test_private_knows_it_all(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: had the search no teeth, it would find nothing here either."""
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    store = tmp_path / "store"
    run("ingest", str(dataset), str(store), "--workers", "1")
    private = PrivateStore.open(str(store))
    rows = json.dumps([private.table(kind).to_pylist() for kind in ("series", "archives", "quarantine")]).lower()
    assert {"zyxwvut", DATE, NUMBER, "424242"} <= set(leaks(rows))
    text = run("whois", str(store), private.keys.patient(f"{NUMBER}-{NAME}", VALUES["LO"])).stdout
    assert f"{NAME}^Planted" in text
