"""Statement of a derived series of how it was made: in words, in codes, and in full as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.sequence import Sequence as DicomSequence

ALGORITHM = "ctpipe"
PRIVATE_GROUP = 0x0071
PRIVATE_CREATOR = "CTPIPE PROVENANCE 1"
_ST_MAX = 1024
VAE_COMPRESSION_RATIO = 16
VAE_COMPRESSION_METHOD = "CTPIPE_VAE"
"""A term of our own: PS3.3 C.7.6.1.1.5.1 lists defined terms, which may be extended, and none for an autoencoder."""


def package_version() -> str:
    """Version of the installed package, ``unknown`` when run from a bare tree."""
    try:
        return version(ALGORITHM)
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Provenance:
    """Provenance of a series; holds keys and hashes, never identity.

    Attributes:
        kind: ``decoded``: the reconstruction of a stored latent; ``generated``: sampled from a thick series;
            ``uncertainty``: standard deviation over samples; ``alarm``: where a sample differs from others.
        source_key: Series key of the source.
        window: (centre, width) in HU of what the latents hold.
        encode_key: The latents' encode key; with ``vae_sha256`` it fixes the autoencoder.
        decoder_sha256: Of the VAE file that decoded, where its decoder was trained apart from the encoder that
            ``vae_sha256`` names; empty where they came in one file.
        checkpoint_sha256: Of the diffusion model, empty when none was used.
        refiner_sha256: Of the pixel-space refiner's weights and settings, empty when none was used.
        sampling: Sampler, steps, seeds, samples.
        answer: ``mean`` over several samples, or one ``sample`` of several; empty where there was but one.
        consistency: Figures of agreement with the measured thick series.
        notes: Anything a reader must know, e.g. that spacing was resampled.
    """

    kind: Literal["decoded", "generated", "uncertainty", "alarm"]
    source_key: str
    window: tuple[float, float]
    spacing_mm: float
    encode_key: str = ""
    vae_sha256: str = ""
    checkpoint_sha256: str = ""
    refiner_sha256: str = ""
    store_snapshot: int | None = None
    generation_key: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    consistency: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    answer: Literal["", "mean", "sample"] = ""
    decoder_sha256: str = ""
    algorithm_version: str = field(default_factory=package_version)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no white space."""
        values = asdict(self)
        if not self.decoder_sha256:  # series of an untouched VAE keep the UIDs that follow from this text
            del values["decoder_sha256"]
        return json.dumps({"algorithm": ALGORITHM, **values}, sort_keys=True, separators=(",", ":"), default=str)

    def summary(self) -> str:
        """One paragraph for a reader at a workstation, at most 1024 characters (VR ST, DICOM PS3.5 6.2)."""
        what = {
            "decoded": "Reconstructed from a compressed latent of the source series by a variational autoencoder",
            "generated": "SYNTHETIC thin slices predicted from the thick source series by "
            + ("a latent diffusion model" if self.checkpoint_sha256 or self.vae_sha256 else "a trained network (mean)"),
            "uncertainty": "Standard deviation in HU over samples of a latent diffusion model",
            "alarm": "Fabrication alarm: how far the written sample of a latent diffusion model stands out from the "
            "other samples, in their own spread, and from the measured slices; what all samples invent does not show",
        }[self.kind]
        if self.answer:
            what += {
                "mean": ", mean over samples: for viewing, smoother than life",
                "sample": ", ONE sample of several: for measuring density and texture",
            }[self.answer]
        parts = [f"{what} ({ALGORITHM} {self.algorithm_version}), {self.spacing_mm:g} mm"]
        parts.append(f"window {self.window[0]:g}/{self.window[1]:g} HU")
        for label, value in (
            ("VAE", self.vae_sha256),
            ("decoder", self.decoder_sha256),
            ("model", self.checkpoint_sha256),
            ("refiner", self.refiner_sha256),
            ("encoding", self.encode_key),
        ):
            if value:
                parts.append(f"{label} {value[:16]}")
        parts += [f"{k} {self.sampling[k]}" for k in ("sampler", "steps", "samples", "seed") if k in self.sampling]
        if "change_gain" in self.consistency:
            parts.append(f"{self.consistency['change_gain']:g} of the model's change")
        if added := self.consistency.get("texture_added_hu", 0):
            parts.append(f"{added:g} HU RMS of enlarged detail and drawn noise, the texture of true thin slices")
        if "rms_after_hu" in self.consistency:
            parts.append(f"agreement with the measured slices {self.consistency['rms_after_hu']:.1f} HU RMS")
        if said := str(self.consistency.get("certificate", {}).get("said", "")):
            parts.append(said)
        parts += self.notes
        return "; ".join(parts)[:_ST_MAX]


def coded(value: str, scheme: str, meaning: str) -> DicomSequence:
    """A code sequence of one item (DICOM PS3.3 8.8)."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return DicomSequence([item])


def add_provenance(
    ds: Dataset, provenance: Provenance, source_sop_uids: tuple[str, ...], source_sop_class: str
) -> None:
    """Write the derivation into a dataset (DICOM PS3.3 C.12.4, C.12.1, C.7.6.1): sources, codes, equipment, JSON."""
    ds.SyntheticData = "YES"
    ds.DerivationDescription = provenance.summary()
    ds.DerivationCodeSequence = coded("113085", "DCM", "Spatial resampling")
    purpose = coded("121322", "DCM", "Source image for image processing operation")
    sources = []
    for uid in source_sop_uids:
        item = Dataset()
        item.ReferencedSOPClassUID = source_sop_class
        item.ReferencedSOPInstanceUID = uid
        item.PurposeOfReferenceCodeSequence = purpose
        sources.append(item)
    if sources:
        ds.SourceImageSequence = DicomSequence(sources)
    equipment = Dataset()
    equipment.PurposeOfReferenceCodeSequence = coded("109102", "DCM", "Processing Equipment")
    equipment.Manufacturer = ALGORITHM
    equipment.ManufacturerModelName = ALGORITHM
    equipment.SoftwareVersions = provenance.algorithm_version
    equipment.ContributionDescription = provenance.summary()
    ds.ContributingEquipmentSequence = DicomSequence([equipment])
    block = ds.private_block(PRIVATE_GROUP, PRIVATE_CREATOR, create=True)
    block.add_new(0x01, "UT", provenance.to_json())


def mark_compression(ds: Dataset, source: Mapping[str, Any], provenance: Provenance) -> None:
    """Write LossyImageCompression, its ratio and its method (C.7.6.1.1.5): once lossy, an image stays it.

    A series decoded from the latent of that series has been through a lossy compression by the autoencoder: 16-bit
    voxels, 64 of them kept as four numbers of 16 bits. A generated one has not been compressed itself; its provenance
    names the VAE.

    Args:
        ds: Changed in place.
        source: Public facts of the source by keyword.
        provenance: How the series came to be.
    """
    lossy = source.get("LossyImageCompression") == "01"
    steps = [(source.get("LossyImageCompressionRatio"), source.get("LossyImageCompressionMethod"))] if lossy else []
    if provenance.kind == "decoded" and provenance.vae_sha256:
        lossy = True
        steps.append((VAE_COMPRESSION_RATIO, VAE_COMPRESSION_METHOD))
    for keyword in ("LossyImageCompressionRatio", "LossyImageCompressionMethod"):
        if keyword in ds:
            delattr(ds, keyword)
    ds.LossyImageCompression = "01" if lossy else "00"
    stated = [(ratio, method) for ratio, method in steps if ratio and method]  # their values correspond one to one
    if stated:
        ds.LossyImageCompressionRatio = [ratio for ratio, _ in stated]
        ds.LossyImageCompressionMethod = [method for _, method in stated]


def read_provenance(ds: Dataset) -> dict[str, Any]:
    """The full provenance of a series that ctpipe wrote, as it is in its private block.

    Raises:
        KeyError: The dataset was not written by ctpipe.
    """
    loaded: dict[str, Any] = json.loads(ds.private_block(PRIVATE_GROUP, PRIVATE_CREATOR)[0x01].value)
    return loaded


def kinds_of_file(path: Path) -> tuple[str, ...]:
    """Return the ``kind`` and the ``answer`` that a file's provenance states; none for a file that is not ctpipe's."""
    try:
        found = read_provenance(dcmread(path, stop_before_pixels=True))
    except (KeyError, InvalidDicomError):
        return ()
    return tuple(str(found[name]) for name in ("kind", "answer") if found.get(name))
