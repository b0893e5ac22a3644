"""Storage of DICOM members:  zips, folders and S3 objects, read in place.

In: a path or URL. Out: a `Source` of members addressed by number, with limits against hostile archives.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
