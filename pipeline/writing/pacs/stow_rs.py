"""STOW-RS: store instances over HTTP (DICOM PS3.18 10.5), with nothing but the standard library."""

from __future__ import annotations

import base64
import http.client
import json
import os
import secrets
import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from latentcache import InputError
from pipeline.writing.pacs.send import PacsUnavailable

BATCH_BYTES = 32 << 20
"""Bytes a request: large enough to be fast, small enough that a broken one costs little."""
CREDENTIALS_VARIABLE = "CTPIPE_STOW_AUTH"
_FAILED_SOP_SEQUENCE, _SOP_INSTANCE, _FAILURE_REASON = "00081198", "00081155", "00081197"


class StowRs:
    """A DICOMweb service at ``http(s)://host[:port]/path``; instances go to ``<url>/studies``.

    Credentials come from the environment variable CTPIPE_STOW_AUTH, as ``user:password`` or ``Bearer TOKEN``.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise InputError(
                "a DICOMweb address that is none",
                expected="http(s)://host[:port]/path without credentials",
                remedy=f"For example https://pacs/dicom-web; credentials go into {CREDENTIALS_VARIABLE}.",
            )
        self._parts = parts
        self.path = parts.path.rstrip("/") + "/studies"
        self.timeout_s = timeout_s

    @property
    def name(self) -> str:
        return f"{self._parts.scheme}://{self._parts.netloc}{self.path}"

    def deliver(
        self, paths: Sequence[Path], done: Callable[[Path], None], refused: Callable[[Path, str], None]
    ) -> None:
        """Send files in batches; see :class:`pipeline.writing.pacs.send.Destination`."""
        for batch in _batches(paths):
            failed = self._post(batch)
            for path, uid in batch:
                if uid in failed:
                    refused(path, failed[uid])
                else:
                    done(path)

    def _post(self, batch: Sequence[tuple[Path, str]]) -> dict[str, str]:
        """Store one batch; returns SOPInstanceUID to reason for those refused."""
        boundary = secrets.token_hex(16)
        head = f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        tail = f"--{boundary}--\r\n".encode()
        length = sum(len(head) + path.stat().st_size + 2 for path, _ in batch) + len(tail)

        def body() -> Iterator[bytes]:
            for path, _ in batch:
                yield head
                yield path.read_bytes()
                yield b"\r\n"
            yield tail

        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(length),
            "Accept": "application/dicom+json",
            **_authorization(),
        }
        connection = self._connection()
        try:
            connection.request("POST", self.path, body=body(), headers=headers)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise PacsUnavailable(f"no answer ({type(error).__name__})") from error
        finally:
            connection.close()
        return self._judged(status, answer, batch)

    def _judged(self, status: int, answer: bytes, batch: Sequence[tuple[Path, str]]) -> dict[str, str]:
        if status in (200, 202, 409):
            failed = _failures(answer)
            if status == 409 and not failed:
                return {uid: "HTTP 409" for _, uid in batch}
            return failed
        if status in (408, 425, 429) or status >= 500:
            raise PacsUnavailable(f"HTTP {status}")
        raise InputError(
            f"HTTP {status} from {self.name}",
            expected="200 or 202",
            remedy=f"Check the address and {CREDENTIALS_VARIABLE}."
            if status in (401, 403, 404)
            else "Ask the PACS administrator what it refuses.",
        )

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=self.timeout_s, context=ssl.create_default_context())
        return http.client.HTTPConnection(host, port, timeout=self.timeout_s)


def _batches(paths: Sequence[Path]) -> Iterator[list[tuple[Path, str]]]:
    from pydicom import dcmread

    batch: list[tuple[Path, str]] = []
    size = 0
    for path in paths:
        if batch and size + path.stat().st_size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        uid = str(dcmread(path, stop_before_pixels=True, specific_tags=["SOPInstanceUID"]).SOPInstanceUID)
        batch.append((path, uid))
        size += path.stat().st_size
    if batch:
        yield batch


def _failures(answer: bytes) -> dict[str, str]:
    """SOPInstanceUID to failure reason from a store response (PS3.18 10.5.3)."""
    try:
        document: Any = json.loads(answer) if answer.strip() else {}
    except ValueError:
        return {}
    items = document.get(_FAILED_SOP_SEQUENCE, {}).get("Value", []) if isinstance(document, dict) else []
    failed = {}
    for item in items:
        uid = (item.get(_SOP_INSTANCE, {}).get("Value") or [""])[0]
        code = (item.get(_FAILURE_REASON, {}).get("Value") or [0])[0]
        failed[str(uid)] = f"failure reason {int(code):#06x}"
    return failed


def _authorization() -> dict[str, str]:
    given = os.environ.get(CREDENTIALS_VARIABLE, "")
    if not given:
        return {}
    if given.startswith(("Bearer ", "Basic ")):
        return {"Authorization": given}
    return {"Authorization": "Basic " + base64.b64encode(given.encode()).decode()}
