"""The frozen MAISI VAE, exact at any size: load, encode, decode, finetune.

In: HU volumes in [-1, 1] or latents. Out: the numbers of one unsplit forward pass, in bounded memory.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
