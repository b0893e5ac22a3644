"""Open a location by its URL."""

from __future__ import annotations

from pathlib import Path

from latentcache import InputError
from latentcache.storage.base import Location
from latentcache.storage.local import FILE_SCHEME, LocalLocation, local_path


def open_location(url: str | Path | Location) -> Location:
    """A local path, file:// or s3://bucket/prefix; a location stays what it is.

    S3 takes its credentials, region and endpoint from the usual AWS_* environment variables.

    Raises:
        InputError: Another scheme.
    """
    if not isinstance(url, (str, Path)):
        return url
    text = str(url)
    if text.startswith("s3://"):
        from latentcache.storage.s3 import S3Location

        return S3Location(text)
    if "://" in text and not text.startswith(FILE_SCHEME):
        raise InputError(
            f"a store URL with the scheme {text.split('://', 1)[0]!r}",
            expected="a local path, file:// or s3://bucket/prefix",
            remedy="Mount the storage as a folder, or use an S3-compatible endpoint (AWS_ENDPOINT_URL).",
        )
    return LocalLocation(local_path(text).absolute())
