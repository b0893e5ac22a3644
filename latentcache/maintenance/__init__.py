"""Care of a store: verify, gc, migrate, erase, diff, status, statistics, staleness, pins.

In: a `LatentStore`. Out: what was found or changed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
