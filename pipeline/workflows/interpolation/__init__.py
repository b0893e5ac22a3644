"""One thick study to thin series, by a shipped model or by a training run.

In: a study and a job. Out: DICOM or NIfTI, figures and a page.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
