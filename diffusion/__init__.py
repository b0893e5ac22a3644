"""Latent diffusion from thick to thin: networks, objectives, training and sampling.

In: latents from a `latentcache.LatentStore`. Out: a run, and an `Interpolator` that samples thin latents.
Knows nothing of DICOM, HU or `pipeline`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
