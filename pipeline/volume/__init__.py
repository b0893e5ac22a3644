"""Volumes in HU on a voxel grid, their geometry, windows and resampling.

In: arrays (z, y, x) with a `Geometry` in mm. Out: the same on another grid, or mapped through a `Window` to [-1, 1].
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
