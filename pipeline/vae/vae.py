"""The VAE: a volume in [-1, 1] to latents and back.

Only this module and those it owns (`vae_*`) know that the network works on [0, 1], that lengths are padded to what the
network halves, and how a volume that does not fit in memory at once is run (`vae_stream`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentcache import (
    Encoding,
    InputError,
    NonFiniteError,
    check_bf16_convolutions,
    dtype_for_latents,
    free_host_bytes,
    full_float32,
)
from pipeline.vae.architecture import KlAutoencoder, VaeArchitecture
from pipeline.vae.sliding_window import Tiling, sliding, tiling_of
from pipeline.vae.streaming import Field, Plan, SlabExecutor, Stored, Stream, as_image, free_bytes, make_plan
from pipeline.vae.weights import TINY, VaeWeights, load_weights


class Autoencoder(Protocol):
    """A frozen VAE on its device: volumes (D, H, W) in [-1, 1] to raw latents (4, d, h, w) and back.

    Attributes:
        sha256: Names the encoder: latents of one are for the decoders of the same name alone.
        architecture: Of the network, as `Encoding.vae_architecture` keeps it.
    """

    sha256: str
    architecture: dict[str, Any]

    def encode(self, unit: Any, *, pad_multiple_zyx: tuple[int, int, int] = ...) -> Any: ...

    def decode(self, latent: Any, valid_zyx: tuple[int, int, int]) -> Any: ...


def load_decoder(
    device: str,
    *,
    spec: str,
    encoding: Encoding,
    precision: str = "auto",
    memory_gib: float | None = None,
    gpu_share: float = 1.0,
) -> Autoencoder:
    """Load the VAE that made an encoding's latents on a device, to decode them as they were encoded.

    Args:
        precision: ``auto`` (the latents' own where the device is of their kind), ``fp32`` or ``bf16``.
        gpu_share: This worker's share of its GPU's memory, where ``memory_gib`` is None.

    Raises:
        InputError: Not the autoencoder that the latents were encoded with.
    """
    from pipeline.vae.streaming import share_gib

    dtype: torch.dtype = getattr(torch, dtype_for_latents(precision, device, encoding))
    if dtype == torch.bfloat16:
        check_bf16_convolutions(torch.device(device))
    memory_gib = memory_gib or share_gib(torch.device(device), gpu_share)
    vae = load_vae(spec, device=device, memory_gib=memory_gib, dtype=dtype, expected=encoding)
    return as_encoded(vae, encoding.extra)


def check_same_vae(vae: Autoencoder, encoding: Encoding) -> None:
    """Refuse to decode with another VAE than the one that encoded.

    Raises:
        InputError: Another one.
    """
    if vae.sha256 != encoding.vae_sha256:
        raise InputError(
            f"a VAE whose SHA-256 begins {vae.sha256[:12]}",
            expected=f"the one that encoded these latents, {encoding.vae_sha256[:12]}",
            remedy="Give its path with --vae.",
        )


def own_decoder(vae: Any) -> str:
    """SHA-256 of a VAE file whose decoder was trained apart from its encoder; empty where they belong together."""
    found = str(getattr(vae, "file_sha256", ""))
    return found if found != vae.sha256 else ""


PAD_MULTIPLE_ZYX = (4, 32, 32)
SLAB_BYTES = {"cpu": 1, "cuda": 256 << 20}
"""One slab of one activation. On a CPU one slice at a time, whatever memory is free: the convolution library chooses
the order of its sums by a slab's depth, so any other plan would show in the bytes of a latent. A slice of a clinical
series is more than the caches hold anyway."""


def load_vae(
    spec: str | Path,
    device: str | torch.device = "cpu",
    memory_gib: float | None = None,
    dtype: torch.dtype | None = None,
    expected: Encoding | None = None,
) -> Vae:
    """Load a VAE for inference.

    Args:
        spec: ``tiny`` (the one that ships with ctpipe) or a checkpoint (see `vae_weights.load_weights`).
        memory_gib: Most memory that encode and decode may take on ``device``; None: what is free.
        dtype: Of the activations; None: bfloat16 on a GPU, float32 on a CPU.
        expected: The encoding whose latents it is for; None for any.

    Raises:
        InputError: The checkpoint is not that of a MAISI autoencoder, or another one than ``expected``.
    """
    weights = load_weights(TINY if spec == "tiny" else Path(spec))
    vae = Vae(weights, torch.device(device), memory_gib=memory_gib, dtype=dtype)
    if expected is not None:
        check_same_vae(vae, expected)
    return vae


def decoder_on_shapes(architecture: dict[str, Any] | None, *, bf16: bool) -> Callable[[Tensor], Tensor]:
    """A decoder without weights, to count on shapes what `Vae.decode_slab` would keep. Call it in a fake tensor mode.

    Args:
        architecture: `Vae.architecture`; None: MAISI's as published.
    """
    layout = VaeArchitecture.from_dict(architecture or {})

    def decode(latents: Tensor) -> Tensor:
        network = KlAutoencoder(layout).eval().requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            image: Tensor = network.decode(latents)
        return image.float() * 2 - 1

    return decode


class Vae:
    """A frozen autoencoder.

    Attributes:
        sha256: Of the weights' file that the encoder came with: what an encode key hashes. A decoder that was trained
            since decodes the same latents.
        file_sha256: Of the weights' file itself, and so of the decoder.
        architecture: JSON-able; with ``sha256`` it says which function this is.
    """

    def __init__(
        self,
        weights: VaeWeights,
        device: torch.device,
        *,
        memory_gib: float | None = None,
        dtype: torch.dtype | None = None,
        slab_bytes: int | None = None,
    ) -> None:
        self.sha256 = weights.sha256
        self.file_sha256 = weights.file_sha256 or weights.sha256
        self.layout = weights.architecture
        self.architecture: dict[str, Any] = weights.architecture.to_dict()
        self.compression = self.layout.compression
        self.latent_channels = self.layout.latent_channels
        self.device = device
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        if self.dtype == torch.float32:
            full_float32()
        self.memory_gib = memory_gib
        self.slab_bytes = slab_bytes or SLAB_BYTES.get(device.type, 16 << 20)
        self.network = weights.build().to(device)
        self.streamed = copy.deepcopy(self.network)
        for layer in self.streamed.modules():
            if isinstance(layer, nn.Conv3d):  # the norms' parameters stay in float32
                layer.weight.data = layer.weight.to(self.dtype, memory_format=torch.channels_last_3d)
                layer.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(self.dtype), False)

    def encode(
        self,
        unit: Tensor | NDArray[Any],
        *,
        with_variance: bool = False,
        pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX,
    ) -> Tensor:
        """Posterior mean of a volume, exact as in one unsplit forward pass.

        Args:
            unit: (D, H, W) intensities in [-1, 1]; padded at the far ends to ``pad_multiple_zyx`` by its edge values.
            with_variance: Append the log-variance: (8, d, h, w).

        Returns:
            (4, d, h, w) float32 on the CPU; d, h, w are the padded lengths over 4.

        Raises:
            NonFiniteError: The volume holds NaN or infinity.
            InputError: Not three-dimensional, or too large for the memory budget.
        """
        volume = torch.as_tensor(unit, dtype=torch.float32)
        if volume.ndim != 3 or volume.numel() == 0:
            raise InputError(
                f"a volume of shape {tuple(volume.shape)}", expected="(D, H, W)", remedy="Encode one series at a time."
            )
        if any(multiple <= 0 or multiple % self.compression for multiple in pad_multiple_zyx):
            raise InputError(
                f"pad_multiple_zyx {pad_multiple_zyx}",
                expected=f"multiples of {self.compression}, the VAE's compression",
                remedy="The default is (4, 32, 32).",
            )
        _refuse_non_finite(volume, "volume to encode")
        with torch.inference_mode():
            padded = padded_shape(volume.shape, pad_multiple_zyx)
            executor = self._executor(self.plan_encode(padded))
            source = VolumeSlices(volume, padded, self.dtype, self.device)
            stream = executor.run(self.streamed.encoder, source)
            features = torch.cat([stream.take(stop - start).float() for start, stop in executor.slabs(stream)])
            mean, log_variance = self.network.posterior(as_image(features))
            latent = torch.cat([mean, log_variance], dim=1) if with_variance else mean
            return latent[0].float().cpu().contiguous()

    def decode(self, latent: Tensor, valid_zyx: tuple[int, int, int]) -> Tensor:
        """Latents (4, d, h, w) to the volume (D, H, W) = ``valid_zyx``, float32 in [-1, 1] (clamped), on the CPU.

        Raises:
            NonFiniteError: The latents hold NaN or infinity.
            InputError: ``valid_zyx`` does not lie within what the latents cover.
        """
        latent = self._checked_latent(latent, valid_zyx).to(self.device)
        depth, height, width = valid_zyx
        _, d, h, w = latent.shape
        with torch.inference_mode():
            quantised = self.network.post_quant_conv(latent.unsqueeze(0))[0]
            slices_DHWC = quantised.permute(1, 2, 3, 0).to(self.dtype).contiguous()
            executor = self._executor(self.plan_decode((d, h, w)))
            stream = executor.run(self.streamed.decoder, Stored(Field(slices_DHWC, self.device)))
            volume = VolumeSink(valid_zyx, self.device)
            for start, stop in executor.slabs(stream, stop=depth):
                slab = stream.take(stop - start)[:, :height, :width, 0]
                volume.put(start, stop, slab.float().mul_(2).sub_(1).clamp_(-1, 1))
            return volume.finished()

    def decode_slab(self, latents: Tensor) -> Tensor:
        """Decode latents (B, 4, d, h, w) to (B, 1, 4d, 4h, 4w), nominally in [-1, 1] and not clamped, with gradients.

        For image losses: unsplit, with the slab's own GroupNorm statistics, so a slab's result is not a crop of the
        volume's. Compare slabs with slabs.
        """
        # Not channels-last on a CPU: PyTorch's GroupNorm loses three digits there (6e-4 after twelve layers).
        layout = torch.channels_last_3d if self.device.type == "cuda" else torch.contiguous_format
        latents = latents.to(self.device).contiguous(memory_format=layout)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            image = self.network.decode(latents)
        unit: Tensor = image.float() * 2 - 1
        return unit

    def encode_sliding(
        self,
        unit: Tensor | NDArray[Any],
        *,
        window_zyx: tuple[int, int, int] = (64, 64, 64),
        overlap: float = 0.4,
        pad_multiple_zyx: tuple[int, int, int] = PAD_MULTIPLE_ZYX,
    ) -> Tensor:
        """Posterior mean in blended windows, as others do it; differs from `encode` (see `vae_sliding`)."""
        volume = torch.as_tensor(unit, dtype=torch.float32)
        _refuse_non_finite(volume, "volume to encode")
        _refuse_partial_windows(window_zyx, self.compression)
        padded = padded_shape(volume.shape, pad_multiple_zyx)
        whole = VolumeSlices(volume, padded, torch.float32, torch.device("cpu")).take(padded[0]).permute(3, 0, 1, 2)

        def run(part: Tensor) -> Tensor:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return self.network.encode(part.to(self.device))[0].float().cpu()

        with torch.inference_mode():
            return sliding(run, whole, window_zyx, overlap, 1 / self.compression)

    def decode_sliding(
        self,
        latent: Tensor,
        valid_zyx: tuple[int, int, int],
        *,
        window_zyx: tuple[int, int, int] = (64, 64, 64),
        overlap: float = 0.4,
    ) -> Tensor:
        """Decode in blended windows (``window_zyx`` in voxels); differs from `decode` (see `vae_sliding`)."""
        _refuse_partial_windows(window_zyx, self.compression)
        dz, dy, dx = (n // self.compression for n in window_zyx)
        depth, height, width = valid_zyx
        with torch.inference_mode():
            checked = self._checked_latent(latent, valid_zyx)
            image = sliding(
                lambda z: self.decode_slab(z).cpu()[:, 0:1], checked, (dz, dy, dx), overlap, self.compression
            )
        return image[0, :depth, :height, :width].clamp(-1, 1)

    def _checked_latent(self, latent: Tensor, valid_zyx: tuple[int, int, int]) -> Tensor:
        """In float32; see `decode` for what is refused."""
        latent = torch.as_tensor(latent, dtype=torch.float32)
        covered = tuple(self.compression * n for n in latent.shape[1:])
        if latent.ndim != 4 or len(latent) != self.latent_channels:
            raise InputError(
                f"latents of shape {tuple(latent.shape)}",
                expected=f"({self.latent_channels}, d, h, w)",
                remedy="Drop the log-variance and any batch axis before decoding.",
            )
        if any(not 0 < valid <= length for valid, length in zip(valid_zyx, covered, strict=True)):
            raise InputError(
                f"valid_zyx {valid_zyx} for latents that cover {covered} voxels",
                expected="lengths of at least 1 within what the latents cover",
                remedy="Take valid_zyx from the latent's manifest row.",
            )
        _refuse_non_finite(latent, "latents to decode")
        return latent

    def plan_encode(self, padded_zyx: tuple[int, int, int]) -> Plan:
        """Predicted memory of encoding a volume of this padded shape; raises `InputError` if no plan fits."""
        return self._plan("encoder", (*padded_zyx, 1))

    def plan_decode(self, latent_zyx: tuple[int, int, int]) -> Plan:
        """Predicted memory of decoding latents of this shape; raises `InputError` if no plan fits."""
        return self._plan("decoder", (*latent_zyx, self.latent_channels))

    def _plan(self, part: str, shape_DHWC: tuple[int, int, int, int]) -> Plan:
        budget = free_bytes(self.device, self.memory_gib)
        return make_plan(
            self.layout,
            part,
            shape_DHWC,
            self.dtype,
            self.device,
            slab_bytes=self.slab_bytes,
            budget_bytes=budget,
            host_budget_bytes=int(0.9 * free_host_bytes()),
        )

    def _executor(self, plan: Plan) -> SlabExecutor:
        return SlabExecutor(plan.slab_bytes, offload=plan.offload)


class VolumeSlices(Stream):
    """A volume (D, H, W) in [-1, 1] as slices (n, H, W, 1) in [0, 1], edge-padded on the way, moved to the device."""

    def __init__(self, volume: Tensor, padded_zyx: tuple[int, int, int], dtype: torch.dtype, device: torch.device):
        super().__init__((*padded_zyx, 1), dtype, device)
        self.volume = volume

    def _produce(self, out_DHWC: Tensor) -> None:
        depth, height, width = self.volume.shape
        out = out_DHWC[..., 0]
        rows = torch.arange(self.position, self.position + len(out)).clamp_max(depth - 1)
        slices = self.volume[rows[0] : rows[-1] + 1]
        if self.device.type == "cuda":
            slices = slices.pin_memory()  # from a cache of such memory; an unpinned copy would wait for the device
        slices = slices.to(self.device, non_blocking=True) * 0.5 + 0.5
        out[: len(slices), :height, :width] = slices
        out[len(slices) :, :height, :width] = slices[-1]
        out[:, height:, :width] = out[:, height - 1 : height, :width]
        out[:, :, width:] = out[:, :, width - 1 : width]


class VolumeSink:
    """A volume on the CPU that fills slab by slab from the device, one slab behind.

    The device is never waited for while it has nothing else to do.
    """

    def __init__(self, shape_zyx: tuple[int, int, int], device: torch.device) -> None:
        self.volume = torch.empty(shape_zyx, dtype=torch.float32)
        self.pinned = device.type == "cuda"
        self.behind: tuple[int, int, Tensor, torch.cuda.Event] | None = None

    def put(self, start: int, stop: int, slab: Tensor) -> None:
        """Slices [start, stop)."""
        if not self.pinned:
            self.volume[start:stop] = slab
            return
        host = torch.empty(slab.shape, dtype=slab.dtype, pin_memory=True)
        host.copy_(slab, non_blocking=True)
        copied = torch.cuda.current_stream(slab.device).record_event()
        self.finished()
        self.behind = (start, stop, host, copied)

    def finished(self) -> Tensor:
        """All that was put."""
        if self.behind is not None:
            start, stop, host, copied = self.behind
            copied.synchronize()
            self.volume[start:stop] = host
            self.behind = None
        return self.volume


def padded_shape(shape_zyx: tuple[int, ...], multiple_zyx: tuple[int, int, int]) -> tuple[int, int, int]:
    """Every length rounded up to its multiple."""
    z, y, x = (-(-n // m) * m for n, m in zip(shape_zyx, multiple_zyx, strict=True))
    return z, y, x


def _refuse_partial_windows(window_zyx: tuple[int, int, int], compression: int) -> None:
    if any(n <= 0 or n % compression for n in window_zyx):
        raise InputError(
            f"a sliding window of {window_zyx} voxels",
            expected=f"multiples of {compression}, the VAE's compression",
            remedy="64x64x64 is usual.",
        )


def _refuse_non_finite(values: Tensor, what: str) -> None:
    # One fused pass: a sum is finite only if every term is, and clinical intensities are far from overflow.
    if not torch.isfinite(values.sum(dtype=torch.float64)):
        raise NonFiniteError(
            f"NaN or infinity in the {what}",
            expected="finite values in [-1, 1]",
            remedy="Check the source; the series is left out until it is repaired.",
        )


class SlidingVae:
    """A VAE whose ``encode`` and ``decode`` are those of its windows, for everything that only knows these two."""

    def __init__(self, vae: Vae, tiling: Tiling) -> None:
        self.sha256 = vae.sha256
        self.file_sha256 = vae.file_sha256
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


def as_encoded(vae: Autoencoder, extra: Mapping[str, Any]) -> Autoencoder:
    """``vae`` as an encoding used it: itself, or in the windows that ``extra`` (`Encoding.extra`) names."""
    tiling = tiling_of(extra)
    if tiling is None:
        return vae
    assert isinstance(vae, Vae), "what works in windows is the VAE itself"
    return SlidingVae(vae, tiling)
