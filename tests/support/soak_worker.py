"""Processes of a soak that are killed while they work: one that catalogues and encodes, one that delivers, and a PACS.

All are forked from a server that has imported everything once (tests/support/soak.py), so that a kill costs a tenth of
a second and not five seconds of imports.
"""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import os
import random
import threading
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

Role = Literal["catalogue", "deliver"]
ROLES: tuple[Role, ...] = ("catalogue", "deliver")
BATCH = 100
AHEAD = 2
SECRET = "5a" * 32
THICK, RATIO, THICK_MM = 3, 2, 3.0
"""Thick slices of a study, thin slices to one of them, and the thick ones' spacing: as small as a study can be."""
PHANTOMS = 8
NUMBER, FIRST = b"99999", 10_000
"""What stands for a study's number in the templates' identifiers, and the number of the first study."""
FULL_EVERY, PRIVATE_FULL_EVERY = 400, 100
"""One slice, and one file of PRIVATE, in so many finds the disk full when half of it is written."""
WARM = (
    "torch",
    "torch._dynamo",
    "pandas",
    "psutil",
    "pynetdicom",
    "obstore.store",
    "latentcache.storage.s3",
    "latentcache.tables",
    "pipeline.encode.store",
    "pipeline.ingest.ingest",
    "pipeline.pairing.pixel_check",
    "pipeline.vae.vae",
    "pipeline.workflows.interpolation.interpolate",
    "pipeline.writing.pacs.cstore",
    "pipeline.writing.pacs.send",
    __name__,
)
"""What the server imports before it forks."""


# -- studies -----------------------------------------------------------------------------------------------------------


def make_templates(root: Path) -> None:
    """Write the archives that all studies are copies of but for their identifiers, and the VAE that encodes them."""
    from pipeline.phantom import make_patient
    from tests.support.hospital import study, write_zip

    depth = THICK * RATIO
    for number in range(PHANTOMS):
        hu = make_patient(number, size=16, n_thin=20).thin.hu[:depth]
        means = hu.reshape(THICK, RATIO, 16, 16).mean(axis=1).round().astype(hu.dtype)
        (thick, thin), thin_mm = study(f"PAT{NUMBER.decode()}", int(NUMBER)), THICK_MM / RATIO
        of_thick = {"n": THICK, "spacing": THICK_MM, "z0": (THICK_MM - thin_mm) / 2, "image": means}
        scans = [dataclasses.replace(thick, **of_thick), dataclasses.replace(thin, n=depth, spacing=thin_mm, image=hu)]
        write_zip(root / "templates" / f"{number}.zip", [dataclasses.replace(scan, pixel=20.0) for scan in scans])
    small_vae(root / "vae.safetensors")


def small_vae(path: Path) -> None:
    """An autoencoder of random weights in few layers: a soak asks whether latents get through, not what they are."""
    import torch
    from safetensors.torch import save_file

    from pipeline.vae import KlAutoencoder, VaeArchitecture

    architecture = VaeArchitecture(channels=(4, 4, 8), num_res_blocks=(1, 1, 1), norm_num_groups=4)
    torch.manual_seed(0)
    save_file(
        KlAutoencoder(architecture).state_dict(), path, metadata={"architecture": json.dumps(architecture.to_dict())}
    )


def archive_of(root: Path, number: int) -> Path:
    """The zip of one study, made where it is missing."""
    path = root / "archive" / f"batch{number // BATCH:05d}" / f"study{number:05d}.zip"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}")
        with (
            zipfile.ZipFile(root / "templates" / f"{number % PHANTOMS}.zip") as made,
            zipfile.ZipFile(draft, "w") as out,
        ):
            for name in made.namelist():
                out.writestr(name, made.read(name).replace(NUMBER, b"%05d" % (FIRST + number)))
        draft.replace(path)
        step(root, "catalogue")
    return path


def step(root: Path, role: Role, count: int = 1) -> None:
    """Say that work went on: a study made, catalogued or encoded; interpolated or sent."""
    append(root / f"steps-{role}", "." * count)


def append(path: Path, text: str) -> None:
    """In one system call, so that a kill leaves all of it or nothing."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


# -- the worker --------------------------------------------------------------------------------------------------------


def out_of(root: Path, number: int) -> Path:
    return root / "out" / f"{number // BATCH:05d}" / f"{number:05d}"


def interpolate(archive: Path, out: Path) -> Path:
    """The folder of a study's thin series, written if it is not there yet."""
    from pipeline.workflows import interpolate_study
    from pipeline.writing import is_written_series

    found = [folder for folder in out.glob("*") if not folder.name.startswith(".")]  # hidden: a killed writer's
    done = [folder for folder in found if is_written_series(folder)]
    options = {"spacing_mm": THICK_MM / RATIO, "device": "cpu", "page": False}
    return done[0] if done else interpolate_study(archive, out, **options).folder


def catalogue(root: Path, store_url: str, numbers: range) -> None:
    """One batch into the store: ingest, then encode; whatever an earlier worker did of it is taken as it is."""
    from pipeline.encode import EncodeSettings, encode_store
    from pipeline.engines import EngineOptions
    from pipeline.ingest import ingest, open_stores

    archives = [archive_of(root, number) for number in numbers]
    store, private = open_stores(store_url, str(root / "private"))
    if ingest(str(archives[0].parent), store, private).archives.get("new"):
        step(root, "catalogue", len(archives))
    settings = EncodeSettings(vae=str(root / "vae.safetensors"), torch_threads=1, pad_in_plane=16)
    summary = encode_store(
        store_url,
        settings,
        EngineOptions(name="inline"),
        private_url=str(root / "private"),
        on_outcome=lambda outcome, planned: step(root, "catalogue"),
    )
    if summary.failed:  # the store was away for longer than a request is repeated: encode again
        raise ConnectionError(next(iter(summary.failed.values())))


def deliver(root: Path, port: int, numbers: range) -> None:
    """One batch to the PACS: interpolate, then send; likewise."""
    from pipeline.writing.pacs import CStore, send_folder

    for number in numbers:
        mark = root / "sent" / f"{number // BATCH:05d}" / str(number)
        if not mark.exists():
            folder = interpolate(archive_of(root, number), out_of(root, number))
            step(root, "deliver")
            sent = send_folder(folder, CStore("127.0.0.1", port, "SOAK", timeout_s=30), backoff_s=0.2)
            if sent.left:
                raise ConnectionError(sent.reason)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
            step(root, "deliver")


def now_and_then_full(chance: random.Random) -> None:
    """Let some slices, and some files of PRIVATE, find the disk full when half of them is written."""
    slices: Any = importlib.import_module("pipeline.writing.ct_image")
    private: Any = importlib.import_module("pipeline.identity.private_store")
    write_slice, write_private = slices._write_file, private.OwnerOnlyFiles.write

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def slice_(path: Path, parts: Any) -> None:
        if chance.randrange(FULL_EVERY) == 0:
            write_slice(path, parts[: len(parts) // 2])
            full()
        write_slice(path, parts)

    def file(self: Any, path: Path, buffers: Any) -> None:
        if chance.randrange(PRIVATE_FULL_EVERY) == 0:
            write_private(self, path, [bytes(b)[: len(bytes(b)) // 2] for b in buffers])
            full()
        write_private(self, path, buffers)

    slices._write_file = slice_
    private.OwnerOnlyFiles.write = file


def worker(
    root: Path, role: Role, store_url: str, port: int, studies: int, life: int, environment: dict[str, str]
) -> None:
    """Do what is left, batch after batch; after each note time, memory, open files, threads and temporary files.

    Args:
        life: The number of this worker; -1 for the last, which finds no disk full.
    """
    import psutil

    from latentcache import CtpipeError

    log_to(root / "worker.log")
    os.environ.update(environment, CTPIPE_SECRET=SECRET)
    if life >= 0:
        now_and_then_full(random.Random(life))
    me = psutil.Process()
    for first in range(0, studies, BATCH):
        if mark_of(root, role, first).exists():
            continue
        while not may_begin(root, role, first):
            time.sleep(0.1)
        numbers = range(first, min(first + BATCH, studies))
        started, spent = time.time(), time.process_time()
        undisturbed = not begun(root, role, first)
        while True:
            try:
                if role == "catalogue":
                    catalogue(root, store_url, numbers)
                else:
                    deliver(root, port, numbers)
                break
            except (OSError, CtpipeError) as error:  # what a person would do: run it again
                undisturbed = False
                append(root / "failures.log", f"{type(error).__name__}\t{str(error)[:200]!r}\n")
        mark_of(root, role, first).touch()
        figures = {
            "role": role,
            "life": life,
            "studies": numbers.stop,
            "time": round(time.time(), 1),
            "seconds": round(time.time() - started, 1),
            "cpu_s": round(time.process_time() - spent, 2),
            "undisturbed": undisturbed,
            "rss_mib": round(me.memory_info().rss / 2**20, 1),
            "files": me.num_fds(),
            "threads": me.num_threads(),
            "temporary": temporary_files(root, first),
        }
        append(root / "figures.jsonl", json.dumps(figures) + "\n")


def mark_of(root: Path, role: Role, first: int) -> Path:
    """The file that says that a batch is through."""
    return root / "done" / role / str(first)


def begun(root: Path, role: Role, first: int) -> bool:
    name = "archive/batch" if role == "catalogue" else "out/"
    return (root / f"{name}{first // BATCH:05d}").exists()


def may_begin(root: Path, role: Role, first: int) -> bool:
    """What is delivered was catalogued; and the catalogue is at most a few batches ahead, so that a soak can end."""
    if role == "deliver":
        return mark_of(root, "catalogue", first).exists()
    return first < AHEAD * BATCH or mark_of(root, "deliver", first - AHEAD * BATCH).exists()


def temporary_files(root: Path, first: int) -> int:
    """Files in the system's temporary folder, and of PRIVATE and this batch's output those that are half-written."""
    hidden = [out_of(root, first).parent.rglob(".*"), (root / "private").rglob(".*")]
    return sum(len(files) for _, _, files in os.walk(root / "tmp")) + sum(1 for paths in hidden for _ in paths)


def log_to(path: Path) -> None:
    with path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


# -- the PACS ----------------------------------------------------------------------------------------------------------


def pacs(root: Path, port: int) -> None:
    """A C-STORE SCP that notes what it stored before it says so: study, series, instance, checksum of the pixels."""
    from pynetdicom import AE, evt
    from pynetdicom.sop_class import CTImageStorage

    log_to(root / "pacs.log")

    def keep(event: Any) -> int:
        ds = event.dataset
        uids = (ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)
        append(root / "pacs.tsv", "\t".join([*map(str, uids), str(zlib.crc32(ds.PixelData))]) + "\n")
        return 0

    entity = AE(ae_title="SOAK")
    entity.maximum_associations = 100  # an association that ended counts until its thread is reaped
    entity.add_supported_context(CTImageStorage, ["1.2.840.10008.1.2.1"])
    entity.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    threading.Event().wait()
