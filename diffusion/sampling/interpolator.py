"""A trained model as one object: a thick volume in, a thin one out; or raw latents in, raw latents out.

    m = Interpolator.load("RUN", codec=load_vae("tiny"))
    thin = m.generate(thick, sampler="ddim", num_inference_steps=50, target_depth=300)  # (300, H, W) in [-1, 1]
    latent = m.generate_latent(condition, sampler="ddim", num_inference_steps=50)

Shapes: C latent channels, D depth, H height, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion.data import align_depth, condition_role, same_extent
from diffusion.networks import ThickSlices, UNet, build_unet, for_generation, told_tensor
from diffusion.objectives import DepthNoise, Objective
from diffusion.runs import RunCard, check_tensors, validation_of
from diffusion.sampling.depth_windows import DepthWindows
from latentcache import COMPRESSION, Encoding, InputError, LatentGrid, LatentRole, NonFiniteError

Alignment = Literal["pixel", "latent"]
Latent = NDArray[Any] | Tensor


class VolumeCodec(Protocol):
    """A VAE as :meth:`Interpolator.generate` needs it; volumes are (D, H, W) in [-1, 1]."""

    def encode(self, unit_DHW: Tensor) -> Tensor: ...

    def decode(self, latent_CDHW: Tensor, valid_zyx: tuple[int, int, int]) -> Tensor: ...


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a trained model that its user needs.

    Attributes:
        encode_key, encoding: What the latents must have been encoded with.
        alignment: How the condition must be brought onto the thin grid: ``pixel`` (interpolated in HU, then encoded)
            or ``latent`` (encoded, then interpolated along z).
        refiner_sha256: The refiner whose slices, encoded, are the condition; empty: interpolated ones, by alignment.
        refiner_sha256: The refiner whose slices, encoded, are the condition; empty: interpolated ones, by alignment.
        checkpoint_sha256: SHA-256 of the weights' file; empty for a model that was not loaded from one.
        depth_window: Latent slices that the network sees at once, by default; None: the whole volume.
        in_plane_multiple: Height and width of a sample are padded to multiples of this.
    """

    encode_key: str = ""
    encoding: Encoding | None = None
    alignment: Alignment = "pixel"
    checkpoint_sha256: str = ""
    depth_window: int | None = None
    in_plane_multiple: int = 1
    refiner_sha256: str = ""
    card: RunCard | None = None


class GenerateOptions(TypedDict, total=False):
    """Options of :meth:`Interpolator.generate_latent`.

    Attributes:
        sampler: One of ``objective.samplers``; the objective's default otherwise, and so for ``num_inference_steps``.
        seed: Noise follows from it, the sample's number and the absolute latent slice alone.
        target_depth: Latent slices wanted; the condition is interpolated along z over the same extent.
        depth_window: Latent slices that the network sees at once; by default as in training.
        overlap: Slices that neighbouring windows share; half a window by default.
        thick, z_mm: The thick series' slices and the positions of the D latent slices, in mm along one axis; needed by
            a model that is ``told``.
    """

    sampler: str | None
    num_inference_steps: int | None
    seed: int
    target_depth: int | None
    depth_window: int | None
    overlap: int | None
    thick: ThickSlices | None
    z_mm: ArrayLike | None


@dataclass(frozen=True)
class _Generation:
    """:class:`GenerateOptions` with their defaults; an unknown one is a TypeError."""

    sampler: str | None = None
    num_inference_steps: int | None = None
    seed: int = 0
    target_depth: int | None = None
    depth_window: int | None = None
    overlap: int | None = None
    thick: ThickSlices | None = None
    z_mm: ArrayLike | None = None


class Interpolator:
    """Predicts thin-slice latents from the condition's. Whitening, padding, windows and sampling are inside.

    Its attributes are those of :class:`ModelFacts`, and the network, the objective and the whitening.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        facts: ModelFacts | None = None,
    ) -> None:
        if len(mean) != len(std) or not all(np.isfinite([*mean, *std])) or min(std) <= 0:
            raise InputError(
                f"whitening with mean {list(mean)} and std {list(std)}",
                expected="a finite mean and a positive std for every channel",
                remedy="Check `ctpipe stats STORE`; a constant channel means that the encode went wrong.",
            )
        self.model = model
        self.objective = objective
        self.mean, self.std = list(map(float, mean)), list(map(float, std))
        facts = facts or ModelFacts()
        self.encode_key, self.encoding = facts.encode_key, facts.encoding
        self.alignment: Alignment = facts.alignment
        self.checkpoint_sha256 = facts.checkpoint_sha256
        self.depth_window = facts.depth_window
        self.in_plane_multiple = facts.in_plane_multiple
        self.refiner_sha256 = facts.refiner_sha256
        self.card = facts.card
        self.codec: VolumeCodec | None = None

    @classmethod
    def from_parts(
        cls, model: UNet, objective: Objective, mean: Sequence[float], std: Sequence[float], **described: Any
    ) -> Interpolator:
        """An interpolator around a model in memory, as the trainer validates it; the model is used, not copied.

        ``described``: fields of :class:`ModelFacts`; the in-plane multiple is the U-Net's own.
        """
        facts = ModelFacts(in_plane_multiple=model.config.in_plane_multiple, **described)
        return cls(model, objective, mean, std, facts=facts)

    @classmethod
    def load(
        cls,
        run_dir: str | Path,
        device: str | torch.device = "cpu",
        which: Literal["best", "last"] = "best",
        codec: VolumeCodec | None = None,
    ) -> Interpolator:
        """Loads a run's averaged weights (``ema.safetensors``, else ``model.safetensors``) in evaluation mode.

        ``best`` falls back to ``last`` where the run has no best checkpoint yet. On the device ``meta`` nothing is
        loaded: what it says of the run (keys, alignment, objective) is there without the memory that weights take.
        ``codec``: the VAE that the run's latents were encoded with, for :meth:`generate`.

        Raises:
            InputError: No run there, no checkpoint yet, damaged weights, or weights of another architecture.
        """
        run_dir = Path(run_dir)
        card = RunCard.read(run_dir)
        path = _weights_file(run_dir, which)
        described = torch.device(device).type == "meta"
        with torch.device("meta") if described else contextlib.nullcontext():
            model = build_unet(card.unet_config)
        if not described:
            model.load_state_dict(_checked_weights(model, path, which))
        model = for_generation(model.eval().requires_grad_(False), torch.device(device))
        loaded = cls.from_parts(
            model,
            card.build_objective(),
            card.whitening["mean"],
            card.whitening["std"],
            encode_key=card.encode_key,
            encoding=card.build_encoding(),
            alignment=card.alignment,
            checkpoint_sha256=_sha256(path),
            depth_window=card.depth_window,
            refiner_sha256=card.refiner_sha256,
            card=card,
        )
        loaded.codec = codec
        return loaded

    @property
    def told(self) -> bool:
        """Whether the network needs the places of the thick slices."""
        return bool(getattr(getattr(self.model, "config", None), "told", False))

    @property
    def condition_role(self) -> LatentRole:
        """Role of the stored latents that the model starts from."""
        return condition_role(self.alignment, bool(self.refiner_sha256))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def generate(
        self, thick: Latent, *, target_depth: int, codec: VolumeCodec | None = None, **options: Any
    ) -> NDArray[np.float32]:
        """Return a thin volume (target_depth, H, W), float32 in [-1, 1], from a thick one of the same extent.

        For volumes whose slices fill one extent evenly. Real series go by their own positions: use
        ``pipeline.interpolate_study``, or align them first and call :meth:`generate_latent`.

        Args:
            thick: (D, H, W) or (1, 1, D, H, W) in [-1, 1], under the window that the latents were encoded with.
            target_depth: Slices wanted (not latent slices).
            codec: The VAE that the run's latents were encoded with; by default the one given to :meth:`load`.
            options: As in :meth:`generate_latent`: ``sampler``, ``num_inference_steps``, ``seed``, ``samples``, ...

        Raises:
            InputError: Another shape or range of values, no VAE, or not the one of the run's latents.
            NonFiniteError: NaN or infinity in the volume or in a sampler step.
        """
        if self.refiner_sha256:
            raise InputError(
                "a plain volume for a model that starts from refined slices",
                expected=f"slices of the refiner {self.refiner_sha256[:12]}, encoded",
                remedy="Use `ctpipe interpolate` or ctpipe.interpolate_study, which refine first; or generate_latent.",
            )
        codec = self._codec_of_run(codec)
        thick_DHW = _checked_volume(thick)
        depth, height, width = thick_DHW.shape
        z_thick, z_thin = same_extent(depth, _positive(target_depth, "target_depth"))
        if self.alignment == "pixel":
            condition = codec.encode(align_depth(thick_DHW[None], z_thick, z_thin)[0])
        else:
            latent = codec.encode(thick_DHW)
            count = -(-target_depth // COMPRESSION)
            z_from = [(COMPRESSION * j + 2) / depth for j in range(latent.shape[1])]
            z_to = [(COMPRESSION * k + 2) / target_depth for k in range(count)]
            condition = align_depth(latent, z_from, z_to)
        if self.told and "thick" not in options:
            # One extent: in units of a thin slice of 1 mm where nobody says otherwise.
            spacing = target_depth / depth
            options["thick"] = ThickSlices(spacing / 2 - 0.5, spacing, depth, spacing)
            options["z_mm"] = LatentGrid((COMPRESSION - 1) / 2, COMPRESSION, (target_depth, height, width)).positions(
                condition.shape[1]
            )
        thin = torch.from_numpy(self.generate_latent(condition, **options))
        return np.asarray(codec.decode(thin, (target_depth, height, width)).cpu(), dtype=np.float32)

    def _codec_of_run(self, codec: VolumeCodec | None) -> VolumeCodec:
        """The VAE handed in, if it is the one that the run's latents were encoded with."""
        codec = codec or self.codec
        wanted = "" if self.encoding is None else self.encoding.vae_sha256
        if codec is None:
            raise InputError(
                "a volume and no VAE to encode it with",
                expected="the VAE of the run's latents" + (f" (SHA-256 begins {wanted[:12]})" if wanted else ""),
                remedy="Hand it in: Interpolator.load(RUN, codec=load_vae(PATH)), or generate(..., codec=...). "
                "For latents, call generate_latent.",
            )
        found = str(getattr(codec, "sha256", wanted))
        if wanted and found != wanted:
            raise InputError(
                f"a VAE whose SHA-256 begins {found[:12]}",
                expected=f"the one that encoded the run's latents, {wanted[:12]}",
                remedy="Load that VAE with load_vae(PATH).",
            )
        return codec

    def generate_latent(
        self, condition: Latent, *, samples: int = 1, **options: Unpack[GenerateOptions]
    ) -> NDArray[np.float32]:
        """Thin-slice latents, raw, (C, D, H, W) float32; with ``samples`` > 1 their mean, which errs least.

        Args:
            condition: (C, D, H, W) raw latents on the thin grid; or on any grid of the same extent, with
                ``target_depth``.
            options: Sampler, seed and windows: see :class:`GenerateOptions`.

        Raises:
            InputError: A model without the facts that it needs, a condition of another shape, an unknown sampler, a
                window that is not larger than its overlap.
            NonFiniteError: NaN or infinity in the condition or in a sampler step.
        """
        total: NDArray[np.float64] | None = None
        for number in range(_positive(samples, "samples")):
            one = self._one_sample(condition, number, **options)
            total = one.astype(np.float64) if total is None else total + one
        assert total is not None
        return (total / samples).astype(np.float32)

    def generate_samples(
        self, condition: Latent, samples: int, **options: Unpack[GenerateOptions]
    ) -> NDArray[np.float32]:
        """``samples`` independent draws, (N, C, D, H, W) float32; ``options`` as in :meth:`generate_latent`."""
        return np.stack([self._one_sample(condition, n, **options) for n in range(_positive(samples, "samples"))])

    @torch.no_grad()
    def _one_sample(self, condition: Latent, sample: int, **options: Unpack[GenerateOptions]) -> NDArray[np.float32]:
        whitened = self._whiten(condition)
        how = _Generation(**options)
        if how.target_depth is not None and how.target_depth != whitened.shape[1]:
            whitened = align_depth(whitened, *same_extent(whitened.shape[1], how.target_depth))
        told = self._told(how.thick, how.z_mm, whitened.shape[1])
        height, width = whitened.shape[2:]
        pad_h, pad_w = -height % self.in_plane_multiple, -width % self.in_plane_multiple
        padded = F.pad(whitened[None], (0, pad_w, 0, pad_h, 0, 0), mode="replicate")
        noise = DepthNoise(how.seed, sample)
        shape = tuple(padded.shape[1:])
        was_training = self.model.training
        self.model.eval()
        try:
            clean = self.objective.sample(
                self._network(padded.shape[2], how.depth_window, how.overlap, told),
                padded,
                sampler=how.sampler,
                num_inference_steps=how.num_inference_steps,
                noise=lambda draw: noise(draw, shape)[None],
            )[0, :, :, :height, :width]
        finally:
            self.model.train(was_training)
        mean, std = self._moments(clean.device)
        return np.asarray((clean * std + mean).cpu(), dtype=np.float32)

    def _told(self, thick: ThickSlices | None, z_mm: ArrayLike | None, depth: int) -> Tensor | None:
        """(1, 6, D) where the network takes it."""
        if not self.told:
            return None
        places = None if z_mm is None else np.asarray(z_mm, np.float64).reshape(-1)
        if thick is None or places is None or len(places) != depth:
            raise InputError(
                "a model that is told where the thick slices lie, and "
                + ("no such thing" if thick is None or places is None else f"{len(places)} positions"),
                expected=f"thick=ThickSlices(...) and z_mm, the positions of the {depth} latent slices",
                remedy="Take z0_mm and dz_mm of the latent's row and the thick series' own positions.",
            )
        return told_tensor(thick, places, self.device)

    def _network(self, depth: int, window: int | None, overlap: int | None, told: Tensor | None) -> DepthWindows:
        window = window or self.depth_window or depth
        device = self.device.type

        def forward(x_BCDHW: Tensor, t_B: Tensor, *told_BFD: Tensor) -> Tensor:
            # bf16 where it is fast; float16 is never used: its range is too small for the first steps.
            with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
                out: Tensor = self.model(x_BCDHW, t_B, *told_BFD)
            return out

        return DepthWindows(forward, window, window // 2 if overlap is None else overlap, told)

    def _whiten(self, condition: Latent) -> Tensor:
        latent = torch.as_tensor(condition).to(self.device, torch.float32)
        if latent.ndim != 4 or latent.shape[0] != len(self.mean):
            raise InputError(
                f"a condition of shape {tuple(latent.shape)}",
                expected=f"({len(self.mean)}, depth, height, width) raw latents",
                remedy="Pass one series' latents, as LatentStore.read returns them.",
            )
        if not bool(torch.isfinite(latent).all()):
            raise NonFiniteError(
                "the condition holds NaN or infinity", expected="finite latents", remedy="Run `ctpipe verify STORE`."
            )
        mean, std = self._moments(latent.device)
        return (latent - mean) / std

    def _moments(self, device: torch.device) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1, 1)
        mean, std = torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)
        return mean.reshape(shape), std.reshape(shape)


def _checked_volume(thick: Latent) -> Tensor:
    """(D, H, W) float32 on the CPU, in [-1, 1]."""
    volume = torch.as_tensor(thick).detach().to("cpu", torch.float32)
    if volume.ndim == 5 and tuple(volume.shape[:2]) == (1, 1):
        volume = volume[0, 0]
    if volume.ndim != 3 or volume.numel() == 0:
        raise InputError(
            f"a volume of shape {tuple(volume.shape)}",
            expected="(depth, height, width) or (1, 1, depth, height, width)",
            remedy="Pass one volume; for raw latents (channels, depth, height, width) call generate_latent.",
        )
    low, high = float(volume.min()), float(volume.max())
    if not np.isfinite([low, high]).all():
        raise NonFiniteError("the volume holds NaN or infinity", expected="finite values", remedy="Check the source.")
    if low < -1.001 or high > 1.001:
        raise InputError(
            f"a volume with values from {low:g} to {high:g}",
            expected="intensities in [-1, 1]",
            remedy="Bring HU into the window of the run first: Window.to_unit(hu), and from_unit on the result.",
        )
    return volume


def change_gain(run_dir: str | Path, num_inference_steps: int | None) -> float:
    """Share of a run's change of what it starts from to take: what its best checkpoint's validation found, else 1.

    A single step gives a mean, and of that alone a share was measured; draws of more steps keep their whole change,
    whose size is how sure the model is.
    """
    card = RunCard.read(Path(run_dir))
    if card.build_objective().steps(num_inference_steps) != 1:
        return 1.0
    return float(validation_of(_weights_file(Path(run_dir), "best").parent).get("val_change_gain", 1.0))


def _weights_file(run_dir: Path, which: Literal["best", "last"]) -> Path:
    order = ("best", "last") if which == "best" else ("last",)
    for name in order:
        for file in ("ema.safetensors", "model.safetensors"):
            path = run_dir / "checkpoints" / name / file
            if path.is_file():
                return path
    raise InputError(
        f"no {which!r} checkpoint in {run_dir}",
        expected="checkpoints/best or checkpoints/last with weights",
        remedy="Let `ctpipe train` reach its first checkpoint.",
    )


def _checked_weights(model: nn.Module, path: Path, which: str) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"the weights of checkpoint {which!r} cannot be read ({type(error).__name__})",
            expected="a whole safetensors file",
            remedy="Use the other of best and last, or restore the run from a copy.",
        ) from error
    check_tensors(model, weights)
    return weights


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _positive(count: int, name: str) -> int:
    if count < 1:
        raise InputError(f"{count} {name}", expected="at least 1", remedy=f"Change {name}.")
    return count
