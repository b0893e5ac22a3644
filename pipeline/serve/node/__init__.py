"""The DICOM node: C-STORE, C-ECHO and storage commitment, bounded against a hostile peer.

In: associations. Out: received instances, durable and recorded before they are acknowledged.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
