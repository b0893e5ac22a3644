"""Hospital archives to latents, and latents back to thin-slice DICOM.

In: zips of DICOM, folders or S3 prefixes. Out: a `latentcache.LatentStore`, DICOM series, figures and reports.
Each room below holds one idea; `pipeline.workflows` has one function per job of a user.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
