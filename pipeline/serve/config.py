"""Configuration of the service: one YAML file, every key declared here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from latentcache import InputError
from pipeline.serve.strict_yaml import read_yaml

ANYONE = "*"


@dataclass(frozen=True)
class TlsConfig:
    """PEM files; with ``ca`` the other side must show a certificate that it signed."""

    certificate: Path
    key: Path
    ca: Path | None = None


@dataclass(frozen=True)
class ListenConfig:
    """Our DICOM node. Without a section ``listen`` there is none, only the watched folder."""

    ae_title: str = "CTPIPE"
    host: str = "0.0.0.0"
    port: int = 11112
    tls: TlsConfig | None = None


@dataclass(frozen=True)
class PeerConfig:
    """A peer that may send to us: an AE title, or ``*`` for anyone.

    Attributes:
        host: The address it must come from; empty for any.
        port: Port of the peer for storage commitment reports; 0 where it has none.
    """

    ae_title: str
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class WatchConfig:
    """A folder whose zips and sub-folders are read as if they had been sent. Its files are never changed."""

    folder: Path
    every_s: float = 30.0
    settled_s: float = 30.0


@dataclass(frozen=True)
class RuleConfig:
    """A rule: which series are interpolated, how, and where the result goes. All conditions given must hold.

    Attributes:
        calling_ae: AE titles (``FOLDER`` for the watched folder).
        body_part: Values of BodyPartExamined.
        description: Regular expression found in SeriesDescription, whatever the case.
        not_description: Regular expression that must not be found there.
        min_thickness_mm, max_thickness_mm: Bounds of SliceThickness, inclusive.
        min_slices: Fewer are no volume.
        send_to: Names of destinations.
    """

    name: str
    send_to: tuple[str, ...]
    calling_ae: tuple[str, ...] = ()
    body_part: tuple[str, ...] = ()
    description: str = ""
    not_description: str = ""
    min_thickness_mm: float = 0.0
    max_thickness_mm: float = 100.0
    min_slices: int = 3
    model: str = ""
    spacing_mm: float = 1.0
    restore_identity: bool = False
    transfer_syntax: Literal["explicit", "jpegls", "htj2k"] = "explicit"


@dataclass(frozen=True)
class DestinationConfig:
    """A destination of results: exactly one of C-STORE (``AET@HOST:PORT``) and STOW-RS (a URL)."""

    c_store: str = ""
    stow_rs: str = ""
    calling_ae: str = "CTPIPE"
    timeout_s: float = 30.0
    tls: TlsConfig | None = None


@dataclass(frozen=True)
class LimitsConfig:
    """Limits on what a peer may ask of us, and on what we ask of the disk.

    Attributes:
        pdu_bytes: Largest protocol data unit; a longer one ends the connection before it is read.
        pdu_timeout_s: Time for one unit, so that a slow sender cannot hold a connection for ever.
        object_mib: Largest single instance. object_timeout_s: time for it.
        idle_timeout_s: Silence after which an association is aborted.
        associations: At once. connections_per_minute: per sending host.
        instances_per_study: More are refused.
        study_gib: Bytes of one study; more are refused.
        spool_gib: Bytes of all studies that are waiting.
        min_free_gib: Below this much free space nothing is accepted and nothing is interpolated.
    """

    pdu_bytes: int = 1 << 17
    pdu_timeout_s: float = 30.0
    object_mib: int = 512
    object_timeout_s: float = 300.0
    idle_timeout_s: float = 60.0
    associations: int = 16
    connections_per_minute: int = 600
    instances_per_study: int = 20_000
    study_gib: float = 20.0
    spool_gib: float = 200.0
    min_free_gib: float = 10.0


@dataclass(frozen=True)
class TimingConfig:
    """When things happen.

    Attributes:
        quiet_s: A study is complete when nothing of it has come for so long.
        unfinished_quiet_s: The same where the sender broke off, or keeps its association open: it may go on.
        attempts: Crashes or unforeseen errors of one study before it is quarantined.
        retry_s: Pause after the first such error; it doubles, up to ``retry_most_s``. Deliveries use the same pauses,
            and are tried without end while the other side cannot be reached.
        refusals: Tries of a delivery that the other side refuses before it is left to a person.
        revisions: Results of one study at most; a study that grows after its last is held.
        keep_h: Images and results are deleted so long after their delivery; quarantined ones stay.
    """

    quiet_s: float = 60.0
    unfinished_quiet_s: float = 600.0
    attempts: int = 3
    retry_s: float = 30.0
    retry_most_s: float = 1800.0
    refusals: int = 10
    revisions: int = 3
    keep_h: float = 24.0


@dataclass(frozen=True)
class MonitoringConfig:
    """Address of /health, /ready and /metrics; on this machine alone unless ``host`` says otherwise."""

    port: int
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class ServeConfig:
    """The whole configuration. ``state`` is the folder that holds queue, images, results and secret (mode 0700)."""

    state: Path
    rules: tuple[RuleConfig, ...]
    destinations: dict[str, DestinationConfig]
    listen: ListenConfig | None = None
    peers: tuple[PeerConfig, ...] = ()
    watch: WatchConfig | None = None
    timing: TimingConfig = field(default_factory=TimingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    monitoring: MonitoringConfig | None = None
    storage_commitment: bool = False
    model: str = ""
    vae: str = "tiny"
    device: str = "auto"


def read_config(path: Path) -> ServeConfig:
    """Return the checked configuration of a YAML file.

    Raises:
        InputError: A key is unknown, a value does not fit, or two parts contradict each other.
    """
    config = read_yaml(path, ServeConfig)
    check_config(config)
    return config


def check_config(config: ServeConfig) -> None:
    """Raise InputError where parts of a configuration contradict each other."""
    if config.listen is None and config.watch is None:
        raise _wrong("neither listen nor watch", "a way for studies to come in", "Add a section listen or watch.")
    if config.listen is not None:
        _check_title(config.listen.ae_title, "listen.ae_title")
        if not config.peers:
            raise _wrong(
                "listen without peers", "the AE titles that may send", "List them; ae_title: '*' admits anyone."
            )
    for number, peer in enumerate(config.peers):
        if peer.ae_title != ANYONE:
            _check_title(peer.ae_title, f"peers[{number}].ae_title")
    if not config.rules:
        raise _wrong("no rules", "at least one", "A rule without conditions takes every thick CT series.")
    names = [rule.name for rule in config.rules]
    if len(set(names)) < len(names):
        raise _wrong("two rules of one name", "a name per rule", "Rename one of them.")
    for number, rule in enumerate(config.rules):
        _check_rule(rule, f"rules[{number}]", config)
    for name, destination in config.destinations.items():
        if bool(destination.c_store) == bool(destination.stow_rs):
            raise _wrong(f"destinations.{name}", "exactly one of c_store and stow_rs", "Leave one of them.")
    for section in (config.timing, config.limits):
        for name, value in vars(section).items():
            if value < 0 or (value == 0 and name not in ("quiet_s", "unfinished_quiet_s", "keep_h", "min_free_gib")):
                raise _wrong(f"{name} = {value}", "a number above 0", "Correct it in the configuration.")


def _check_rule(rule: RuleConfig, at: str, config: ServeConfig) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", rule.name):
        raise _wrong(f"{at}.name", "1 to 40 letters, digits, dots and dashes", "It appears in logs and metrics.")
    for name in ("description", "not_description"):
        try:
            re.compile(getattr(rule, name))
        except re.error as error:
            raise _wrong(f"{at}.{name} ({error.msg})", "a regular expression", "Escape special signs.") from None
    unknown = [name for name in rule.send_to if name not in config.destinations]
    if unknown or not rule.send_to:
        raise _wrong(
            f"{at}.send_to names {unknown[0] if unknown else 'nothing'}",
            f"one of {', '.join(config.destinations) or 'destinations, of which there are none'}",
            "Declare it under destinations.",
        )
    if not 0.2 <= rule.spacing_mm <= 10:
        raise _wrong(f"{at}.spacing_mm = {rule.spacing_mm:g}", "0.2 to 10", "For example 1.0.")


def _check_title(title: str, at: str) -> None:
    if not 1 <= len(title) <= 16 or not title.isascii() or "\\" in title or title != title.strip():
        raise _wrong(f"{at}", "1 to 16 ASCII characters without a backslash", "Ask the PACS administrator.")


def _wrong(found: str, expected: str, remedy: str) -> InputError:
    return InputError(found, expected=expected, remedy=remedy)
