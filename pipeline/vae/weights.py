"""Checkpoint files to weights: MAISI's and MONAI's names alike, nothing missing, nothing extra, nothing NaN."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentcache import InputError
from pipeline.vae.architecture import KlAutoencoder, VaeArchitecture

log = logging.getLogger("ctpipe.vae")


TINY = Path(__file__).with_name("tiny_vae.safetensors")
WRAPPERS = ("unet_state_dict", "state_dict")
_WRAPPED_CONV = re.compile(r"\.(?:conv|postconv)(?=\.)")


@dataclass(frozen=True)
class VaeWeights:
    """A checked state dict under our names, with the architecture it fits.

    Attributes:
        sha256: Names the encoder, and so the latents: SHA-256 of the file that the encoder came with. That is this very
            file, unless only its decoder was trained since (see `encoder_metadata`).
        file_sha256: SHA-256 of this file's bytes, and so of the decoder.
    """

    state: dict[str, Tensor]
    architecture: VaeArchitecture
    sha256: str
    file_sha256: str = ""

    def build(self) -> KlAutoencoder:
        """The network with these weights, in evaluation mode, with gradients off."""
        with torch.device("meta"):
            model = KlAutoencoder(self.architecture)
        model.load_state_dict(self.state, strict=True, assign=True)
        return model.eval().requires_grad_(False)


ENCODER_OF, ENCODER_TENSORS = "encoder_of", "encoder_tensors_sha256"
"""Metadata of a file whose decoder alone was trained: the file its encoder came with, and a hash of that encoder."""


def encoder_metadata(start: VaeWeights) -> dict[str, str]:
    """Return the metadata of a file with the encoder of ``start`` and another decoder: latents stay usable."""
    return {ENCODER_OF: start.sha256, ENCODER_TENSORS: encoder_tensors_sha256(start.state)}


def encoder_tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names and float32 bytes of the tensors that make a latent: all but the decoder's."""
    digest = hashlib.sha256()
    for name in sorted(state):
        if not name.startswith(DECODER_PARTS):
            digest.update(name.encode() + b"\0")
            digest.update(state[name].detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


DECODER_PARTS = ("decoder.", "post_quant_conv.")


def tuned_decoder(spec: str | Path) -> str:
    """SHA-256 of a VAE file whose decoder was trained alone; empty for any other, ``tiny`` included."""
    path = Path(spec)
    if str(spec) == "tiny" or path.suffix != ".safetensors" or not path.is_file():
        return ""
    weights = load_weights(path)
    return weights.file_sha256 if weights.file_sha256 != weights.sha256 else ""


def canonical_name(name: str) -> str:
    """Our name of a tensor.

    MAISI's and MONAI's classes wrap convolutions in up to three modules named ``conv`` or ``postconv``, which say
    nothing: ``encoder.blocks.3.conv.conv.conv.weight`` is ``encoder.blocks.3.weight``.
    """
    return _WRAPPED_CONV.sub("", name.removeprefix("module.").removeprefix("_orig_mod."))


def load_weights(path: Path) -> VaeWeights:
    """Read the weights of an autoencoder of MAISI's family.

    They are a ``.safetensors`` file or a PyTorch checkpoint: a state dict, bare or under ``unet_state_dict`` or
    ``state_dict``. Pickled code is never run (``weights_only``).

    The architecture is in a safetensors file's metadata (``architecture``, JSON); without it MAISI's published
    one is expected. Upsampling, where it is not named, is what the class that wrote the names does.

    Raises:
        InputError: No such file; not a state dict; tensors missing, extra, of other shapes, or not finite; an encoder
            other than the one that the metadata names.
    """
    if not path.is_file():
        raise InputError(
            "no VAE checkpoint at the given path",
            expected="`tiny` or a file with MAISI autoencoder weights (.pt, .pth, .ckpt or .safetensors)",
            remedy="MAISI's weights are not shipped; download them under their licence and give --vae PATH.",
        )
    raw, metadata = _read(path)
    sha256 = _sha256(path)
    named: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        own = canonical_name(name)
        if own in named:
            raise _refusal(f"two tensors that both mean {own}", "a checkpoint of one network")
        named[own] = tensor
    default = VaeArchitecture(upsampling="nearest" if any(".postconv." in name for name in raw) else "trilinear")
    described = json.loads(metadata["architecture"]) if "architecture" in metadata else {}
    architecture = VaeArchitecture.from_dict(described, default)
    state = _checked(named, architecture)
    log.info("%d/%d tensors loaded, sha256 %s", len(state), len(state), sha256[:16])
    if ENCODER_OF not in metadata:
        return VaeWeights(state, architecture, sha256, sha256)
    if encoder_tensors_sha256(state) != metadata.get(ENCODER_TENSORS):
        raise _refusal("an encoder that is not the one its metadata names", "an unchanged encoder beside its decoder")
    return VaeWeights(state, architecture, metadata[ENCODER_OF], sha256)


def _read(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except SafetensorError as error:
            raise _refusal("a file that is not safetensors", "a whole .safetensors file") from error
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _refusal("a file that cannot be read as weights", "a PyTorch file of tensors only") from error
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise _refusal("a file that holds no state dict", "a mapping of names to tensors, bare or under a known key")
    return {str(name): tensor for name, tensor in content.items()}, {}


def _checked(named: Mapping[str, Tensor], architecture: VaeArchitecture) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in KlAutoencoder(architecture).state_dict().items()}
    missing = [name for name in wanted if name not in named]
    extra = [name for name in named if name not in wanted]
    shapes = [
        f"{name} {tuple(named[name].shape)} for {shape}"
        for name, shape in wanted.items()
        if name in named and tuple(named[name].shape) != shape
    ]
    if missing or extra or shapes:
        faults = [("missing", missing), ("extra", extra), ("of another shape", shapes)]
        listed = "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in faults if names)
        fitting = len(wanted) - len(missing) - len(shapes)
        raise _refusal(f"{fitting}/{len(wanted)} tensors that fit ({listed})", f"{len(wanted)}/{len(wanted)}")
    broken = [name for name in wanted if not torch.isfinite(named[name]).all()]
    if broken:
        raise _refusal(f"NaN or infinity in {_some(broken)}", "finite weights")
    return {name: named[name].to(torch.float32).contiguous() for name in wanted}


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _refusal(found: str, expected: str) -> InputError:
    return InputError(
        f"the VAE checkpoint has {found}",
        expected=expected,
        remedy="Give the autoencoder of MAISI (autoencoder_v1.pt, autoencoder_epoch273.pt or v2), "
        "or a safetensors file that names its own `architecture`.",
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
