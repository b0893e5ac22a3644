"""The store snapshot that a run reads: pinned when the run begins, opened again when it resumes."""

from __future__ import annotations

import logging

from diffusion.run_card import RunCard
from latentcache.errors import InputError, StoreError
from latentcache.pins import pin
from latentcache.store import LatentStore

log = logging.getLogger("ctpipe.train")


def reopen(store: LatentStore, card: RunCard) -> LatentStore:
    """The store at the snapshot that the run is pinned to.

    Raises:
        InputError: Another store, or one that has lost the snapshot.
    """
    if store.secret_fingerprint != card.store_fingerprint:
        raise InputError(
            f"a store of fingerprint {store.secret_fingerprint} where the run was trained on {card.store_fingerprint}",
            expected="the store that the run began with",
            remedy="Name that store, or start a new run directory.",
        )
    if store.snapshot == card.snapshot:
        return store
    try:
        return LatentStore.open(store.url, snapshot=card.snapshot)
    except StoreError as error:
        raise InputError(
            f"a store without snapshot {card.snapshot}, which this run reads",
            expected="the snapshot that the run began with: it goes when a patient is forgotten or snapshots expire",
            remedy="Start a new run directory on the store as it is; its weights so far remain in this one.",
        ) from error


def pin_snapshot(store: LatentStore, card: RunCard) -> None:
    """Name the run's snapshot in the store, so that ``ctpipe gc --expire`` keeps what a resume will read.

    The pin bears the run's id, so that pinning again is the same pin. A store that cannot be written is trained on all
    the same, and said so.
    """
    try:
        pin(store.location, card.pin_name, card.snapshot)
    except (OSError, StoreError) as error:
        log.warning(
            "snapshot %d could not be pinned (%s): until this run is over, do not expire snapshots of the store",
            card.snapshot,
            error.strerror if isinstance(error, OSError) else error.found,
        )
