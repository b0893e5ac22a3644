"""Latents, their records, and the store that keeps them.

In: arrays with their `Encoding`. Out: checked reads from a store that survives kills; one committing driver.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
