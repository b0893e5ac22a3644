"""Rows as Arrow tables: schemas, fragments, snapshots and key lookup.

In: records. Out: immutable fragments, and the snapshot that lists them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
