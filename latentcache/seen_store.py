"""That a worker sees the driver's store, and not another one that lies at the same path on its own machine."""

from __future__ import annotations

from latentcache.errors import InputError
from latentcache.store import LatentStore


def open_on_worker(url: str, fingerprint: str) -> LatentStore:
    """The driver's store, opened on a worker; ``fingerprint`` is that of the secret that made the driver's keys.

    Raises:
        InputError: There is no store at this URL, or another one.
    """
    try:
        store = LatentStore.open(url)
    except InputError as error:
        raise InputError(
            f"a worker does not see the store {url}",
            expected="the same store at the same URL on every node",
            remedy=f"Mount it there, or use s3://. On the worker: {error.found}.",
        ) from error
    if store.secret_fingerprint != fingerprint:
        raise InputError(
            f"a worker sees another store at {url}",
            expected=f"the driver's store, secret fingerprint {fingerprint}",
            remedy=f"The worker's has {store.secret_fingerprint}: mount the same volume on every node.",
        )
    return store
