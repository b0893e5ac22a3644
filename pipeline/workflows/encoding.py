"""Run the frozen VAE once per series of a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.encode import EncodeSettings, EncodeSummary
    from pipeline.engines import EngineOptions


@dataclass(frozen=True)
class EncodeJob:
    """Settings of one encoding; spellings are the command line's.

    Attributes:
        store: Path or URL of the store.
        engine: How the work is distributed.
        vae: ``tiny`` or the path of weights.
        window: ``soft-tissue``, ``maisi``, ``lung``, or ``C:W`` in HU.
        roles: Roles of the latents wanted, separated by commas.
        augment: ``flip-x``, ``flip-y`` or both, by comma: encode the training pairs mirrored too, each under another
            key.
        refiner: A refiner's run whose slices are encoded too, as role ``refined_on_thin``.
        pad_in_plane: Rows and columns are padded to a multiple of this.
        tiling: ``exact`` or ``sliding``.
        memory_gib: Memory budget of the VAE on each device.
        dtype: Arithmetic: ``auto``, ``fp32`` or ``bf16``.
        threads: Arithmetic threads per device.
        round_trip: Share of latents whose reconstruction is measured, 0 to 1.
        private: URL of the private part, if not ``STORE/private``.
        refresh: Replace latents of archives that have changed.
        repair: Read all latents first and replace those that are damaged or gone.
        dry_run: Count what would be encoded and stop.
    """

    store: str
    engine: EngineOptions
    vae: str = "tiny"
    window: str = "soft-tissue"
    roles: str = "thin,thick,thick_on_thin"
    refiner: Path | None = None
    pad_in_plane: int = 32
    tiling: str = "exact"
    memory_gib: float | None = None
    dtype: str = "auto"
    threads: int = 2
    round_trip: float = 0.02
    private: str | None = None
    refresh: bool = False
    repair: bool = False
    dry_run: bool = False
    augment: str = ""

    def settings(self) -> EncodeSettings:
        """Return the job's settings, parsed; raises InputError where one cannot be."""
        from pipeline.encode import EncodeSettings, parse_roles
        from pipeline.refiner import RefinerFile
        from pipeline.vae import parse_tiling
        from pipeline.volume import Window

        wanted = parse_roles(self.roles)
        file = None if self.refiner is None else RefinerFile.of(self.refiner)
        if file is not None and "refined_on_thin" not in wanted:
            wanted = (*wanted, "refined_on_thin")
        return EncodeSettings(
            vae=self.vae,
            window=Window.parse(self.window),
            roles=wanted,
            refiner=file,
            round_trip_fraction=self.round_trip,
            memory_gib=self.memory_gib,
            pad_in_plane=self.pad_in_plane,
            tiling=parse_tiling(self.tiling),
            torch_threads=self.threads,
            precision=self.dtype,
        )


def encode(job: EncodeJob, on_done: Callable[[int, int], None] | None = None) -> EncodeSummary:
    """Encode every series and pair that the store lacks; run again, it resumes.

    Args:
        job: What to encode and how.
        on_done: Called after each study or series with how many are done and how many are planned.
    """
    from latentcache import mirror_axes
    from pipeline.encode import encode_store, together

    done = 0

    def count(_outcome: Any, planned: int) -> None:
        nonlocal done
        done += 1
        if on_done is not None:
            on_done(done, planned)

    settings, found = job.settings(), []
    for axis in ("", *mirror_axes(job.augment).values()):
        done = 0
        summary = encode_store(
            job.store,
            replace(settings, mirrored=axis),
            job.engine,
            private_url=job.private,
            dry_run=job.dry_run,
            refresh=job.refresh,
            repair=job.repair,
            on_outcome=count,
        )
        if axis:
            summary.mirrored[axis] = summary.encode_key
        found.append(summary)
    return together(found)
