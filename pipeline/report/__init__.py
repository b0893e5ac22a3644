"""Offline HTML pages of a run and of a store.

In: metrics and views. Out: one file that opens without a network.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
