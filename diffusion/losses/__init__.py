"""Image losses through the frozen decoder: MS-SSIM and VGG features.

In: predicted and clean latents. Out: a scalar loss on a decoded slab.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
