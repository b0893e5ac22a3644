"""The 3-D U-Net and its blocks.

In: noisy latent, condition and time. Out: a prediction of the objective's target.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
