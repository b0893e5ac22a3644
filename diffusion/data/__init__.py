"""Batches of latents: pairs, epoch plan, readers, prefetch, positions along z.

In: a store. Out: pinned batches of equal depth.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
