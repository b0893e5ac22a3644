"""The lease that lets one driver commit at a time, with expiry."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from latentcache.errors import StoreError
from latentcache.storage import Location

log = logging.getLogger("ctpipe.commit")
LEASE = "lease.json"
LEASE_SECONDS = 60.0
CLOCK_SKEW_SECONDS = 60.0
"""An unrenewed lease this long past its end is dead whatever the clocks of the two machines say."""


@dataclass(frozen=True)
class LeaseRecord:
    """Holder of the lease, and its end (seconds since 1970). ``host`` and ``process`` are hashes, not names."""

    token: str
    host: str
    process: str
    expires: float

    @property
    def holder_is_dead(self) -> bool:
        """True only for a process of this very machine and process namespace that is no longer there."""
        return self.host == _host() and self.process != _process(int(self.process.split("-")[0]))

    @property
    def holder_is_alive(self) -> bool:
        return self.host == _host() and not self.holder_is_dead


def _uptime() -> float:
    """Seconds that pass for a process that is stopped and for a machine that sleeps too, and never jump."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    # macOS and Windows count sleep in the monotonic clock itself.
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _host() -> str:
    """Differs between machines, boots and containers: process numbers mean the same only where it is equal."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = (
        boot.read_text(encoding="utf-8") + os.readlink("/proc/self/ns/pid") if boot.exists() else uuid.uuid4().hex
    )
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _process(number: int) -> str:
    """The process number and its start time, so that a reused number is another process; empty if there is none."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else f"{number}-{fields[19]}"


class Lease:
    """The right to commit, renewed in the background until released."""

    def __init__(self, location: Location, seconds: float = LEASE_SECONDS) -> None:
        self.location = location
        self.seconds = seconds
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def current(self) -> LeaseRecord | None:
        """Return the holder of the lease; None when nobody holds it."""
        try:
            data = self.location.read(LEASE)
        except FileNotFoundError:
            return None
        try:
            return LeaseRecord(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{LEASE} cannot be read",
                expected="the record of a committing driver",
                remedy=f"Make sure that no ctpipe command writes to this store, then delete {LEASE}.",
            ) from error

    def acquire(self) -> None:
        """Take the lease, waiting out a dead holder's remaining time.

        Raises:
            StoreError: A living driver holds it.
        """
        found = self.current()
        if found is not None:
            self._wait_for(found)
        self._write()
        # Two drivers may have found the lease free at once: the later write wins, and the loser sees it here.
        if not self.exclusive:
            time.sleep(min(1.0, self.seconds / 10))
        self.check()
        self._thread = threading.Thread(target=self._renew, name="ctpipe-lease", daemon=True)
        self._thread.start()

    @property
    def exclusive(self) -> bool:
        """Whether a racing driver would be stopped by the store itself (exclusive links of a file system)."""
        return "://" not in self.location.url or bool(getattr(self.location, "conditional", False))

    def _wait_for(self, found: LeaseRecord) -> None:
        seen = time.monotonic()
        while not (found.holder_is_dead or time.time() > found.expires + CLOCK_SKEW_SECONDS):
            if found.holder_is_alive or self.current() not in (found, None):
                raise StoreError(
                    "another ctpipe command is committing to this store",
                    expected="one committing driver at a time",
                    remedy="Let it end or stop it; its finished work is kept, and running the command again resumes.",
                )
            if time.monotonic() - seen > self.seconds or self.current() is None:
                return
            log.info("waiting for the lease of a driver that no longer renews it")
            time.sleep(min(1.0, self.seconds / 5))

    def _write(self) -> None:
        record = LeaseRecord(self.token, _host(), _process(os.getpid()), time.time() + self.seconds)
        self.location.put(LEASE, json.dumps(asdict(record)).encode())

    def _renew(self) -> None:
        while not self._stop.wait(self.seconds / 3):
            try:
                asked, held = _uptime(), self.held()
                while held and _uptime() - asked > self.seconds / 3:
                    # Stopped between asking and writing: by now another may have it by right, so ask again.
                    asked, held = _uptime(), self.held()
                if not held:
                    return  # taken over: check() says so at the next commit
                self._write()
            except (OSError, StoreError) as error:
                log.warning("the lease could not be renewed: %s", type(error).__name__)

    def held(self) -> bool:
        """Whether it is still this driver's."""
        found = self.current()
        return found is not None and found.token == self.token

    def check(self) -> None:
        """Raises StoreError if another driver has taken the lease."""
        if not self.held():
            raise StoreError(
                "this driver's lease was taken over by another",
                expected="one committing driver at a time",
                remedy="Stop the other command, then run this one again: it resumes from what is committed.",
            )

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.held():
            self.location.delete(LEASE)
