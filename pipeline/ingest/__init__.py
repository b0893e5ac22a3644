"""An archive to a catalog: scan, key, pair and split, once per archive and again where it changed.

In: a `Source` tree. Out: catalog, pairs and private rows of a store; unreadable input is quarantined with its reason.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
