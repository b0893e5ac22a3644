"""Run one stage over many items: in process, on dask or on Ray, with equal bytes and per-item retry.

In: a `Stage`, items and `EngineOptions`. Out: one `Outcome` per item, in the order in which they end.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
