"""Matching of thick and thin series: positions first, then proof by pixels, then the split.

In: series of a study. Out: pairs with their evidence, and splits by patient.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
