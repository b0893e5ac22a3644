"""The secret of a store: without it no key can be traced back to a PatientID."""

from __future__ import annotations

import os
import secrets

from latentcache.errors import StoreError
from latentcache.location import Location
from pipeline.keys import MIN_SECRET_BYTES

SECRET_VARIABLE = "CTPIPE_SECRET"


def read_secret(location: Location, create: bool) -> bytes:
    """The secret: CTPIPE_SECRET, else the file ``secret``, else with ``create`` a fresh one of 256 bits.

    Raises:
        StoreError: There is none, it is too short, or the file and the environment disagree.
    """
    given = os.environ.get(SECRET_VARIABLE, "").strip().encode()
    try:
        kept = location.read("secret").strip()
    except FileNotFoundError:
        kept = b""
    if given and kept and given != kept:
        raise StoreError(
            f"{SECRET_VARIABLE} differs from the secret that this store was made with",
            expected="one secret for the life of a store",
            remedy=f"Unset {SECRET_VARIABLE}, or open the store that belongs to it.",
        )
    secret = given or kept
    if not secret and create:
        secret = secrets.token_hex(32).encode()
        location.put_once("secret", [secret])
    if not secret:
        raise StoreError(
            "no secret",
            expected=f"a file `secret` in the private folder, or {SECRET_VARIABLE}",
            remedy="Give the private folder with --private, or ingest first.",
        )
    if len(secret) < MIN_SECRET_BYTES:
        raise StoreError(
            f"a secret of {len(secret)} bytes",
            expected=f"at least {MIN_SECRET_BYTES}",
            remedy="For example 64 hex digits from a random source.",
        )
    return secret
