"""DICOM members to series and volumes in HU, with a stated policy for every odd geometry.

In: a `Source`. Out: `Series` with positions and flags, then a `Volume`; what cannot be read comes with its reason.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
