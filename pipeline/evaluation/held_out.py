"""Held-out pairs looked at during training: sampled latents decoded to HU and scored beside what bounds them.

The score is of what `decode` would write, but for the agreement with the thick slices: the model's change, decoded, on
top of what it started from. A decoded sample alone would mostly show the autoencoder's own error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentcache import LATENT_CHANNELS, CtpipeError, LatentRecord, LatentStore, PairRecord
from pipeline.decode import ComposeSettings, base_volume, compose, condition_of
from pipeline.forward_model import ThickMeasurement
from pipeline.identity import PrivateStore
from pipeline.metrics import DetailPower, TexturePower, intensity as metrics, ssim
from pipeline.reading import read_series
from pipeline.vae import Autoencoder, as_encoded, check_same_vae
from pipeline.volume import Volume, Window, common_slices, onto_field, resample_z

if TYPE_CHECKING:
    from pipeline.refiner import RefinerFile


@dataclass(frozen=True)
class HeldOutPair:
    """A pair's truth in HU, clipped to the window, on the thin slices that the thick series covers, and its bounds.

    ``start`` is what the model's change is added to, ``condition`` the decoded condition; zeros both where there is no
    condition of the model's own grid, so that the decoded sample is taken by itself. ``bounds`` has PSNR and SSIM of
    linear interpolation, of ``base`` (the slices that the model starts from) and of the VAE ceiling (the true thin
    series, encoded and decoded, alone).
    """

    pair: PairRecord
    valid_zyx: tuple[int, int, int]
    inside: slice
    truth: NDArray[np.float32]
    start: NDArray[np.float32]
    condition: NDArray[np.float32]
    bounds: Mapping[str, float]


class HeldOutImages:
    """The first pairs of a split, read once; later looks only decode and compare.

    Args:
        start: The refiner whose slices the model starts from; None where it starts from interpolated ones.
        count: Pairs to look at; the smallest pair keys, so that every validation sees the same ones.

    Raises:
        InputError: A VAE other than the one that encoded the latents, or refined latents of another refiner.
    """

    def __init__(
        self,
        store: LatentStore,
        private: PrivateStore,
        vae: Autoencoder,
        encode_key: str,
        *,
        split: str = "val",
        count: int = 2,
        start: RefinerFile | None = None,
    ) -> None:
        encoding = store.encoding(encode_key)
        check_same_vae(vae, encoding)
        self.vae: Autoencoder = as_encoded(vae, encoding.extra)
        self.composing = ComposeSettings(start=start)
        self.window = Window.of(encoding)
        chosen = _first_pairs(store, encode_key, split, count)
        self.pairs = [self._read(store, private, encode_key, pair) for pair in chosen]

    def figures(self, latent_of: Callable[[PairRecord], NDArray[Any]], *, means: bool = False) -> dict[str, float]:
        """Mean PSNR (dB) and SSIM over the window of sampled latents, and those of the bounds.

        Args:
            latent_of: A pair's sampled thin latent, raw, (4, d, h, w).
            means: The latents are means, not draws: ``val_change_gain`` is then the share of the model's change, 0 to
                1, that errs least over these pairs (``ComposeSettings.change_gain``), and is what is scored.
        """
        changes = [self._decode(latent_of(held.pair), held) - held.condition for held in self.pairs]
        gain = self._gain(changes) if means else None
        rows = [
            {
                **self._scores("", held, self._clip(held.start + np.float32(1.0 if gain is None else gain) * change)),
                **held.bounds,
                **({} if gain is None else {"val_change_gain": gain}),
            }
            for held, change in zip(self.pairs, changes, strict=True)
        ]
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}

    def _gain(self, changes: list[NDArray[np.float32]]) -> float | None:
        """<truth - start, change> / <change, change> over all pairs, 0 to 1; None where a sample is taken by itself."""
        wanted = power = 0.0
        for held, change in zip(self.pairs, changes, strict=True):
            if not held.condition.any():
                return None
            wanted += float(np.sum((held.truth - held.start) * change, dtype=np.float64))
            power += float(np.sum(np.square(change), dtype=np.float64))
        return 1.0 if power == 0 else min(1.0, max(0.0, wanted / power))

    def _read(self, store: LatentStore, private: PrivateStore, encode_key: str, pair: PairRecord) -> HeldOutPair:
        thin, thick, inside = _series(private, pair)
        truth = self._clip(thin.hu[inside])
        z_inside = np.array(thin.geometry.z_mm)[inside]
        linear = self._clip(resample_z(thick.hu, np.array(thick.geometry.z_mm), z_inside))
        record = store.find(pair.thin_key, "thin", encode_key)
        assert record is not None, "pairs are chosen among those encoded"
        base = self._clip(base_volume(thick, z_inside, self.composing, self.window))
        held = HeldOutPair(pair, thin.geometry.shape_zyx, inside, truth, base, base, {})
        ceiling = self._decode(_means(store, record), held)
        given = condition_of(store, pair, encode_key, self.composing.start)
        # Without a condition of its own grid (alignment `latent` alone was encoded) the decoded sample stands alone.
        condition = np.zeros_like(base) if given is None else self._decode(_means(store, given), held)
        start = np.zeros_like(base) if given is None else base
        bounds = {
            **self._scores("_linear", held, linear),
            **self._scores("_base", held, base),
            **self._scores("_vae_ceiling", held, ceiling),
        }
        return HeldOutPair(pair, held.valid_zyx, inside, truth, start, condition, bounds)

    def _decode(self, latent: NDArray[Any], held: HeldOutPair) -> NDArray[np.float32]:
        unit = np.asarray(self.vae.decode(np.asarray(latent, dtype=np.float32), held.valid_zyx))
        return self._clip(self.window.from_unit(unit[held.inside]))

    def _clip(self, hu: NDArray[Any]) -> NDArray[np.float32]:
        return np.clip(hu.astype(np.float32), self.window.lower, self.window.upper)

    def _scores(self, suffix: str, held: HeldOutPair, hu: NDArray[np.float32]) -> dict[str, float]:
        return {
            f"val_psnr_db{suffix}": metrics.psnr(hu, held.truth, data_range=self.window.width),
            f"val_ssim{suffix}": ssim(hu, held.truth, data_range=self.window.width),
        }


TEXTURE_PAIRS = 6
"""Training pairs that a run's texture is measured on."""


def texture_of_pairs(
    store: LatentStore, private: PrivateStore, encode_key: str, count: int = TEXTURE_PAIRS
) -> tuple[TexturePower | None, dict[str, str]]:
    """Texture of the true thin slices of a store's training pairs, and the pairs that could not be read, with why.

    The first ``count`` pairs by pair key whose thin series are encoded; None where none could be read.
    """
    found: TexturePower | None = None
    failed: dict[str, str] = {}
    for pair in _first_pairs(store, encode_key, "train", count):
        try:
            pointers = private.pointers([pair.thin_key, pair.thick_key])
            thin, thick = (read_series(pointers[key]) for key in (pair.thin_key, pair.thick_key))
            inside = common_slices(thick.geometry, thin.geometry)
            # Slices on another pixel grid say as much about A, which works along z alone.
            measured = ThickMeasurement.of(thick, np.array(thin.geometry.z_mm)[inside])
            one = TexturePower.of(thin.hu[inside], measured.operator)
        except CtpipeError as error:
            failed[pair.pair_key] = str(error)
            continue
        found = one if found is None else found + one
    return found, failed


def detail_of_draws(
    store: LatentStore,
    private: PrivateStore,
    vae: Autoencoder,
    encode_key: str,
    draw: Callable[[PairRecord], NDArray[Any]],
    start: RefinerFile | None,
    count: int,
) -> tuple[DetailPower, DetailPower] | None:
    """Detail in ker A of held-out pairs' true thin slices, and of draws composed as a decode composes them.

    Of the first ``count`` validation pairs whose condition is at hand; None where there is none.

    Args:
        draw: A pair's sampled thin latent, raw, (4, d, h, w).
    """
    encoding = store.encoding(encode_key)
    codec, window = as_encoded(vae, encoding.extra), Window.of(encoding)
    composing = ComposeSettings(start=start)
    found: tuple[DetailPower, DetailPower] | None = None
    for pair in _first_pairs(store, encode_key, "val", count):
        given = condition_of(store, pair, encode_key, start)
        if given is None:
            continue
        thin, thick, inside = _series(private, pair)
        measured = composing.measured(thick, thin.geometry.with_z(np.array(thin.geometry.z_mm)[inside]))
        drawn, condition = (
            window.from_unit(np.asarray(codec.decode(np.asarray(z, np.float32), thin.geometry.shape_zyx))[inside])
            for z in (draw(pair), _means(store, given))
        )
        hu, _ = compose(drawn, window, measured, composing, condition_hu=condition)
        truth, own = (DetailPower.of(volume, measured.operator) for volume in (thin.hu[inside], hu))
        found = (truth, own) if found is None else (found[0] + truth, found[1] + own)
    return found


def _first_pairs(store: LatentStore, encode_key: str, split: str, count: int) -> list[PairRecord]:
    """The first pairs of a split by pair key whose thin series are encoded."""
    encoded = {record.key for record in store.records(encode_key, "thin")}
    pairs = [p for p in store.pairs() if p.split == split and p.status == "ok" and p.thin_key in encoded]
    return sorted(pairs, key=lambda p: p.pair_key)[:count]


def _series(private: PrivateStore, pair: PairRecord) -> tuple[Volume, Volume, slice]:
    """A pair's thin series, its thick one on the thin pixel grid, and the thin slices that the thick ones cover."""
    pointers = private.pointers([pair.thin_key, pair.thick_key])
    thin = read_series(pointers[pair.thin_key])
    thick = onto_field(read_series(pointers[pair.thick_key]), thin.geometry)
    return thin, thick, common_slices(thick.geometry, thin.geometry)


def _means(store: LatentStore, record: LatentRecord) -> NDArray[np.float32]:
    """A stored latent without the log-variances that may follow its means."""
    return np.asarray(store.read(record), dtype=np.float32)[:LATENT_CHANNELS]
