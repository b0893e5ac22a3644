"""A store's pairs as the refiner's cases: pixels read from the archives, and what a model adds where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from latentcache import InputError, LatentStore
from pipeline.decode import ComposeSettings, decoded_hu, restore
from pipeline.identity import PrivateStore
from pipeline.reading import read_series
from pipeline.refiner import COMPOSED, RefinerCase, cut_patch, held_out_operator
from pipeline.vae import Autoencoder
from pipeline.volume import Geometry, Volume, Window, common_slices, interpolated, onto_field

HELD_OUT_ZYX = (32, 96, 96)
"""Voxels in the middle of a held-out pair that validation looks at."""


@dataclass(frozen=True)
class Sampled:
    """Thin latents that a model sampled for the pairs, and the decoder that belongs to them."""

    encode_key: str
    generated: LatentStore
    decoder: Autoencoder


class RefinerSource:
    """Cases by pair key.

    Args:
        scratch: A folder of the run's own for decoded detail, so that a model's output is decoded once per pair.
        model: None where the refiner is to correct plain interpolation.
    """

    def __init__(
        self, latents: LatentStore, private: PrivateStore, scratch: Path, model: Sampled | None = None
    ) -> None:
        self.latents, self.private, self.scratch, self.model = latents, private, scratch, model
        self.window = Window.of(latents.encoding(model.encode_key) if model else latents.encoding_in_use())
        self._series = {s.series_key: s for s in latents.series()}
        self._pairs = {p.pair_key: p for p in latents.pairs() if p.status == "ok"}

    def keys(self, split: str) -> list[str]:
        """Pair keys of a split, sorted."""
        return sorted(key for key, pair in self._pairs.items() if pair.split == split)

    def spacing_range(self, keys: Sequence[str]) -> tuple[float, float]:
        """Least and largest slice spacing in mm of the pairs' thin series."""
        found = [self._series[self._pairs[key].thin_key].spacing_mm_zyx[0] for key in keys]
        return min(found), max(found)

    def case(self, key: str) -> RefinerCase:
        """Read one pair: thin slices inside the thick extent, thick slices, detail."""
        pair = self._pairs[key]
        thin = read_series(self.private.pointer(pair.thin_key))
        thick = onto_field(read_series(self.private.pointer(pair.thick_key)), thin.geometry)
        inside = common_slices(thick.geometry, thin.geometry)
        target = thin.geometry.with_z(np.asarray(thin.geometry.z_mm)[inside])
        detail = None if self.model is None else self._detail(self.model, key, thick, target, inside)
        return RefinerCase(pair.study_key, Volume(thin.hu[inside], target), thick, detail)

    def _detail(self, model: Sampled, key: str, thick: Volume, target: Geometry, inside: slice) -> NDArray[np.float16]:
        """Return what the model adds to the interpolation, as ``compose`` adds it: (z, y, x) float16 HU."""
        path = self.scratch / f"{key}.npy"
        if path.exists():
            kept: NDArray[np.float16] = np.load(path)
            return kept
        sample = model.generated.find(key, "thin", model.encode_key)
        condition = self.latents.find(key, "thick_on_thin", model.encode_key)
        if sample is None or condition is None:
            raise InputError(
                f"pair {key} without {'a sample' if sample is None else 'a thick_on_thin latent'}",
                expected="both, because residual detail is the difference of their decodes",
                remedy="Encode with --roles thin,thick,thick_on_thin, or train without --checkpoint.",
            )
        thin_hu = decoded_hu(model.decoder, self.window, model.generated.url, sample)[inside]
        given = decoded_hu(model.decoder, self.window, self.latents.url, condition)[inside]
        settings = ComposeSettings()
        base = interpolated(thick, target, settings.base_method)
        restored = base.copy()
        restore(restored, thin_hu, self.window, given)
        detail = (restored - base).astype(np.float16)
        np.save(path, detail)
        return detail


@torch.no_grad()
def held_out_figures(source: RefinerSource, keys: Sequence[str], network: nn.Module, step: int) -> dict[str, float]:
    """PSNR in the window over the middles of held-out pairs under the held-out operator.

    ``back_projected`` (the linear estimate) and ``composed`` are the network's inputs, ``refined`` its output;
    ``val_loss`` is the squared error in unit scale.
    """
    device = next(network.parameters()).device
    errors = []
    for key in keys:
        case = source.case(key)
        thin = case.thin
        operator = held_out_operator(np.asarray(thin.geometry.z_mm), case.stated.fwhm_mm)
        box = tuple(
            slice(max(0, n // 2 - s // 2), n // 2 + s // 2) for n, s in zip(thin.hu.shape, HELD_OUT_ZYX, strict=True)
        )
        inputs, target = cut_patch(case, box, operator, source.window)
        refined = (
            network(*(torch.from_numpy(part)[None].to(device) for part in inputs))[0, 0].clamp(-1, 1).cpu().numpy()
        )
        images = (inputs.fine[0], inputs.fine[COMPOSED], refined)
        errors.append([float(np.square(image - target[0]).mean()) for image in images])
    linear, composed, after = np.mean(errors, axis=0).tolist()
    said = {"back_projected": linear, "composed": composed, "refined": after}
    return {
        "val_loss": after,
        **{f"{name}_psnr_db": float(10 * np.log10(4 / max(value, 1e-12))) for name, value in said.items()},
    }
