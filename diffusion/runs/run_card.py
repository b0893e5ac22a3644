"""``RUN/run.json``: what a run was trained on and with, so that its weights can be used anywhere."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from diffusion.networks import UNetConfig
from diffusion.objectives import Objective, build_objective
from latentcache import Encoding, InputError, LatentStore, StoreError
from latentcache.maintenance import pin
from latentcache.storage import write_text

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
    the same, and reported.
    """
    try:
        pin(store.location, card.pin_name, card.snapshot)
    except (OSError, StoreError) as error:
        log.warning(
            "snapshot %d could not be pinned (%s): until this run is over, do not expire snapshots of the store",
            card.snapshot,
            error.strerror if isinstance(error, OSError) else error.found,
        )


RUN_CARD = "run.json"


@dataclass(frozen=True)
class RunCard:
    """Everything but the weights that generation needs. Written once, at the start of a run."""

    encode_key: str
    encoding: str
    """The encoding's canonical JSON (:meth:`latentcache.records.Encoding.to_json`)."""
    snapshot: int
    store_fingerprint: str
    alignment: Literal["pixel", "latent"]
    whitening: dict[str, list[float]]
    """``mean`` and ``std``, a number a latent channel."""
    model: dict[str, Any]
    """:meth:`diffusion.networks.config.UNetConfig.to_dict`."""
    objective: dict[str, Any]
    """``name`` and ``settings`` of :func:`diffusion.objectives.bridge.build_objective`."""
    preset: str
    depth_window: int | None = None
    """Depth of the training windows in latents: the default window of generation. None: whole volumes."""
    refiner_sha256: str = ""
    """The refiner whose slices, encoded, the model starts from; empty where it starts from interpolated ones."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def unet_config(self) -> UNetConfig:
        return UNetConfig.from_dict(self.model)

    @property
    def pin_name(self) -> str:
        """The name under which the run pins its snapshot: the run's id; for a card without one, a hash of the card."""
        own = self.extra.get("run_id") or hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"run-{own[:16]}"

    def build_objective(self) -> Objective:
        return build_objective(self.objective["name"], **self.objective.get("settings", {}))

    def build_encoding(self) -> Encoding:
        return Encoding.from_json(self.encoding)

    def write(self, run_dir: Path) -> None:
        """Write ``run.json``, whole or not at all."""
        write_text(run_dir / RUN_CARD, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, run_dir: Path) -> RunCard:
        """Reads ``run.json``. Raises :class:`InputError` where it is absent, no JSON, or lacks a key."""
        path = run_dir / RUN_CARD
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(
                f"no {RUN_CARD} in {run_dir}",
                expected="a run directory made by `ctpipe train`",
                remedy="Give the directory that holds run.json and checkpoints/.",
            ) from None
        except json.JSONDecodeError as error:
            raise InputError(
                f"{RUN_CARD} is damaged ({error.msg} at line {error.lineno})",
                expected="the JSON object that `ctpipe train` wrote",
                remedy="Restore it from a copy of the run.",
            ) from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunCard:
        names = {f.name for f in fields(cls)}
        needed = names - {"depth_window", "refiner_sha256", "extra"}
        if missing := sorted(needed - set(values)):
            raise InputError(
                f"{RUN_CARD} without {', '.join(missing)}",
                expected="every key that `ctpipe train` writes",
                remedy="The run was made by another version of ctpipe: train again or use that version.",
            )
        known = {name: values[name] for name in names & set(values)}
        if isinstance(known["encoding"], Mapping):
            known["encoding"] = json.dumps(known["encoding"], sort_keys=True, separators=(",", ":"))
        return cls(**known)
