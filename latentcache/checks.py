"""Admission to a store: registered encodings, and latents that are finite, of the right shape and keyed by a hash."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache.errors import InputError, NonFiniteError, StoreError
from latentcache.records import LATENT_CHANNELS, LATENT_ROLES, Encoding, valid_latents
from latentcache.storage import Location

_KEY = re.compile(r"[0-9a-f]{16}")


@functools.lru_cache(maxsize=256)
def _cached_encoding(url: str, encode_key: str, text: str) -> Encoding:
    encoding = Encoding.from_json(text)
    if encoding.encode_key != encode_key:
        raise StoreError(
            f"encodings/{encode_key}.json does not hash to its name",
            expected="the encoding that the key was made from",
            remedy="Restore the file from a copy of the store.",
        )
    return encoding


def load_encoding(location: Location, encode_key: str) -> Encoding:
    """Raises StoreError if the store has no such encoding, or its file is damaged."""
    try:
        text = location.read(f"encodings/{encode_key}.json").decode()
    except FileNotFoundError as error:
        raise StoreError(
            f"no encoding {encode_key} in this store",
            expected="a registered encode key",
            remedy="Run `ctpipe status STORE` to see the keys; register the encoding before staging latents.",
        ) from error
    return _cached_encoding(location.url, encode_key, text)


def validate_latent(
    array: NDArray[Any], encoding: Encoding, key: str, role: str, dz_mm: float, valid_zyx: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    """Refuse what must never be cached; returns the shape (C, d, h, w).

    Raises:
        InputError: Wrong type, shape, key or geometry.
        NonFiniteError: NaN or infinity.
    """
    check_key("latent key", key)
    if role not in LATENT_ROLES:
        raise InputError(f"latent role {role!r}", expected=", ".join(LATENT_ROLES), remedy="Use one of these.")
    channels = LATENT_CHANNELS * (2 if encoding.posterior == "mean+logvar" else 1)
    if array.dtype != np.float16 or array.ndim != 4 or array.shape[0] != channels:
        raise InputError(
            f"latent {key} {role} is {array.dtype} of shape {array.shape}",
            expected=f"float16 of shape ({channels}, d, h, w)",
            remedy="Encode with the VAE of this encoding; one store holds latents of one channel count an encoding.",
        )
    valid = valid_latents(valid_zyx)
    if min(valid) < 1 or any(n > have for n, have in zip(valid, array.shape[1:], strict=True)) or not dz_mm > 0:
        raise InputError(
            f"latent {key} {role}: valid_zyx {valid_zyx} and dz_mm {dz_mm} with latents of {array.shape[1:]}",
            expected="at least one voxel, no more than four a latent along each axis, and a positive spacing",
            remedy="Pass the volume's shape before padding and the distance between latent slices.",
        )
    if not np.isfinite(array).all():
        raise NonFiniteError(
            f"latent {key} {role} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite",
            expected="finite float16 values",
            remedy="Encode in float32 or bfloat16, and look at the series for values outside the window.",
        )
    channels, depth, height, width = array.shape
    return (channels, depth, height, width)


def check_key(what: str, key: str) -> None:
    """Raises InputError for anything but 16 hexadecimal digits; says nothing of what was found."""
    if not _KEY.fullmatch(key):
        raise InputError(
            f"{what} of {len(key)} characters",
            expected="16 lower-case hexadecimal digits",
            remedy="Use the keyed hash; names and numbers of patients must not reach the store.",
        )
