"""Thin latents from a trained run.

In: a run and condition latents. Out: samples, stored like any latent.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
