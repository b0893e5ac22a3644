"""Volumes to derived DICOM: CT Image, Enhanced CT, Parametric Map, with provenance.

In: a volume in HU and the source's header. Out: files that PACS and referee tools accept.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
