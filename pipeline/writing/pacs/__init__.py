"""DICOM files to a PACS by C-STORE or STOW-RS.

In: a folder and a destination. Out: one answer per file, with retries.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
