"""One function per job of a user: interpolate a study, sample, evaluate, train, report.

In: a settings object and a progress callback. Out: a result object. The one room that joins `pipeline` and `diffusion`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
