"""Figures of a volume against its truth, in HU: intensity, similarity, sharpness, noise, lung density, volumes.

In: arrays in HU with spacings in mm. Out: numbers with stated units.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
