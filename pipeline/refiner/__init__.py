"""Networks in pixel space: the refiner after decoding, and the regression baseline.

In: thick HU on the thick grid. Out: thin HU that agrees with it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
