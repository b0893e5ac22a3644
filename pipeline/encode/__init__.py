"""Catalogued series to VAE latents in the store, once per series.

In: a store with a catalog and a VAE. Out: committed latents, with checksums and round-trip figures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
