"""Configuration of a U-Net: a frozen configuration with presets, kept beside the weights in every run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from latentcache import InputError


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the denoising 3D U-Net.

    Level ``i`` works at ``width * multipliers[i]`` channels; every level but the last halves the in-plane grid. Depth
    is never resampled, so any depth passes. With ``latent_patch`` = p, p x p in-plane latents are folded into channels
    inside the network, which therefore works on a p times smaller grid.
    """

    width: int = 192
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks_per_level: int = 2
    attention_levels: tuple[int, ...] = (1, 2)
    """Levels (0 is the finest) whose residual blocks are followed by self-attention along depth."""
    heads: int = 8
    time_embedding: int = 1024
    groups: int = 32
    """GroupNorm groups; must divide every level's channels."""
    latent_channels: int = 4
    condition_channels: int = 4
    told: bool = False
    """Given the places of the thick slices: distances as two input channels, spacing, thickness and profile width by
    embedding, positions in mm in the attention along depth. See ``networks.acquisition``."""
    latent_patch: int = 1
    activation_checkpointing: Literal[False, True, "auto"] = False
    """Recompute each block in the backward pass: about a third more arithmetic for a fraction of the memory. ``auto``:
    only the blocks that would not fit otherwise, chosen at the start of training; results are the same."""

    def __post_init__(self) -> None:
        for name in ("multipliers", "attention_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        positive = (self.width, *self.multipliers, self.blocks_per_level, self.heads, self.groups, self.latent_patch)
        if min(positive) < 1 or not self.multipliers:
            raise InputError(
                f"a U-Net of width {self.width}, multipliers {self.multipliers}, {self.blocks_per_level} blocks, "
                f"{self.heads} heads, {self.groups} groups, latent patch {self.latent_patch}",
                expected="positive whole numbers",
                remedy="Start from a preset: tiny, medium or classic.",
            )
        for level, channels in enumerate(self.channels):
            # Positions turn pairs of a head's features.
            per_head = 2 * self.heads if self.told else self.heads
            needs = [self.groups] + ([per_head] if level in self.attention_levels else [])
            for divisor in needs:
                if channels % divisor:
                    raise InputError(
                        f"level {level} has {channels} channels, which {divisor} does not divide",
                        expected=f"a multiple of groups ({self.groups}) and of heads ({self.heads}; twice that where "
                        "the model is told positions) where it attends",
                        remedy="Change width, multipliers, groups or heads.",
                    )
        if any(level not in range(len(self.multipliers)) for level in self.attention_levels):
            raise InputError(
                f"attention at levels {self.attention_levels}",
                expected=f"levels 0 to {len(self.multipliers) - 1}",
                remedy="Level 0 is the finest; name levels that exist.",
            )

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.width * m for m in self.multipliers)

    @property
    def in_plane_multiple(self) -> int:
        """The latent grid's height and width must be multiples of this."""
        return int(self.latent_patch * 2 ** (len(self.multipliers) - 1))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, which :meth:`from_dict` reads back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UNetConfig:
        """Reads :meth:`to_dict`'s form. Raises :class:`InputError` for an unknown key, naming the nearest known one."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise InputError(
                    f"model key {key!r}",
                    expected="one of " + ", ".join(known),
                    remedy=f"Did you mean {near[0]!r}?" if near else "Remove it.",
                )
        return cls(**values)


MODEL_PRESETS: dict[str, UNetConfig] = {
    "tiny": UNetConfig(
        width=24,
        multipliers=(1, 2, 2),
        blocks_per_level=1,
        attention_levels=(2,),
        heads=4,
        time_embedding=128,
        groups=8,
        told=True,
        latent_patch=2,
    ),
    "medium": UNetConfig(told=True),
    "classic": UNetConfig(latent_patch=2),
}
"""``tiny`` trains on a CPU in minutes; ``medium`` has 599M parameters; ``classic`` is ``medium`` on 2x2 patches."""


def model_preset(name: str) -> UNetConfig:
    """The preset of that name. Raises :class:`InputError` for an unknown one."""
    try:
        return MODEL_PRESETS[name]
    except KeyError:
        raise InputError(
            f"model preset {name!r}", expected="one of " + ", ".join(MODEL_PRESETS), remedy="Choose one of these."
        ) from None
