"""Latents to thin HU: decode, compose with the measured slices, refine, write.

In: a store's latents and the thick series. Out: DICOM series with provenance.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
