"""The same latents in ctpipe's store and in the formats of others: writers and readers for ``store.py``.

Every maker takes a folder and (4, 76, 128, 128) float16 arrays, writes them, and returns ``read(number, depth)``. A
peer that is not installed raises ImportError. Where a format can return a window without its whole latent, it does.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentcache import LatentMeta

SHAPE = (4, 76, 128, 128)
WINDOW = 24
Reader = Callable[[int, slice], Any]
INSTALL = (
    "python -m pip install --no-deps --target PEERS litdata mosaicml-streaming lightning-utilities boto3 botocore "
    "s3transfer jmespath Brotli python-snappy cramjam xxhash zstd catalogue"
)
"""litdata and MosaicML streaming ask for a torchvision that would pull another torch; reading needs none of it."""


def filled_store(root: Path, arrays: list[np.ndarray]) -> Any:
    from latentcache import Encoding, LatentStore

    store = LatentStore.create(root, secret_fingerprint="bench")
    key = store.register_encoding(Encoding("0" * 64, {}, 40, 400))
    valid = (4 * SHAPE[1], 4 * SHAPE[2], 4 * SHAPE[3])
    with store.writer() as writer:
        for n, array in enumerate(arrays):
            row = store.stage(
                array, LatentMeta(encode_key=key, key=f"{n:016x}", role="thin", z0_mm=0.0, dz_mm=4.0, valid_zyx=valid,
                source_digest=""),
            )  # fmt: skip
            writer.commit([row])
    return store


def ours(root: Path, arrays: list[np.ndarray]) -> Reader:
    store = filled_store(root, arrays)
    rows = {row.key: row for row in store.records()}
    return lambda n, depth: store.read(rows[f"{n:016x}"], depth)


def ours_into(root: Path, arrays: list[np.ndarray]) -> Reader:
    """Into a buffer that is used again, as a pinned one would be."""
    store = filled_store(root, arrays)
    rows = {row.key: row for row in store.records()}
    buffers = {n: np.empty((4, n, *SHAPE[2:]), np.float16) for n in (SHAPE[1], WINDOW)}
    return lambda n, depth: store.read(rows[f"{n:016x}"], depth, out=buffers[depth.stop - depth.start])


def npy(root: Path, arrays: list[np.ndarray]) -> Reader:
    root.mkdir()
    for n, array in enumerate(arrays):
        np.save(root / f"{n}.npy", array)

    def read(n: int, depth: slice) -> np.ndarray:
        whole = depth.stop - depth.start == SHAPE[1]
        return np.load(root / f"{n}.npy") if whole else np.load(root / f"{n}.npy", mmap_mode="r")[:, depth].copy()

    return read


def safetensors(root: Path, arrays: list[np.ndarray]) -> Reader:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    root.mkdir()
    for n, array in enumerate(arrays):
        save_file({"latent": array}, root / f"{n}.safetensors")

    def read(n: int, depth: slice) -> np.ndarray:
        with safe_open(root / f"{n}.safetensors", "np") as file:
            return np.ascontiguousarray(file.get_slice("latent")[:, depth])

    return read


def zarr_default(root: Path, arrays: list[np.ndarray]) -> Reader:
    import zarr

    opened = []
    for n, array in enumerate(arrays):
        stored = zarr.create_array(root / f"{n}", shape=array.shape, dtype=array.dtype)
        stored[:] = array
        opened.append(stored)
    return lambda n, depth: opened[n][:, depth]


def zarr_of_ours(root: Path, arrays: list[np.ndarray]) -> Reader:
    import zarr

    store = filled_store(root, arrays)
    opened = {row.key: zarr.open_array(f"{store.url}/{row.path}", mode="r") for row in store.records()}
    return lambda n, depth: opened[f"{n:016x}"][:, depth]


def zarrs_of_ours(root: Path, arrays: list[np.ndarray]) -> Reader:
    import zarr
    import zarrs  # noqa: F401

    filled_store(root, arrays)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        stored = sorted(root.glob("latents.zarr/*/*/thin/*"))
        opened = {p.parent.parent.name: zarr.open_array(p, mode="r") for p in stored}
    return lambda n, depth: opened[f"{n:016x}"][:, depth]


def tensorstore_of_ours(root: Path, arrays: list[np.ndarray]) -> Reader:
    import tensorstore

    store = filled_store(root, arrays)
    context = tensorstore.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})
    place = {"driver": "file", "path": ""}
    opened = {
        row.key: tensorstore.open(
            {"driver": "zarr3", "kvstore": place | {"path": f"{store.url}/{row.path}/"}}, context=context, read=True
        ).result()
        for row in store.records()
    }
    return lambda n, depth: opened[f"{n:016x}"][:, depth].read().result()


def hdf5(root: Path, arrays: list[np.ndarray]) -> Reader:
    import h5py

    root.mkdir()
    for n, array in enumerate(arrays):
        with h5py.File(root / f"{n}.h5", "w") as file:
            file.create_dataset("latent", data=array, chunks=(4, 4, 128, 128), fletcher32=True)

    def read(n: int, depth: slice) -> np.ndarray:
        with h5py.File(root / f"{n}.h5") as file:
            return file["latent"][:, depth]

    return read


def litdata(root: Path, arrays: list[np.ndarray]) -> Reader:
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    root.mkdir()
    cache = Cache(str(root), chunk_bytes="64MB")
    for n, array in enumerate(arrays):
        cache[n] = {"latent": array}
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(root))
    return lambda n, depth: np.ascontiguousarray(dataset[n]["latent"][:, depth])


def mosaic(root: Path, arrays: list[np.ndarray]) -> Reader:
    base = _mosaic_alone()
    columns = {"latent": f"ndarray:float16:{','.join(map(str, SHAPE))}"}
    with base.MDSWriter(out=str(root), columns=columns) as writer:
        for array in arrays:
            writer.write({"latent": array})
    dataset = base.StreamingDataset(local=str(root), shuffle=False, batch_size=1)
    return lambda n, depth: np.ascontiguousarray(dataset[n]["latent"][:, depth])


def _mosaic_alone() -> Any:
    """MosaicML's ``streaming.base`` without the package's example datasets, which import torchvision at once.

    Of transformers it needs two classes to tell batches apart in its data loader, which is not used here.
    """
    found = importlib.util.find_spec("streaming")
    if found is None:
        raise ImportError("mosaicml-streaming")
    package = types.ModuleType("streaming")
    package.__path__ = list(found.submodule_search_locations or [])
    sys.modules["streaming"] = package
    if importlib.util.find_spec("transformers") is None:
        for name, kind in (("feature_extraction_utils", "BatchFeature"), ("tokenization_utils_base", "BatchEncoding")):
            module = types.ModuleType(f"transformers.{name}")
            setattr(module, kind, type(kind, (dict,), {}))
            sys.modules[module.__name__] = module
        sys.modules["transformers"] = types.ModuleType("transformers")
    return importlib.import_module("streaming.base")


PEERS: dict[str, Callable[[Path, list[np.ndarray]], Reader]] = {
    "ctpipe (crc32c checked)": ours,
    "ctpipe, reused buffer": ours_into,
    "npy": npy,
    "safetensors": safetensors,
    "zarr-python default": zarr_default,
    "zarr-python on ours": zarr_of_ours,
    "zarrs on ours": zarrs_of_ours,
    "tensorstore on ours": tensorstore_of_ours,
    "hdf5 (chunked, fletcher32)": hdf5,
    "litdata": litdata,
    "mosaicml-streaming": mosaic,
}
PACKAGES = ("numpy", "zarr", "zarrs", "tensorstore", "safetensors", "h5py", "litdata", "mosaicml-streaming", "obstore",
            "pyarrow", "google-crc32c")  # fmt: skip
