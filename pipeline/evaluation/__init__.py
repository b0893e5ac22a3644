"""Methods scored on held-out pairs in HU.

In: a store, a split and methods. Out: case scores, their summary, and views for the report.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
