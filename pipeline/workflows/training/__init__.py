"""Training runs on a store: the diffusion model, the VAE, the refiner and the regression baseline.

In: a store and a job. Out: a run folder and its figures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
