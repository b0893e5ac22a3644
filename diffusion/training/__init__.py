"""The training loop and what surrounds it: launch, distribution, validation, early stopping, estimates.

In: a `TrainConfig` and a store. Out: a run.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
