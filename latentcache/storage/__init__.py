"""Files by URL: local disk and S3, atomic writes.

In: a path or s3:// URL. Out: a `Location` to read, list and put.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
