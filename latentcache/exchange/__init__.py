"""Stores as one Zarr hierarchy, for sharing and cold storage, and back.

In: a store's rows and latents. Out: a folder that any Zarr v3 reader opens, without patient data; and a store again.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
