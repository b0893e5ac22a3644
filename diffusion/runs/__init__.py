"""Files that a run leaves: run card, checkpoints, averaged weights, log.

In: a trainer's state. Out: files that resume to the bit.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
