"""Synthetic chest CT with known truth, as volumes and as zipped DICOM in the archive's own layout.

In: a seed. Out: anatomy, its rendering in HU, thick and thin series.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
