"""The forward operator A of a thick slice, its fit, and data consistency with what was measured.

In: a slice profile and two geometries. Out: A, its transpose, fitted profiles, and volumes that agree with y = A x.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
