"""Which of two functions of the VAE's weights a store holds: the exact one, or blended windows as others do it.

Exact is the default and leaves no trace in the encode key. Windows change every latent, so they are part of it
(`Encoding.extra`), and what was encoded in windows is decoded in the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from latentcache.errors import InputError


@dataclass(frozen=True)
class Tiling:
    """Windows of ``window_zyx`` voxels, of which neighbours share ``overlap`` (0 to below 1)."""

    window_zyx: tuple[int, int, int] = (64, 64, 64)
    overlap: float = 0.4

    def to_extra(self) -> dict[str, Any]:
        """As it stands in `Encoding.extra`."""
        return {"tiling": {"kind": "sliding", "window_zyx": list(self.window_zyx), "overlap": self.overlap}}


class WindowedVae(Protocol):
    """The part of `vae.Vae` that works in windows."""

    sha256: str
    architecture: dict[str, Any]

    def encode_sliding(
        self,
        unit: Any,
        *,
        window_zyx: tuple[int, int, int],
        overlap: float,
        pad_multiple_zyx: tuple[int, int, int],
    ) -> Any: ...

    def decode_sliding(
        self, latent: Any, valid_zyx: tuple[int, int, int], *, window_zyx: tuple[int, int, int], overlap: float
    ) -> Any: ...


class SlidingVae:
    """A VAE whose ``encode`` and ``decode`` are those of its windows, for everything that only knows these two."""

    def __init__(self, vae: WindowedVae, tiling: Tiling) -> None:
        self.sha256 = vae.sha256
        self.architecture = vae.architecture
        self.vae = vae
        self.tiling = tiling

    def encode(self, unit: Any, *, pad_multiple_zyx: tuple[int, int, int] = (4, 32, 32)) -> Any:
        """See `vae.Vae.encode`."""
        return self.vae.encode_sliding(
            unit,
            window_zyx=self.tiling.window_zyx,
            overlap=self.tiling.overlap,
            pad_multiple_zyx=pad_multiple_zyx,
        )

    def decode(self, latent: Any, valid_zyx: tuple[int, int, int]) -> Any:
        """See `vae.Vae.decode`."""
        return self.vae.decode_sliding(
            latent, valid_zyx, window_zyx=self.tiling.window_zyx, overlap=self.tiling.overlap
        )


def parse_tiling(text: str) -> Tiling | None:
    """``exact`` (None) or ``sliding``."""
    if text not in ("exact", "sliding"):
        raise InputError(f"--tiling {text}", expected="exact or sliding", remedy="Leave it out: exact is the default.")
    return Tiling() if text == "sliding" else None


def tiling_of(extra: Mapping[str, Any]) -> Tiling | None:
    """What `Tiling.to_extra` wrote; None for an exact encoding.

    Raises:
        InputError: A tiling of a kind that this version does not know.
    """
    written = extra.get("tiling")
    if written is None:
        return None
    if written.get("kind") != "sliding":
        raise InputError(
            f"latents encoded with tiling {written.get('kind')!r}",
            expected="exact or sliding",
            remedy="They come from a newer ctpipe: upgrade, or encode again.",
        )
    z, y, x = written["window_zyx"]
    return Tiling((z, y, x), written["overlap"])


def as_encoded(vae: Any, extra: Mapping[str, Any]) -> Any:
    """``vae`` as an encoding used it: itself, or in the windows that ``extra`` (`Encoding.extra`) names."""
    tiling = tiling_of(extra)
    return vae if tiling is None else SlidingVae(vae, tiling)
