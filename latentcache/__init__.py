"""What a latent is and where it is kept.

In: arrays with their `Encoding`. Out: checked reads from a store that survives kills; one committing driver.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
